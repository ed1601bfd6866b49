"""Recall exercises: text with facts hidden in it, each asked for again further on.

Perplexity hardly rewards reading far back: a model can get it all back after its positions were rescaled, and find nothing
any more. Exercises put retrieval into the training data. They take many forms (key and value in many wordings, lists, several
facts open at once, real text or senseless filler between them), because a model drilled on one prompt learns that prompt.
One form is the pass-key prompt of Mohtashami and Jaggi 2023 (arXiv 2305.16300), which LongLoRA's authors evaluate with. A model
that was trained on it knows the words of that question; `passkey` leaves them out, so that passkeys are asked for in new words.

`reach` bounds the distance between a fact and its answer, `nearness` says how it is used. With shifted sparse attention of
group size G, a pair within G / 2 is seen by at least half of the heads wherever it falls, beyond G by none: such questions are
learnt from in the steps in full attention at the end (`attention.full_attention_last`).
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from longlora.data import passkey_words
from longlora.data.tokenise import as_words, bare
from longlora.section import Section, refuse

# With the pass-key prompt's words, and without.
FILLER = {
    True: f"{passkey_words.FILLER} ",
    False: "A door is open. The road is long. Rain will fall soon. They wait outside. Nothing is lost. ",
}
LABELS = (
    passkey_words.LABEL, "secret number", "code", "account", "answer", "license", "telephone number", "magic word", "address",
    "lucky number", "reference", "ticket",
)  # fmt: skip
# A fact, and its question with the answer. A {label} alone stands for one fact of an exercise; each {name} is new.
FIRST_FORM = {
    True: (passkey_words.FACT, f"{passkey_words.QUESTION} {passkey_words.LEAD} {{value}}.\n"),
    False: ("The {label} to keep is {value}.\n", "Tell the {label}: {value}.\n"),
}
FORMS = (
    ("Note that the {label} is {value}.\n", "Question: what was the {label}? Answer: {value}.\n"),
    ("The {label} of {name} is {value}.\n", "What is the {label} of {name}? The {label} of {name} is {value}.\n"),
    ("{name} has the {label} {value}.\n", "Which {label} has {name}? It is {value}.\n"),
    ("Remember: {name} means {value}.\n", "Now, {name} means {value}.\n"),
    ("{name}: {value}\n", "{name}: {value}\n"),
    ("{name} = {value}\n", "print {name}\n{value}\n"),
    ("We sent {value} to {name}.\n", "What did we send to {name}? We sent {value}.\n"),
)
BARE = 2  # that many forms, the first one included, have no {name}
SHORTEST = 64  # tokens that hold a fact and its question


class Recall(Section):
    reach: int = Field(gt=0)
    """Tokens between a fact and its question, at most. Beyond a group only the steps in full attention at the end see the fact."""
    count: int = Field(ge=0)
    """How many different exercises are written."""
    nearness: float = Field(gt=0)
    """A question comes at reach x u ** nearness, u uniform in [0, 1): at 2 half of them within a quarter of the reach, at 0.5
    half of them beyond 0.7 of it."""
    passkey: bool
    """Whether the pass-key prompt's own words are among the exercises; if so, passkey retrieval is no question in new words."""

    def misfits(self, context: int) -> Iterator[str]:
        """What exercises of `context` tokens cannot be."""
        if self.count:
            yield from misfits(self.reach, length=context)


def misfits(reach: int, *, length: int) -> Iterator[str]:
    if reach > length:
        yield f"blocks.recall.reach = {reach} must be at most position.context = {length}"
    if reach < SHORTEST:
        yield f"blocks.recall.reach = {reach} has no room for a fact and its question; at least {SHORTEST}"


class Exercise(NamedTuple):
    tokens: list[int]
    asked: list[tuple[int, int, int, int]]
    """Per question: fact [first, last) and question with answer [first, last), as places in `tokens`."""


def exercises(
    texts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    reach: int,
    nearness: float,
    count: int,
    seed: int,
    passkey: bool = True,
) -> Iterator[list[int]]:
    """`count` exercises of exactly `length` tokens, the same for the same seed.

    No more than `reach` tokens lie between the first token of a fact and the last of its answer (both counted). Names and
    word values are taken from `texts`, so exercises speak their language; the questions are English.

    Raises:
        ValueError: `reach` is longer than `length`, or too short for a fact and its question; the texts hold no words; the
            tokenizer drops line breaks.
    """
    if not count:
        return
    refuse(misfits(reach, length=length))
    if not encode("\n", tokenizer):
        raise ValueError(
            "recall exercises part their lines, and the base's tokenizer has no token for a line break: set "
            "blocks.recall.count: 0, and fit.recall_share: 0"
        )
    words = words_of(texts, length=length)
    texts = [as_words(text, tokenizer=tokenizer) for text in texts]
    dice = random.Random(seed)
    for _ in range(count):
        yield exercise(
            texts,
            words=words,
            tokenizer=tokenizer,
            length=length,
            reach=reach,
            nearness=nearness,
            dice=dice,
            passkey=passkey,
        ).tokens


