"""Questions on long documents, scored against given answers: exact match, F1 over words, ROUGE-L.

Cases are JSON lines of `document`, `question` and `answers` (one or more that are right; the best counts). Exact match and F1
are SQuAD's (Rajpurkar et al. 2016): lower case, without punctuation and English articles; for other scripts MLQA's (Lewis et al.
2020): punctuation is what Unicode says, and where a script puts no spaces between words, each character counts as one. ROUGE-L
is the F measure of the longest common subsequence (Lin 2004), of the library rouge-score, over the same words.
Where a case also has `evidence`, the passages that show the answer, it is scored whether the answer points to one of them
(longlora/evaluation/cited.py).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.data.cases import Case, case, read_lines
from longlora.data.prompt import WORD, continuation, frame
from longlora.data.tokenise import as_words
from longlora.data.wording import LEAD, PLAIN_LEAD, READ, asked, the_question
from longlora.data.words import words
from longlora.evaluation.answer import answers, text_of
from longlora.evaluation.breakdown import PARTED, Marked, by_depth, by_length, overall
from longlora.evaluation.cited import Truth, cite, fault
from longlora.parallel.sharding import say
from longlora.section import Once, Section

SHOWN = 60
"""Characters of a question that a message shows."""


class LongQA(Section):
    cases: Annotated[list[str], Once]
    """JSON lines files; all their cases are scored together."""
    held_out: bool
    """Also the cases that the casebook of `pairs` has on documents that are not trained on."""
    length: int = Field(gt=0)
    """Prompts in tokens, at most, the answer included. A longer document loses its middle, as in LongBench, and is counted."""
    max_new_tokens: int = Field(gt=0)
    """Tokens that an answer may take."""
    prompt: Literal["plain", "authors", "chat"]
    """plain: text to be continued, to the end of the line; authors: [INST]...[/INST], for models that were fine-tuned on pairs
    with it; chat: a user's turn in the tokenizer's own template."""

    def misfits(self) -> Iterator[str]:
        """What is wrong with files of cases. One that is not there may be known by its hash, and scored already."""
        wrong = (faulty(file.resolve()) for file in map(Path, self.cases) if file.is_file())
        return filter(None, wrong)


class Question(Case):
    document: str = Field(pattern=r"\S")
    question: str = Field(pattern=r"\S")
    answers: list[str] = Field(min_length=1)
    evidence: list[Annotated[str, Field(pattern=r"\S")]] = Field(default=[])
    """Passages of the document, word for word; none where it does not say, or nobody noted them."""
    sources: list[str] = Field(default=[])
    """What the document is from, by name, as `longlora longqa build` notes it: questions on one source are not independent."""


def read_cases(file: Path) -> list[Question]:
    """The cases of a file.

    Raises:
        ValueError: a line is malformed: file, line, and what is wrong. An answer without a word cannot be given, and evidence
            that is not in the document cannot be found.
    """
    found = []
    for place, row in read_lines(file):
        question = case(Question, row, place=place)
        for answer in question.answers:
            if not words(answer):
                raise ValueError(f"{place}: answers: {answer!r} holds no word")
        for passage in question.evidence:
            if said := fault(passage, question.document):
                raise ValueError(f"{place}: evidence: {passage!r} {said}")
        found.append(question)
    return found


@cache
def faulty(file: Path) -> str:
    """What is wrong with a file of cases, or ''; a run is told before its training."""
    try:
        read_cases(file)
    except ValueError as error:
        return str(error)
    return ""


class Words(Tokenizer):
    """Our words, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


ROUGE = RougeScorer(["rougeL"], tokenizer=Words())


def exact(given: str, wanted: str) -> float:
    return float(words(given) == words(wanted))


def f1(given: str, wanted: str) -> float:
    """The harmonic mean of precision and recall over words, each counted as often as it stands."""
    ours, theirs = Counter(words(given)), Counter(words(wanted))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def rouge_l(given: str, wanted: str) -> float:
    return float(ROUGE.score(wanted, given)["rougeL"].fmeasure)


METRICS = {"exact": exact, "f1": f1, "rouge_l": rouge_l}


class Written(NamedTuple):
    """A prompt."""

    ids: list[int]
    tokens: int
    """Of the whole document."""
    cut: bool
    """Whether its middle was left out."""


