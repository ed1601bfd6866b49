"""A model's questions are believed as far as the document shows them; whatever the endpoint does, finished work is kept."""

import json
import math
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
from jsonschema import Draft202012Validator

from flows.cli.longqa import write_by_model
from longlora.data import author
from longlora.data.author import ATTEMPTS, PATIENCE, Endpoint, Plan, Work, judge, posted, write_questions
from longlora.data.casebook import excerpt, write
from longlora.data.reading import Document

DOCUMENTS = [
    Document(
        name,
        " ".join(
            f"Ship {n} of the {name} fleet\ncarried {n * 7} barrels of oil to the northern port." for n in range(60)
        ),
    )
    for name in ("white", "black", "green")
]
PLAN = Plan(excerpts=6, length=120, questions=3, budget=10_000, seed=1)


class Stub(BaseHTTPRequestHandler):
    """Answers from the document it is sent: one true question, one false quotation, one without an answer."""

    script: list
    """What the next calls meet: a status, a raw body, a float for silence of so many seconds, a dict of headers for a status of
    429, a range for so many bytes one by one, or None for a good reply."""
    seen: list

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers.get("Authorization"), body))
        turn = self.script.pop(0) if self.script else None
        if isinstance(turn, int):
            self.answer(turn, b'{"error": "busy"}')
        elif isinstance(turn, bytes):
            self.answer(200, turn)
        elif isinstance(turn, float):
            time.sleep(turn)  # and then the connection ends without a word
        elif isinstance(turn, dict):
            self.answer(429, b"busy", **turn)
        elif isinstance(turn, range):
            self.send_response(200)
            self.send_header("Content-Length", str(len(turn)))
            self.end_headers()
            for _ in turn:
                self.wfile.write(b" ")
                time.sleep(0.05)
        else:
            document = body["messages"][0]["content"].split("\n\n", 1)[1]
            sentence = document.split(". ")[1].split(".")[0] + "."
            rows = [
                {"question": "What was carried?", "answer": "oil", "evidence": " ".join(sentence.split())},
                {"question": "Who drowned?", "answer": "Ada", "evidence": "Ada drowned in the northern port."},
                {"question": "Who?", "evidence": sentence},
            ]
            text = f"Here you are:\n```json\n{json.dumps(rows)}\n```"
            reply = {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 100}}
            self.answer(200, json.dumps(reply).encode())

    def answer(self, status, raw, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(raw)), "Retry_After": "3"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def stub():
    """A server of its own for each test."""
    handler = type("Handler", (Stub,), {"script": [], "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "some-model", "sesame", timeout=10)
    server.shutdown()
    server.server_close()


def work(endpoint, tmp_path, plan=PLAN, waits=None):
    return write_questions(
        DOCUMENTS,
        endpoint=endpoint,
        plan=plan,
        journal=tmp_path / "j",
        wait=(waits if waits is not None else []).append,
    )


def test_only_what_stands_in_the_document_is_kept(stub, tmp_path):
    handler, endpoint = stub
    done = work(endpoint, tmp_path)
    assert (len(done.cases), done.calls, done.tokens, done.stopped) == (6, 6, 600, "")
    assert all(c.evidence[0] in c.document and c.kind == "written" for c in done.cases)
    assert done.refused == {"the evidence is not in the document": 6, "answer missing": 6}
    path, key, body = handler.seen[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sesame", "some-model")
    assert body["max_completion_tokens"] == endpoint.max_tokens
    assert "sesame" not in (tmp_path / "j").read_text()


def test_a_schema_is_asked_for_and_what_follows_it_is_read(stub, tmp_path):
    handler, endpoint = stub
    row = {"question": "What was carried?", "answer": "oil", "evidence": "barrels of oil to the northern port."}
    content = json.dumps({"questions": [row]})
    handler.script += [json.dumps({"choices": [{"message": {"content": content}}]}).encode()]
    told = []
    done = write_questions(
        DOCUMENTS,
        endpoint=replace(endpoint, schema=True),
        plan=replace(PLAN, excerpts=1),
        journal=tmp_path / "j",
        tell=told.append,
    )
    assert [case.question for case in done.cases] == ["What was carried?"]
    assert told == [f"1 of 1 excerpts: 1 question, {done.tokens:,} tokens"]
    asked = handler.seen[0][2]
    assert "JSON object" in asked["messages"][0]["content"]
    form = asked["response_format"]["json_schema"]
    Draft202012Validator.check_schema(form["schema"])
    follows = Draft202012Validator(form["schema"]).is_valid
    assert form["strict"] and follows({"questions": [row]})
    for other in (
        [row],
        {"questions": []},
        {"questions": [row] * 4},
        {"questions": [row | {"why": "so"}]},
        {"questions": [{}]},
    ):
        assert not follows(other)


def test_without_a_schema_none_is_asked_for(stub, tmp_path):
    handler, endpoint = stub
    work(endpoint, tmp_path, plan=replace(PLAN, excerpts=1))
    assert "response_format" not in handler.seen[0][2]


def test_failures_that_may_pass_are_waited_for(stub, tmp_path):
    handler, endpoint = stub
    handler.script += [429, 503, None, 500]
    waits = []
    assert len(work(endpoint, tmp_path, waits=waits).cases) == 6
    assert waits == [3.0, 3.0, 3.0]
    assert len(handler.seen) == 9


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [("7", 7, 7), ("²", 1, 1), ("soon", 1, 1), ("-3", 1, 1), (f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT", 1, 1)],
)
def test_a_server_is_waited_for_as_long_as_it_says(stub, tmp_path, said, least, most):
    handler, endpoint = stub
    handler.script += [{"Retry_After": said}]
    assert len(work(endpoint, tmp_path, waits=(waits := [])).cases) == 6
    assert len(waits) == 1 and least <= waits[0] <= most


@pytest.mark.parametrize(("ahead", "least", "most"), [(40, 30, 40), (-40, 0, 0), (900, PATIENCE, PATIENCE)])
def test_a_server_may_say_the_date_until_which_it_is_waited_for(stub, tmp_path, ahead, least, most):
    handler, endpoint = stub
    handler.script += [{"Retry_After": formatdate(time.time() + ahead, usegmt=True)}]
    assert len(work(endpoint, tmp_path, waits=(waits := [])).cases) == 6
    assert len(waits) == 1 and least <= waits[0] <= most


def test_a_reply_that_comes_byte_by_byte_has_no_longer_than_another(stub, tmp_path):
    handler, endpoint = stub
    handler.script += [range(200)] * ATTEMPTS
    begun = time.monotonic()
    done = work(replace(endpoint, timeout=0.3), tmp_path)
    assert "ReadTimeout: no whole reply in 0.3 seconds" in done.stopped and len(handler.seen) == ATTEMPTS
    assert time.monotonic() - begun < ATTEMPTS * 2


def test_a_body_that_cannot_be_unpacked_is_tried_again(stub, tmp_path):
    handler, endpoint = stub
    handler.script += [{"Content_Encoding": "gzip"}, {"Content_Encoding": "gzip"}]
    done = work(endpoint, tmp_path, waits=(waits := []))
    assert (len(done.cases), done.stopped, waits) == (6, "", [1.0, 2.0])


@pytest.mark.parametrize(
    ("silence", "timeout", "said"), [(0.0, 10, "RemoteProtocolError: Server disconnected"), (0.5, 0.2, "ReadTimeout")]
)
def test_a_connection_that_is_dropped_or_silent_is_tried_again_and_then_ends_the_run(
    stub, tmp_path, silence, timeout, said
):
    handler, endpoint = stub
    handler.script += [None, silence, None, *[silence] * ATTEMPTS]
    done = work(replace(endpoint, timeout=timeout), tmp_path, waits=(waits := []))
    assert len(done.cases) == 2 and f"gives no reply ({said}" in done.stopped
    assert len(handler.seen) == 3 + ATTEMPTS and waits == [1.0, 1.0, 2.0, 4.0, 8.0]


def test_a_key_is_sent_without_its_line_break_and_one_that_cannot_be_is_not_shown(stub, tmp_path):
    handler, endpoint = stub
    assert len(work(replace(endpoint, key="sesame\n"), tmp_path).cases) == 6
    assert {key for _, key, _ in handler.seen} == {"Bearer sesame"}
    for key in ("sk-secret\nX-Other: 1", "sk-sécret", "sk-secret\x7f"):
        with pytest.raises(ValueError, match="^the key .* no HTTP header may$") as caught:
            work(replace(endpoint, key=key), tmp_path)
        assert "cret" not in str(caught.value)


def test_a_request_that_is_no_http_is_not_repeated(stub, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise httpx.LocalProtocolError("Illegal header value b'Bearer sk-secret'")

    monkeypatch.setattr(httpx.Client, "stream", refuse)
    done = work(stub[1], tmp_path, waits=(waits := []))
    assert done.stopped.endswith("cannot be asked: what would be sent is not HTTP") and waits == []


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://", "ftp://localhost/v1"])
def test_an_address_that_is_none_is_asked_once(stub, tmp_path, url):
    done = work(replace(stub[1], url=url), tmp_path, waits=(waits := []))
    assert done.stopped.startswith(f"{url} is no address of an endpoint: ") and waits == []


def test_the_budget_holds_where_the_endpoint_counts_nothing(stub, tmp_path):
    handler, endpoint = stub
    handler.script += [b'{"choices": [{"message": {"content": "I cannot."}}]}'] * 12
    done = work(endpoint, tmp_path, plan=Plan(6, 120, 3, 1, 1))
    assert (len(handler.seen), done.estimated) == (1, 1)
    asked = handler.seen[0][2]["messages"][0]["content"] + "I cannot."
    assert done.tokens == math.ceil(len(asked) / 4)
    again = work(endpoint, tmp_path, plan=Plan(2, 120, 3, 10_000, 1))
    assert (again.calls, again.estimated) == (1, 2)  # the kept one counts as it did


def test_half_a_character_in_a_reply_costs_that_question(stub, tmp_path):
    handler, endpoint = stub
    rows = [
        {"question": "What \ud83d was it?", "answer": "oil", "evidence": "barrels of oil"},
        {"question": "What was it?", "answer": "oil", "evidence": "barrels of oil"},
    ]
    handler.script += [
        json.dumps({"choices": [{"message": {"content": json.dumps(rows, ensure_ascii=False)}}]}).encode()
    ]
    done = work(endpoint, tmp_path, plan=replace(PLAN, excerpts=1))
    write(done.cases, tmp_path / "qa.jsonl")
    assert [c.question for c in done.cases] == ["What was it?"] and done.refused == {"question value error": 1}


def test_an_answer_without_a_word_is_left_out_and_counted():
    rows = [{"question": "Which?", "answer": a, "evidence": "It is A."} for a in ("A.", "?!", "B.")]
    judge(json.dumps(rows), "Here. It is A.", ["d"], done := Work())
    assert [c.answers for c in done.cases] == [["B."]]
    assert done.refused == {"the answer holds no word": 2}


def test_a_short_document_is_asked_about_and_paid_for_once(stub, tmp_path):
    handler, endpoint = stub
    few = [Document("short", " ".join(DOCUMENTS[0].text.split()[:125]))]
    done = write_questions(few, endpoint=endpoint, plan=Plan(9, 120, 3, 250, 1), journal=tmp_path / "j")
    assert (len(handler.seen), len(done.cases), done.tokens, done.stopped) == (1, 1, 100, "")
    assert done.refused["an excerpt is another's again"] == 8


def test_what_is_not_asked_any_more_is_not_counted_as_left_out(stub, tmp_path):
    handler, endpoint = stub
    handler.script += [403]
    few = [Document("short", " ".join(DOCUMENTS[0].text.split()[:125]))]
    done = write_questions(few, endpoint=endpoint, plan=PLAN, journal=tmp_path / "j")
    assert "HTTP 403" in done.stopped and not done.refused


def test_a_reply_that_is_whole_a_moment_too_late_is_taken(monkeypatch):
    endpoint = Endpoint("http://127.0.0.1:1/v1", model="m", key=None, timeout=10)
    client = httpx.Client(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, content=iter([b"a", b"b", b"c"])))
    )
    for moments, late in ([0, 4, 8, 12], False), ([0, 4, 12, 13], True):
        monkeypatch.setattr(author, "time", SimpleNamespace(monotonic=iter(moments).__next__))
        with pytest.raises(httpx.ReadTimeout) if late else nullcontext():
            assert posted(client, endpoint, {}).content == b"abc"


def test_once_an_endpoint_has_failed_no_more_excerpts_are_cut(stub, tmp_path, monkeypatch):
    handler, endpoint = stub
    handler.script += [403]
    cut = []
    monkeypatch.setattr(author, "excerpt", lambda *a, **k: cut.append(1) or excerpt(*a, **k))
    done = work(endpoint, tmp_path, plan=replace(PLAN, excerpts=50))
    assert "HTTP 403" in done.stopped and len(cut) == 1


def test_an_excerpt_without_a_whole_sentence_is_not_asked_about(stub, tmp_path):
    handler, endpoint = stub
    text = f"{' '.join(['and'] * 500)}. Ship 1 of the fleet carried 7 barrels of oil to the port."
    done = write_questions(
        [Document("a", text)], endpoint=endpoint, plan=Plan(1, 100, 3, 250, 1), journal=tmp_path / "j"
    )
    assert handler.seen == [] and done.refused == {"an excerpt holds no whole sentence": 1}


@pytest.mark.parametrize(
    "around",
    [
        "[Thinking: two facts] {}",
        "See [1] and [2, 3]. ```json\n{}\n``` That is [all].",
        '{{"notes": ["none"], "questions": {}}}',
        "{} [done]",
        "I had [] before. {}",
    ],
)
def test_a_list_among_other_brackets_is_found(around):
    rows = [{"question": "Who [came]?", "answer": "Ada", "evidence": "Ada came [late]."}]
    judge(around.format(json.dumps(rows)), "Ada came [late].", ["a"], done := Work())
    assert [c.question for c in done.cases] == ["Who [came]?"] and not done.refused


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        ("he", "the evidence is a word or two that stand at several places"),
        ("The ropt", "the evidence is not in the document"),
        ("he cut", None),
        ("saw Theo.", None),
    ],
)
def test_evidence_is_whole_words_and_one_or_two_only_where_they_stand_once(evidence, said):
    text = "Then he came with other ropes, and he saw Theo. The ropes he cut."
    judge(json.dumps([{"question": "Who?", "answer": "Theo", "evidence": evidence}]), text, ["a"], done := Work())
    assert ([c.evidence for c in done.cases], dict(done.refused)) == (([], {said: 1}) if said else ([[evidence]], {}))


def test_what_is_asked_twice_and_evidence_without_a_word_are_left_out():
    one = {"question": "Who came?", "answer": "Ada", "evidence": "Ada came."}
    judge(json.dumps([one, {**one, "evidence": "Ada"}, {**one, "evidence": "."}]), "Ada came.", ["a"], done := Work())
    assert [c.evidence for c in done.cases] == [["Ada came."]]
    assert done.refused == {"the question is asked again": 1, "the evidence holds no word": 1}


def test_a_run_that_broke_off_goes_on_and_ends_with_the_same_bytes(stub, tmp_path):
    handler, endpoint = stub
    write(work(endpoint, tmp_path).cases, tmp_path / "whole")
    (tmp_path / "j").unlink()
    handler.seen.clear()
    handler.script += [None, None, *[503] * ATTEMPTS]
    broken = work(endpoint, tmp_path)
    assert len(broken.cases) == 2 and "gives no reply (HTTP 503" in broken.stopped
    with (tmp_path / "j").open("a") as journal:
        journal.write('{"key": "cut off')
    finished = work(endpoint, tmp_path)
    assert (finished.calls, finished.tokens, finished.stopped) == (4, 600, "")
    write(finished.cases, tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert work(endpoint, tmp_path).calls == 0


def test_no_call_is_made_once_the_budget_is_used(stub, tmp_path):
    handler, endpoint = stub
    done = work(endpoint, tmp_path, plan=Plan(6, 120, 3, 250, 1))
    assert (len(handler.seen), len(done.cases), done.tokens) == (3, 3, 300)
    assert done.stopped == "the budget of 250 tokens is used"


@pytest.mark.parametrize(
    ("turn", "calls", "said"),
    [
        (401, 1, "HTTP 401"),
        (b"<html>", 1, "does not answer as OpenAI's chat completions do: '<html>'"),
        (b"[" * 100_000, 1, "does not answer as OpenAI's chat completions do"),
        (b'{"choices": [{"message": {}}], "usage": {"total_tokens": 1e999}}', 1, "does not answer as OpenAI's"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(stub, tmp_path, turn, calls, said):
    handler, endpoint = stub
    handler.script += [turn]
    done = work(endpoint, tmp_path)
    assert said in done.stopped and len(handler.seen) == calls and done.cases == []


def test_an_answer_may_be_written_as_a_number_and_tokens_below_nothing_pay_for_none(stub, tmp_path):
    handler, endpoint = stub
    rows = json.dumps([{"question": "How many?", "answer": 1987, "evidence": "barrels of oil to the northern port."}])
    handler.script += [
        json.dumps({"choices": [{"message": {"content": rows}}], "usage": {"total_tokens": -9}}).encode()
    ]
    done = work(endpoint, tmp_path, plan=replace(PLAN, excerpts=1))
    assert [case.answers for case in done.cases] == [["1987"]] and (done.estimated, done.tokens > 0) == (1, True)


def test_replies_to_later_excerpts_are_kept_where_one_that_was_cut_short_is_not_had_again(stub, tmp_path):
    handler, endpoint = stub
    cut = {"choices": [{"message": {"content": "["}, "finish_reason": "length"}], "usage": {"total_tokens": 70}}
    handler.script += [None, json.dumps(cut).encode()]
    first = work(endpoint, tmp_path)
    more = replace(endpoint, max_tokens=endpoint.max_tokens + 1)
    for plan, turns, said in (
        (PLAN, [403], "HTTP 403"),
        (replace(PLAN, budget=1), [], "the budget of 1 tokens is used"),
    ):
        handler.script += turns
        done = work(more, tmp_path, plan=plan)
        assert said in done.stopped and (done.calls, done.cases, done.tokens) == (0, first.cases, 570)


def test_a_reply_without_a_list_costs_that_reply(stub, tmp_path):
    handler, endpoint = stub
    handler.script += [b'{"choices": [{"message": {"content": "I cannot."}}]}']
    done = work(endpoint, tmp_path)
    assert len(done.cases) == 5 and done.refused["a reply is no JSON list"] == 1


def test_a_reply_that_was_cut_short_is_left_out_and_asked_for_again_only_where_more_is_allowed(stub, tmp_path):
    handler, endpoint = stub
    rows = json.dumps([{"question": "What was carried?", "answer": "oil", "evidence": "barrels of oil"}])
    cut = {"choices": [{"message": {"content": rows}, "finish_reason": "length"}], "usage": {"total_tokens": 70}}
    handler.script += [json.dumps(cut).encode()]
    done = work(endpoint, tmp_path)
    assert (len(done.cases), done.tokens) == (5, 570) and done.refused["a reply is cut short (--max-tokens)"] == 1
    assert work(endpoint, tmp_path).calls == 0
    more = work(replace(endpoint, max_tokens=endpoint.max_tokens + 1), tmp_path)
    assert (more.calls, len(more.cases), more.tokens) == (1, 6, 670)  # the reply that was cut is paid for, too
    again = work(replace(endpoint, max_tokens=endpoint.max_tokens + 1), tmp_path)
    assert (again.calls, again.cases, again.tokens) == (0, more.cases, 670)
    short = work(endpoint, tmp_path, plan=replace(PLAN, budget=570))
    assert (short.calls, short.tokens) == (0, 670)  # what was paid for is used, whatever the budget says now


def test_the_command_keeps_what_is_finished_and_says_how_to_go_on(stub, tmp_path, monkeypatch):
    handler, endpoint = stub
    handler.script += [b'{"choices": [{"message": {"content": "I cannot."}}]}', None, 403]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "doc.txt").write_text(DOCUMENTS[0].text)
    plan = {"excerpts": 3, "length": 120, "questions": 3, "budget": 1000, "seed": 1}
    said = []
    with pytest.raises(ValueError, match="stopped: .*HTTP 403.* 1 question is kept, and the same command goes on"):
        said += write_by_model(
            str(tmp_path / "doc.txt"),
            out=tmp_path / "qa.jsonl",
            asked={"url": endpoint.url, "model": "m"},
            plan=plan,
            encoding="utf-8",
        )
    assert len((tmp_path / "qa.jsonl").read_text().splitlines()) == 1
    assert "the endpoint counts no tokens: those of 1 reply are estimated, one for every four bytes" in said
    assert handler.seen[0][1] is None


def test_an_address_that_is_none_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="--url htp:/x: must be an http address, such as http"):
        list(
            write_by_model(
                "none", out=tmp_path / "qa.jsonl", asked={"url": "htp:/x", "model": "m"}, plan={}, encoding="utf-8"
            )
        )
    assert not list(tmp_path.iterdir())


def test_questions_of_another_origin_are_not_written_over(stub, tmp_path):
    _, endpoint = stub
    (tmp_path / "doc.txt").write_text(DOCUMENTS[0].text)
    (tmp_path / "qa.jsonl").write_text("by rule\n")
    asked, plan = {"url": endpoint.url, "model": "m"}, {"excerpts": 1, "length": 120, "questions": 3, "budget": 1000}
    with pytest.raises(
        ValueError, match=r"^OUT .*qa.jsonl: is there, and not of this command \(no qa.jsonl.journal beside"
    ):
        list(
            write_by_model(
                str(tmp_path / "doc.txt"),
                out=tmp_path / "qa.jsonl",
                asked=asked,
                plan=plan | {"seed": 1},
                encoding="utf-8",
            )
        )
    assert (tmp_path / "qa.jsonl").read_text() == "by rule\n"


def test_a_journal_that_is_none_is_not_written_over(stub, tmp_path):
    (tmp_path / "j").write_text("my notes\n")
    with pytest.raises(ValueError, match="line 1 is no line of a journal"):
        work(stub[1], tmp_path)
    assert (tmp_path / "j").read_text() == "my notes\n"
