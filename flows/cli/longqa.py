"""Questions on one's own documents: the library's casebook, told what the command line says."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.cli.options import must_take
from longlora.data.author import Endpoint, Plan, write_questions
from longlora.data.casebook import Built, Casebook, DocumentCase, Measure, TooShortError, tokens, words, write
from longlora.data.casebook import build as build_cases
from longlora.data.cases import read_lines
from longlora.data.questions import KINDS, LONGEST, SHORTEST, askable
from longlora.data.reading import SUFFIXES, Document, located, read_documents
from longlora.data.sentences import prose

USUAL: dict[str, Any] = {
    "lengths": [500, 1000, 2000, 4000, 8000],
    "depths": [0.0, 0.25, 0.5, 0.75, 1.0],
    "kinds": list(KINDS),
}


def build(docs: str, *, out: Path, settings: dict[str, Any], tokenizer: Path | None, encoding: str) -> list[str]:
    """Write the cases to `out`; what was written, in lines.

    Raises:
        ValueError: the documents or settings are wrong, `out` cannot be written or holds something else, or there is too little
            text.
    """
    must_be_no_document(out)
    must_take("OUT", out)
    must_be_own(out)
    casebook_of(settings)  # what is wrong is said before the documents are read
    documents = documents_at(docs, encoding)
    measure = tokens_by(tokenizer) if tokenizer else words
    casebook, built = asked_about(documents, settings, measure)
    cases = built.cases
    write(cases, out)
    kinds = Counter(case.kind for case in cases)
    fit = len(documents) - len(built.unfit)
    said = [
        f"{len(cases)} question{'s' * (len(cases) != 1)} on {fit} document{'s' * (fit != 1)}: {out}",
        ", ".join(f"{kinds[kind]} {kind}" for kind in casebook.kinds),
    ]
    if "lengths" not in settings and casebook.lengths != USUAL["lengths"]:
        unit = "tokens" if tokenizer else "words"
        said.append(f"of up to {', '.join(map(str, casebook.lengths))} {unit}: there is too little text for more")
    if built.repeated:
        said.append(f"{built.repeated} more were the same ones on the same text, and are left out")
    if built.unfit:
        hold, are = ("holds", "is") if len(built.unfit) == 1 else ("hold", "are")
        told = f"no sentence of {SHORTEST} to {LONGEST} characters to ask about, and {are} left out"
        said.append(f"{len(built.unfit)} of {len(documents)} documents {hold} {told}, the first: {built.unfit[0]}")
    if built.missing:
        said.append(f"{len(built.missing)} could not be asked, the first: {built.missing[0]}")
    return said


def tokens_by(tokenizer: Path) -> Measure:
    from longlora.model.load import open_tokenizer  # it imports PyTorch, which nothing else here needs

    return tokens(open_tokenizer(tokenizer))


def asked_about(documents: Sequence[Document], settings: dict[str, Any], measure: Measure) -> tuple[Casebook, Built]:
    """The questions, and the settings they were built by. Lengths that are not among `settings` are the usual ones, but those for
    which there is too little text between headings and tables.

    Raises:
        ValueError: as `build` of the casebook.
    """
    lengths = usual_lengths(documents, measure)
    while True:
        casebook = casebook_of({"lengths": lengths} | settings)
        try:
            return casebook, build_cases(documents, casebook, measure=measure)
        except TooShortError as error:
            lengths = [length for length in lengths if length < error.length] or [error.length // 2]
            if "lengths" in settings or not lengths[0]:
                raise


def usual_lengths(documents: Sequence[Document], measure: Measure) -> list[int]:
    """The usual lengths that the documents that can be asked about together have; where they have none, all that they have."""
    held = 0
    for document in documents:
        if any(askable(document.text, sentence) for sentence in prose(document.text)):
            held += len(measure(document.text))
        if held >= max(USUAL["lengths"]):
            break
    return [length for length in USUAL["lengths"] if length <= held] or [max(1, held)]


def casebook_of(settings: dict[str, Any]) -> Casebook:
    """`settings`, and what is usual for the rest.

    Raises:
        ValueError: one is outside its range; it is named as on the command line.
    """
    try:
        return Casebook(**USUAL | settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        option = name.removesuffix("s") if name in USUAL else name  # those that may be repeated are lists
        rule = first["msg"].replace("Input should", "must")
        raise ValueError(f"--{option} {first['input']}: {rule}") from None


def write_by_model(
    docs: str,
    *,
    out: Path,
    asked: dict[str, Any],
    plan: dict[str, int],
    encoding: str,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Have the model behind the endpoint `asked` write questions to `out`; what was done, in lines. `tell` hears how far it is.

    Raises:
        ValueError: `out` cannot be written, `url` is none; or not all was done: what was is in `out`, and the same command goes on.
    """
    endpoint = Endpoint(key=os.environ.get("OPENAI_API_KEY"), **asked)
    if not endpoint.url.startswith(("http://", "https://")):
        raise ValueError(f"--url {endpoint.url}: must be an http address, such as http://127.0.0.1:8000/v1")
    must_be_no_document(out)
    must_take("OUT", out)
    journal = out.with_name(out.name + ".journal")
    if out.is_file() and out.stat().st_size and not journal.exists():
        raise ValueError(f"OUT {out}: is there, and not of this command (no {journal.name} beside it): name a new file")
    documents = documents_at(docs, encoding)
    work = write_questions(documents, endpoint=endpoint, plan=Plan(**plan), journal=journal, tell=tell)
    write(work.cases, out)
    written = f"{len(work.cases)} question{'s' * (len(work.cases) != 1)}"
    calls = f"{work.calls} call{'s' * (work.calls != 1)}"
    yield f"{written}: {out} ({calls} now, {work.tokens:,} tokens in all)"
    if work.estimated:
        replies = "1 reply" if work.estimated == 1 else f"{work.estimated} replies"
        yield f"the endpoint counts no tokens: those of {replies} are estimated, one for every four bytes"
    for reason, times in work.refused.most_common():
        yield f"left out {times}: {reason}"
    if work.stopped:
        kept = "is" if len(work.cases) == 1 else "are"
        raise ValueError(f"stopped: {work.stopped}; {written} {kept} kept, and the same command goes on")


def must_be_no_document(out: Path) -> None:
    """Raises ValueError: `out` is named as a document is; it could be the one that is read, or would be the next time."""
    if out.suffix.lower() in SUFFIXES:
        raise ValueError(
            f"OUT {out}: is named as a document, and questions are JSON lines: {out.with_suffix('.jsonl')}"
        )


def must_be_own(out: Path) -> None:
    """Raises ValueError: `out` is there, and is more than questions by rule, which the same command writes again."""
    if not out.is_file() or not out.stat().st_size:
        return
    keys = {field.name for field in fields(DocumentCase)}
    try:
        others = [place for place, row in read_lines(out) if row.keys() != keys or row["kind"] not in KINDS]
    except ValueError as error:
        others = [str(error)]
    if others:
        raise ValueError(f"OUT {out}: is there, and not of this command ({others[0]}): name a new file")


def documents_at(docs: str, encoding: str) -> list[Document]:
    return read_documents(located(docs), encoding=encoding)
