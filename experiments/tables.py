"""The tables, ours beside the paper's, and whether the order of the rows agrees; and what brings retrieval, at what cost.

Sizes cannot agree (another model, another text, 2,048 tokens), orders may. Two rows are compared where the paper sees a
difference of at least one per cent: ours agrees or disagrees if the paired difference over the seeds is clear of zero (95 %,
Student's t), and is open else.
"""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from longlora.section import read_params

CLEAR = 0.01
"""The smallest relative difference of the paper that is worth comparing."""
NOTHING = "none"


@dataclass(frozen=True)
class Row:
    arm: str
    says: str
    paper: float | None
    yardstick: str
    """The arm of full attention that it is measured by: of the same data."""
    nats: np.ndarray
    """S: log perplexity at the target length, per seed."""
    keys: np.ndarray
    """S: share of the passkeys that were found at the target length, per seed."""
    far: np.ndarray
    """S: loss of an answer whose fact lies more than a group back, in nats, per seed."""
    near_right: np.ndarray
    """S: share of the answers read right whose fact lies at most a group back, per seed."""
    far_right: np.ndarray
    """S: the same, more than a group back."""
    leak: float | None
    """Training loss less loss at evaluation, mean over the seeds: lower than its neighbours', training saw what it should not."""
    seconds: np.ndarray | None
    """S: of the processor, per step; nothing is trained without."""

    def perplexity(self) -> tuple[float, float]:
        """Mean over the seeds (geometric), and half of its 95 % interval."""
        mean = float(np.exp(self.nats.mean()))
        return mean, mean * half_width(self.nats)


def spread(values_S: np.ndarray, times: float = 1) -> tuple[float, float]:
    """Mean over the seeds, and half of its 95 % interval."""
    return times * float(values_S.mean()), times * half_width(values_S)


def half_width(values_S: np.ndarray) -> float:
    return float(stats.t.ppf(0.975, len(values_S) - 1) * values_S.std(ddof=1) / np.sqrt(len(values_S)))


def rows_of(table: dict[str, Any], results: Path) -> list[Row]:
    """Raises ValueError if an arm has fewer than two results, or others than its neighbours: they are compared seed by seed."""
    folder = results / table["study"]
    rows = []
    for said in table["rows"]:
        found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{said['arm']}-[0-9].json"))]
        if len(found) < 2:
            raise ValueError(f"{said['arm']} has {len(found)} results in {folder}; an interval needs two seeds or more")
        if rows and len(found) != len(rows[0].nats):
            raise ValueError(f"{said['arm']} has {len(found)} results in {folder}, {rows[0].arm} {len(rows[0].nats)}")
        target = max(found[0]["perplexity"], key=int)
        nats_S = np.log([one["perplexity"][target] for one in found])
        rows.append(
            Row(
                **{"yardstick": "full-attention", **said},
                nats=nats_S,
                keys=np.array([one["passkey"][target] for one in found]),
                far=np.array([one["answers"]["far"]["nats"] for one in found]),
                near_right=np.array([one["answers"]["near"]["right"] for one in found]),
                far_right=np.array([one["answers"]["far"]["right"] for one in found]),
                leak=float(np.mean([one["loss"] for one in found]) - nats_S.mean()) if "loss" in found[0] else None,
                seconds=np.array([one["seconds_per_step"] for one in found]) if "loss" in found[0] else None,
            )
        )
    return rows


def by_perplexity(row: Row) -> np.ndarray:
    return row.nats


def by_answers(row: Row) -> np.ndarray:
    return row.far


SIZE: dict[Callable[[Row], np.ndarray], Callable[[float], str]] = {
    by_perplexity: lambda nats: f"{np.expm1(nats):.1%}".replace("%", " %"),
    by_answers: lambda nats: f"{nats:.2f} nats",
}
"""A difference of such losses, in words."""


