"""How many tokens a group has: numbers only, for the attention itself and for a plan of it."""

import math


def group_size(length: int, ratio: float) -> int:
    """The smallest even number of tokens that is at least `length` x `ratio`.

    Even, so that half a group is whole; rounded up, so that there are never more than 1/ratio groups.

    Raises:
        ValueError: the length is not positive, or the ratio not in (0, 1].
    """
    if length < 1 or not 0 < ratio <= 1:
        raise ValueError(f"a group is a share in (0, 1] of at least one token, not {ratio} of {length}")
    # 1e-9: a product such as 0.7 x 30 can come out a little above the whole number that it is.
    return 2 * math.ceil(length * ratio / 2 - 1e-9)
