"""The tables, ours beside the paper's, and whether the order of the rows agrees.

Sizes can not agree (another model, another text, 2,048 tokens), orders may. Two rows are compared where the paper sees a
difference of at least one per cent: ours agrees or disagrees if the paired difference over the seeds is clear of zero (95 %,
Student's t), and is open else.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from longlora.section import read_params

LENGTH = "2048"
CLEAR = 0.01
"""The smallest relative difference of the paper that is worth comparing."""


@dataclass(frozen=True)
class Row:
    arm: str
    says: str
    paper: float
    nats: np.ndarray
    """S: log perplexity at the target length, per seed."""
    leak: float
    """Training loss less loss at evaluation, mean over the seeds: far below zero, the training saw what it should not."""

    def perplexity(self) -> tuple[float, float]:
        """Mean over the seeds (geometric), and half of its 95 % interval."""
        mean = float(np.exp(self.nats.mean()))
        return mean, mean * half_width(self.nats)


def half_width(values_S: np.ndarray) -> float:
    return float(stats.t.ppf(0.975, len(values_S) - 1) * values_S.std(ddof=1) / np.sqrt(len(values_S)))


def rows_of(table: dict[str, Any], results: Path) -> list[Row]:
    rows = []
    for said in table["rows"]:
        found = [json.loads(file.read_text()) for file in sorted(results.glob(f"{said['arm']}-[0-9].json"))]
        if len(found) < 2:
            raise ValueError(
                f"{said['arm']} has {len(found)} results in {results}; an interval needs two seeds or more"
            )
        nats_S = np.log([one["perplexity"][LENGTH] for one in found])
        rows.append(Row(**said, nats=nats_S, leak=float(np.mean([one["loss"] for one in found]) - nats_S.mean())))
    return rows


def order(rows: list[Row]) -> tuple[list[str], list[str]]:
    """Pairs in which ours disagrees with the paper, and pairs that stay open, in words; the other clear pairs agree."""
    against, open_ = [], []
    for one, other in itertools.combinations(rows, 2):
        better, worse = sorted((one, other), key=lambda row: row.paper)
        if worse.paper / better.paper - 1 < CLEAR:
            continue
        gap_S = worse.nats - better.nats
        if abs(gap_S.mean()) <= half_width(gap_S):
            open_.append(f"{better.says} / {worse.says}")
        elif gap_S.mean() < 0:
            against.append(f"{worse.says} is better than {better.says} here")
    return against, open_


def pairs(rows: list[Row]) -> int:
    return sum(abs(np.log(a.paper / b.paper)) >= np.log1p(CLEAR) for a, b in itertools.combinations(rows, 2))


def page(tables: list[tuple[dict[str, Any], list[Row]]]) -> str:
    lines = [
        "# The paper's tables, small",
        "",
        "Made by `make experiments`. Ours: the demo's base, 512 to 2,048 tokens by linear interpolation, perplexity of held-out",
        "text at 2,048 in full attention, geometric mean and 95 % interval over the seeds. Theirs: Llama 2 7B. Orders are",
        "compared, not sizes. Training less evaluation: how far the last training loss lies from the loss at evaluation, in nats.",
    ]
    for table, rows in tables:
        against, open_ = order(rows)
        lines += ["", f"## {table['title']}", "", f"| | ours | theirs, {table['paper']} | training less evaluation |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        lines += [
            f"| {r.says} | {r.perplexity()[0]:.3f} ± {r.perplexity()[1]:.3f} | {r.paper} | {r.leak:+.2f} |"
            for r in rows
        ]
        count = pairs(rows)
        agree = count - len(against) - len(open_)
        lines += ["", f"Of {count} pairs that differ by 1 % or more in the paper, {agree} are in the same order here."]
        lines += [f"- Not so: {one}." for one in against]
        lines += [f"- Open, within the seeds' interval: {one}." for one in open_]
    return "\n".join(lines) + "\n"


def draw(tables: list[tuple[dict[str, Any], list[Row]]], file: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2
    figure, axes = plt.subplots(-(-len(tables) // columns), columns, figsize=(13, 10), layout="constrained")
    for axis, (table, rows) in zip(axes.flat, tables, strict=False):
        places = range(len(rows), 0, -1)
        values = [row.perplexity() for row in rows]
        axis.errorbar(
            [v for v, _ in values], places, xerr=[w for _, w in values], fmt="o", color="#0b5cad", capsize=3, lw=1.2
        )
        axis.set_yticks(list(places), [row.says for row in rows])
        axis.set_title(table["title"], loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel(f"perplexity at {int(LENGTH):,} tokens, 95 % interval over seeds", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e3e6ea")
    for axis in axes.flat[len(tables) :]:
        axis.remove()
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main(said: Path, results: Path, text: Path, picture: Path) -> None:
    tables = [(table, rows_of(table, results)) for table in read_params(said)["tables"]]
    text.write_text(page(tables))
    draw(tables, picture)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