def order(rows: list[Row], losses: Callable[[Row], np.ndarray]) -> tuple[list[str], list[str], int]:
    """Pairs in which the order of our `losses` (S) disagrees with the paper's perplexities, and pairs that stay open, in words;
    and how many pairs are clear there."""
    against, open_, count = [], [], 0
    theirs = [(row.paper, row) for row in rows if row.paper is not None]
    for (_, better), (_, worse) in itertools.combinations(sorted(theirs, key=lambda pair: pair[0]), 2):
        if worse.paper / better.paper - 1 < CLEAR:
            continue
        count += 1
        gap_S = losses(worse) - losses(better)
        if abs(gap_S.mean()) <= half_width(gap_S):
            open_.append(f"{better.says} / {worse.says}")
        elif gap_S.mean() < 0:
            against.append(f"{worse.says} is better than {better.says} here, by {SIZE[losses](-gap_S.mean())}")
    return against, open_, count


def agreement(rows: list[Row], measure: str, losses: Callable[[Row], np.ndarray]) -> list[str]:
    against, open_, count = order(rows, losses)
    kept = count - len(against) - len(open_)
    return [
        f"By {measure}, {kept} of the {count} pairs of rows that are 1 % or more apart in the paper are in the same order here.",
        *[f"- The other way round: {one}." for one in against],
        *([f"- Undecided, within the seeds' interval: {len(open_)} ({'; '.join(open_)})."] if open_ else []),
    ]


