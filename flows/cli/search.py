"""Which values a search tries: Optuna's TPE, told how the runs before scored and what the gate had against them.

Nothing of it is kept. It is seeded, so the same search draws the same values as long as the same scores come back, and its runs
are found by their keys: that is how it goes on where it stopped, and with more runs beyond that.
"""

import math
from collections.abc import Sequence

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from flows.cli.axes import Range
from tasks.comparison import Better

DIGITS = 4
"""Of a number drawn from a range: what is shown is what is run."""


class Search:
    """Draws a value for every key, the better ones the more it was told."""

    def __init__(self, space: dict[str, Range | list[str]], better: Better, *, seed: int) -> None:
        """`space`: by key a range, or a choice of `key=value`."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells each trial on stderr
        self._space = {
            key: CategoricalDistribution(values) if isinstance(values, list) else values
            for key, values in space.items()
        }
        self._study = optuna.create_study(
            direction="minimize" if better.order == "lower" else "maximize",
            sampler=optuna.samplers.TPESampler(seed=seed),
        )

    def looked_at(self) -> list[tuple[str, ...]]:
        """Combinations as `key=value` that show whether every key takes its values: the first value of each key (of a range its low
        end); then, one key at a time beside the first values of the others, every other choice, or a number between and the high
        end."""
        axes = [[text(key, value, values) for value in examples(values)] for key, values in self._space.items()]
        first = tuple(axis[0] for axis in axes)
        others = [(place, value) for place, axis in enumerate(axes) for value in axis[1:]]
        return [first, *((*first[:place], value, *first[place + 1 :]) for place, value in others)]

    def ask(self) -> tuple[optuna.Trial, tuple[str, ...]]:
        """What to try next: the trial that is to be told of, and its values as `key=value`."""
        trial = self._study.ask({**self._space})
        return trial, tuple(text(key, trial.params[key], values) for key, values in self._space.items())

    def tell(self, trial: optuna.Trial, score: float | None, *, refusals: int) -> None:
        """How it went: `score` is None if it failed; with `refusals` of the gate it is not feasible, whatever its score."""
        if score is None or not math.isfinite(score):
            self._study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint("gate", refusals)
        self._study.tell(trial, score)


def examples(values: Range | CategoricalDistribution) -> Sequence[object]:
    """What shows whether a key takes such values: every choice, or both ends of a range and, if it is not of whole numbers, one
    between them."""
    if isinstance(values, CategoricalDistribution):
        return list(values.choices)
    inner = [between(values)] if isinstance(values, FloatDistribution) else []
    return [values.low, *inner, values.high]


def between(values: FloatDistribution) -> float:
    """A number of this range with a fraction: most draws have one even where the ends have none, and a key of whole numbers must
    refuse it. The middle, if all that are tried are whole."""
    low, high = values.low, values.high
    shares = [0.5**n for n in range(1, 12)]
    found = [low * (high / low) ** share if values.log else low + share * (high - low) for share in shares]
    return next((number for number in found if not float(f"{number:.{DIGITS}g}").is_integer()), found[0])


def text(key: str, value: object, values: Range | CategoricalDistribution) -> str:
    """`key=value`, with four digits unless these lie outside of the range `values`; a choice is that already."""
    if isinstance(values, CategoricalDistribution):
        return str(value)
    if isinstance(values, FloatDistribution):
        shown = f"{value:.{DIGITS}g}"
        end = min(max(float(shown), values.low), values.high)
        return f"{key}={shown}" if float(shown) == end else f"{key}={end}"
    return f"{key}={value}"
