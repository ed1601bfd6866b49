"""Which question-answer pairs are trained on: those of all sources and of a casebook, each once, none about what is evaluated on,
none too long; what was left out is written down.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from longlora.data.blocks import Blocks
from longlora.data.casebook import Built, Casebook, DocumentCase, build
from longlora.data.casebook import tokens as token_ends
from longlora.data.casebook import write as write_cases
from longlora.data.curation import Contamination, about_held_out, apart, beside, statistics, uncontaminated, unique
from longlora.data.dialogue import tokenised
from longlora.data.heldout import elsewhere, split
from longlora.data.instructions import Bad, Dialogue, Records, Turn, read_hub, read_records
from longlora.data.packing import Pair, write
from longlora.data.prompt import listed
from longlora.data.reading import Document
from longlora.data.texts import read as read_texts
from longlora.data.tokenise import marks
from longlora.data.wording import asked
from longlora.section import Section, Seed, write_json

REASONS = ("duplicate", "contamination", "split", "length")
"""For which a record that is not malformed is left out."""
SHOWN = 5
"""Faults that an error message names."""


class PairSource(Section):
    kind: Literal["file", "hub"]
    """file: JSON, JSONL or Parquet, or a folder of them; hub: a `datasets` hub id."""
    name: str
    """The file, folder or hub id."""
    split: str | None
    """hub: which split; null is train."""
    take: int | None = Field(gt=0)
    """So many records, drawn from the seed; null takes all. The authors mix 9,000 long with 3,000 short ones."""
    license: str
    """Of the records."""


class Pairs(Section):
    """Empty sources and no casebook: there are no pairs, and `fit.pairs_share` must be 0."""

    sources: list[PairSource]
    """Where records are read."""
    casebook: Casebook | None
    """Questions by rule on the training documents of `blocks`, lengths in tokens; null writes none."""
    prompt: Literal["chat", "authors"]
    """chat: the tokenizer's own template; authors: [INST]{instruction}[/INST]{output}."""
    faults: Literal["refuse", "leave_out"]
    """What becomes of a record that is malformed or too long for position.context; either way all of them are listed."""
    held_out: float = Field(ge=0, lt=1)
    """Share of the sources' documents that are not trained on: data/pairs/heldout.jsonl, for measures of your own."""
    contamination: Contamination
    """Evaluation cases that no pair may hold."""
    seed: Seed


class Chosen(NamedTuple):
    train: list[Dialogue]
    held_out: list[Dialogue]
    left: list[Bad]
    """What was left out, each with its reason."""
    read: int
    undrawn: int
    """Of those, good ones that `take` left."""
    unread: Counter[str]
    """Keys of records that mean nothing here, with how often."""


def make(
    settings: Pairs, *, blocks: Blocks, tokenizer: PreTrainedTokenizerFast, context: int, out: Path
) -> dict[str, Any]:
    """Write the pairs of all sources, and of a casebook on the training documents of `blocks`, below `out`, with the casebook's
    cases on the held-out ones; return the counts.

    Raises:
        ValueError: as `gather`, `build` and `prepare`; the documents cannot be read.
    """
    found = gather(settings)
    train, kept, held_out = [], [], []
    if settings.casebook or settings.sources:
        train, kept = sides(blocks)
        held_out = evaluated(blocks, kept, tokenizer=tokenizer)
    taught_from, asked_from = (
        book(documents, settings.casebook, side=side, tokenizer=tokenizer)
        for side, documents in (("train", train), ("heldout", kept))
    )
    chosen = choose(found, settings, built=taught(taught_from.cases), held_out=held_out)
    report = prepare(chosen, settings=settings, tokenizer=tokenizer, context=context, out=out)
    write_cases(asked_from.cases, out / "cases.jsonl")
    return report | {
        "built": len(taught_from.cases),
        "missing": len(taught_from.missing),
        "built_held_out": len(asked_from.cases),
        "missing_held_out": len(asked_from.missing),
    }


