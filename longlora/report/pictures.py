"""The pictures of a run. One colour per model throughout, lengths on a scale of doublings, lines labelled where they end.

The same findings give the same bytes: no dates, no version stamps, matplotlib's own font.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from longlora.report.findings import NAMES, Figure, Findings
from longlora.report.findings import lengths as by_length
from longlora.report.heat import needle, passkey, questions
from longlora.report.style import COLOURS, FAINT, STYLE, colour, headed

DPI = 160


def draw(findings: Findings, *, out: Path) -> None:
    """Write history.png to the folder `out`, and perplexity.png, passkey.png, by_yarn.png, positions.png, needle.png and
    questions.png where those were scored."""
    with mpl.rc_context(STYLE):
        save(history(findings), out / "history.png")
        if findings.lengths():
            save(perplexity(findings), out / "perplexity.png")
        if any(m.depths for m in findings.models):
            save(passkey(findings), out / "passkey.png")
        if findings.model("extended").by_yarn:
            save(by_yarn(findings), out / "by_yarn.png")
        if any(m.positions for m in findings.models):
            save(positions(findings), out / "positions.png")
        if any(m.needles for m in findings.models):
            save(needle(findings), out / "needle.png")
        if any(m.questions for m in findings.models):
            save(questions(findings), out / "questions.png")


def save(canvas: Canvas, file: Path) -> None:
    FigureCanvasAgg(canvas)
    canvas.savefig(file, dpi=DPI, facecolor="white", metadata={"Software": None})


def perplexity(findings: Findings) -> Canvas:
    """Perplexity of the same tokens against the length of the window before them, a line per model, both scales logarithmic."""
    canvas = Canvas(figsize=(9, 5))
    axes = canvas.add_axes((0.075, 0.12, 0.705, 0.70))
    headed(
        canvas,
        "Perplexity by context length",
        "the same last tokens of held-out documents, only the window before them grows; logarithmic scale, lower is better",
    )
    labels = [m.label for m in findings.models]
    ends: list[tuple[float, str, str]] = []
    for model in findings.models:
        scored = by_length(model.perplexity)
        points = [(n, f) for n, f in scored.items() if f.value is not None]
        if not points:
            continue
        hue, ours = colour(model.label, labels), model.label == "extended"
        values = [f.value or 0.0 for _, f in points]
        axes.plot([n for n, _ in points], values, color=hue, solid_capstyle="round", **marked(ours))
        ends.append((values[-1], f"{last(scored)}  {model.name}", hue))
    lengths(axes, findings.lengths())
    window(axes, findings)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # A flat line must look flat: the scale spans at least a doubling.
    middle, half = (low * high) ** 0.5, max((high / low) ** 0.5, 2**0.5)
    axes.set_ylim(middle / half, middle * half)
    numbers(axes)
    label_ends(axes, ends)
    axes.set_xlabel("context length in tokens")
    return canvas


def marked(ours: bool) -> dict[str, Any]:
    """How a line with a point per length is drawn: ours stands out."""
    return {
        "lw": 3 if ours else 1.8, "marker": "o", "ms": 6 if ours else 4.5, "mec": "white", "mew": 1.2, "zorder": 4 if ours else 3,
    }  # fmt: skip


def by_yarn(findings: Findings) -> Canvas:
    """Perplexity relative to untrained YaRN, by place, with its interval: the extended model's, and those that end on its scale."""
    canvas = Canvas(figsize=(9, 3.8))
    axes = canvas.add_axes((0.075, 0.155, 0.705, 0.59))
    headed(
        canvas,
        "Perplexity relative to untrained YaRN",
        "the ratio over the same tokens of held-out documents, bars: 95 % by the spread between documents; below 1 is better",
    )
    ratios = findings.model("extended").by_yarn
    told = [end for f in ratios.values() for end in (f.value, f.low, f.high) if end is not None]
    reach = max([0.01, *(1.6 * abs(end - 1) for end in told)])
    labels = [m.label for m in findings.models]
    axes.axhline(1, color=COLOURS["yarn"], lw=1.8)
    ends = [(1.0, f"1  {NAMES['yarn']}", COLOURS["yarn"])]
    for model in findings.models:
        values, low, high = np.array([(f.value, f.low, f.high) for f in model.by_yarn.values()], float).reshape(-1, 3).T
        if model.label == "yarn" or not len(values) or not abs(values[-1] - 1) < reach:
            continue
        hue, ours = colour(model.label, labels), model.label == "extended"
        bars = [values - low, high - values]
        axes.errorbar(list(model.by_yarn), values, yerr=bars, color=hue, elinewidth=1.4, capsize=4, **marked(ours))
        ends.append((values[-1], f"{values[-1]:.3f}  {model.name}", hue))
    lengths(axes, sorted(ratios))
    window(axes, findings)
    axes.set_ylim(max(0, 1 - reach), 1 + reach)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)  # as many digits as tell the ticks apart
    label_ends(axes, ends)
    axes.set_xlabel("context length in tokens")
    return canvas


