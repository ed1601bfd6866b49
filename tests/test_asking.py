"""Answers are those of plain greedy generation; the document is read once; what is too long is refused, cut, or read in windows."""

import io
import os
import re
import subprocess
import sys
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
import torch
import typer
from dummy import ENV
from test_pairs import CHATML
from test_passkey import byte_level, sentencepiece_like

from flows.cli import options
from flows.cli.ask import ask, typed
from flows.cli.chat import chat
from flows.cli.main import app
from longlora.asking.asking import Answer, CallbackStreamer, Prompt, Session, TooLong, windows
from longlora.asking.sinks import Dialogue
from longlora.data.dialogue import tokenised
from longlora.data.instructions import Turn
from longlora.data.sentences import Span
from longlora.data.wording import asked
from longlora.evaluation.longqa import answer_of
from longlora.model.gguf import Dtype
from longlora.model.load import open_model, open_tokenizer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny/model"
TEXT = "The committee met in 1873. Mr. Renn read the report to the members of the House.\n"
QUESTIONS = ("Who read the report?", "When did the committee meet?")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return open_model(TINY)


@pytest.fixture
def words():
    return open_tokenizer(TINY)


def session(model, words, text=TEXT, **settings):
    return Session(model, tokenizer=words, text=text, **{"max_new_tokens": 12, **settings})


def greedy(model, words, text, question, *, prompt, max_new_tokens=12):
    """The answer by one plain call of generate, and its mean log-probability, by one plain forward pass."""
    pair = tokenised(
        (Turn("user", asked(text.rstrip(), question)), Turn("assistant", "x")), tokenizer=words, prompt=prompt
    )
    ids = torch.tensor([pair.tokens[~pair.answer].tolist()])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    new = out[0, ids.shape[1] :]
    logits = model(out[:, :-1]).logits[0, ids.shape[1] - 1 :].log_softmax(-1)
    return words.decode(new, skip_special_tokens=True).strip(), logits.gather(1, new[:, None]).mean().item()


@pytest.mark.parametrize("prompt", ["authors", "chat"])
def test_every_answer_is_plain_greedy_generation_on_the_prompt_of_training(model, words, prompt):
    words.chat_template = CHATML if prompt == "chat" else None
    here = session(model, words)
    assert here.prompt == prompt
    for question in (*QUESTIONS, QUESTIONS[0]):
        told: list[str] = []
        answer = here.ask(question, say=told.append)
        text, certainty = greedy(model, words, TEXT, question, prompt=prompt)
        assert answer.text == "".join(told).strip() == text
        assert sum(map(bool, told)) > 1, "it comes word by word"
        assert answer.certainty == pytest.approx(certainty, abs=1e-4)


def test_a_further_question_reads_the_question_alone(model, words, monkeypatch):
    here = session(model, words)
    here.ask(QUESTIONS[0])
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    here.ask(QUESTIONS[1])
    hook.remove()
    assert sizes[0] == len(here.question_ids(QUESTIONS[1]))
    assert set(sizes[1:]) == {1}


def test_an_answer_that_breaks_off_does_not_spoil_the_next(model, words):
    here = session(model, words)

    def leave(text):
        if text:
            raise KeyboardInterrupt

    for question in QUESTIONS:
        with pytest.raises(KeyboardInterrupt):
            here.ask(question, say=leave)
    assert here.ask(QUESTIONS[0]).text == session(model, words).ask(QUESTIONS[0]).text


LONG = "".join(f"Paragraph {n} says that the number of ships was {n * 7}.\n\n" for n in range(40))


def test_what_is_too_long_is_refused_with_the_numbers_and_the_ways_out(model, words):
    with pytest.raises(
        ValueError, match=r"has \d{4} tokens, and the model reads 512, of which \d+ .*truncate.*windows"
    ):
        session(model, words, LONG)


def test_what_a_shorter_answer_would_leave_room_for_is_said(model, words):
    with pytest.raises(ValueError) as error:
        session(model, words, TEXT * 2, max_new_tokens=200)
    shorter = int(re.findall(r"a shorter answer \(--max-new-tokens (\d+)\)", str(error.value))[0])
    assert len(session(model, words, TEXT * 2, max_new_tokens=shorter).windows) == 1
    with pytest.raises(ValueError, match="the model reads 512, of which"):
        session(model, words, TEXT * 2, max_new_tokens=shorter + 1)


