"""A document asked on a web page: the library's sessions behind NiceGUI, on 127.0.0.1; the page fetches nothing from elsewhere.

Every browser tab has a document and a conversation of its own; the model is shared, and answers one question at a time.
"""

import asyncio
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path, PurePath

from nicegui import app, run, ui
from nicegui.events import UploadEventArguments
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from flows.cli.ask import NOTHING
from flows.cli.ask_style import STYLE
from longlora.asking.asking import Answer, Prompt, Session, TooLong
from longlora.data.reading import LARGEST, SUFFIXES, Document, parsed
from longlora.evaluation.evidence import Evidence, Passage
from longlora.model.load import open_model, open_tokenizer
from tasks.listening import LOOPBACK

SHOWN = 4000
"""Characters of the document before and after a passage that the page shows: a whole book would be too much for a browser."""
TICK = 0.05
"""Seconds between two looks at what the model has written."""
SCROLL = """const reader = getHtmlElement(%d), mark = reader.querySelector("mark"), box = (mark || reader).getBoundingClientRect();
reader.scrollTop = mark ? reader.scrollTop + box.top - reader.getBoundingClientRect().top
  - Math.max(0, reader.clientHeight - box.height) / 2 : 0"""
"""The passage to the middle of the document's own frame: the window stays where it is, on a telephone at the answer."""
WAYS: dict[TooLong, str] = {"refuse": "refuse it", "truncate": "read its beginning", "windows": "ask part by part"}


