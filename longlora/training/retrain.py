"""The same recipe under another attention pattern: what shifted sparse attention gives away, or does not, against full attention.

A baseline that costs a second training, so none is trained unless it is named. Everything but the pattern is the recipe's:
blocks in the same order, seed, rates, trained parts.
"""

from collections.abc import Iterator
from typing import Literal

from longlora.attention.shifted import Attention
from longlora.section import Section, refuse


class Retrain(Section):
    patterns: list[Literal["s2", "full"]]
    """Attention patterns that the recipe is trained under once more; the matrices of dvc.yaml are this list, and the models
    are called by it. None leaves the comparison out."""

    def misfits(self, attention: Attention) -> Iterator[str]:
        """Says so where a pattern is the recipe's own: there would be nothing to compare."""
        if attention.pattern in self.patterns:
            other = "s2" if attention.pattern == "full" else "full"
            yield f"retrain.patterns names {attention.pattern}, which is attention.pattern already: name {other}, or none"


def under(attention: Attention, *, pattern: str, settings: Retrain) -> Attention:
    """The recipe's attention under another pattern.

    Raises:
        ValueError: as `Retrain.misfits`.
    """
    assert pattern in settings.patterns
    refuse(settings.misfits(attention))
    return attention.model_copy(update={"pattern": pattern})