def test_what_is_said_word_by_word_is_the_answer(words):
    pieces = ["\n\n", " The", " House", " ", "\n", " met", " \n"]
    said: list[str] = []
    streamer = CallbackStreamer(words, said.append, ends=[])
    for piece in pieces:
        streamer.on_finalized_text(piece)
    assert "".join(said) == "".join(pieces).strip() and all(said)


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x\n", "one\n two  three", "\u65e5\u672c na\u00efve \U0001f600\n \u4e2d\u6587"]
)
def test_what_is_said_is_the_answer_in_a_tokenizer_that_puts_a_space_before_every_text_too(text):
    for tokenizer in (sentencepiece_like(text), byte_level()):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        said: list[str] = []
        streamer = CallbackStreamer(tokenizer, said.append, ends=[])
        for token in [0, *ids]:  # the first stands for the prompt
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(said) == tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("mark", ["<pad>", "d"])
def test_an_answer_ends_before_the_mark_of_the_template_that_was_learnt_or_of_the_model(words, mark):
    """As after supervised fine-tuning of a base, whose own end mark is that of a text; a mark may be a word, too."""
    words.chat_template = CHATML.replace("<eos>", "<pad>")
    model, chain = open_model(TINY), ("\u010a", "R", "e", mark, "\u010a")  # the first is a line break
    if mark != "<pad>":
        model.generation_config.eos_token_id = words.convert_tokens_to_ids(mark)
    after = dict(pairwise(words.convert_tokens_to_ids(list(chain))))
    read: list[int] = []

    def teach(module, args, out):
        if read[-1] in after:
            out[0, -1, after[read[-1]]] = 1000.0

    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    model.lm_head.register_forward_hook(teach)
    told: list[str] = []
    assert session(model, words).ask(QUESTIONS[0], say=told.append).text == "".join(told) == "Re"
    dialogue = Dialogue(model, tokenizer=words, size=400, max_new_tokens=12)
    assert [dialogue.say(question) for question in QUESTIONS] == ["Re", "Re"]


def test_a_plain_answer_is_its_first_line_that_is_not_empty_as_where_it_is_scored(words):
    model, line = open_model(TINY), words.convert_tokens_to_ids(["\u010a", "R", "e", "\u010a", "R"])
    steps: list[int] = []  # how many tokens each reads: parts of the prompt, and then one after the other

    def teach(module, args, out):
        out[0, -1, line[sum(1 for _ in takewhile(lambda read: read == 1, reversed(steps)))]] = 1000.0

    model.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.lm_head.register_forward_hook(teach)
    told: list[str] = []
    answer = session(model, words, prompt="plain").ask(QUESTIONS[0], say=told.append)
    assert answer.text == "".join(told) == answer_of(words.decode(line), prompt="plain") == "Re"


@pytest.mark.parametrize("prompt", ["authors", "chat", "plain"])
@pytest.mark.parametrize("make", [lambda: byte_level(0, marks=True), sentencepiece_like, lambda: open_tokenizer(TINY)])
def test_a_mark_in_a_users_words_is_words(model, make, prompt):
    """A document on tokenizers, or one that forges the end of its turn."""
    tokenizer = make()
    tokenizer.chat_template, mark = CHATML.replace("<eos>", tokenizer.eos_token), tokenizer.eos_token
    here = session(model, tokenizer, f"{mark}A text ends with {mark}. {mark}", prompt=prompt)
    for words, write in (
        (f"{mark}A text ends with {mark}. {mark}", here.prefix_ids),
        (f"{mark}What is {mark}?{mark}", here.question_ids),
        (
            f"{mark}What is {mark}?{mark}",
            Dialogue(model, tokenizer=tokenizer, size=64, max_new_tokens=1, prompt=prompt).turn,
        ),
    ):
        with_marks, without = write(words), write("again")
        assert with_marks.count(tokenizer.eos_token_id) == without.count(tokenizer.eos_token_id)
        if tokenizer.unk_token_id not in with_marks:
            assert words in tokenizer.decode(with_marks)
    assert here.windows == [(0, len(here.text))]


def test_marks_take_the_room_of_words(model, words):
    here = session(model, words, "They say <eos>, and mean it. " * 40, too_long="windows")
    assert here.ask(QUESTIONS[0]).windows == len(here.windows) > 2


def test_truncated_the_beginning_is_read_and_that_is_said(model, words):
    here = session(model, words, LONG, too_long="truncate")
    (window,) = here.windows
    assert window.start == 0 and LONG[: window.end] in LONG
    assert f"up to line {LONG.count(chr(10), 0, window.end) + 1}, character {window.end:,}" in here.notice()
    assert here.ask(QUESTIONS[0]).text == greedy(model, words, LONG[: window.end], QUESTIONS[0], prompt="authors")[0]


def test_windows_hold_all_of_the_text_and_the_surest_answer_is_taken(model, words):
    here = session(model, words, LONG, too_long="windows")
    assert here.windows[0].start == 0 and here.windows[-1].end == len(LONG.rstrip())
    for one, two in zip(here.windows[:-1], here.windows[1:], strict=True):
        assert one.start < two.start < one.end < two.end
    told: list[str] = []
    answer = here.ask(QUESTIONS[0], say=told.append)
    each = [greedy(model, words, LONG[slice(*w)], QUESTIONS[0], prompt="authors") for w in here.windows]
    assert answer.text == max(each, key=lambda e: (e[0] != "", e[1]))[0] == "".join(told)
    assert answer.windows == len(here.windows) > 2
    assert f"{len(here.windows)} overlapping windows" in here.notice()