def words_of(texts: Sequence[str], *, length: int) -> list[str]:
    """Words that stand in `texts`, enough for exercises of `length` tokens.

    Raises:
        ValueError: the texts hold no words.
    """
    words = sorted({word for text in texts for word in re.findall(r"\b[^\W\d_]{4,12}\b", text)})
    if not words:
        raise ValueError("recall exercises take their names from the training texts, and those hold no words")
    # Names are drawn without putting back, a few per exercise; a handful of words would also teach the words.
    return (
        words if len(words) >= 2 * length else [f"{w}{i}" for i in range(-(-2 * length // len(words))) for w in words]
    )


def exercise(
    texts: Sequence[str],
    *,
    words: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    reach: int,
    nearness: float,
    dice: random.Random,
    passkey: bool = True,
) -> Exercise:
    """One exercise: facts and questions, each question due at a random distance, and background between them."""
    senseless = dice.random() < 0.3
    background = (
        filler_tokens(tokenizer, length, passkey=passkey) if senseless else text_tokens(texts, tokenizer, length, dice)
    )
    tokens = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if senseless and dice.random() < 0.7 and passkey:
        tokens += encode(passkey_words.PREAMBLE, tokenizer)
    crowd = dice.choice((1, 2, 4, 8))  # facts that may be open at once
    facts = new_facts(words, dice, passkey=passkey)
    open_: list[tuple[int, int, int, list[int]]] = []  # due at, fact [first, last), question
    asked = []
    newline = encode("\n", tokenizer)[-1]
    while len(tokens) < length:
        open_.sort()
        if open_ and open_[0][0] <= len(tokens):
            _, first, last, question = open_.pop(0)
            tokens += [] if tokens[-1:] == [newline] else [newline]
            if len(tokens) + len(question) - first <= reach:
                asked.append((first, last, len(tokens), len(tokens) + len(question)))
                tokens += question
        elif len(open_) < crowd:
            tokens += [] if tokens[-1:] == [newline] else [newline]
            fact, question = (encode(part, tokenizer) for part in next(facts))
            first, last = len(tokens), len(tokens) + len(fact)
            tokens += fact
            room = min(reach, length - first) - len(fact) - len(question)
            if room >= 0:
                open_.append((last + int(room * dice.random() ** nearness), first, last, question))
        else:
            gap = min(open_[0][0] - len(tokens), dice.randint(4, 200))
            tokens += background[:gap]
            background = background[gap:]
    return Exercise(tokens[:length], [places for places in asked if places[-1] <= length])


def new_facts(words: Sequence[str], dice: random.Random, *, passkey: bool = True) -> Iterator[tuple[str, str]]:
    """Facts with their questions, no two about the same thing."""
    forms = (FIRST_FORM[passkey], *FORMS)
    known = [label for label in LABELS if passkey or label != passkey_words.LABEL]
    labels = dice.sample(known, len(known))
    taken = set[str]()
    while True:
        form = dice.randrange(len(forms))
        if form < BARE and not labels:
            form = dice.randrange(BARE, len(forms))
        label = labels.pop() if form < BARE else dice.choice(known)
        name = dice.choice(words)
        while name in taken:
            name = dice.choice(words)
        taken.add(name)
        value = new_value(words, dice)
        fact, question = (part.format(label=label, name=name, value=value) for part in forms[form])
        yield fact, question


def new_value(words: Sequence[str], dice: random.Random) -> str:
    """Mostly a number of 3 to 8 digits, often 5; sometimes words."""
    if dice.random() < 0.25:
        return " ".join(dice.choices(words, k=dice.randint(1, 3)))
    digits = dice.choice((3, 4, 5, 5, 5, 6, 7, 8))
    return str(dice.randrange(10 ** (digits - 1), 10**digits))


def filler_tokens(tokenizer: PreTrainedTokenizerBase, length: int, *, passkey: bool) -> list[int]:
    once = encode(FILLER[passkey], tokenizer)
    return once * (length // len(once) + 1)


def text_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, dice: random.Random
) -> list[int]:
    """At least `length` tokens of running text, from a random place."""
    tokens: list[int] = []
    while len(tokens) < length:
        text = dice.choice(texts)
        # A token is rarely longer than eight characters; what is too short is continued from another place.
        first = text.find(" ", dice.randrange(max(1, len(text) - 8 * length))) + 1
        tokens += encode(text[first : first + 8 * length], tokenizer) or [0]
    return tokens


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return bare(tokenizer, text)
