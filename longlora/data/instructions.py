"""Instruction data, validated record by record: what is wrong is named by place, field and reason, nothing is dropped unsaid.

Three kinds of record: LongAlpaca's and LongQA's (`instruction`, `output`, optional `input`, `context`, `file`; Chen et al.,
"LongLoRA", section 4.1), chats (`messages`), and questions on a document (`document`, `question`, `answers`), as
longlora/data/questions.py writes them. They come as JSON (one list), JSONL, Parquet, or from the hub.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.parquet as parquet
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from longlora.data.cases import TwiceError, once, parsed
from longlora.data.texts import from_hub
from longlora.data.wording import asked
from longlora.data.words import terms

SUFFIXES = (".json", ".jsonl", ".parquet")
INSTRUCTION = 50
"""Words of a system turn, at most, that only says how to answer; a longer one is taken for a document."""
SENTENCE_END = re.compile(r"[.!?]['\"\u2019\u201d)\]]*\s|[\u3002\uff01\uff1f]|\n\s*\n")
"""Roughly: only the longest sentence of a text is looked for."""


@dataclass(frozen=True)
class Turn:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Dialogue:
    """What a model is taught to say. The last turn is the assistant's; a system turn, if any, is the first; users and
    assistant take turns."""

    turns: tuple[Turn, ...]
    documents: tuple[str, ...]
    """What it is about, so that a split leaves no document on both sides: names, or a digest of the text."""
    place: str
    """Where it was read: file and line, or row."""
    others: tuple[str, ...] = ()
    """Answers that are as right as the last turn, and are not taught: who is asked the question may be taught none of them."""


@dataclass(frozen=True)
class Bad:
    """One fault of one record; a record may have several."""

    place: str
    field: str
    reason: str


@dataclass
class Records:
    dialogues: list[Dialogue] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    """Keys that good records have and that mean nothing here, with how often."""
    undrawn: int = 0
    """Good records that are not among `dialogues`, because only some were to be taken."""

    @property
    def read(self) -> int:
        return len(self.dialogues) + self.undrawn + len({b.place for b in self.bad})

    def summary(self) -> str:
        """One line: how many were read, kept and refused, and the first fault."""
        refused = self.read - len(self.dialogues)
        first = f"; first: {self.bad[0].place}, {self.bad[0].field}: {self.bad[0].reason}" if self.bad else ""
        ignored = f"; keys not read: {', '.join(sorted(self.unread))}" if self.unread else ""
        return f"{self.read} records, {len(self.dialogues)} good, {refused} bad{first}{ignored}"


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def whole(text: str) -> str:
    """JSON can say half of a character (an emoji that was cut), which no file and no tokenizer takes."""
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"holds half of a character, {half.group()!a}")
    return text


Whole = Annotated[str, AfterValidator(whole)]
Text = Annotated[Whole, AfterValidator(not_blank)]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Instruction(Record):
    instruction: Text
    output: Text
    input: Whole | None = None
    context: Whole | None = None
    file: Whole | None = None

    def turns(self) -> tuple[Turn, ...]:
        return Turn("user", said(self.context, self.instruction, self.input)), Turn("assistant", self.output)

    def documents(self) -> tuple[str, ...]:
        own = said(self.context) or said(self.instruction, self.input)  # Alpaca's own records have it in `input`
        return (said(self.file) or digest_of_document(own),)


def said(*texts: str | None) -> str:
    """Those of the texts that say something, a blank line between."""
    return "\n\n".join(t for t in texts if t and t.strip())


class Message(Record):
    role: Literal["system", "user", "assistant"]
    content: Text


class Chat(Record):
    messages: list[Message] = Field(min_length=2)

    def turns(self) -> tuple[Turn, ...]:
        return tuple(Turn(m.role, m.content) for m in self.messages)

    def documents(self) -> tuple[str, ...]:
        return (digest_of_document("\n\n".join(given(self.turns()))),)


def given(turns: Iterable[Turn]) -> list[str]:
    """What the assistant is given to answer from: all that the others say, but for a system turn of few words."""
    return [
        t.content for t in turns if t.role == "user" or (t.role == "system" and len(terms(t.content)) > INSTRUCTION)
    ]


class Question(Record):
    document: Text
    question: Text
    answers: list[Text] = Field(min_length=1)
    sources: list[Whole] | None = None

    def turns(self) -> tuple[Turn, ...]:
        return Turn("user", asked(self.document, self.question)), Turn("assistant", self.answers[0])

    def documents(self) -> tuple[str, ...]:
        return tuple(self.sources) if self.sources else (digest_of_document(self.document),)


def digest_of_document(text: str) -> str:
    """Of the words of the longest sentence: two questions on one text share it, whatever stands before and after (LongAlpaca has
    both in one field), and wherever lines break."""
    longest = max((" ".join(piece.split()) for piece in SENTENCE_END.split(text)), key=len)
    return hashlib.sha256((" ".join(terms(longest.casefold())) or longest).encode()).hexdigest()[:16]


def read_records(place: Path) -> Records:
    """All records of a file, or of all files with a known suffix below a folder, in order of their paths.

    Raises:
        ValueError: nothing is there, the suffix is unknown, or a file cannot be read as what it says it is.
    """
    if not place.exists():
        raise ValueError(f"no file or folder {place} (seen from {Path.cwd()})")
    files = [place]
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"no {', '.join(SUFFIXES)} file below {place}")
    found = Records()
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{file}: records are read from {', '.join(SUFFIXES)}, not from '{file.suffix}'")
        for where, value in parquet_rows(file) if file.suffix.lower() == ".parquet" else json_rows(file):
            add(found, where, value)
    return found


def read_hub(name: str, *, split: str | None) -> Records:
    """All records of a dataset on the hub; `split` None takes 'train'.

    Raises:
        ValueError: as `from_hub`.
    """
    found = Records()
    for number, row in enumerate(from_hub(name, split=split), start=1):
        add(found, f"{name}{f' {split}' if split else ''} row {number}", row)
    return found


def json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a list, or of a file with one a line, with the line where it starts. A broken line is a `Bad`.

    Raises:
        ValueError: the file is not UTF-8; or as `list_rows`.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    if text.lstrip()[:1] == "[":
        yield from list_rows(text, file)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                value = parsed(line)
            except TwiceError as error:
                value = Bad(where, error.key, "stands twice")
            except ValueError as error:
                value = Bad(where, "record", str(error))
            yield where, value


def list_rows(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    """The members of a JSON list. Behind a fault in it nothing can be told apart, so that a fault ends all.

    Raises:
        ValueError: such a fault, with its place.
    """
    decoder, at, line, counted, beside = json.JSONDecoder(object_pairs_hook=once), text.index("[") + 1, 1, 0, 0
    while True:
        at = skip(text, at)
        if text[at : at + 1] == "]":
            if rest := text[at + 1 :].strip():
                raise ValueError(f"{file} goes on behind the end of its list: {rest[:20]!r}")
            return
        breaks, counted = text.count("\n", counted, at), at
        line, beside = line + breaks, 1 if breaks else beside + 1  # a list without line breaks is all on one
        where = f"{file} line {line}" + (f", record {beside}" if beside > 1 else "")
        try:
            try:
                value, at = decoder.raw_decode(text, at)
            except TwiceError as error:
                value = Bad(where, error.key, "stands twice")
                _, at = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
        except RecursionError:
            raise ValueError(f"{file} line {line}: is nested too deep to be read") from None
        yield where, value
        at = skip(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise ValueError(
                f"{file}: behind the record of line {line} there is neither a comma nor the end of the list"
            )


def skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a Parquet file, with its number.

    Raises:
        ValueError: it is no Parquet file, or a broken one.
    """
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", row
    except (OSError, ValueError) as error:
        wrong = f"cannot be read behind row {number}" if number else "is not a Parquet file"
        raise ValueError(f"{file} {wrong}: {str(error).splitlines()[0]}") from None