@dataclass(frozen=True)
class Shared:
    """What all tabs share."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    prompt: Prompt | None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


def serve_page(folder: Path, *, name: str, port: int, max_new_tokens: int, prompt: Prompt | None) -> None:
    """Serve the page for the model of `folder` until interrupted.

    Raises:
        ValueError: there is no model or tokenizer.
    """
    logging.disable_progress_bar()
    shared = Shared(name, open_model(folder), open_tokenizer(folder), max_new_tokens, prompt)
    # A page elsewhere whose name is made to point here has another Host, and is turned away.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])
    app.on_startup(lambda: print(f"ask at http://{LOOPBACK}:{port} (Ctrl-C ends it)", flush=True))
    ui.run(
        lambda: Visit(shared),
        host=LOOPBACK,
        port=port,
        title="Ask a document",
        favicon="📖",
        show=False,
        reload=False,
        show_welcome_message=False,
        uvicorn_logging_level="warning",
    )


class LeftError(Exception):
    """Nobody is there any more to be answered: the tab was closed, its document replaced, or the server ends."""


class Visit:
    """One tab: a document, and the session that answers questions on it."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.client = shared, ui.context.client
        self.document: Document | None = None
        self.evidence: Evidence | None = None
        self.session: Session | None = None
        self.latest: UploadEventArguments | None = None
        ui.add_css(STYLE)
        ui.colors(primary="#0b6bb0")
        with ui.element("div").classes("sheet"):
            with ui.element("header"):
                ui.label("Ask a document").classes("title")
                context = int(shared.model.config.get_text_config().max_position_embeddings)
                ui.label(f"{shared.name} · reads {context:,} tokens").classes("faint")
            with ui.element("section").classes("document"):
                self.lay_out_document()
            with ui.element("section").classes("talk"):
                self.lay_out_talk()

    def lay_out_document(self) -> None:
        upload = ui.upload(
            label="Drop a document here, or choose one",
            auto_upload=True,
            max_file_size=LARGEST,
            on_upload=self.take,
            # by its name or by its size, the browser does not say
            on_rejected=lambda: self.say(
                "bad", f"a document is {', '.join(SUFFIXES)}, and has at most {LARGEST:,} bytes"
            ),
        )
        self.upload = upload.props(f'accept="{",".join(SUFFIXES)}" flat bordered').classes("drop")
        with ui.element("div").classes("choices"):
            ui.label("If it is longer than the model reads").classes("faint")
            self.way = ui.toggle(WAYS, value="refuse", on_change=self.lay).props("no-caps dense unelevated")
            self.encoding = ui.input("encoding of text", value="utf-8").props("dense").classes("encoding")
        self.note = ui.label().classes("note")
        self.note.set_visibility(False)
        self.reader = ui.element("div").classes("reader")

    def lay_out_talk(self) -> None:
        self.talk = ui.element("div").classes("turns")
        with self.talk:
            self.hint = ui.label(f"Documents: {', '.join(s[1:] for s in SUFFIXES)}. Nothing leaves this machine.")
            self.hint.classes("hint")
        with ui.element("form").classes("ask").on("submit.prevent", self.ask):
            self.question = ui.input(placeholder="Ask about the document").props("outlined dense autofocus")
            self.send = ui.button("Ask").props('type="submit" no-caps unelevated')
        self.able(False)

    def able(self, can: bool) -> None:
        self.question.set_enabled(can)
        self.send.set_enabled(can)

    def say(self, kind: str, text: str) -> None:
        """A line about the document: `good`, `warn` or `bad`."""
        self.note.set_text(text)
        self.note.classes(replace=f"note {kind}")
        self.note.set_visibility(bool(text))

    async def take(self, event: UploadEventArguments) -> None:
        """Read the file that was sent, and begin a session on it. Its name is a browser's word: only the last part is kept."""
        self.upload.reset()
        self.latest = event
        raw, file = await event.file.read(), Path(PurePath(event.file.name.replace("\\", "/")).name)
        document = evidence = None
        said = ""
        try:
            document = await run.io_bound(parsed, raw, file, encoding=self.encoding.value or "utf-8")
            evidence = await run.io_bound(Evidence, document) if document else None
        except ValueError as error:
            said = str(error)
        if self.latest is not event:  # it took so long that another was sent meanwhile
            return
        if said:
            self.say("bad", said)
        # At once: what is said and cited is always about the document that is shown.
        self.document, self.evidence, self.session = document, evidence, None
        self.able(False)
        self.talk.clear()
        self.reader.clear()
        if document:
            self.show(0, 0)
            await self.lay()

    async def lay(self) -> None:
        """Begin a session on the document, in the chosen way; what does not go is said."""
        if self.document is None:
            return
        shared, document, way = self.shared, self.document, self.way.value
        said, self.session = "", None
        try:
            session = await run.io_bound(
                Session,
                shared.model,
                tokenizer=shared.tokenizer,
                text=document.text,
                max_new_tokens=shared.max_new_tokens,
                too_long=way,
                prompt=shared.prompt,
            )
        except ValueError as error:
            session, said = None, re.sub(r" \(--too-long \w+\)", "", str(error))  # here they are chosen by a click
        # meanwhile another was chosen, and has its own session
        if self.document is not document or self.way.value != way:
            return
        self.session = session
        if session:
            whole = f"{document.name}: {session.length:,} tokens, read whole"
            notice = session.notice()
            self.say("warn" if notice else "good", notice or whole)
        else:
            self.say("bad", said)
        self.able(session is not None)

    def show(self, start: int, end: int) -> None:
        """The document around characters [start, end), those marked and in view; from its beginning, if there are none."""
        assert self.document
        text = self.document.text
        first, last = max(0, start - SHOWN), min(len(text), end + SHOWN)
        before, marked, after = (escape(t) for t in (text[first:start], text[start:end], text[end:last]))
        self.reader.clear()
        with self.reader:
            if first or last < len(text):
                lines = f"lines {self.document.line(first):,} to {self.document.line(last - 1):,}"
                ui.label(f"{self.document.name}, {lines}").classes("faint")
            html = f"{before}<mark>{marked}</mark>{after}" if marked else before + after
            ui.html(html, sanitize=False).classes("text")  # escaped above
        ui.run_javascript(SCROLL % self.reader.id)

    def turn_to(self, passage: Passage) -> None:
        """Show a passage, and the document itself where the window holds only the conversation."""
        self.show(passage.start, passage.end)
        ui.run_javascript(f'getHtmlElement({self.reader.id}).scrollIntoView({{block: "nearest"}})')

    async def ask(self) -> None:
        """Answer what was typed, as it comes; then cite."""
        session, evidence, question = self.session, self.evidence, str(self.question.value or "").strip()
        if session is None or evidence is None or not question:
            return
        self.question.set_value("")
        self.able(False)
        parts: list[str] = []
        waiting = "…"

        def tell(words: str) -> None:
            nonlocal waiting
            if self.client.is_deleted or app.is_stopping or self.evidence is not evidence:
                raise LeftError
            parts.append(words)
            if not words and len(session.windows) > 1:
                waiting = f"… part {len(parts):,} of {len(session.windows):,}"

        with self.talk:
            ui.label(question).classes("question")
            with ui.element("div").classes("answer"):
                said = ui.label("…").classes("said waiting")
                below = ui.element("div")
        self.follow()
        ticking = ui.timer(TICK, lambda: said.set_text("".join(parts).lstrip() or waiting))
        try:
            async with self.shared.turn:
                answer = await run.io_bound(session.ask, question, say=tell)
            passage = evidence.passage(question, answer.text, within=answer.window) if answer else None
        except LeftError:
            return
        except ValueError as error:
            said.set_text(str(error))
            said.classes(replace="said bad")
            return
        except Exception:  # memory, mostly
            said.set_text("the answer failed: the terminal of `longlora page` says why")
            said.classes(replace="said bad")
            raise
        finally:
            ticking.cancel()
            self.able(self.session is not None)
        if answer is None or self.client.is_deleted or self.evidence is not evidence:  # None: the server ends
            return
        said.set_text(answer.text or NOTHING)
        said.classes(replace="said")
        with below:
            self.cite(answer, passage)
        self.follow()
        self.question.run_method("focus")

    def follow(self) -> None:
        """Bring the end of the conversation into view: in its frame, and in the window where that is lower than the page."""
        ui.run_javascript(
            f"const e = getHtmlElement({self.talk.id}); e.scrollTop = e.scrollHeight; "
            'e.nextElementSibling.scrollIntoView({block: "nearest"})'
        )

    def cite(self, answer: Answer, passage: Passage | None) -> None:
        assert self.document
        if passage:
            with ui.element("blockquote").on("click", lambda: self.turn_to(passage)):
                ui.label(f"“{passage.text}”")
                ui.label(passage.place()).classes("place")
            self.show(passage.start, passage.end)
        else:
            ui.label("no passage shares its words").classes("faint")
        read = f"{answer.read:,} tokens read for this answer"
        if answer.windows > 1:
            first, last = (self.document.line(at) for at in (answer.window.start, answer.window.end - 1))
            read += f", the surest of {answer.windows} parts: lines {first:,} to {last:,}"
        ui.label(read).classes("faint")
