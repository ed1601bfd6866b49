"""What the command line says of a sweep's values: a list, `key=1,2`, or a range, `key=1..64` (`:log`: on a logarithmic scale)."""

import re

from optuna.distributions import FloatDistribution, IntDistribution

NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"\s*({NUMBER})\.\.({NUMBER})(:log)?\s*")

Range = IntDistribution | FloatDistribution


def must_be_given_once(axes: list[str], overrides: list[str]) -> None:
    keys, taken = [key_of(axis) for axis in axes], [key_of(item) for item in overrides]
    for place, key in enumerate(keys):
        if key in keys[:place] or key in taken:
            raise ValueError(f"{key}: is given twice; name it once, with all its values: {key}=1,2")


def key_of(axis: str) -> str:
    return axis.partition("=")[0].strip()


def axis_values(axis: str) -> list[str]:
    """`key=1,2` as `key=1` and `key=2`; a comma inside brackets or quotes is part of a value."""
    key, equals, text = axis.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"sweep {axis!r}: must be key=value,value, such as adapter.rank=8,16")
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += letter
    if not all(value.strip() for value in values):
        raise ValueError(f"sweep {axis!r}: a value is empty; write key=value,value, such as adapter.rank=8,16")
    return [f"{key.strip()}={value.strip()}" for value in values]


def range_of(axis: str) -> Range | None:
    """The range of `key=1..64` or `key=1e-4..1e-3:log`, of whole numbers if both ends are written so; None if it is none.

    Raises:
        ValueError: there is nothing between its ends, or no logarithm of them.
    """
    found = RANGE.fullmatch(axis.partition("=")[2])
    if not found:
        return None
    low, high, log = found.groups()
    try:
        if re.fullmatch(r"[-+]?\d+", low) and re.fullmatch(r"[-+]?\d+", high):
            return IntDistribution(int(low), int(high), log=bool(log))
        return FloatDistribution(float(low), float(high), log=bool(log))
    except ValueError as error:
        raise ValueError(f"sweep {axis!r}: {error}") from None
