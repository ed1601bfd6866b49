"""Passkey retrieval (Mohtashami and Jaggi 2023; LongLoRA section 4.3): a number hidden in filler, at every depth of every length.

The answer is checked without generating it: where a model's first choice at every place of the right answer is the right
token, its greedy answer is the right answer, and the other way round. So one forward pass over prompt and answer decides.
Prompts share the filler before their keys: the longest is computed once, into a cache that every prompt continues.

Letters: C cells, D depths, S samples of a cell, B prompts of a batch, L tokens of a prompt with its answer, A tokens of an answer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from longlora.data import passkey_words as words
from longlora.data.prompt import LINE, WORD, continuation, frame
from longlora.evaluation.interval import of_trials
from longlora.model.cache import beginning, read, shareable
from longlora.model.load import batch_tokens, must_reach, spread
from longlora.parallel.sharding import ours, say, whole
from longlora.section import Section, Seed

QUESTION = "\n" + words.QUESTION.format(label=words.LABEL)
LEAD = words.LEAD.format(label=words.LABEL)


def named(depth: float) -> str:
    return f"{depth:.2f}"


class Grid(Section):
    """Something is hidden in a text, at every depth of every length."""

    lengths: list[int] = Field(min_length=1)
    """Prompts in tokens, answer included."""
    depths: list[float] = Field(min_length=1)
    """Where it lies: the share of the text around it that stands before it, 0 to 1."""
    samples: int = Field(gt=0)
    """Prompts for each length and depth."""
    prompt: Literal["plain", "chat"]
    """plain: a text to be continued; chat: the same as a user's turn in the tokenizer's own template."""
    seed: Seed

    @field_validator("lengths", "depths")
    @classmethod
    def named_once(cls, values: list[float]) -> list[float]:
        if len(set(values)) < len(values):
            raise ValueError("a value stands twice")
        return values

    @field_validator("depths")
    @classmethod
    def shares(cls, depths: list[float]) -> list[float]:
        if not all(0 <= d <= 1 for d in depths):
            raise ValueError("a depth is a share of the text, from 0 to 1")
        if len({named(d) for d in depths}) < len(depths):
            raise ValueError("depths are told by two digits behind the point, and two of these would be one")
        return depths


class Passkey(Grid):
    digits: int = Field(gt=0)
    """Of a key."""


@dataclass(frozen=True)
class Prompt:
    """The question as token ids; its first `shared` tokens are the same for every key."""

    question: list[int]
    answer: list[int]
    shared: int


class Writer:
    """Writes prompts of an exact number of tokens. Only the filler gives way; it is cut between tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, prompt: Literal["plain", "chat"]) -> None:
        self.tokenizer, around = tokenizer, frame(tokenizer, prompt, plain=" ")
        self.head = around.open(words.PREAMBLE)
        self.end = continuation(tokenizer, QUESTION + around.after + LEAD, after=WORD)
        self.first = continuation(tokenizer, words.FILLER, after=LINE)
        self.next = continuation(tokenizer, " " + words.FILLER, after=words.FILLER)

    def write(self, key: str, *, length: int, depth: float) -> Prompt:
        """The prompt for `key`: question and answer together have `length` tokens.

        Raises:
            ValueError: `length` has no room for the fixed parts, or the tokenizer does not know the key's digits, so that all keys
                would be one.
        """
        fact = words.FACT.format(label=words.LABEL, value=key)
        needle = continuation(self.tokenizer, f"\n{fact}", after=WORD)
        lead, answer = parted(self.tokenizer, continuation(self.tokenizer, " " + key, after=LEAD))
        said = str(self.tokenizer.decode(answer))
        if "".join(filter(str.isdigit, said)) != key:  # marks of the tokenizer's own may stand between
            raise ValueError(
                f"passkey: the model's tokenizer cannot write the key {key}: its tokens for it read {said!r}"
            )
        room = length - len(self.head) - len(needle) - len(self.end) - len(lead + answer)
        if room < 0:
            raise ValueError(f"passkey.lengths: {length} tokens are too few, without filler it is {length - room}")
        before = round(depth * room)
        question = self.head + self.filler(before) + needle + self.filler(room - before) + self.end + lead
        return Prompt(question, answer, shared=len(self.head) + before)

    def filler(self, count: int) -> list[int]:
        repeats = max(0, -(-(count - len(self.first)) // len(self.next)))
        return (self.first + self.next * repeats)[:count]


def parted(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> tuple[list[int], list[int]]:
    """A space that is a token of its own, and the rest. The space is the question's: a model that would go on in words, "The
    pass key is the ...", may well have found the key, and what is measured is whether it has."""
    spaces = 0
    while spaces < len(answer) - 1 and not tokenizer.decode(answer[: spaces + 1]).strip():
        spaces += 1
    return answer[:spaces], answer[spaces:]


@torch.inference_mode()
def prefix_of(model: PreTrainedModel, *, cells: list[list[Prompt]]) -> DynamicCache:
    """The cache of what stands before the deepest needle: of all that may stand before any."""
    deepest = max((prompt for cell in cells for prompt in cell), key=lambda prompt: prompt.shared)
    cache = DynamicCache(config=model.config)
    tokens_BL = torch.tensor([deepest.question[: deepest.shared]], device=model.device)
    read(model, tokens_BL, cache=cache, keep=1)
    return cache


def hits(model: PreTrainedModel, *, cells: list[list[Prompt]], prefix: DynamicCache | None) -> list[list[bool]]:
    """Whether the greedy answer to each prompt is its answer, token for token. All prompts have one length.

    Each cell goes on from the beginning of the `prefix` that it shares, if there is one. Each process answers its share.
    """
    longest = max(len(p.question + p.answer) for cell in cells for p in cell)
    hit_CS = np.zeros((len(cells), max(map(len, cells))), dtype=np.uint8)
    size = 1 if prefix is None else max(1, batch_tokens(model) // longest)

    def work(batch: tuple[int, int]) -> None:
        cell, first = batch
        group = cells[cell][first : first + size]
        cache = (
            None if prefix is None else beginning(prefix, length=min(p.shared for p in cells[cell]), rows=len(group))
        )
        hit_CS[cell, first : first + len(group)] = answered(model, group, cache=cache)

    every = [(cell, first) for cell, prompts in enumerate(cells) for first in range(0, len(prompts), size)]
    spread(work, (batch for number, batch in enumerate(every) if ours(number)), model=model)
    return [row[: len(cell)] for row, cell in zip(whole(hit_CS).astype(bool).tolist(), cells, strict=True)]


def answered(model: PreTrainedModel, prompts: list[Prompt], *, cache: DynamicCache | None) -> list[bool]:
    tokens_BL = torch.tensor([p.question + p.answer for p in prompts], device=model.device)
    kept = max(len(p.answer) for p in prompts)
    known = 0 if cache is None else cache.get_seq_length()
    choice_BA = read(model, tokens_BL[:, known:-1], cache=cache, keep=kept)
    right_BA = (choice_BA == tokens_BL[:, -kept:]).tolist()
    return [all(row[-len(p.answer) :]) for row, p in zip(right_BA, prompts, strict=True)]


def measure(
    model: PreTrainedModel, *, label: str, tokenizer: PreTrainedTokenizerBase, settings: Passkey
) -> dict[str, Any]:
    """Accuracy of the model `label` by length, and within it by depth, with exact 95 % intervals.

    Raises:
        ValueError: a length has no room for the prompt or is beyond the model's positions, or there is no chat template for a chat
            prompt.
    """
    writer = Writer(tokenizer, prompt=settings.prompt)
    cells_of = {
        length: [
            [writer.write(key, length=length, depth=d) for key in keys(settings, length=length, depth=d)]
            for d in settings.depths
        ]
        for length in sorted(settings.lengths)
    }
    for length in cells_of:
        must_reach(model, length - 1)
    prefix = prefix_of(model, cells=[c for cells in cells_of.values() for c in cells]) if shareable(model) else None
    result: dict[str, Any] = {"prompt": settings.prompt}
    for length, cells in cells_of.items():
        hit_DS = hits(model, cells=cells, prefix=prefix)
        result[str(length)] = by_depth(hit_DS, depths=settings.depths)
        say(f"{length} tokens: {sum(map(sum, hit_DS))} of {sum(map(len, hit_DS))} keys found")
    return {"passkey": {label: result}}


def by_depth(hit_DS: Sequence[Sequence[float]], *, depths: list[float]) -> dict[str, Any]:
    """The share of hits at one length, and within it at each depth."""
    cuts = {named(depth): of_trials(row) for depth, row in zip(depths, hit_DS, strict=True)}
    return of_trials([hit for row in hit_DS for hit in row]) | {"depth": cuts}


def keys(settings: Passkey, *, length: int, depth: float) -> list[str]:
    """A cell's keys: they depend on the seed and the cell, not on which other cells there are."""
    generator = random.Random(f"{settings.seed} {length} {depth}")
    return [str(generator.randrange(10 ** (settings.digits - 1), 10**settings.digits)) for _ in range(settings.samples)]
