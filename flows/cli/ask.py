"""`longlora ask`: answer questions about a document."""

import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.options import PromptName, TooLong
from longlora.data.reading import Document, read_document

if TYPE_CHECKING:
    from longlora.asking.asking import Session
    from longlora.evaluation.evidence import Evidence

NOTHING = "(it said nothing)"
ERASE = "\r\x1b[K"
"""A terminal's line is empty again."""


def ask(
    model: str,
    *,
    document: Path,
    question: str | None,
    too_long: TooLong,
    prompt: PromptName | None,
    max_new_tokens: int,
    encoding: str,
) -> None:
    """Answer `question`, or every line that is typed, on the terminal; of these, one that cannot be asked does not end the others.

    Raises:
        ValueError: the model or the document is wrong; the document is too long and that is refused.
    """
    must_be_text(question or "")
    text = read_document(document, encoding=encoding)
    folder = model_folder(model)
    # Seconds of imports, which a wrong name or a document that cannot be read need not wait for.
    from transformers.utils import logging

    from longlora.asking.asking import Session
    from longlora.evaluation.evidence import Evidence
    from longlora.model.load import open_model, open_tokenizer

    logging.disable_progress_bar()
    session = Session(
        open_model(folder),
        tokenizer=open_tokenizer(folder),
        text=text.text,
        too_long=too_long,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        question=question or "",
    )
    if notice := session.notice():
        print(f"note: {notice}", file=sys.stderr)
    evidence = Evidence(text)
    for each in [question] if question is not None else typed():
        try:
            must_be_text(each)
            tell_answer(session, each, evidence=evidence, text=text, file=document.name)
        except ValueError as error:
            if question is not None:
                raise
            print(f"error: {error}", file=sys.stderr)  # the document is read; a shorter question may follow


def tell_answer(session: "Session", question: str, *, evidence: "Evidence", text: Document, file: str) -> None:
    """Ask, print the answer as it comes, and where in `file` it is from.

    Raises:
        ValueError: the question is too long.
    """
    tell = teller(len(session.windows))
    answer = session.ask(question, say=tell)
    if not answer.text:
        tell(NOTHING)
    print()
    passage = evidence.passage(question, answer.text, within=answer.window)
    place = f"{file}, {passage.place()}: {passage.text}" if passage else "no passage that shares its words"
    print(f"  from {place}")
    if answer.windows > 1:
        first, last = (text.line(at) for at in (answer.window.start, answer.window.end - 1))
        print(f"  read in lines {first}-{last}, the surest of {answer.windows} windows")


def teller(windows: int) -> Callable[[str], None]:
    """Prints words as they come. Where several windows are asked first, which may take long, a terminal is told which one."""
    asked, shown = count(1), windows > 1 and sys.stderr.isatty()

    def tell(words: str) -> None:
        if shown:
            print(
                f"{ERASE}window {next(asked):,} of {windows:,}" if not words else ERASE,
                end="",
                file=sys.stderr,
                flush=True,
            )
        print(words, end="", flush=True)

    return tell


def page(model: str, *, port: int, prompt: PromptName | None, max_new_tokens: int) -> None:
    """The same on a web page.

    Raises:
        ValueError: the model is wrong, the port is taken, or NiceGUI is not installed.
    """
    if importlib.util.find_spec("nicegui") is None:
        raise ValueError("the page needs NiceGUI, an extra: pip install -c constraints.txt -e '.[page]'")
    from tasks.listening import LOCAL, must_be_free

    must_be_free(LOCAL, port, "--port")
    folder = model_folder(model)
    from flows.cli.ask_page import serve_page

    serve_page(folder, name=model, port=port, max_new_tokens=max_new_tokens, prompt=prompt)


def typed() -> Iterator[str]:
    """Lines of the terminal, or of a pipe, until its end; empty ones are passed over. A byte that is no UTF-8 is refused with its
    line (`must_be_text`), and ends no session."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        print("> " if sys.stdin.isatty() else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def must_be_text(words: str) -> None:
    """Raises ValueError: `words` came as bytes that are no UTF-8, which Python keeps in a form that no tokenizer takes."""
    if any("\ud800" <= sign <= "\udfff" for sign in words):
        raise ValueError(f"a question must be UTF-8, and this is not: {words.encode('utf-8', 'replace').decode()}")


def model_folder(name: str) -> Path:
    """A folder as it is; else that of an alias of the registry, or a run's, brought here from DVC once. `longlora gc` leaves it
    to this process.

    Raises:
        ValueError: there is no such folder, alias or run.
    """
    from tasks import locks, workspace

    locks.pin(Path(name))
    if Path(name).is_dir():
        return Path(name)
    if "/" in name or name.startswith("."):
        raise ValueError(f"no model at {name} (seen from {Path.cwd()})")
    from tasks import runs, servers, tracking

    try:
        where = workspace.project(Path.cwd())
    except ValueError as error:  # away from a project the name is a folder's, misspelt
        raise ValueError(f"no folder '{name}' in {Path.cwd()}, and no runs to look it up in: {error}") from None
    servers.use_environment(where)
    source, _ = runs.address_and_key(tracking.connect(), where, name)
    with runs.data_of(name):
        return fetched(source, home=where.state / "asked")


def fetched(source: str, *, home: Path) -> Path:
    """The model behind a dvc:// address, kept under its commit; whole or absent, however many processes bring it at once."""
    import tempfile
    from urllib.parse import parse_qs, urlsplit

    from mlflow.artifacts import download_artifacts

    from tasks.locks import pin

    place = home / parse_qs(urlsplit(source).query)["rev"][0][:16]
    pin(place)
    if not place.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=f"{place.name}-", suffix=".partial") as scratch:
            partial = Path(scratch) / "model"  # below it, for the scratch folder is closed to others
            partial.mkdir()
            download_artifacts(artifact_uri=source, dst_path=str(partial))
            try:
                partial.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
                # another process was first, with the same bytes
    configs = sorted(place.rglob("config.json"), key=lambda file: len(file.parts))
    if not configs:
        raise ValueError(f"{source} holds no model (no config.json)")
    return configs[0].parent
