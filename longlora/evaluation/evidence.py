"""Where in a document an answer comes from: the sentence that shares the rarest words with it, and with what was asked.

A guess from the words alone, made after the answer and independent of the model: it cannot tell why the model answered so,
but lets a reader look. Words weigh by their rarity in the document (TF-IDF, scikit-learn).
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from longlora.data.reading import Document
from longlora.data.sentences import Span, parts, sentences
from longlora.data.wording import UNSAID
from longlora.data.words import terms, words

VERBATIM = 1.0
"""What a sentence that holds the answer word for word has more than one that does not; a cosine is at most 1."""
ASKED = 0.5
"""Weight of the question's words against the answer's: the question is mostly about what the passage is about."""
NUMBERING = re.compile(r"\d{1,2}[.)]")
"""The number of a list's item, which `sentences` takes for a sentence: for the answer "3" it would be the passage."""

LONGEST = 2000
"""Characters of what is cited as a sentence."""
LINE = re.compile(r"\S(?:.*\S)?")


@dataclass(frozen=True)
class Passage:
    """Characters [start, end) of the document's text, as people look them up."""

    start: int
    end: int
    lines: tuple[int, int]
    """First and last, from 1."""
    page: int | None
    heading: str | None
    text: str

    def place(self) -> str:
        first, last = self.lines
        said = [f"line {first}" if first == last else f"lines {first}-{last}"]
        said.append(f"characters {self.start:,}-{self.end:,}")
        said += [f"page {self.page}"] if self.page else []
        said += [f'under "{self.heading}"'] if self.heading else []
        return ", ".join(said)


class Evidence:
    """A document's sentences, weighed once and searched for every answer."""

    def __init__(self, document: Document) -> None:
        self.document = document
        spans = [part for sentence in sentences(document.text) for part in shortened(document.text, sentence)]
        self.spans = [s for s in spans if not NUMBERING.fullmatch(document.text, *s)]
        self.flat = [spelt(document.text[slice(*s)]) for s in self.spans]
        self.words = TfidfVectorizer(token_pattern=r"\S+", sublinear_tf=True)
        try:
            self.weights_SW: Any = self.words.fit_transform(self.flat)
        except ValueError:  # scikit-learn's way to say that there is not one word
            self.weights_SW = None

    def passage(self, question: str, answer: str, *, within: Span | None = None) -> Passage | None:
        """The best sentence, of those that reach into `within`; None if the answer says there is none, or no word is shared."""
        if self.weights_SW is None or words(answer) in ([], words(UNSAID)):
            return None
        score_S = self.near(answer) + ASKED * self.near(question)
        if whole := spelt(answer):
            score_S += VERBATIM * np.array([f" {whole} " in f" {s} " for s in self.flat])
        if within is not None:
            score_S *= np.array([s.start < within.end and within.start < s.end for s in self.spans])
        return self.best(score_S)

    def asked_about(self, question: str) -> Passage | None:
        """The best sentence for the question alone, before any answer; None if no word is shared."""
        return None if self.weights_SW is None else self.best(self.near(question))

    def near(self, text: str) -> np.ndarray:
        """The cosine of each sentence with `text`, shape (S,): both are sparse and of length 1, as the vectorizer makes them."""
        text_1W: Any = self.words.transform([spelt(text)])
        return (self.weights_SW @ text_1W.T).toarray()[:, 0]

    def best(self, score_S: np.ndarray) -> Passage | None:
        """The first sentence of the highest score; None where that is 0."""
        best = int(score_S.argmax())
        return self.shown(self.spans[best]) if score_S[best] > 0 else None

    def shown(self, span: Span) -> Passage:
        document = self.document
        heading = next((p.heading for p in parts(document.text) if p.start <= span.start < p.end), None)
        lines = document.line(span.start), document.line(span.end - 1)
        text = " ".join(document.text[slice(*span)].split())
        return Passage(span.start, span.end, lines, document.page(span.start), heading, text)


def shortened(text: str, sentence: Span) -> list[Span]:
    """The sentence, or its lines where it is longer than one that somebody wrote: a log, a list, a poem without full stops."""
    if sentence.end - sentence.start <= LONGEST:
        return [sentence]
    return [Span(*line.span()) for line in LINE.finditer(text, *sentence)]


def spelt(text: str) -> str:
    """Words in lower case, a space between them, whatever stood there."""
    return " ".join(terms(text.lower()))
