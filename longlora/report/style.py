"""The look of every picture: one colour per model throughout, one font, a title flush left above."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas

INK, FAINT, RULE = "#1f2933", "#6b7785", "#d9dee4"
COLOURS = {"base": "#4a5560", "linear": "#c98a1b", "yarn": "#a2528c", "extended": "#0b6bb0"}
OTHERS = ("#3d8a62", "#7a6a53", "#8a4b3d")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "grid.color": "#eceff2",
    "grid.linewidth": 0.8,
}


def colour(label: str, labels: Sequence[str]) -> str:
    """A model's colour, the same in every picture of a run."""
    others = [name for name in labels if name not in COLOURS]
    return COLOURS.get(label) or OTHERS[others.index(label) % len(OTHERS)]


def headed(canvas: Canvas, title: str, subtitle: str) -> None:
    """Title and subtitle, flush left at the top, at a fixed distance in inches."""
    height = canvas.get_figheight()
    canvas.text(0.022, 1 - 0.22 / height, title, size=13, weight="bold", va="top")
    canvas.text(0.022, 1 - 0.52 / height, subtitle, size=9.5, color=FAINT, va="top")
