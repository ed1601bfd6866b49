"""The shares of running text, recall exercises and pairs among the training blocks: numbers only, for the blocks themselves and
for a check of the parameters."""

from collections.abc import Iterator


def misfits(*, pairs_share: float, recall_share: float, pairs: bool, exercises: bool) -> Iterator[str]:
    """What the shares ask for in vain, where there are `pairs` and `exercises`, or not."""
    if recall_share and not exercises:
        yield f"fit.recall_share = {recall_share} needs exercises, and blocks.recall.count is 0"
    if pairs_share and not pairs:
        yield f"fit.pairs_share = {pairs_share} needs pairs: name pairs.sources or a pairs.casebook, or set it to 0"
    if pairs_share + recall_share > 1:
        yield f"fit.pairs_share + fit.recall_share = {pairs_share} + {recall_share}: must be at most 1"
