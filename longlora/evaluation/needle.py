"""Needle in a haystack (Kamradt 2023): a sentence of fact in real text, at every depth of every length.

A passkey is a number in filler that repeats itself, and stands out from it. Here the haystack is running text of the held-out
documents, and the needle a sentence like others, with two words to be found again. Its words are in no recall exercise of the
training (longlora/data/recall.py), so a model that was drilled on those is asked in new ones.

Each sample has a haystack of its own, from a random place of the documents on, which is the same at all lengths and depths: it is
computed once, into a cache that all its prompts continue. Answers are checked in one forward pass, as those of passkeys are.

Letters: S samples, N lengths, D depths.
"""

import random
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.data.prompt import WORD, continuation, frame, haystack, hidden
from longlora.evaluation.interval import figure, share
from longlora.evaluation.passkey import Grid, Prompt, answered, by_depth, parted, prefix_of
from longlora.model.cache import beginning, shareable
from longlora.model.load import must_reach, spread
from longlora.parallel.sharding import ours, say, whole

PREAMBLE = "One sentence on market days was slipped into the following pages. You are asked for it at the end.\n"
LEAD = "On market days the {trade} of {town} sells only"
"""How the needle begins, and the answer."""
QUESTION = "\nWhat does the {trade} of {town} sell on market days?"
TRADES = ("baker", "brewer", "chandler", "cobbler", "cooper", "miller", "potter", "saddler", "tanner", "weaver")
TOWNS = ("Averby", "Colmouth", "Dunwick", "Estham", "Farnleigh", "Gorsby", "Holmstead", "Ketterby", "Marlow", "Westrup")
GOODS = (
    "almonds", "apricots", "baskets", "beans", "bonnets", "brooms", "buckets", "buttons", "candles", "carrots", "cherries",
    "chisels", "combs", "cushions", "dates", "feathers", "figs", "garlic", "ginger", "gloves", "hammers", "herrings", "honey",
    "kettles", "ladders", "lanterns", "lemons", "mirrors", "mustard", "needles", "onions", "pears", "pepper", "plums", "ribbons",
    "ropes", "saddles", "scissors", "spoons", "turnips",
)  # fmt: skip


class Needle(Grid):
    """A haystack for each of `samples`, and in it a needle of its own at each length and depth."""


@dataclass(frozen=True)
class Fact:
    """Who sells what."""

    trade: str
    town: str
    goods: str

    def said(self, words: str) -> str:
        return words.format(trade=self.trade, town=self.town)


class Writer:
    """Writes prompts of an exact number of tokens. Only the haystack gives way; it is cut between tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, texts: list[str], prompt: Literal["plain", "chat"]
    ) -> None:
        """Raises ValueError where the texts hold no words, or a chat template is missing."""
        self.tokenizer = tokenizer
        self.hay = haystack(tokenizer, texts)
        if not len(self.hay):
            raise ValueError("the held-out documents hold no text for a haystack: hold out others")
        self.frame = frame(tokenizer, prompt, plain=" ")
        self.head = self.frame.open(PREAMBLE)

    def write(self, fact: Fact, *, start: int, length: int, depth: float) -> Prompt:
        """The prompt for `fact`, in the haystack that begins at the token `start` of the text: question and answer together have
        `length` tokens.

        Raises:
            ValueError: `length` has no room for the fixed parts, or the tokenizer does not know the words to be found, so that all
                needles would be one.
        """
        lead = fact.said(LEAD)
        needle = continuation(self.tokenizer, f" {lead} {fact.goods}.", after=WORD)
        end = continuation(self.tokenizer, fact.said(QUESTION) + self.frame.after + lead, after=WORD)
        space, answer = parted(self.tokenizer, continuation(self.tokenizer, f" {fact.goods}", after=lead))
        said = str(self.tokenizer.decode(answer))
        # the tokenizer's own white space may stand inside of words
        if not all(word in "".join(said.casefold().split()) for word in fact.goods.split()):
            raise ValueError(
                f"needle: the model's tokenizer cannot write {fact.goods!r}: its tokens for it read {said!r}, as others' may"
            )
        spare = length - len(self.head) - len(needle) - len(end) - len(space + answer)
        if spare < 0:
            raise ValueError(f"needle.lengths: {length} tokens are too few, without a haystack it is {length - spare}")
        before = round(depth * spare)
        body = hidden([needle], hay=self.hay, start=start, cuts=[before], length=spare)
        return Prompt(self.head + body + end + space, answer, shared=len(self.head) + before)


def fact(settings: Needle, *, sample: int, length: int, depth: float) -> Fact:
    """It depends on the seed and the cell, not on which other cells there are."""
    generator = random.Random(f"{settings.seed} {sample} {length} {depth}")
    return Fact(generator.choice(TRADES), generator.choice(TOWNS), " and ".join(generator.sample(GOODS, 2)))


def start(settings: Needle, *, sample: int, hay: int) -> int:
    """Where in the `hay` tokens of the documents the haystack of a sample begins."""
    return random.Random(f"{settings.seed} {sample}").randrange(hay)


def hits(model: PreTrainedModel, *, prompts_SND: list[list[list[Prompt]]]) -> np.ndarray:
    """Whether the greedy answer to each prompt is its answer (S, N, D), token for token. The prompts of a sample share what stands
    before their needles, so each process answers its share of the samples."""
    hit_SND = np.zeros((len(prompts_SND), len(prompts_SND[0]), len(prompts_SND[0][0])), dtype=np.uint8)

    def work(sample: int) -> None:
        prefix = prefix_of(model, cells=prompts_SND[sample]) if shareable(model) else None
        for length, row in enumerate(prompts_SND[sample]):
            for depth, prompt in enumerate(row):
                cache = None if prefix is None else beginning(prefix, length=prompt.shared, rows=1)
                hit_SND[sample, length, depth] = answered(model, [prompt], cache=cache)[0]

    spread(work, filter(ours, range(len(prompts_SND))), model=model)
    return whole(hit_SND)


def measure(
    model: PreTrainedModel, *, label: str, tokenizer: PreTrainedTokenizerBase, texts: list[str], settings: Needle
) -> dict[str, Any]:
    """The share of needles that the model `label` finds, by length, and within it by depth, with 95 % intervals: exact at one
    depth, where each needle has a haystack of its own; over all depths by the spread between haystacks, for some are harder.

    Raises:
        ValueError: a length has no room for the prompt or is beyond the model's positions, the texts hold no words, or there is no
            chat template for a chat prompt.
    """
    lengths = sorted(settings.lengths)
    must_reach(model, max(lengths) - 1)
    writer = Writer(tokenizer, texts=texts, prompt=settings.prompt)
    prompts_SND = [
        [
            [
                writer.write(
                    fact(settings, sample=sample, length=length, depth=depth),
                    start=start(settings, sample=sample, hay=len(writer.hay)),
                    length=length,
                    depth=depth,
                )
                for depth in settings.depths
            ]
            for length in lengths
        ]
        for sample in range(settings.samples)
    ]
    hit_SND = hits(model, prompts_SND=prompts_SND)
    result: dict[str, Any] = {"prompt": settings.prompt}
    for number, length in enumerate(lengths):
        hit_DS = hit_SND[:, number].T
        ends = share(hit_DS.ravel(), groups_N=[*range(settings.samples)] * len(settings.depths))
        result[str(length)] = by_depth(hit_DS.tolist(), depths=settings.depths) | figure(
            hit_DS.mean(), ends, trials=hit_DS.size
        )
        say(f"{length} tokens: {hit_DS.sum()} of {hit_DS.size} needles found")
    return {"needle": {label: result}}
