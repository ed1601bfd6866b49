"""Heat maps of a run: a map per model, by length and depth, all of a picture on the same scale."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas

from longlora.report.findings import Cell, Cells, Findings
from longlora.report.style import FAINT, INK, colour, headed

HEAT = LinearSegmentedColormap.from_list("heat", ["#f6f3ee", "#cfdfeb", "#7fb0d3", "#2f7fba", "#084c82"])
ABREAST = 4
"""Heat maps side by side, at most: more would make the numbers in them too small to read."""
BETWEEN = 0.8
"""Inches between two rows of heat maps."""
BEYOND = "right of the line lies beyond the base's window"


def passkey(findings: Findings) -> Canvas:
    """A heat map per model: share of keys found, by length and depth."""
    cells = {m.label: m.depths for m in findings.models}
    return maps(
        findings,
        cells,
        title="Passkey retrieval by context length and depth",
        subtitle=f"per cent of hidden keys answered exactly ({findings.prompts['passkey']} prompt), {per_cell(cells)}; {BEYOND}",
        across_is="context length in tokens",
        down_is="depth of the key",
    )


def needle(findings: Findings) -> Canvas:
    """A heat map per model: share of needles found, by length and depth."""
    cells = {m.label: m.needles for m in findings.models}
    return maps(
        findings,
        cells,
        title="Needles in held-out text by context length and depth",
        subtitle=f"per cent of sentences answered exactly ({findings.prompts['needle']} prompt), {per_cell(cells)}; {BEYOND}",
        across_is="context length in tokens",
        down_is="depth of the needle",
    )


def questions(findings: Findings) -> Canvas:
    """A heat map per model: F1 of its answers, by length of the document and depth of the evidence."""
    return maps(
        findings,
        {m.label: m.questions for m in findings.models},
        title="Questions on documents by length and depth of the evidence",
        subtitle=f"F1 of the answers, per cent, and below it of how many questions; {BEYOND}",
        across_is="length of the document in tokens, up to",
        down_is="depth of the evidence, up to",
        counted=True,
    )


def per_cell(cells: dict[str, Cells]) -> str:
    """How many trials a share in the maps is of."""
    counts = {cell.trials for rows in cells.values() for row in rows.values() for cell in row.values()}
    return f"{' to '.join(str(of(counts)) for of in (min, max)[: len(counts)])} per cell"


def maps(
    findings: Findings,
    cells: dict[str, Cells],
    *,
    title: str,
    subtitle: str,
    across_is: str,
    down_is: str,
    counted: bool = False,
) -> Canvas:
    """A heat map for every model that has `cells`, all on the same lengths and depths."""
    models = [m for m in findings.models if cells[m.label]]
    lengths_ = sorted({n for m in models for n in cells[m.label]})
    depths = sorted({d for m in models for row in cells[m.label].values() for d in row})
    across = max(1, len(models) if len(models) <= ABREAST else ABREAST - 1)
    down = max(1, -(-len(models) // across))
    width, tall = max(9.0, 1.1 + 0.3 * across + 0.55 * len(lengths_) * across), 0.42 * len(depths)
    canvas = Canvas(figsize=(width, 1.75 + tall + (down - 1) * (tall + BETWEEN)))
    height = canvas.get_figheight()
    headed(canvas, title, subtitle)
    left, gap = 0.72 / width, 0.16 / width
    each = (1 - left - 0.2 / width - gap * (across - 1)) / across
    labels = [m.label for m in findings.models]
    for number, model in enumerate(models):
        row, column = divmod(number, across)
        top = 1.12 + row * (tall + BETWEEN)
        axes = canvas.add_axes((left + column * (each + gap), 1 - (top + tall) / height, each, tall / height))
        heat(axes, cells[model.label], lengths_=lengths_, depths=depths, border=findings.window, counted=counted)
        axes.set_title(model.name, size=10, loc="left", color=colour(model.label, labels), weight="bold", pad=7)
        if column:
            axes.set_yticks([])
        else:
            axes.set_ylabel(down_is)
    canvas.text(0.5, 0.10 / height, across_is, color=FAINT, ha="center", va="bottom")
    return canvas


def heat(
    axes: Axes, cells: Cells, *, lengths_: list[int], depths: list[float], border: int, counted: bool = False
) -> None:
    """One map; `counted` writes the number of trials below each value."""
    nothing = Cell(np.nan, 0)
    grid = [[cells.get(n, {}).get(d, nothing).value for n in lengths_] for d in depths]
    axes.imshow(np.array(grid), cmap=HEAT, vmin=0, vmax=1, aspect="auto")
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths_):
            cell = cells.get(length, {}).get(depth)
            if cell is None:
                continue
            shade = "white" if cell.value > 0.55 else INK if cell.value > 0 else "#a9a398"
            up = 0.14 if counted else 0
            axes.text(column, row - up, f"{100 * cell.value:.0f}", ha="center", va="center", size=9, color=shade)
            if counted:
                axes.text(column, row + 0.26, f"{cell.trials:,}", ha="center", va="center", size=6.5, color=shade)
    axes.set_xticks(range(len(lengths_)), [short(n) for n in lengths_])
    axes.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
    axes.set_xticks(np.arange(0.5, len(lengths_) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(depths) - 1), minor=True)
    axes.grid(which="minor", color="white", lw=2)
    axes.tick_params(which="minor", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    inside = sum(n <= border for n in lengths_)
    if 0 < inside < len(lengths_):
        axes.axvline(inside - 0.5, color="white", lw=5)
        axes.axvline(inside - 0.5, color=INK, lw=1.4, ls=(0, (3, 2)))


def short(length: int) -> str:
    """512, 1k, 1.5k, 100k: a k is 1024, so 2,000 is written out, and is no 2k."""
    return f"{length / 1024:g}k" if length >= 1024 and length % 512 == 0 else f"{length:,}"