def lengths(axes: Axes, values: list[int]) -> None:
    """The x axis: one doubling is one step."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{n:,}" for n in values])
    axes.minorticks_off()
    axes.set_xlim(values[0] / 2**0.2, values[-1] * 2**0.2)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def window(axes: Axes, findings: Findings) -> None:
    """Mark what lies beyond the base's window."""
    left, right = axes.get_xlim()
    if not left < findings.window < right:
        return
    axes.axvspan(findings.window, right, color="#f4f7fa", zorder=0, lw=0)
    axes.axvline(findings.window, color=FAINT, lw=1, ls=(0, (3, 3)), zorder=1)
    axes.text(
        findings.window, 1.015, f"base window {findings.window:,}", size=8.5, color=FAINT, ha="left", va="bottom",
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip


def numbers(axes: Axes) -> None:
    """Ticks of a logarithmic y axis at 1, 2, 5 times powers of ten (and between, where the range is small), as plain numbers."""
    low, high = axes.get_ylim()
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(np.arange(1, 10, 0.5)), tuple(np.arange(1, 10, 0.2))):
        ticks = [s * 10.0**p for p in range(-1, 10) for s in steps if low <= s * 10.0**p <= high]
        if len(ticks) >= 4:
            break
    axes.minorticks_off()
    axes.set_yticks(ticks, [f"{t:,.3g}" if t < 1000 else f"{t:,.0f}" for t in ticks])


def last(scored: dict[int, Figure]) -> str:
    """What stands beside the end of a line: NaN, where it ends before what is no number."""
    value = scored[max(scored)].value
    return "NaN" if value is None else f"{value:.3g}"


def label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each line's last value and name beside its end, pushed apart where they would touch."""
    gap, heights = 0.217 / axes.bbox.height * axes.figure.dpi, []  # inches, as a share
    scaled = axes.transScale + axes.transLimits
    wanted = sorted((float(scaled.transform((1, v))[1]), text, hue) for v, text, hue in ends)
    for height, text, hue in wanted:
        heights.append([max(height, heights[-1][0] + gap) if heights else height, text, hue])
    for over, entry in enumerate(reversed(heights)):
        entry[0] = min(entry[0], 1.0 - over * gap)
    for height, text, hue in heights:
        value, _, name = text.partition("  ")
        axes.text(1.02, height, value, color=hue, weight="bold", size=9.5, va="center", transform=axes.transAxes)
        axes.text(1.095, height, name, color=hue, size=9.5, va="center", transform=axes.transAxes)


def positions(findings: Findings) -> Canvas:
    """Nats per token inside the longest window, a line per model over the middle of each band of positions."""
    canvas = Canvas(figsize=(9, 4.4))
    axes = canvas.add_axes((0.075, 0.13, 0.705, 0.67))
    headed(
        canvas,
        "Nats per token by position in the context",
        "inside one long window of held-out documents; where a line rises, more context does harm; logarithmic scale",
    )
    labels, ends = [m.label for m in findings.models], []
    for model in findings.models:
        points = [(end, f.value) for end, f in model.positions.items() if f.value is not None]
        if not points:
            continue
        hue, half = colour(model.label, labels), min(model.positions) / 2
        values = [value for _, value in points]
        axes.plot(
            [end - half for end, _ in points], values, color=hue, lw=3 if model.label == "extended" else 1.8,
            zorder=4 if model.label == "extended" else 3, solid_capstyle="round",
        )  # fmt: skip
        ends.append((values[-1], f"{last(model.positions)}  {model.name}", hue))
    axes.set_xlim(0, max(end for m in findings.models for end in m.positions))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    window(axes, findings)
    axes.set_yscale("log")
    numbers(axes)
    label_ends(axes, ends)
    axes.set_xlabel("position in tokens")
    return canvas


def history(findings: Findings) -> Canvas:
    """The training loss by step, as logged and smoothed."""
    canvas = Canvas(figsize=(9, 3.6))
    axes = canvas.add_axes((0.075, 0.15, 0.705, 0.62))
    headed(canvas, "Training loss", f"nats per token, {learnt(findings.recipe['fit'])}; the thick line is smoothed")
    steps = [row["step"] for row in findings.history]
    losses = [row["loss"] for row in findings.history]
    hue = COLOURS["extended"]
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel("step")
    if not steps:
        return canvas
    smooth = smoothed(losses)
    axes.plot(steps, losses, color=hue, lw=1, alpha=0.35)
    axes.plot(steps, smooth, color=hue, lw=2.6, solid_capstyle="round")
    axes.set_xlim(0, steps[-1] * 1.02)
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    height = (smooth[-1] - low) / (high - low)
    axes.text(1.02, height, f"{smooth[-1]:.3g}", color=hue, weight="bold", va="center", transform=axes.transAxes)
    axes.text(1.095, height, f"after {steps[-1]:,.0f} steps", color=hue, va="center", transform=axes.transAxes)
    return canvas


def learnt(fit: dict[str, Any]) -> str:
    """What the loss is of."""
    recall, pairs = fit["recall_share"], fit["pairs_share"]
    shares = {"texts": 1 - recall - pairs, "recall exercises": recall, "answers to questions": pairs}
    *others, last = (name for name, share in shares.items() if share > 1e-9)
    return f"{', '.join(others)} and {last} together" if others else last


def smoothed(values: list[float]) -> list[float]:
    """An exponential mean over about a tenth of the values, without bias at its start."""
    weight = min(0.97, max(0.0, 1 - 10 / len(values)))
    total, share, result = 0.0, 0.0, []
    for value in values:
        total, share = weight * total + (1 - weight) * value, weight * share + (1 - weight)
        result.append(total / share)
    return result