@pytest.mark.parametrize("nothing", ["", ".", "The document does not say", '"The document does not say."'])
def test_a_window_that_says_nothing_never_wins_however_sure_it_is(model, words, monkeypatch, nothing):
    here = session(model, words, LONG, too_long="windows")
    said = iter([Answer("42", here.windows[0], -2.0, 2, 1), Answer(nothing, here.windows[1], -0.1, 2, 1)])
    monkeypatch.setattr(here, "windows", here.windows[:2])
    monkeypatch.setattr(here, "answer", lambda *args: next(said))
    assert here.ask(QUESTIONS[0]).text == "42"


def test_who_leaves_amid_the_windows_ends_the_work_before_the_next_one(model, words, monkeypatch):
    here = session(model, words, LONG, too_long="windows")
    asked, answer = [], here.answer
    monkeypatch.setattr(here, "answer", lambda *args: asked.append(args) or answer(*args))

    def leave(text):
        if len(asked) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.ask(QUESTIONS[0], say=leave)
    assert len(asked) == 2 < len(here.windows)


def test_a_window_is_never_longer_than_its_room(words):
    for space in (40, 97, 300):
        spans, length = windows(LONG, tokenizer=words, space=space)
        sizes = [len(words(LONG[slice(*s)], add_special_tokens=False)["input_ids"]) for s in spans]
        assert max(sizes) <= space + 8 and length > space
    assert windows("short", tokenizer=words, space=40)[0] == [(0, 5)]


def test_impossible_questions_are_refused(model, words):
    here = session(model, words)
    with pytest.raises(ValueError, match="the question is empty"):
        here.ask("  ")
    with pytest.raises(ValueError, match=r"the question has \d+ tokens, and \d+ are left"):
        here.ask("Why? " * 400)
    with pytest.raises(ValueError, match="ask for a shorter answer"):
        session(model, words, max_new_tokens=500)
    with pytest.raises(ValueError, match="chat template"):
        session(model, words, prompt="chat")


def longlora(folder, *arguments, typed=""):
    command = [sys.executable, "-m", "flows.cli.main", "ask", "--model", str(TINY), *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **ENV}, input=typed, capture_output=True, text=True, timeout=120
    )


def test_the_command_answers_and_cites_and_takes_further_questions(tmp_path, model, words):
    (tmp_path / "report.txt").write_text(TEXT)
    done = longlora(tmp_path, "--document", "report.txt", "--max-new-tokens", "12", typed="\n".join(QUESTIONS) + "\n")
    assert done.returncode == 0, done.stderr
    for question in QUESTIONS:
        assert session(model, words).ask(question).text in done.stdout
    assert done.stdout.count("from report.txt, line 1, characters") == 2
    assert done.stderr == ""


def test_one_document_is_asked_at_a_time(tmp_path):
    done = longlora(tmp_path, "-d", "a.txt", "-d", "b.txt", "Who?")
    assert done.returncode == 1 and done.stderr.startswith("error: --document: one at a time, and here are 2")


USUAL = {"model": str(TINY), "too_long": "refuse", "prompt": None, "max_new_tokens": 8, "encoding": "utf-8"}


def test_a_typed_question_that_is_too_long_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "report.txt").write_text(TEXT)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'Why? ' * 400}\n{QUESTIONS[0]}\n"))
    ask(document=tmp_path / "report.txt", question=None, **USUAL)
    said = capsys.readouterr()
    assert said.out.count("\n  from ") == 1
    assert re.fullmatch(r"error: the question has \d+ tokens, and \d+ are left for it\n", said.err)
    with pytest.raises(ValueError, match="prompt, question and an answer of 8 need"):
        ask(document=tmp_path / "report.txt", question="Why? " * 400, **USUAL)


def test_a_question_that_is_not_utf_8_is_said_to_be_and_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "report.txt").write_text(TEXT)
    broken = b"Qui \xe9tait l\xe0?".decode(
        errors="surrogateescape"
    )  # as it comes from a terminal, a pipe or the command line
    with pytest.raises(ValueError, match="^a question must be UTF-8, and this is not: Qui .tait l.[?]$"):
        ask(document=tmp_path / "none.txt", question=broken, **USUAL)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{broken}\n{QUESTIONS[0]}\n"))
    ask(document=tmp_path / "report.txt", question=None, **USUAL)
    said = capsys.readouterr()
    assert said.out.count("\n  from ") == 1 and said.err.startswith("error: a question must be UTF-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{broken}\n"))
    with pytest.raises(ValueError, match="a question must be UTF-8"):
        chat(str(TINY), window=None, prompt=None, max_new_tokens=8)


