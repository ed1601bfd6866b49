"""Questions on one's own documents: the library's casebook, told what the command line says."""

from collections import Counter
from pathlib import Path
from typing import Any

from longlora.casebook import Casebook, tokens, words, write
from longlora.casebook import build as build_cases
from longlora.plain import open_tokenizer
from longlora.questions import KINDS
from longlora.reading import located, read_documents
from longlora.section import section_of

USUAL: dict[str, Any] = {
    "lengths": [500, 1000, 2000, 4000, 8000],
    "depths": [0.0, 0.25, 0.5, 0.75, 1.0],
    "kinds": list(KINDS),
}


def build(docs: str, *, out: Path, settings: dict[str, Any], tokenizer: Path | None, encoding: str) -> list[str]:
    """Write the cases to `out`; what was written, in lines.

    Raises:
        ValueError: the documents or settings are wrong, or there is too little text.
    """
    casebook = section_of(Casebook, {"longqa": USUAL | settings}, "longqa")
    documents = read_documents(located(docs), encoding="utf-8-sig" if encoding == "utf-8" else encoding)
    measure = tokens(open_tokenizer(tokenizer)) if tokenizer else words
    built = build_cases(documents, casebook, measure=measure)
    write(built.cases, out)
    kinds = Counter(case.kind for case in built.cases)
    said = [
        f"{len(built.cases)} questions on {len(documents)} documents: {out}",
        ", ".join(f"{kinds[kind]} {kind}" for kind in casebook.kinds),
    ]
    if built.missing:
        said.append(f"{len(built.missing)} could not be asked, the first: {built.missing[0]}")
    return said
