"""The tables, ours beside the paper's, and whether the order of the rows agrees; and what brings retrieval, at what cost.

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

CLEAR = 0.01
"""The smallest relative difference of the paper that is worth comparing."""
AT_MOST = 1.1
"""How much more than S2-Attn alone a recipe may cost to be called cheap."""


@dataclass(frozen=True)
class Row:
    arm: str
    says: str
    paper: float | None
    nats: np.ndarray
    """S: log perplexity at the target length, per seed."""
    keys: np.ndarray
    """S: share of the passkeys that were found at the target length, per seed."""
    leak: float
    """Training loss less loss at evaluation, mean over the seeds: far below zero, the training saw what it should not."""
    seconds: float
    """Of the processor, per step: the least of the seeds, which other work on the machine has disturbed the least."""

    def perplexity(self) -> tuple[float, float]:
        """Mean over the seeds (geometric), and half of its 95 % interval."""
        mean = float(np.exp(self.nats.mean()))
        return mean, mean * half_width(self.nats)

    def found(self) -> tuple[float, float]:
        """Per cent of the passkeys, mean over the seeds, and half of its 95 % interval."""
        return 100 * float(self.keys.mean()), 100 * half_width(self.keys)


def half_width(values_S: np.ndarray) -> float:
    return float(stats.t.ppf(0.975, len(values_S) - 1) * values_S.std(ddof=1) / np.sqrt(len(values_S)))


def rows_of(table: dict[str, Any], results: Path) -> list[Row]:
    """Raises ValueError if an arm has fewer than two results."""
    folder = results / table["study"]
    rows = []
    for said in table["rows"]:
        found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{said['arm']}-[0-9].json"))]
        if len(found) < 2:
            raise ValueError(f"{said['arm']} has {len(found)} results in {folder}; an interval needs two seeds or more")
        target = max(found[0]["perplexity"], key=int)
        nats_S = np.log([one["perplexity"][target] for one in found])
        rows.append(
            Row(
                **said,
                nats=nats_S,
                keys=np.array([one["passkey"][target] for one in found]),
                leak=float(np.mean([one["loss"] for one in found]) - nats_S.mean()),
                seconds=min(one["seconds_per_step"] for one in found),
            )
        )
    return rows


def order(rows: list[Row]) -> tuple[list[str], list[str], int]:
    """Pairs in which ours disagrees with the paper, and pairs that stay open, in words; and how many pairs are clear there."""
    against, open_, count = [], [], 0
    for one, other in itertools.combinations(rows, 2):
        assert one.paper and other.paper
        better, worse = (one, other) if one.paper <= other.paper else (other, one)
        if max(one.paper, other.paper) / min(one.paper, other.paper) - 1 < CLEAR:
            continue
        count += 1
        gap_S = worse.nats - better.nats
        if abs(gap_S.mean()) <= half_width(gap_S):
            open_.append(f"{better.says} / {worse.says}")
        elif gap_S.mean() < 0:
            against.append(f"{worse.says} is better than {better.says} here")
    return against, open_, count


def paper_table(table: dict[str, Any], rows: list[Row]) -> list[str]:
    against, open_, count = order(rows)
    return [
        f"| | ours | theirs, {table['paper']} | training less evaluation |",
        "| --- | ---: | ---: | ---: |",
        *[
            f"| {r.says} | {r.perplexity()[0]:.3f} ± {r.perplexity()[1]:.3f} | {r.paper} | {r.leak:+.2f} |"
            for r in rows
        ],
        "",
        f"Of {count} pairs 1 % or more apart in the paper, {count - len(against) - len(open_)} are in the same order here.",
        *[f"- Not so: {one}." for one in against],
        *[f"- Open, within the seeds' interval: {one}." for one in open_],
    ]


def retrieval_table(rows: list[Row]) -> list[str]:
    """Against full attention throughout (retrieval, perplexity) and S2-Attn throughout (cost)."""
    full, bare = (next(row for row in rows if row.arm == name) for name in ("full-attention", "s2-only"))
    lines = ["| | perplexity | passkeys found | processor time of a step |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        mean, width = row.perplexity()
        found, spread = row.found()
        lines.append(
            f"| {row.says} | {mean:.3f} ± {width:.3f} | {found:.0f} ± {spread:.0f} % | {row.seconds / bare.seconds:.2f} |"
        )
    lines.append("")
    for row in rows:
        if row is not full:
            gap_S = row.keys - full.keys
            is_clear = abs(gap_S.mean()) > half_width(gap_S)
            verdict = "clear of the seeds' noise" if is_clear else "within the seeds' noise"
            cheap = "" if row.seconds <= AT_MOST * bare.seconds else f", but costs more than {AT_MOST} of S2-Attn"
            lines.append(
                f"- {row.says}: {100 * gap_S.mean():+.0f} points from full attention throughout, {verdict}{cheap}."
            )
    return lines


HEADS = {
    "paper": """# The paper's tables, small

The demo's base, 512 to 2,048 tokens by linear interpolation; perplexity of held-out text at 2,048 in full attention, geometric
mean and 95 % interval over the seeds. Theirs: Llama 2 7B. Orders are compared, not sizes. Training less evaluation: how far
the last training loss lies from the loss at evaluation, in nats; far below zero, the training saw what it should not.
""",
    "retrieval": """# What brings retrieval, and at what cost

The demo, 512 to 4,096 tokens by YaRN, and one thing changed. Perplexity and passkeys (forty per seed) at 4,096, with 95 %
intervals over the seeds; time of the processor against S2-Attn throughout.
""",
}


def page(study: str, tables: list[tuple[dict[str, Any], list[Row]]]) -> str:
    lines = [HEADS[study]]
    for table, rows in tables:
        lines += [f"## {table['title']}", ""]
        lines += [*(paper_table(table, rows) if table["paper"] else retrieval_table(rows)), ""]
    return "\n".join(lines) + "\nMade by `make experiments`.\n"


def draw(tables: list[tuple[dict[str, Any], list[Row]]], file: Path) -> None:
    """Perplexities of each table, and the passkeys where the table is about them."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(table["title"], rows, "perplexity") for table, rows in tables]
    panels += [("", rows, "passkeys found, %") for table, rows in tables if not table["paper"]]
    figure, axes = plt.subplots(
        -(-len(panels) // 2), 2, figsize=(13, 4.3 * -(-len(panels) // 2)), layout="constrained", squeeze=False
    )
    for axis, (title, rows, what) in zip(axes.flat, panels, strict=False):
        places = range(len(rows), 0, -1)
        values = [row.found() if what.startswith("passkeys") else row.perplexity() for row in rows]
        means, widths = zip(*values, strict=True)
        axis.errorbar(means, places, xerr=widths, fmt="o", color="#0b5cad", capsize=3, lw=1.2)
        axis.set_yticks(list(places), [row.says for row in rows])
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel(f"{what} (95 % over seeds)", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e3e6ea")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main(said: Path, study: str, results: Path, text: Path, picture: Path) -> None:
    tables = [(table, rows_of(table, results)) for table in read_params(said)["tables"] if table["study"] == study]
    text.write_text(page(study, tables))
    draw(tables, picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
