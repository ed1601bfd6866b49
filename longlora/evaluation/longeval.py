"""LongEval's two tasks (Li et al. 2023, "How long can open-source LLMs truly promise on context length?"): lines and topics.

Lines: a record of lines, each with a number; the number of one line is asked for. Topics: a conversation that goes through many
topics; the first is asked for. LongChat's published test cases are read as they are. Cases of our own have the same shape, a
length in tokens, and wording of ours; scores of the two do not compare.

Scoring is exact. LongChat takes the last number of an answer to lines, and had a judge read topics. Here a chat answer to lines is
its last number as well; a plain prompt is continued after a lead, so its first number counts. A topic is right where, of all the
topics of the case, the first one is named first.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.data.cases import Case, case, read_lines
from longlora.data.prompt import Prompt, frame
from longlora.evaluation.answer import answers, text_of
from longlora.evaluation.interval import of_trials
from longlora.parallel.sharding import say
from longlora.section import Once, Section, Seed, refuse

Task = Literal["lines", "topics"]
ROOM = {"lines": 24, "topics": 40}
"""Tokens that an answer may take; a byte-level tokenizer needs as many for a topic."""
SUBJECTS = (
    "rivers", "bridges", "bread", "clocks", "lighthouses", "carpets", "volcanoes", "railways", "orchards", "maps", "mills",
    "whales", "libraries", "glass", "gardens", "harbours", "honey", "tunnels", "comets", "paper",
)  # fmt: skip
ASPECTS = ("history", "future", "beauty", "cost", "science", "naming", "care", "trade")
TALK = (
    "USER: What should I know first about it?\nASSISTANT: Most of it was learnt slowly, by trial, and is still argued about.\n",
    "USER: Who knows most of it?\nASSISTANT: Those who work with it every day, and a few who write it down.\n",
    "USER: Has it changed much?\nASSISTANT: In detail a great deal, in principle less than one would think.\n",
    "USER: Where can I see it for myself?\nASSISTANT: Ask in the next town; somebody will gladly show you around.\n",
)


class LongEval(Section):
    tasks: Annotated[list[Task], Once]
    """Tasks of our own cases."""
    lengths: Annotated[list[PositiveInt], Once]
    """Prompts of our own cases in tokens, at most, the room for the answer included."""
    samples: int = Field(gt=0)
    """Our own cases for each length and task."""
    cases: Annotated[list[str], Once]
    """Files of test cases as LongChat publishes them (`200_lines.jsonl`, `20_topics.jsonl`), beside our own."""
    prompt: Literal["plain", "chat"]
    """plain: text to be continued after a lead; chat: a user's turn in the tokenizer's own template."""
    seed: Seed

    def misfits(self) -> Iterator[str]:
        """Files whose scores would replace others: they go by the name of their file, own cases by their length."""
        taken = {str(length): f"the length {length}" for length in self.lengths}
        for file in self.cases:
            if (name := Path(file).stem) in taken:
                yield f"longeval.cases: {file} and {taken[name]} would have one score, '{name}': give the file another name"
            taken[name] = file


class LinesCase(Case):
    prompt: str = Field(min_length=1)
    expected_number: int
    random_idx: tuple[str | int, int]


class TopicsCase(Case):
    prompt: str = Field(min_length=1)
    topics: list[str] = Field(min_length=1)


@dataclass(frozen=True)
class Question:
    """A prompt, the lead of its answer, and what is right: a number, or topics of which the first is asked for."""

    task: Task
    prompt: str
    lead: str
    right: list[str]


def read_cases(file: Path) -> list[Question]:
    """Published test cases of either task.

    Raises:
        ValueError: a line is malformed (file and line are named), or the file holds both tasks.
    """
    questions = []
    for place, row in read_lines(file):
        if "expected_number" in row:
            lines = case(LinesCase, row, place=place)
            lead = f"The <REGISTER_CONTENT> in line {lines.random_idx[0]} is <"
            questions.append(Question("lines", lines.prompt, lead, [str(lines.expected_number)]))
        elif "topics" in row:
            topics = case(TopicsCase, row, place=place)
            questions.append(Question("topics", topics.prompt, "The first topic was", topics.topics))
        else:
            raise ValueError(
                f"{place}: neither 'expected_number' (lines) nor 'topics'; there are {', '.join(row) or 'none'}"
            )
        if questions[-1].task != questions[0].task:
            raise ValueError(f"{place}: a case of {questions[-1].task} in a file of {questions[0].task}")
    return questions


def read_published(settings: LongEval) -> dict[str, list[Question]]:
    """The cases of all files, by the file's stem.

    Raises:
        ValueError: a file is malformed, or scores of two would have one name.
    """
    refuse(settings.misfits())
    return {Path(file).stem: read_cases(Path(file)) for file in settings.cases}


def own_lines(generator: random.Random, *, count: int) -> Question:
    syllables = ["".join(pair) for pair in zip("bdfgklmnprstvz" * 5, "aeiou" * 14, strict=True)]
    names = [
        f"{''.join(generator.sample(syllables, 2))}-{''.join(generator.sample(syllables, 2))}" for _ in range(count)
    ]
    names = list(dict.fromkeys(names))
    numbers = [generator.randrange(100, 50_000) for _ in names]
    asked = generator.randrange(len(names))
    record = "".join(f"line {name}: its number is <{number}>\n" for name, number in zip(names, numbers, strict=True))
    return Question(
        "lines",
        "Remember the number of every line of the following record. You will be asked for one of them.\n\n"
        f"{record}\nThe record is over. What is the number of line {names[asked]}? Answer with the number.",
        f"The number of line {names[asked]} is <",
        [str(numbers[asked])],
    )


def own_topics(generator: random.Random, *, count: int) -> Question:
    subjects = [f"the {aspect} of {subject}" for aspect in ASPECTS for subject in SUBJECTS]
    topics = generator.sample(subjects, min(count, len(subjects)))
    parts = []
    for number in range(count):
        topic = topics[number % len(topics)]  # beyond the 160 there are, the first come again
        talk = "".join(generator.sample(TALK, len(TALK)))
        parts.append(f"USER: Let us talk about the topic of {topic}.\nASSISTANT: Gladly.\n{talk}")
    return Question(
        "topics",
        "The following is a conversation of a USER and an ASSISTANT that goes from topic to topic. Remember the topics.\n\n"
        f"{''.join(parts)}\nThe conversation is over. What was the first topic? Answer with the topic alone.",
        "The first topic was",
        topics,
    )


class Writer:
    """Questions as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, prompt: Prompt) -> None:
        """Raises ValueError where a chat template is missing."""
        self.chat = prompt == "chat"
        self.frame = frame(tokenizer, prompt, plain="\n")

    def ids(self, question: Question) -> list[int]:
        lead = "" if self.chat else question.lead
        return self.frame.open(question.prompt + self.frame.after + lead)

    def own(self, task: Task, *, length: int, seed: str) -> Question:
        """A question of as many lines or topics as fit into `length` tokens.

        Raises:
            ValueError: not even two do.
        """
        make = own_lines if task == "lines" else own_topics
        room = length - ROOM[task]

        def made(count: int) -> tuple[Question, int]:
            question = make(random.Random(seed), count=count)
            return question, len(self.ids(question))

        _, shortest = made(2)
        if shortest > room:
            raise ValueError(
                f"longeval.lengths: {length} tokens are too few for {task}, the shortest takes {shortest + ROOM[task]}"
            )
        low, high = 2, 4
        while made(high)[1] <= room:
            low, high = high, 2 * high
        while high - low > max(1, low // 50):
            middle = (low + high) // 2
            low, high = (middle, high) if made(middle)[1] <= room else (low, middle)
        return made(low)[0]


def right(question: Question, text: str, *, chat: bool) -> bool:
    """Whether the answer `text` is right."""
    if question.task == "lines":
        numbers = re.findall(r"\d+", text)
        return bool(numbers) and numbers[-1 if chat else 0] == question.right[0]
    said = normal(text)
    named = {topic: said.find(normal(topic)) for topic in question.right}
    first = {topic: start for topic, start in named.items() if start >= 0}
    return bool(first) and min(first, key=lambda t: (first[t], -len(t))) == question.right[0]


def normal(text: str) -> str:
    """Lower case words, without punctuation and articles."""
    return " ".join(w for w in re.sub(r"[^\w\s]", " ", text.lower()).split() if w not in ("a", "an", "the"))


def measure(
    model: PreTrainedModel,
    *,
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: LongEval,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Share of right answers of the model `label` by task and length (published cases: by the file's stem), with exact 95 %
    intervals. Answers are kept in the folder `kept`.

    Raises:
        ValueError: a case file is malformed, a length has no room for a task, or there is no chat template for a chat prompt;
            or nothing is asked, or two files, or a file and a length, have one name.
    """
    if not (settings.tasks or settings.cases):
        raise ValueError("longeval names neither tasks nor cases; name some, or leave evaluate.longeval empty")
    published = read_published(settings)
    writer = Writer(tokenizer, prompt=settings.prompt)
    result: dict[str, Any] = {}
    own: dict[tuple[Task, str], list[Question]] = {
        (task, str(length)): [
            writer.own(task, length=length, seed=f"{settings.seed} {task} {length} {n}")
            for n in range(settings.samples)
        ]
        for task in settings.tasks
        for length in sorted(settings.lengths)
    }
    for (task, column), questions in [*own.items(), *(((q[0].task, stem), q) for stem, q in published.items())]:
        figures = score(model, tokenizer=tokenizer, writer=writer, questions=questions, kept=kept)
        result.setdefault(f"longeval_{task}", {label: {"prompt": settings.prompt}})[label][column] = figures
        say(f"{task} {column}: {figures['value']:.0%} of {figures['trials']} right")
    return result


def score(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    writer: Writer,
    questions: Sequence[Question],
    kept: Path | None,
) -> dict[str, Any]:
    prompts = [writer.ids(q) for q in questions]
    around = 60 if writer.chat else 0  # a chat model may talk around the answer
    max_new_tokens = [ROOM[q.task] + around for q in questions]
    written = answers(model, prompts=prompts, max_new_tokens=max_new_tokens, kept=kept)
    texts = [text_of(ids, tokenizer=tokenizer) for ids in written]
    hits = [right(q, text, chat=writer.chat) for q, text in zip(questions, texts, strict=True)]
    return of_trials(hits) | {"tokens": round(sum(map(len, prompts)) / len(prompts))}
