"""The picture of the benchmarks, from their JSON alone: `python -m benchmarks.picture docs/bench.json docs/bench.png`."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.memory import line
from longlora.report.style import FAINT, INK, STYLE

OURS, FULL, AUTHORS = "#0b6bb0", "#4a5560", "#c98a1b"
COLOURS = {"full": FULL, "roll_and_mask": AUTHORS, "s2": OURS, "ours": OURS, "plain": FULL, "chunked": OURS}
NAMES = {"full": "full SDPA", "roll_and_mask": "roll and mask", "s2": "S2-Attn", "ours": "ours", "plain": "plain"}


def draw(results: dict[str, Any], file: Path) -> None:
    """Six panels; one whose part was not measured says so."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3).flat
        parts = {name: list(cases.values()) for name, cases in results["parts"].items()}
        panels = (
            ("attention", "Attention alone: time of S2-Attn / the other", alone),
            ("step", "Training step: time with S2-Attn / the other", ratios),
            ("memory", "Peak memory of a training step", growth),
            ("attention", "Peak memory of attention alone, float32", peaks),
            ("loss", "Chunked loss, relative to the plain loss", losses),
            ("preparation", "What the pipeline adds", overheads),
        )
        for ax, (part, title, panel) in zip(axes, panels, strict=True):
            ax.set_title(title, loc="left", fontsize=11, color=INK)
            if part in parts:
                panel(ax, parts[part] if panel is not overheads else [*parts[part], *parts.get("command", [])])
            else:
                ax.text(0.5, 0.5, "not measured", ha="center", va="center", color=FAINT, transform=ax.transAxes)
        m = results["machine"]
        threads = f"{m['threads']} thread{'s' if m['threads'] > 1 else ''}"
        figure.supxlabel(
            f"{m['processor']}, {threads}; torch {m['torch']}, transformers {m['transformers']}. "
            "Points: medians over interleaved turns; bars: smallest to largest.",
            fontsize=9,
            color=FAINT,
        )
        figure.savefig(file, dpi=110, metadata={"Software": None})


def by_length(ax: Axes, lengths: list[int], *, what: str) -> None:
    """Lengths on a scale of doublings."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("tokens")
    ax.set_ylabel(what)
    ax.grid(axis="y")


def ratios(ax: Axes, rows: list[dict[str, Any]]) -> None:
    styles = {"float32": "-", "bfloat16": "--"}
    for method in ("full", "roll_and_mask"):
        for dtype, style in styles.items():
            points = [
                (r["length"], r["methods"][method]) for r in rows if r["dtype"] == dtype and method in r["methods"]
            ]
            if points:
                middle = [p["ratio"] for _, p in points]
                below = [p["ratio"] - p["interval"][0] for _, p in points]
                above = [p["interval"][1] - p["ratio"] for _, p in points]
                x = [n for n, _ in points]
                label = f"/ {NAMES[method]}, {dtype}"
                colour = COLOURS[method]
                ax.errorbar(x, middle, [below, above], color=colour, ls=style, marker="o", ms=4, capsize=2, label=label)
    ax.axhline(1, color=FAINT, lw=0.8)
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])  # room for the legend above the points
    by_length(ax, sorted({r["length"] for r in rows}), what="ratio of times")
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", columnspacing=1.0, handlelength=1.6)


def alone(ax: Axes, rows: list[dict[str, Any]]) -> None:
    ratios(ax, rows)
    ax.axhline(0.25, color=OURS, lw=0.8, ls=":")
    ax.text(0.01, 0.24, "arithmetic: 1/4", transform=ax.get_yaxis_transform(), color=OURS, fontsize=8, va="top")


def growth(ax: Axes, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda r: r["length"])
    colours = {**COLOURS, "tiled": "#3d8a62"}
    words = {"ours": "ours", "plain": "plain, whole logits", "tiled": "ours, tiled feed-forward"}
    for method in rows[0]["peak_mb"]:
        x, y = [r["length"] / 1000 for r in rows], [r["peak_mb"][method] for r in rows]
        slope, _, _ = line(rows, method)
        ax.plot(
            x, y, color=colours[method], marker="o", ms=4, label=f"{words[method]}: {slope:.1f} MB per 1,000 tokens"
        )
    ax.set_xlabel("thousand tokens")
    ax.set_ylabel("MB above the model")
    ax.set_ylim(0, 1.3 * max(max(r["peak_mb"].values()) for r in rows))
    ax.grid(axis="y")
    ax.legend(frameon=False, fontsize=8)


def peaks(ax: Axes, rows: list[dict[str, Any]]) -> None:
    rows = [r for r in rows if r["dtype"] == "float32"]
    for method in ("s2", "full", "roll_and_mask"):
        points = [(r["length"], r["methods"][method]["peak_mb"]) for r in rows if method in r["methods"]]
        ax.plot(*zip(*points, strict=True), color=COLOURS[method], marker="o", ms=4, label=NAMES[method])
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    by_length(ax, [r["length"] for r in rows], what="MB above the inputs")
    ax.legend(frameon=False, fontsize=8)


def losses(ax: Axes, rows: list[dict[str, Any]]) -> None:
    labels, values = [], []
    for row in rows:
        plain, chunked = row["methods"]["plain"], row["methods"]["chunked"]
        labels += [f"time, {row['length']:,} tokens", f"memory, {row['length']:,} tokens"]
        values += [plain["ratio"], chunked["peak_mb"] / plain["peak_mb"]]
    bars(ax, labels, values, [f"{v:.2f}" for v in values])
    ax.axvline(1, color=FAINT, lw=0.8)


def overheads(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Seconds of commands; and how fast data is prepared, in words."""
    for row in rows:
        methods = row["methods"]
        if "tokenizer" in methods:
            share = methods["tokenizer"]["seconds"] / methods["preparation"]["seconds"]
            words = f"data preparation: {share:.2f} of\nthe bare tokenizer's tokens/s"
            ax.text(0.0, 0.03, words, transform=ax.transAxes, fontsize=9, color=INK)
        else:
            names = {"python": "python -c pass", "help": "longlora --help", "no-op run": "longlora run, nothing to do"}
            seconds = [methods[name]["seconds"] for name in names]
            bars(ax, list(names.values()), seconds, [f"{each:.2f} s" for each in seconds])
            ax.set_ylim(len(names) + 0.1, -0.7)
            ax.set_xlabel("seconds")


def bars(ax: Axes, labels: list[str], values: list[float], said: list[str]) -> None:
    """Horizontal, the words inside the panel above each bar."""
    places = range(len(labels))
    ax.barh(places, values, height=0.32, color=OURS)
    for place, label, value, words in zip(places, labels, values, said, strict=True):
        ax.text(0, place - 0.24, label, fontsize=9, va="bottom", color=INK)
        ax.text(value, place, f" {words}", fontsize=9, va="center", color=INK)
    ax.set_xlim(0, max([*values, 0.1]) * 1.35)
    ax.set_ylim(len(labels) - 0.5, -0.7)
    ax.set_yticks([])


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
