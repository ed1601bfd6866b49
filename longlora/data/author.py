"""Questions on documents, written by a model behind an OpenAI-compatible endpoint, each with evidence that must stand in the text.

What a model claims is not believed: a question whose evidence is not in the document, word for word but for white space, or is one
or two words that stand there several times, is left out and counted. Every reply is kept in a journal as it comes, so an
interrupted run goes on where it was, pays for nothing twice, and ends with the bytes of one that was not interrupted.
"""

import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from longlora.data.casebook import DocumentCase, Source, excerpt, words
from longlora.data.instructions import Text
from longlora.data.reading import Document
from longlora.data.sentences import by_chance, occurrences
from longlora.data.words import words as words_of

ORDER = (
    "Write {count} questions that this document answers, each answered by a few words. Reply with {form}, of objects "
    'with the keys "question", "answer" and "evidence"; evidence is the sentence that shows the answer, copied word for word.\n\n'
    "{document}"
)
LIST, OBJECT = "a JSON list alone", 'a JSON object alone, whose key "questions" has a list'
"""A schema's root must be an object."""
ATTEMPTS = 5
"""Calls for one reply, before the run stops."""
PATIENCE = 60.0
"""Seconds between two calls, at most, whatever the server asks for."""
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that another call may not meet."""


@dataclass(frozen=True)
class Endpoint:
    url: str
    """Up to and with /v1."""
    model: str
    key: str | None
    """Sent as a bearer token, without the white space around it; never written anywhere."""
    timeout: float = 300.0
    """Seconds for one reply, however it comes."""
    schema: bool = False
    """Whether the endpoint is to let its model write nothing but what has the form asked for (`response_format: json_schema`)."""
    max_tokens: int = 4096
    """Of a reply, at most, what a model thinks before it included: a small model may repeat itself for ever, above all inside a
    string that a schema asks for."""


@dataclass(frozen=True)
class Plan:
    excerpts: int
    length: int
    """Of an excerpt, in words, at most."""
    questions: int
    """Per excerpt."""
    budget: int
    """Tokens that all calls may take together, as the endpoint counts them, or `estimated`; no call is made once they are used."""
    seed: int


class Written(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)  # an answer that is a year is mostly written as one

    question: Text
    answer: Text
    evidence: Text


@dataclass
class Work:
    cases: list[DocumentCase] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """What was left out, by reason."""
    tokens: int = 0
    """That all replies took, those of earlier runs included."""
    estimated: int = 0
    """Replies, of those, whose tokens the endpoint did not count."""
    calls: int = 0
    """Made by this run."""
    stopped: str = ""
    """Why not all excerpts were asked about; '' if they were."""


class Reply(NamedTuple):
    text: str
    tokens: int
    """That it took, what was asked included; 0 if the endpoint does not count them."""
    cut: int = 0
    """The `max_tokens` at which it was cut short; 0 if it ended by itself."""


class Unavailable(Exception):  # noqa: N818  a state of the endpoint, told by the caller
    """No reply was had."""


def write_questions(
    documents: Sequence[Document],
    *,
    endpoint: Endpoint,
    plan: Plan,
    journal: Path,
    wait: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = lambda _: None,
) -> Work:
    """Questions on seeded excerpts. It stops, and says so, when the endpoint fails for good or the budget is used. After each
    reply `tell` hears how far it is.

    Raises:
        ValueError: the documents have too little text, the journal is not one, or the key cannot be sent.
    """
    headers = authorization(endpoint.key)
    sources = [s for s in (Source(d, words) for d in documents) if s.fit]
    if not sources:
        hold = "document holds" if len(documents) == 1 else "documents hold"
        raise ValueError(f"{len(documents)} {hold} no sentence to ask about")
    work, known, heard = Work(), read_journal(journal), set[str]()
    with httpx.Client(timeout=endpoint.timeout, headers=headers) as client:
        for number in range(plan.excerpts):
            if work.stopped and known.keys() <= heard:
                break
            dice = random.Random(f"{plan.seed} {plan.length} {number}")
            text, names = excerpt(sources, length=plan.length, collections=0.0, measure=words, dice=dice)
            order = ORDER.format(count=plan.questions, form=OBJECT if endpoint.schema else LIST, document=text)
            key = hashlib.sha256(f"{endpoint.model}\n{order}".encode()).hexdigest()
            if not text or key in heard:  # a short document has but one excerpt
                if not work.stopped:
                    work.refused["an excerpt is another's again" if text else "an excerpt holds no whole sentence"] += 1
                continue
            heard.add(key)
            replies = known.setdefault(key, [])
            for earlier in replies:  # one that was cut, and asked for again, was paid for as well
                pay(earlier, order, work)
            lacking = not replies or 0 < replies[-1].cut < endpoint.max_tokens
            if lacking and not work.stopped and work.tokens >= plan.budget:
                work.stopped = f"the budget of {plan.budget:,} tokens is used"
            if lacking and not work.stopped:
                try:
                    replies.append(
                        call(client, endpoint, order, form=form(plan.questions) if endpoint.schema else {}, wait=wait)
                    )
                except Unavailable as error:
                    work.stopped = str(error)
                else:
                    work.calls += 1
                    note(journal, key, replies[-1])
                    pay(replies[-1], order, work)
            if not replies:  # those to later excerpts may have come before
                continue
            reply = replies[-1]
            if reply.cut:
                work.refused["a reply is cut short (--max-tokens)"] += 1
            else:
                judge(reply.text, text, names, work)
            questions = f"{len(work.cases)} question{'s' * (len(work.cases) != 1)}"
            tell(f"{number + 1} of {plan.excerpts} excerpts: {questions}, {work.tokens:,} tokens")
    return work


def pay(reply: Reply, order: str, work: Work) -> None:
    """Count the tokens of `reply` to `order` among those of all."""
    work.estimated += not reply.tokens
    work.tokens += reply.tokens or estimated(order + reply.text)


def form(questions: int) -> dict[str, Any]:
    """What a request says of a reply's form, in OpenAI's terms, which vLLM and llama.cpp share. `strict` asks that every key be
    required and no other be allowed."""
    row = Written.model_json_schema() | {"additionalProperties": False}
    rows = {"type": "array", "items": row, "minItems": 1, "maxItems": questions}
    whole = {
        "type": "object",
        "properties": {"questions": rows},
        "required": ["questions"],
        "additionalProperties": False,
    }
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "questions", "schema": whole, "strict": True},
        }
    }


def authorization(key: str | None) -> dict[str, str]:
    """The header that carries a key.

    Raises:
        ValueError: it has a character that no header may have. The key is not shown.
    """
    bare = (key or "").strip()
    if not (bare.isascii() and bare.isprintable()):
        raise ValueError(
            "the key (OPENAI_API_KEY) has a line break, or a character that is not ASCII: no HTTP header may"
        )
    return {"Authorization": f"Bearer {bare}"} if bare else {}


def estimated(text: str) -> int:
    """Tokens of a text that nobody counted: one for every four bytes, as is usual for English, begun ones included."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


