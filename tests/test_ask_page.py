"""The page as a person meets it, in headless Chromium: a document is sent, an answer comes, its evidence is shown in the text."""

import asyncio
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import browser
import pytest
from browser import needs_browser
from dummy import ENV
from test_asking import LONG, QUESTIONS, TEXT, TINY, session

from flows.cli.ask import page as ask_page
from longlora.model.load import open_model, open_tokenizer
from tasks.servers import answers, free_port

needs_nicegui = pytest.mark.skipif(not importlib.util.find_spec("nicegui"), reason="NiceGUI is not installed")
NEW = 144
"""Tokens of an answer: enough that it is seen as it comes."""
ANSWERED = ".answer:has(.said:not(.waiting))"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """The page's server on the demo's base model; it ends when it is told to, with nothing left in its folder."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    command = [sys.executable, "-m", "flows.cli.main", "page", "--model", str(TINY)]
    with (folder.parent / "page.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--max-new-tokens", str(NEW)],
            cwd=folder,
            env={
                k: v for k, v in (os.environ | ENV).items() if k != "PYTEST_CURRENT_TEST"
            },  # NiceGUI would take it for its own
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    watch = threading.Timer(120, server.kill)
    watch.start()
    assert server.stdout
    said = server.stdout.readline()
    assert said == f"ask at http://127.0.0.1:{port} (Ctrl-C ends it)\n", Path(log.name).read_text()
    while not answers(f"http://127.0.0.1:{port}/"):
        assert server.poll() is None, Path(log.name).read_text()
    watch.cancel()  # each step that waits for the page has a limit of its own
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 130
    said = Path(log.name).read_text()  # a tab that closes amid a request has starlette complain, not us
    assert "/flows/" not in said and "/longlora/" not in said, said
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as opened:
        yield opened


@pytest.fixture
def tab(chromium, url):
    """A tab on the page; whatever it asks for, it asks of the server on this machine."""
    tab = chromium.new_page(viewport={"width": 1280, "height": 800})
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_default_timeout(60_000)
    tab.goto(url)
    tab.wait_for_selector("text=Ask a document")
    yield tab
    tab.close()
    assert asked and all(a.startswith((url, "data:", "blob:")) for a in asked), asked


def send(tab, name: str, raw: bytes) -> str:
    """What the page says of the document."""
    tab.set_input_files("input[type=file]", {"name": name, "mimeType": "text/plain", "buffer": raw})
    return tab.wait_for_selector(".note:visible").inner_text()


def ask(tab, question: str, *, number: int):
    tab.fill(".ask input", question)
    tab.press(".ask input", "Enter")
    return tab.wait_for_selector(f":nth-match({ANSWERED}, {number}) >> text=tokens read").query_selector("xpath=../..")


@needs_nicegui
@needs_browser
def test_a_document_is_sent_asked_twice_and_cited(tab):
    here = session(open_model(TINY), open_tokenizer(TINY), max_new_tokens=NEW)
    assert send(tab, "report.txt", TEXT.encode()) == f"report: {here.length} tokens, read whole"
    for number, question in enumerate(QUESTIONS, start=1):
        expected = here.ask(question)
        shown = ask(tab, question, number=number)
        assert shown.query_selector(".said").inner_text() == expected.text
        assert shown.query_selector("text=tokens read").inner_text() == f"{expected.read} tokens read for this answer"
        place = shown.query_selector("blockquote .place").inner_text()
        start, end = map(int, re.search(r"line 1, characters (\d+)-(\d+)", place).groups())
        assert shown.query_selector("blockquote").inner_text().startswith(f"“{TEXT[start:end]}”")
        assert tab.inner_text("mark") == TEXT[start:end]
    assert expected.read == len(here.question_ids(question)), "the document was read once"


@needs_nicegui
@needs_browser
def test_on_a_telephone_nothing_stands_beyond_the_edge_whatever_its_words(tab):
    tab.set_viewport_size({"width": 320, "height": 640})
    send(tab, "report.txt", b"word" * 25)
    ask(tab, "word" * 25, number=1)
    tab.evaluate("document.querySelector('header .faint').innerText = 'a/model/folder_of_a_name'.repeat(4)")
    assert tab.evaluate("document.documentElement.scrollWidth") == 320


@needs_nicegui
@needs_browser
def test_on_a_telephone_what_is_cited_stays_in_view_and_the_document_is_a_click_away(tab):
    tab.set_viewport_size({"width": 390, "height": 500})
    tab.click("text=ask part by part")
    send(tab, "ships.md", LONG.encode())
    tab.evaluate(WATCH)
    shown = ask(tab, QUESTIONS[0], number=1)
    assert any(re.fullmatch(r"… part \d+ of \d+", text) for text in tab.evaluate("window.seen"))
    place = "document.querySelector('.answer .place').getBoundingClientRect()"
    tab.wait_for_function(f"document.querySelector('mark') && {place}.top >= 0 && {place}.bottom < 500")
    assert tab.evaluate("document.querySelector('mark').getBoundingClientRect().top") < 0
    shown.query_selector("blockquote").click()
    tab.wait_for_function("document.querySelector('mark').getBoundingClientRect().top >= 0")


@needs_nicegui
@needs_browser
def test_the_next_document_is_shown_from_its_beginning(tab):
    send(tab, "one.md", b"A line of it.\n\n" * 200)
    tab.evaluate("document.querySelector('.reader').scrollTop = 900")
    send(tab, "two.md", b"Another line.\n\n" * 200)
    tab.wait_for_function("document.querySelector('.reader').innerText.startsWith('Another')")
    tab.wait_for_function("document.querySelector('.reader').scrollTop === 0")


WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const said = document.querySelector(".answer .said");
        if (said && said.innerText !== window.seen.at(-1)) window.seen.push(said.innerText);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@needs_nicegui
@needs_browser
def test_an_answer_is_shown_as_it_comes(tab):
    send(tab, "report.txt", TEXT.encode())
    tab.evaluate(WATCH)
    ask(tab, QUESTIONS[0], number=1)
    *before, last = tab.evaluate("window.seen")
    partial_ = [text for text in before if text != "…"]
    assert len(partial_) > 1 and all(0 < len(text) < len(last) and last.startswith(text.rstrip()) for text in partial_)


@needs_nicegui
@needs_browser
def test_what_is_too_long_is_refused_then_read_as_is_chosen_and_a_passage_is_brought_into_view(tab):
    said = send(tab, "ships.md", LONG.encode())
    assert "the model reads 512" in said and "part by part" in said and "--too-long" not in said
    assert tab.is_disabled(".ask button")
    tab.click("text=read its beginning")
    assert "only its beginning is read" in tab.wait_for_selector(".note.warn").inner_text()
    tab.click("text=ask part by part")
    tab.wait_for_selector(".note:has-text('overlapping windows')")
    shown = ask(tab, QUESTIONS[0], number=1)
    assert re.search(r"the surest of \d+ parts: lines \d+ to \d+", shown.inner_text())
    if tab.query_selector("mark"):
        box, frame = tab.locator("mark").bounding_box(), tab.locator(".reader").bounding_box()
        assert frame["y"] <= box["y"] < frame["y"] + frame["height"]


@needs_nicegui
@needs_browser
def test_a_bad_document_is_named_and_html_in_one_is_text(tab):
    assert send(tab, "scan.txt", b"caf\xe9").startswith("scan.txt is not utf-8: byte 3 is 0xe9")
    tab.fill(".encoding input", "latin-1")
    send(tab, "scan.txt", b"caf\xe9 <img src=x onerror=alert(1)> <b>bold</b>")
    tab.wait_for_selector(".note.good")
    assert tab.inner_text(".text") == "café <img src=x onerror=alert(1)> <b>bold</b>"
    assert tab.query_selector(".reader img") is None


@needs_nicegui
@needs_browser
def test_a_file_that_is_no_document_is_told_what_one_is_and_not_that_it_is_too_large(tab):
    said = send(tab, "letter.docx", b"PK")
    assert said.startswith("a document is .txt, .md,") and "and has at most 268,435,456 bytes" in said


@needs_nicegui
@needs_browser
def test_what_is_written_from_right_to_left_is_shown_so(tab):
    send(tab, "ruling.txt", "פסק הדין ניתן.\nIt was given.".encode())
    tab.wait_for_selector(".text")
    first, stop, english = tab.evaluate("""() => {
        const words = document.querySelector(".text").firstChild;
        return [0, 13, 15].map(at => {
            const range = document.createRange();
            range.setStart(words, at);
            range.setEnd(words, at + 1);
            return range.getBoundingClientRect().x;
        });
    }""")
    assert english < stop < first


@needs_nicegui
@needs_browser
def test_a_tab_closed_amid_an_answer_leaves_the_next_one_served(chromium, url, tab):
    other = chromium.new_page()
    other.goto(url)
    send(other, "report.txt", TEXT.encode())
    other.fill(".ask input", QUESTIONS[0])
    other.press(".ask input", "Enter")
    other.close()
    send(tab, "report.txt", TEXT.encode())
    ask(tab, QUESTIONS[1], number=1)


@needs_nicegui
def test_a_page_of_another_name_is_turned_away(url):
    import httpx

    assert httpx.get(url, headers={"Host": "elsewhere.example"}, trust_env=False).status_code == 400


@needs_nicegui
def test_a_mistake_is_named_before_the_model_is_opened(monkeypatch):
    usual = {"model": str(TINY), "port": free_port(), "prompt": None, "max_new_tokens": 12}
    with pytest.raises(ValueError, match=r"--port 0: must be 1 to 65535"):
        ask_page(**usual | {"port": 0})
    with pytest.raises(ValueError, match=r"no model at \./nowhere"):
        ask_page(**usual | {"model": "./nowhere"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs NiceGUI, an extra: pip install"):
        ask_page(**usual)


@needs_nicegui
@pytest.mark.parametrize("told", [True, False], ids=["amid it", "at its end"])
@pytest.mark.parametrize(("raw", "shown"), [(b"Another one says so.", [(0, 0)]), (b"caf\xe9", [])])
def test_an_answer_on_a_document_that_was_replaced_is_dropped(monkeypatch, raw, shown, told):
    """Without a browser or a model, so that the document is replaced at a known moment."""
    from flows.cli import ask_page
    from longlora.asking.asking import Answer
    from longlora.data.sentences import Span

    begun, goes_on = threading.Event(), threading.Event()

    def answer(question, *, say):
        begun.set()
        assert goes_on.wait(60)
        if told:
            say("Mr. Renn")
        return Answer("Mr. Renn", Span(0, len(TEXT)), 0.0, 1, 9)

    monkeypatch.setattr(ask_page, "ui", MagicMock(**{"context.client.is_deleted": False}))
    monkeypatch.setattr(ask_page, "run", SimpleNamespace(io_bound=asyncio.to_thread))
    monkeypatch.setattr(
        ask_page, "Session", lambda *a, **k: MagicMock(ask=answer, length=9, **{"notice.return_value": ""})
    )
    shows: list[tuple[int, int]] = []
    monkeypatch.setattr(ask_page.Visit, "show", lambda visit, *span: shows.append(span))

    async def replaced():
        visit = ask_page.Visit(ask_page.Shared("m", MagicMock(), MagicMock(), 12, None))
        visit.encoding.value, visit.question.value, visit.send = "utf-8", QUESTIONS[0], MagicMock()
        visit.talk = MagicMock()
        await visit.take(sent(TEXT.encode()))
        asking = asyncio.ensure_future(visit.ask())
        await asyncio.to_thread(begun.wait, 60)
        shows.clear()
        visit.talk.clear.reset_mock()
        await visit.take(sent(raw))
        goes_on.set()
        await asking
        visit.talk.clear.assert_called_once()  # what was asked about the other one can be clicked no more
        visit.send.set_enabled.assert_called_with(bool(shown))

    with ThreadPoolExecutor(1) as pool:  # Playwright has a loop in this thread
        pool.submit(asyncio.run, replaced()).result()
    assert shows == shown


@pytest.fixture
def visit(monkeypatch):
    """A tab without a browser or a model; its documents have one token."""
    from flows.cli import ask_page

    monkeypatch.setattr(ask_page, "ui", MagicMock(**{"context.client.is_deleted": False}))
    monkeypatch.setattr(ask_page, "run", SimpleNamespace(io_bound=asyncio.to_thread))
    monkeypatch.setattr(ask_page, "Session", lambda *a, **k: MagicMock(length=1, **{"notice.return_value": ""}))
    with ThreadPoolExecutor(1) as pool:  # Playwright has a loop in this thread
        made = ask_page.Visit(ask_page.Shared("m", MagicMock(), MagicMock(), 12, None))
        made.encoding.value, made.question.value = "utf-8", QUESTIONS[0]
        yield made, lambda work: pool.submit(asyncio.run, work).result()


@needs_nicegui
def test_of_two_documents_the_one_that_was_sent_last_is_kept_however_long_the_first_takes(visit, monkeypatch):
    from flows.cli import ask_page

    here, done = visit
    parsed, second_is_read = ask_page.parsed, threading.Event()

    def slowly(raw, file, *, encoding):
        assert raw != b"The first." or second_is_read.wait(60)
        return parsed(raw, file, encoding=encoding)

    monkeypatch.setattr(ask_page, "parsed", slowly)

    async def both():
        first = asyncio.ensure_future(here.take(sent(b"The first.")))
        await asyncio.sleep(0.1)
        await here.take(sent(b"The second."))
        second_is_read.set()
        await first

    done(both())
    assert here.document.text == "The second."


@needs_nicegui
def test_an_answer_that_fails_is_not_waited_for(visit):
    here, done = visit
    done(here.take(sent(TEXT.encode())))
    here.session.ask = MagicMock(side_effect=MemoryError)
    from flows.cli import ask_page

    with pytest.raises(MemoryError):
        done(here.ask())
    said = ask_page.ui.label.return_value.classes.return_value.set_text
    said.assert_called_with("the answer failed: the terminal of `longlora page` says why")


def sent(raw: bytes) -> SimpleNamespace:
    """A browser's event."""
    return SimpleNamespace(file=SimpleNamespace(name="report.txt", read=partial(asyncio.sleep, 0, raw)))
