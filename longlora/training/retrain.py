"""The same recipe under another attention pattern: what shifted sparse attention gives away, or does not, against full attention.

A baseline that costs a second training, so none is trained unless it is named. Everything but the pattern is the recipe's:
blocks in the same order, seed, rates, trained parts.
"""

from typing import Literal

from longlora.attention.shifted import Attention
from longlora.section import Section


class Retrain(Section):
    patterns: list[Literal["s2", "full"]]
    """Attention patterns that the recipe is trained under once more; the matrices of dvc.yaml are this list, and the models
    are called by it. None leaves the comparison out."""


def under(attention: Attention, *, pattern: str, settings: Retrain) -> Attention:
    """The recipe's attention under another pattern.

    Raises:
        ValueError: the pattern is the recipe's own, so there would be nothing to compare.
    """
    (wanted,) = (p for p in settings.patterns if p == pattern)
    if wanted == attention.pattern:
        raise ValueError(
            f"retrain.patterns names {pattern}, which is the recipe's own attention.pattern: name "
            f"{'s2' if pattern == 'full' else 'full'}, or none"
        )
    return attention.model_copy(update={"pattern": wanted})