def call(
    client: httpx.Client, endpoint: Endpoint, order: str, *, form: dict[str, Any], wait: Callable[[float], None]
) -> Reply:
    """A reply; asked again after failures that may pass, a longer while each time.

    Raises:
        Unavailable: it failed for good.
    """
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": order}],
        "temperature": 0,
        "max_completion_tokens": endpoint.max_tokens,
    } | form
    said = ""
    for attempt in range(ATTEMPTS):
        delay = 2.0**attempt
        try:
            response = posted(client, endpoint, body)
        except httpx.LocalProtocolError:
            # without the error, which may show the key
            raise Unavailable(f"{endpoint.url} cannot be asked: what would be sent is not HTTP") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Unavailable(f"{endpoint.url} is no address of an endpoint: {error}") from None
        except httpx.RequestError as error:
            said = f"{type(error).__name__}: {error}"
        else:
            if response.is_success:
                return content(response, endpoint)
            said = f"HTTP {response.status_code}: {response.text[:200].strip()}"
            if response.status_code not in AGAIN:
                break
            delay = seconds(response.headers.get("Retry-After", ""), usual=delay)
        if attempt + 1 < ATTEMPTS:
            wait(min(delay, PATIENCE))
    raise Unavailable(f"{endpoint.url} gives no reply ({' '.join(said.split())})")