def paper_table(table: dict[str, Any], rows: list[Row]) -> list[str]:
    lines = [
        f"| | theirs: perplexity, {table['paper']} | ours: perplexity "
        "| loss of a far answer | far answers right | training less evaluation |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        perplexity, far, right = row.perplexity(), spread(row.far), spread(row.far_right, 100)
        theirs, leak = row.paper or NOTHING, NOTHING if row.leak is None else f"{row.leak:+.2f}"
        lines.append(
            f"| {row.says} | {theirs} | {perplexity[0]:.3f} ± {perplexity[1]:.3f} | {far[0]:.2f} ± {far[1]:.2f} | "
            f"{right[0]:.0f} ± {right[1]:.0f} % | {leak} |"
        )
    if order(rows, by_perplexity)[2] == 0:
        return [*lines, "", "No two rows are 1 % or more apart in the paper, so no order is compared."]
    return [*lines, "", *agreement(rows, "perplexity", by_perplexity), "", *agreement(rows, "far answers", by_answers)]


def in_all(tables: list[list[Row]]) -> str:
    """How many pairs of all `tables` are in the paper's order, and how many the other way round."""
    said = []
    for measure, losses in (("perplexity", by_perplexity), ("far answers", by_answers)):
        found = [order(rows, losses) for rows in tables]
        against, open_, count = (sum(each) for each in zip(*((len(a), len(o), n) for a, o, n in found), strict=True))
        said.append(f"by {measure} {count - against - open_} of {count} pairs, and {against} the other way round")
    return f"Over all tables, in the paper's order: {'; '.join(said)}. The rest is undecided."


def cost(row: Row, bare: Row) -> tuple[float, float] | None:
    """Processor time of a step over that of `bare`, seed by seed: mean, half of its 95 % interval. None: nothing was trained."""
    assert bare.seconds is not None
    return None if row.seconds is None else spread(row.seconds / bare.seconds)


def retrieval_table(rows: list[Row]) -> list[str]:
    """Against S2-Attn throughout, and how much of the way from there to full attention throughout is made."""
    of = {row.arm: row for row in rows}
    bare = of["s2-only"]
    lines = [
        "| | perplexity | passkeys found | near answers right | far answers right "
        "| loss of a far answer | processor time of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        shares = [spread(values_S, 100) for values_S in (row.keys, row.near_right, row.far_right)]
        mean, width = row.perplexity()
        far, far_width = spread(row.far)
        time = cost(row, bare)
        lines.append(
            f"| {row.says} | {mean:.3f} ± {width:.3f} | "
            + " | ".join(f"{share:.0f} ± {half:.0f} %" for share, half in shares)
            + f" | {far:.2f} ± {far_width:.2f} | {f'{time[0]:.2f} ± {time[1]:.2f}' if time else NOTHING} |"
        )
    lines += ["", "Loss of a far answer, minus that under S2-Attn throughout:", ""]
    for row in rows:
        if row is not bare:
            gap, width = spread(row.far - bare.far)
            verdict = "clear of the seeds' noise" if abs(gap) > width else "within the seeds' noise"
            way = gap / (of[row.yardstick].far - bare.far).mean()
            made = (
                f", {way:.0%} of the way to full attention".replace("%", " %") if abs(gap) > width and gap < 0 else ""
            )
            lines.append(f"- {row.says}: {gap:+.2f} ± {width:.2f} nats, {verdict}{made}.")
    return lines


MADE = (
    "Made by `make experiments` from the files in results/, which `cd experiments && dvc repro --force` trains anew.\n"
)
HEADS = {
    "paper": """# The paper's tables, small

Do the paper's comparisons come out the same on a small model? The order of the rows is compared, not the size of the figures.

- **Ours**: the demo's base, 512 to 2,048 tokens under NTK-aware scaling; measured in full attention at 2,048. Mean and 95 %
  interval over the seeds.
- **Theirs**: Llama 2 7B, linear interpolation.
- **A far answer** answers a question on a fact that lies more than a group (512 tokens) back.
- **Training less evaluation**: the last training loss minus the loss at evaluation, in nats; compare it between the rows of a
  table.
- Intervals cover only the training's seeds, because all models are asked the same questions and read the same places, of six
  documents. Each pair is decided by itself at 95 %, and the tables share rows.
""",
    "retrieval": """# What brings retrieval, and at what cost

The paper's recipe with one thing changed at a time, on the demo's base, 512 to 2,048 tokens under NTK-aware scaling. Measured at
2,048 tokens, with 95 % intervals over the seeds:

- perplexity, and passkeys (forty per seed);
- answers to questions on a fact: *near*, at most a group (512 tokens) back; *far*, more than that;
- processor time of a step, relative to S2-Attn throughout, seed by seed. The runs were not made side by side. By steps
  [measured in turns](cost.md) full attention takes 1.6 times S2-Attn's time, so a share s of such steps costs about 1 + 0.6 s.
  Where all groups see the first four tokens, a mask is used, and the time means nothing.

All models are asked the same questions, on six documents, so the intervals do not cover other documents. "The way to full
attention" ends at the run in full attention with as many recall questions; if there is none, at "full attention throughout".
""",
}


def page(study: str, tables: list[tuple[dict[str, Any], list[Row]]]) -> str:
    lines = [HEADS[study]]
    if study == "paper":
        lines += [in_all([rows for _, rows in tables]), ""]
    for table, rows in tables:
        lines += [f"## {table['title']}", "", *([table["note"], ""] if "note" in table else [])]
        lines += [*(paper_table(table, rows) if table["paper"] else retrieval_table(rows)), ""]
    return "\n".join([*lines, MADE])


def draw(tables: list[tuple[dict[str, Any], list[Row]]], file: Path) -> None:
    """A line per table: perplexities on the left, the answers on the right."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(rows) + 2 for _, rows in tables]
    figure, axes = plt.subplots(
        len(tables),
        2,
        figsize=(13, 0.36 * sum(heights) + 0.5),
        layout="constrained",
        squeeze=False,
        sharey="row",
        height_ratios=heights,
    )
    for (left, right), (table, rows) in zip(axes, tables, strict=True):
        places = range(len(rows), 0, -1)
        left.set_yticks(list(places), [row.says for row in rows])
        left.set_title(table["title"], loc="left", fontsize=10, fontweight="bold")
        for axis, what, values in (
            (left, "perplexity", [row.perplexity() for row in rows]),
            (right, "loss of an answer more than a group back, nats", [spread(row.far) for row in rows]),
        ):
            means, widths = zip(*values, strict=True)
            axis.errorbar(means, places, xerr=widths, fmt="o", color="#0b5cad", capsize=3, lw=1.2)
            axis.set_xlabel(f"{what} (95 % over seeds)", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x", color="#e3e6ea")
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main(said: Path, study: str, results: Path, text: Path, picture: Path) -> None:
    tables = [(table, rows_of(table, results)) for table in read_params(said)["tables"] if table["study"] == study]
    text.write_text(page(study, tables))
    draw(tables, picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