def sides(blocks: Blocks) -> tuple[list[Document], list[Document]]:
    """The documents of the training source that are trained on, and those that are held out."""
    rows = read_texts(blocks)
    train, kept = (
        [Document(rows[i]["name"], rows[i]["text"]) for i in members]
        for members in split(list(rows["name"]), held_out=blocks.held_out, seed=blocks.seed)
    )
    return train, kept


def evaluated(blocks: Blocks, kept: Sequence[Document], *, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts that are evaluated on: the documents that were `kept` for it, or those of another source."""
    other = blocks.held_out.texts
    if other is None:
        return [d.text for d in kept]
    return [
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in elsewhere(other, tokenizer=tokenizer).values()
    ]


def book(
    documents: Sequence[Document], casebook: Casebook | None, *, side: str, tokenizer: PreTrainedTokenizerFast
) -> Built:
    """The casebook's questions on the `documents` of one side; says so where an excerpt or a document allowed none."""
    if not documents or casebook is None:
        return Built([], [], [])
    built = build(documents, casebook, measure=token_ends(tokenizer))
    if built.missing:
        questions = f"{len(built.missing)} question{'s' * (len(built.missing) != 1)}"
        print(f"{side}: {questions} that no excerpt allowed, {built.missing[0]} first")
    if built.unfit:
        hold = "holds" if len(built.unfit) == 1 else "hold"
        print(
            f"{side}: {len(built.unfit)} of {len(documents)} documents {hold} no sentence to ask about, {built.unfit[0]} first"
        )
    return built


def gather(settings: Pairs) -> Records:
    """The records of all sources.

    Raises:
        ValueError: a record is malformed, and faults are refused.
    """
    found = Records()
    for source in settings.sources:
        place = Path(os.path.expanduser(source.name))
        one = read_hub(source.name, split=source.split) if source.kind == "hub" else read_records(place)
        if one.bad and settings.faults == "refuse":
            raise ValueError(refusal(f"pairs.sources: {source.name}: {one.summary()}", one.bad))
        kept = one.dialogues
        if source.take is not None and source.take < len(kept):
            order = np.random.default_rng(settings.seed).permutation(len(kept))[: source.take]
            kept = [kept[i] for i in sorted(order)]
        found.dialogues += kept
        found.undrawn += len(one.dialogues) - len(kept)
        found.bad += one.bad
        found.unread += one.unread
    return found


def choose(found: Records, settings: Pairs, *, built: Sequence[Dialogue] = (), held_out: Iterable[str] = ()) -> Chosen:
    """Each once, none that holds an evaluation case or a passage of the `held_out` texts, split by document. `built`, of a
    casebook, are about training documents."""
    once, twins = unique([*found.dialogues, *built])
    fresh, known = about_held_out(once, held_out, settings.contamination)
    clean, contaminated = uncontaminated(fresh, settings.contamination)
    own = set(built)
    parted = apart([d for d in clean if d not in own], share=settings.held_out, seed=settings.seed)
    train, same = beside(parted.train + [d for d in clean if d in own], parted.held_out, settings.contamination)
    left = found.bad + twins + known + contaminated + parted.left + same
    return Chosen(train, parted.held_out, left, found.read, found.undrawn, found.unread)


def taught(cases: Sequence[DocumentCase]) -> list[Dialogue]:
    """A casebook's cases as dialogues."""
    return [
        Dialogue(
            (Turn("user", asked(c.document, c.question)), Turn("assistant", c.answers[0])),
            tuple(c.sources),
            f"case {number} ({c.kind})",
        )
        for number, c in enumerate(cases, start=1)
    ]


def refusal(said: str, faults: Sequence[Bad]) -> str:
    return f"{said}. Mend them, or set pairs.faults: leave_out. {first(faults)}"


def first(faults: Sequence[Bad]) -> str:
    return "The first: " + "; ".join(f"{b.place}, {b.field}: {b.reason}" for b in faults[:SHOWN])


def shorter(settings: Pairs, *, rest: int) -> str:
    """What can be done about pairs that are too long, where `rest` others are not."""
    ways = ["Raise position.context"]
    ways += ["lower pairs.casebook.lengths"] if settings.casebook else []
    ways += ["shorten the records (longlora longqa build: --tokenizer and --length)"] if settings.sources else []
    ways += [f"set pairs.faults: leave_out, which goes on with the other {rest:,}"] if rest else []
    return ", or ".join(ways)


def prepare(
    chosen: Chosen, *, settings: Pairs, tokenizer: PreTrainedTokenizerBase, context: int, out: Path
) -> dict[str, Any]:
    """Write the training pairs, the held-out dialogues, and what was left out, below `out`; return the counts.

    Raises:
        ValueError: a pair is longer than `context`, or its turns are refused by the template, or left without an end mark, and so
            are faults; or all are.
    """
    fit, left = [], list(chosen.left)
    lengths, answers, beyond = [], [], []
    refused: list[Bad] = []
    ends = [*marks(tokenizer), *listed(tokenizer.eos_token_id)]
    for dialogue in chosen.train:
        try:
            pair = tokenised(dialogue.turns, tokenizer=tokenizer, prompt=settings.prompt)
            if settings.prompt == "chat":
                must_end(pair, ends)
        except ValueError as error:
            if settings.faults == "refuse":
                raise ValueError(f"{dialogue.place}: {error}") from None
            refused.append(Bad(dialogue.place, "messages", str(error)))
            continue
        if len(pair.tokens) > context:
            reason = f"has {len(pair.tokens)} tokens, position.context = {context}"
            left.append(Bad(dialogue.place, "length", reason))
            beyond.append(len(pair.tokens))
        else:
            fit.append(pair)
            lengths.append(len(pair.tokens))
            answers.append(int(pair.answer.sum()))
    if beyond and (settings.faults == "refuse" or not fit):
        are = "is" if len(beyond) == 1 else "are"
        said = f"pairs: {len(beyond)} of {len(chosen.train)} {are} longer than the context of {context}, by up to"
        raise ValueError(
            f"{said} {max(beyond) - context} tokens. {shorter(settings, rest=len(fit))}. {first(left[-len(beyond) :])}"
        )
    if refused and not fit:
        raise ValueError(f"pairs: not one of {len(chosen.train)} can be trained on. {first(refused)}")
    left += refused
    out.mkdir(parents=True)
    write(fit, out / "train.safetensors", vocabulary=len(tokenizer))
    write_dialogues(chosen.held_out, out / "heldout.jsonl")
    write_left(left, out / "left_out.csv")
    sources = [{"source": s.kind, "name": s.name, "license": s.license} for s in settings.sources]
    write_json({"sources": sources}, out / "provenance.json")
    if chosen.unread:
        print(f"keys not read: {', '.join(f'{key} ({count})' for key, count in sorted(chosen.unread.items()))}")
    records = {(b.place, b.field if b.field in REASONS else "malformed") for b in left}  # one may have several faults
    return {
        "read": chosen.read,
        "not_drawn": chosen.undrawn,
        "train": len(fit),
        "held_out": len(chosen.held_out),
        "left_out": dict(sorted(Counter(reason for _, reason in records).items())),
        "keys_not_read": len(chosen.unread),
        "tokens": statistics(lengths),
        "answer_tokens": statistics(answers),
    }


def must_end(pair: Pair, ends: list[int]) -> None:
    """Raises ValueError: what is learnt holds none of the marks `ends`, so a model would learn to go on for ever."""
    if not np.isin(pair.tokens[pair.answer], ends).any():
        raise ValueError(
            "pairs.prompt = chat: the template writes no end mark behind an answer, so no answer would learn to end: use authors, "
            "or a template that does (eos_token)"
        )


def write_dialogues(dialogues: Sequence[Dialogue], file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        for d in dialogues:
            messages = [{"role": t.role, "content": t.content} for t in d.turns]
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_left(left: Sequence[Bad], file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(Bad.__annotations__)
        rows.writerows((b.place, b.field, b.reason) for b in left)