def posted(client: httpx.Client, endpoint: Endpoint, body: dict[str, Any]) -> httpx.Response:
    """What comes back; httpx's own time-out is of each piece, and a server that sends byte by byte would never meet it.

    Raises:
        httpx.RequestError: it does not come, or not in time.
    """
    begun, pieces = time.monotonic(), []
    with client.stream("POST", f"{endpoint.url.rstrip('/')}/chat/completions", json=body) as response:
        late = False
        for piece in response.iter_raw():
            if late:  # the last piece may be: then the reply is whole, and paid for
                raise httpx.ReadTimeout(f"no whole reply in {endpoint.timeout:g} seconds")
            pieces.append(piece)
            late = time.monotonic() - begun > endpoint.timeout
        return httpx.Response(response.status_code, headers=response.headers, content=b"".join(pieces))


def seconds(asked: str, *, usual: float) -> float:
    """To wait where a server says Retry-After: seconds, or a date (RFC 9110, section 10.2.3); as `usual` where it says neither."""
    if asked.isdecimal():
        return float(asked)
    try:
        until = parsedate_to_datetime(asked)
    except (ValueError, OverflowError):
        return usual
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def content(response: httpx.Response, endpoint: Endpoint) -> Reply:
    try:
        answer = response.json()
        choice = answer["choices"][0]
        cut = endpoint.max_tokens if choice.get("finish_reason") == "length" else 0
        tokens = max(0, int((answer.get("usage") or {}).get("total_tokens") or 0))
        return Reply(str(choice["message"]["content"] or ""), tokens, cut)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        raise Unavailable(
            f"{endpoint.url} does not answer as OpenAI's chat completions do: {response.text[:80]!r}"
        ) from None


def judge(reply: str, text: str, names: list[str], work: Work) -> None:
    """Add the questions of `reply` that hold what they claim to `work`, and count the others."""
    written = rows(reply)
    if written is None:
        work.refused["a reply is no JSON list"] += 1
        return
    asked = set[str]()
    for row in written:
        try:
            one = TypeAdapter(Written).validate_python(row)
        except ValidationError as error:
            wrong = error.errors()[0]
            work.refused[f"{'.'.join(map(str, wrong['loc'])) or 'a question'} {wrong['type'].replace('_', ' ')}"] += 1
            continue
        if not words_of(one.answer):
            work.refused["the answer holds no word"] += 1
            continue
        if not words_of(one.evidence):
            work.refused["the evidence holds no word"] += 1
            continue
        if one.question in asked:
            work.refused["the question is asked again"] += 1
            continue
        places = occurrences(one.evidence, text)
        if not places:
            work.refused["the evidence is not in the document"] += 1
            continue
        if by_chance(one.evidence, places):
            work.refused["the evidence is a word or two that stand at several places"] += 1
            continue
        asked.add(one.question)
        depth = round(places[0].start / len(text), 4)
        length = len(words(text))
        work.cases.append(
            DocumentCase(text, one.question, [one.answer], [text[slice(*places[0])]], "written", depth, length, names)
        )


def rows(reply: str) -> list[Any] | None:
    """The list that a reply holds: models like to put words or a fence around it, and those words may have brackets."""
    for bracket in re.finditer(r"\[", reply):
        try:
            found, _ = json.JSONDecoder().raw_decode(reply, bracket.start())
        except (ValueError, RecursionError):
            continue
        if any(isinstance(row, dict) for row in found):
            return found
    return None


def note(journal: Path, key: str, reply: Reply) -> None:
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as lines:
        row = {"key": key, "reply": reply.text, "tokens": reply.tokens} | ({"cut": reply.cut} if reply.cut else {})
        lines.write(json.dumps(row) + "\n")


def read_journal(journal: Path) -> dict[str, list[Reply]]:
    """Replies by the digest of what was asked, the last one last. A last line that was cut off in writing is taken away.

    Raises:
        ValueError: a whole line is none of a journal.
    """
    if not journal.exists():
        return {}
    raw = journal.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:  # nothing is written anew: these replies were paid for
        os.truncate(journal, len(whole))
    known: dict[str, list[Reply]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            known.setdefault(row["key"], []).append(Reply(row["reply"], row["tokens"], row.get("cut", 0)))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{journal} line {number} is no line of a journal: move it away") from None
    return known
