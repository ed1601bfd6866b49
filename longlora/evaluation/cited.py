"""Whether an answer points to the evidence: the passage that is cited for it, held to the passages that show the right answer.

Cited is what `longlora ask` cites (evidence.py): the sentence of the document that supports the answer best, beside the
question's words. A question often names its passage by itself, so there is a floor: the sentence that is cited for the question
alone. What an answer is worth as a pointer is how far it stands above, and a wrong answer can stand below.

The rules. One character in common is enough, with one of the passages, wherever in the document its words stand, as whole words if
they do so anywhere. One or two words that stand at several places are refused: whatever is cited would be right by chance. Headings
are left out, no sentence is one. An answer that cites nothing finds nothing. The whole document is searched, also where a prompt
held less of it. A case without evidence, such as one that the document does not answer, has nothing to be found and is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from longlora.data.reading import Document
from longlora.data.sentences import by_chance, occurrences, parts
from longlora.evaluation.evidence import Evidence, Passage


@dataclass(frozen=True)
class Citation:
    """Whether the evidence was found by question and answer, and by the question alone."""

    answer: bool
    question: bool

    def scores(self) -> dict[str, float]:
        return {"evidence": float(self.answer), "evidence_floor": float(self.question)}


class Truth:
    """Where the evidence of a case stands in its document; nowhere, if it has none."""

    def __init__(self, document: str, evidence: Sequence[str]) -> None:
        self.document = document
        titles = headings(document)
        quoted = [passage for passage in evidence if " ".join(passage.split()) not in titles]
        self.spans = [span for passage in quoted for span in occurrences(passage, document)]

    @property
    def depth(self) -> float | None:
        """The share of the document's characters before the first evidence; None without."""
        return min(s.start for s in self.spans) / len(self.document) if self.spans else None

    def holds(self, passage: Passage | None) -> bool:
        return passage is not None and any(s.start < passage.end and passage.start < s.end for s in self.spans)


def headings(document: str) -> set[str]:
    return {" ".join(p.heading.split()) for p in parts(document)}


def fault(passage: str, document: str) -> str:
    """Why a passage can be no evidence, or ''."""
    places = occurrences(passage, document)
    if not places:
        return "does not stand in the document, word for word"
    if by_chance(passage, places) and " ".join(passage.split()) not in headings(document):
        return f"stands {len(places)} times in the document, too short to point anywhere: give the sentence around it"
    return ""


def cite(truths: Sequence[Truth], *, questions: Sequence[str], answers: Sequence[str]) -> list[Citation | None]:
    """For each case what its question and answer find; None for a case without evidence."""
    found: list[Citation | None] = []
    evidence: Evidence | None = None
    for truth, question, answer in zip(truths, questions, answers, strict=True):
        if not truth.spans:
            found.append(None)
            continue
        if evidence is None or evidence.document.text != truth.document:  # cases of one document stand together
            evidence = Evidence(Document("", truth.document))
        found.append(
            Citation(
                answer=truth.holds(evidence.passage(question, answer)),
                question=truth.holds(evidence.asked_about(question)),
            )
        )
    return found
