"""The riddles of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3): what is asked, and what is right.

Sizes are the paper's: four keys, values or queries; one chain of four hops; ten common words; three frequent ones. The wording
is ours. Every riddle is a function of a random generator and the words of a text.
"""

import random
import string
from dataclasses import dataclass
from typing import Literal

import numpy as np

DOTS = "..."
Task = Literal["single", "multikey", "multivalue", "multiquery", "tracking", "common", "frequent"]


@dataclass(frozen=True)
class Riddle:
    """A question over a long text: `lines` are spread over a haystack in this order, or, in word lists, are the text."""

    head: str
    lines: list[str]
    question: str
    lead: str
    """How the answer begins; the model goes on from there."""
    answers: list[str]
    room: int
    """Tokens that the answer may take."""


def needles(task: Task, generator: random.Random, words: list[str]) -> Riddle:
    """Secret numbers of things, hidden in a text; RULER's sizes: four keys, four values, four queries."""
    keys = generator.sample(words, 4)
    count = {"single": 1, "multikey": 4, "multivalue": 1, "multiquery": 4}[task]
    values = [str(generator.randrange(10**6, 10**7)) for _ in range(4)]
    pairs = (
        [(keys[0], v) for v in values] if task == "multivalue" else list(zip(keys[:count], values[:count], strict=True))
    )
    asked = keys[:4] if task == "multiquery" else keys[:1]
    answers = values if task in ("multivalue", "multiquery") else values[:1]
    lines = [f"A secret number of {key} is {value}." for key, value in pairs]
    generator.shuffle(lines)
    of = listed(asked)
    return Riddle(
        head="Secret numbers are hidden in the following text. Keep them in mind, you will be asked for them.\n",
        lines=lines,
        question=f"\nWhich secret numbers of {of} does the text name?",
        lead=f"The secret numbers of {of} are",
        answers=answers,
        room=48 if len(answers) > 1 else 16,
    )


def tracking(generator: random.Random) -> Riddle:
    """A value handed on from variable to variable: RULER's one chain of four hops."""
    names = ["".join(generator.choices(string.ascii_uppercase, k=5)) for _ in range(5)]
    value = str(generator.randrange(10**4, 10**5))
    hops = [f"VAR {after} = VAR {before}." for before, after in zip(names, names[1:], strict=False)]
    return Riddle(
        head="Assignments of variables are hidden in the following text. Keep track of them.\n",
        lines=[f"VAR {names[0]} = {value}.", *hops],
        question=f"\nWhich variables have the value {value}, directly or by way of others? There are {len(names)}.",
        lead=f"The variables that have the value {value} are",
        answers=names,
        room=48,
    )


def common(generator: random.Random, words: list[str], *, budget: int) -> Riddle:
    """A numbered list of words, ten of them ten times as frequent as the others (RULER: 30 and 3; in a short list 10 and 1)."""
    often, seldom = (30, 3) if budget >= 900 else (10, 1)
    chosen = generator.sample(words, len(words))
    ten, others = chosen[:10], chosen[10:]
    filling = [w for w in others for _ in range(seldom)][: max(0, budget - 10 * often)]
    items = [w for w in ten for _ in range(often)] + filling
    generator.shuffle(items)
    return Riddle(
        head="The following is a numbered list of words. Some occur much more often than the others.\n",
        lines=[f"{number}. {word}" for number, word in enumerate(items, start=1)],
        question="\nWhich are the ten words that occur most often?",
        lead="The ten words that occur most often are",
        answers=ten,
        room=120,
    )


def frequent(generator: random.Random, *, budget: int) -> Riddle:
    """A text of made-up words whose frequencies fall with the square of their rank (RULER: zeta, alpha 2); the first three. What
    is most frequent of all is dots, which are no word, as in RULER's code: so nothing is right by being nearly everywhere."""
    coined = ["".join(generator.choices(string.ascii_lowercase, k=6)) for _ in range(max(8, budget // 50))]
    coined[0] = DOTS
    shares = np.arange(1, len(coined) + 1, dtype=float) ** -2
    counts = np.maximum(1, np.floor(budget * shares / shares.sum())).astype(int)
    items = [w for w, n in zip(coined, counts, strict=True) for _ in range(n)][:budget]
    generator.shuffle(items)
    return Riddle(
        head="The following text is in an unknown language. Watch how often its words occur.\n",
        lines=items,
        question=f"\nWhich are the three words that occur most often? The dots {DOTS} are no word.",
        lead="The three words that occur most often are",
        answers=coined[1:4],
        room=48,
    )


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