def add(found: Records, place: str, value: Any) -> None:
    """Validate one record into `found`: as a dialogue, or as all that is wrong with it."""
    if isinstance(value, Bad):
        found.bad.append(value)
        return
    if not isinstance(value, dict):
        found.bad.append(Bad(place, "record", f"is a {type(value).__name__}, not an object with named fields"))
        return
    known = {key: v for key, v in value.items() if v is not None}  # a column of Parquet that this row leaves out
    kind = Chat if "messages" in known else Question if "question" in known else Instruction
    try:
        record = kind.model_validate(known)
    except ValidationError as error:
        found.bad += [Bad(place, ".".join(map(str, e["loc"])) or "record", complaint(e)) for e in error.errors()]
        return
    turns = record.turns()
    if fault := disorder(turns):
        found.bad.append(Bad(place, "messages", fault))
        return
    found.unread.update(known.keys() - kind.model_fields.keys())
    if isinstance(record, Chat):  # such as a tool's call, or a weight of 0, which would not learn the turn
        own = {key for m in known["messages"] for key, v in m.items() if v is not None}
        found.unread.update(f"messages.{key}" for key in own - Message.model_fields.keys())
    others = tuple(record.answers[1:]) if isinstance(record, Question) else ()
    found.dialogues.append(Dialogue(turns, record.documents(), place, others))


def complaint(error: Any) -> str:
    if error["type"] == "missing":
        return "is missing"
    return str(error["msg"]).removeprefix("Value error, ").replace("Input should", "should")


def disorder(turns: tuple[Turn, ...]) -> str:
    """What is wrong with the order of roles, or ''."""
    roles = [t.role for t in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(spoken, start=1 + len(roles) - len(spoken)):
        due = ("user", "assistant")[(number - 1 - len(roles) + len(spoken)) % 2]
        if role != due:
            return f"turn {number} is the {role}'s, and the {due}'s is due"
    return "" if spoken and spoken[-1] == "assistant" else "the last turn is not the assistant's: nothing to learn"