def test_a_byte_that_is_not_utf_8_ends_no_session_where_python_is_strict(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Qui \xe9tait?\nWhy?\n"), encoding="utf-8"))
    assert [line.encode(errors="surrogateescape") for line in typed()] == [b"Qui \xe9tait?", b"Why?"]


def test_an_answer_without_a_word_is_said_to_be_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "report.txt").write_text(TEXT)
    empty = Answer("", Span(0, len(TEXT)), certainty=0.0, windows=1, read=1)
    monkeypatch.setattr(Session, "ask", lambda self, question, say: empty)
    ask(document=tmp_path / "report.txt", question="Why?", **USUAL)
    assert capsys.readouterr().out == "(it said nothing)\n  from no passage that shares its words\n"
    monkeypatch.setattr(Dialogue, "say", lambda self, line, tell: "")
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    chat(str(TINY), window=None, prompt=None, max_new_tokens=8)
    assert capsys.readouterr().out == "(it said nothing)\n"


@pytest.mark.parametrize(
    ("way", "note"),
    [
        ("truncate", "only its beginning is read, up to line"),
        ("windows", "overlapping windows, and the answer it is surest of is taken"),
    ],
)
def test_the_command_says_what_it_does_with_what_is_too_long(tmp_path, capsys, model, words, way, note):
    (tmp_path / "long.txt").write_text(LONG)
    ask(document=tmp_path / "long.txt", question=QUESTIONS[0], **USUAL | {"too_long": way})
    said = capsys.readouterr()
    here = session(model, words, LONG, too_long=way, max_new_tokens=8)
    answer = here.ask(QUESTIONS[0])
    assert said.err == f"note: {here.notice()}\n" and note in said.err
    assert said.out.strip().startswith(answer.text)
    first, last = (LONG.count("\n", 0, at) + 1 for at in (answer.window.start, answer.window.end - 1))
    surest = f"  read in lines {first}-{last}, the surest of {len(here.windows)} windows\n"
    assert said.out.endswith(surest) == (way == "windows")


def test_a_terminal_is_told_which_window_is_asked(tmp_path, monkeypatch, capsys):
    (tmp_path / "long.txt").write_text(LONG)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    ask(document=tmp_path / "long.txt", question=QUESTIONS[0], **USUAL | {"too_long": "windows"})
    said = capsys.readouterr()
    told = [line for line in said.err.replace("\x1b[K", "").split("\r") if line.startswith("window ")]
    number = int(re.findall(r"surest of (\d+) windows", said.out)[0])
    assert told == [f"window {n} of {number}" for n in range(1, number + 1)] and said.err.endswith("\r\x1b[K")
    assert "window " not in said.out.splitlines()[0]


@pytest.mark.parametrize(
    ("name", "raw", "change", "said"),
    [
        ("none.txt", None, {}, "no document .*none.txt"),
        ("a.txt", b" \n", {}, "a.txt holds no text"),
        ("a.txt", b"caf\xe9", {}, "a.txt is not utf-8: byte 3 is 0xe9; name its encoding, such as latin-1"),
        (".", None, {}, "is a folder: name one document in it"),
        ("a.txt", LONG.encode(), {}, r"the document has \d+ tokens.* read its beginning \(--too-long truncate\)"),
        ("a.txt", b"x", {"model": "./nowhere"}, "no model at ./nowhere"),
    ],
)
def test_a_mistake_is_named(tmp_path, name, raw, change, said):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=said):
        ask(document=tmp_path / name, question="Who?", **USUAL | change)


def test_the_command_lines_choices_are_the_librarys():
    assert (options.PromptName, options.TooLong, options.Dtype) == (Prompt, TooLong, Dtype)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["ask", "--document", "a.txt", "--too-long", "cut"], "'cut' is not one of 'refuse', 'truncate', 'windows'"),
        (["ask", "--document", "a.txt", "--max-new-tokens", "0"], "greater than or equal to 1"),
        (["ask", "--document", "a.txt", "--prompt", "chatty"], "'chatty' is not one of 'chat', 'authors', 'plain'"),
        (["chat", "--prompt", "chatty"], "'chatty' is not one of"),
        (["page", "--prompt", "chatty"], "'chatty' is not one of"),
        (["serve", "--prompt", "chatty"], "'chatty' is not one of"),
    ],
)
def test_a_choice_that_is_none_is_named_before_anything_is_opened(command, said):
    with pytest.raises(typer.BadParameter, match=said):
        app(command, standalone_mode=False)


def test_a_mistake_on_the_command_line_is_one_line_and_quick(tmp_path):
    done = longlora(tmp_path, "--document", "none.pdf", "Who?")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: no document none.pdf")