class Writer:
    """Questions as token ids of a bounded number."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, settings: LongQA) -> None:
        """Raises ValueError where a chat template is missing."""
        self.tokenizer, self.settings = tokenizer, settings
        self.frame = frame(tokenizer, settings.prompt, plain=PLAIN_LEAD)

    def write(self, question: Question) -> Written:
        """The prompt, with as much of the document as there is room for.

        Raises:
            ValueError: there is no room for the document.
        """
        text, put = (as_words(said, tokenizer=self.tokenizer) for said in (question.document, question.question))
        before = len(self.frame.open(READ))
        after = len(continuation(self.tokenizer, LEAD + the_question(put) + self.frame.after, after=WORD))
        space = self.settings.length - self.settings.max_new_tokens - before - after
        if space < 2:
            raise ValueError(
                f"longqa.length: {self.settings.length} tokens are too few for the question {question.question[:SHOWN]!r}, "
                f"without a document it is {self.settings.length - space}"
            )
        # At once, as in training: a tokenizer may join signs across the borders of the document.
        ids = self.frame.open(asked(text, put) + self.frame.after)
        tokens = len(ids) - before - after
        if tokens > space:
            ids = ids[: before + (space + 1) // 2] + ids[-(space // 2 + after) :]
        return Written(ids, tokens, cut=tokens > space)


def measure(
    model: PreTrainedModel,
    *,
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: LongQA,
    held_out: Path | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Scores of the model `label` over all cases, and by length and depth (longlora/evaluation/breakdown.py), with 95 % intervals.
    `held_out` is a file of further cases. Answers are kept in the folder `kept`.

    Raises:
        ValueError: a case is malformed, there is none, or no room for a document, or no chat template for a chat prompt.
    """
    questions = [question for file in files(settings, held_out) for question in read_cases(file)]
    if not questions:
        raise ValueError(
            "longqa.cases names no file, and the casebook of `pairs` has no held-out case: name one, or leave evaluate.longqa empty"
        )
    writer = Writer(tokenizer, settings=settings)
    prompts = [writer.write(question) for question in questions]
    written = answers(
        model,
        prompts=[prompt.ids for prompt in prompts],
        max_new_tokens=[settings.max_new_tokens] * len(prompts),
        kept=kept,
        documents=[question.document for question in questions],
    )
    said = [answer_of(text_of(ids, tokenizer=tokenizer), prompt=settings.prompt) for ids in written]
    marked = mark(questions, prompts=prompts, said=said)
    result: dict[str, Any] = {
        "prompt": settings.prompt,
        "cases": len(questions),
        "cut": sum(prompt.cut for prompt in prompts),
        **overall(marked),
    }
    told = [f"{name} {figure['value']:.3f}" for name, figure in result.items() if isinstance(figure, dict)]
    cited = f"; {result['evidence']['trials']} of them have evidence" if "evidence" in result else ""
    say(f"{', '.join(told)} of {len(questions)}{cited}")
    parts = {f"longqa_{n}": by_length(marked, name=n, longest=settings.length) for n in PARTED}
    parts["longqa_depth"] = by_depth(marked)
    return {"longqa": {label: result}, **{name: {label: part} for name, part in parts.items() if part}}


def files(settings: LongQA, held_out: Path | None) -> list[Path]:
    own = [held_out] if settings.held_out and held_out is not None else []
    return [*map(Path, settings.cases), *own]


def answer_of(text: str, *, prompt: str) -> str:
    """What counts of the text: one that is continued goes on after the answer, with the next line; a model that was taught to
    answer ends by itself."""
    return (text.strip().splitlines() or [""])[0] if prompt == "plain" else text.strip()


def mark(questions: Sequence[Question], *, prompts: Sequence[Written], said: Sequence[str]) -> list[Marked]:
    """The score of every answer; the best of the right answers counts."""
    truths = [Truth(q.document, q.evidence) for q in questions]
    citations = cite(truths, questions=[q.question for q in questions], answers=said)
    return [
        Marked(
            {name: max(score(answer, right) for right in question.answers) for name, score in METRICS.items()}
            | ({} if citation is None else citation.scores()),
            source=(question.sources or [question.document])[0],  # one of several: its others are taken as independent
            tokens=prompt.tokens,
            depth=truth.depth,
        )
        for question, prompt, answer, truth, citation in zip(questions, prompts, said, truths, citations, strict=True)
    ]
