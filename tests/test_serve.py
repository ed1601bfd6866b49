"""An endpoint as a client meets it: transformers' server answers as `longlora ask` does; a lent template has training's tokens."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dummy import ENV
from test_asking import QUESTIONS, TEXT, TINY, session

from flows.cli.options import state_below
from flows.cli.serve import lay_out, serve
from longlora.data.dialogue import tokenised
from longlora.data.instructions import Turn
from longlora.data.prompt import rendered
from longlora.data.wording import asked
from longlora.model.load import open_model, open_tokenizer
from longlora.model.seal import broken, seal
from longlora.model.template import authors_template
from tasks.servers import answers, free_port

needs_openai = pytest.mark.skipif(
    not importlib.util.find_spec("openai"), reason="openai is not installed: the extra serve"
)


@pytest.mark.parametrize("mark", ["", "<bos>"])
def test_the_lent_template_has_the_tokens_of_training(mark):
    words = open_tokenizer(TINY)
    if mark:
        from tokenizers.processors import TemplateProcessing

        ids = [(mark, words.convert_tokens_to_ids(mark))]
        words.backend_tokenizer.post_processor = TemplateProcessing(single=f"{mark} $A", special_tokens=ids)
    turns = [
        Turn("system", "Be brief."),
        Turn("user", 'Who read "it"?\n'),
        Turn("assistant", "Mr. Renn."),
        Turn("user", "When?"),
        Turn("assistant", "1873"),
    ]
    words.chat_template = authors_template(words)
    for count in (2, 3, 4, 5):
        messages = [{"role": t.role, "content": t.content} for t in turns[:count]]
        ours = words.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ours == tokenised(turns[:count], tokenizer=words, prompt="authors").tokens.tolist()
    assert (ours[0] == words.bos_token_id) == bool(mark)


def test_only_links_and_a_template_are_laid_out(tmp_path):
    lay_out(TINY, tmp_path / "s", prompt="authors")
    lay_out(TINY, tmp_path / "s", prompt="authors")  # again, over its own
    files = {f.name: f.is_symlink() for f in (tmp_path / "s").iterdir()}
    assert files == {f.name: True for f in TINY.iterdir()} | {"chat_template.jinja": False}
    words = open_tokenizer(tmp_path / "s")
    assert words.chat_template == authors_template(words)
    assert open_tokenizer(TINY).chat_template is None


@pytest.mark.parametrize("prompt", ["plain", "authors"])
def test_a_template_inside_the_tokenizers_configuration_is_replaced_too(tmp_path, prompt):
    shutil.copytree(TINY, tmp_path / "model")
    file = tmp_path / "model/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "its own"}))
    before, plain = file.read_text(), open_tokenizer(TINY)
    assert open_tokenizer(tmp_path / "model").chat_template == "its own"
    lay_out(tmp_path / "model", tmp_path / "s", prompt=prompt)
    served = open_tokenizer(tmp_path / "s")
    assert served.chat_template == (authors_template(plain) if prompt == "authors" else None)
    assert served("The House")["input_ids"] == plain("The House")["input_ids"]
    lay_out(tmp_path / "model", tmp_path / "s", prompt=None)  # again, over a copy
    assert open_tokenizer(tmp_path / "s").chat_template == "its own" and file.read_text() == before


def test_what_is_served_lies_in_the_projects_state_folder_wherever_in_it_one_is(folder, tmp_path):
    inside = folder / ".longlora"
    assert state_below(folder / "recipes", model=TINY) == state_below(folder, model=TINY) == inside
    assert state_below(tmp_path, model=TINY) == tmp_path / ".longlora"


@needs_openai
@pytest.mark.parametrize("within", ["", "more"])
def test_a_model_served_from_its_own_folder_keeps_its_seal(tmp_path, monkeypatch, within):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "more").mkdir()
    seal(model)
    monkeypatch.setattr("os.execve", lambda program, command, environment: None)
    monkeypatch.chdir(model / within)
    serve(str(model) if within else ".", port=(port := free_port()), prompt="authors")
    assert broken(model) == [] and (tmp_path / ".longlora" / "served" / str(port) / "model" / "config.json").exists()


def test_mistakes_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = {"model": str(TINY), "port": free_port(), "prompt": None}
    with pytest.raises(ValueError, match=r"has no chat template: --prompt authors lends .*; --prompt plain serves"):
        serve(**usual)
    with pytest.raises(ValueError, match=r"--port 70000: must be 1 to 65535"):
        serve(**usual | {"port": 70000})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model at .*empty"):
        serve(**usual | {"model": str(tmp_path / "empty")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"serving needs openai, uvicorn, fastapi: pip install"):
        serve(**usual)


@needs_openai
def test_a_server_keeps_its_files_when_another_serves_a_model_of_the_same_name(tmp_path, monkeypatch):
    """They are read again by the first request, and after every five minutes without one."""
    became = []
    monkeypatch.setattr("os.execve", lambda program, command, environment: became.append((Path.cwd(), command[4])))
    for place, prompt in (("one", "authors"), ("other", "plain")):
        shutil.copytree(TINY, tmp_path / place / "extended")
        monkeypatch.chdir(tmp_path)
        serve(str(tmp_path / place / "extended"), port=free_port(), prompt=prompt)
    (first, second), (_, name) = (home / name for home, name in became), became[0]
    assert name == "extended" and (first / "config.json").resolve().parent == tmp_path / "one/extended"
    assert (second / "config.json").resolve().parent == tmp_path / "other/extended"
    assert open_tokenizer(first).chat_template and not open_tokenizer(second).chat_template


THINKING = (
    "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    "{% if enable_thinking is false %}{{ eos_token }}{% else %}{{ raise_exception('it may think') }}{% endif %}"
)


@needs_openai
def test_a_template_that_lets_a_model_think_is_told_not_to_as_asking_does(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(THINKING)
    monkeypatch.chdir(tmp_path)
    became: list[list[str]] = []
    monkeypatch.setattr("os.execve", lambda program, command, environment: became.append(command))
    serve(str(tmp_path / "model"), port=free_port(), prompt=None)
    told = json.loads(became[0][became[0].index("--chat-template-kwargs") + 1])
    turn = [{"role": "user", "content": "Who?"}]
    words = open_tokenizer(tmp_path / "model")
    served = words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **told)
    assert served == rendered(words, turn, open_turn=True)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("serving"), free_port()
    command = [sys.executable, "-m", "flows.cli.main", "serve", "--model", str(TINY)]
    log = folder / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--prompt", "authors", "--port", str(port)],
            cwd=folder,
            env=os.environ | ENV | {"HF_HOME": str(folder / "none")},
            stdout=out,
            stderr=out,
        )
    while not answers(f"http://127.0.0.1:{port}/health"):
        assert server.poll() is None, log.read_text()
    assert f"model 'model' at http://127.0.0.1:{port}/v1 (/v1/chat/completions" in log.read_text()
    yield f"http://127.0.0.1:{port}/v1"
    server.send_signal(signal.SIGTERM)
    server.wait(20)


@needs_openai
def test_a_streamed_chat_is_what_ask_answers_and_a_completion_is_plain_text(url):
    import httpx
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", http_client=httpx.Client(trust_env=False), max_retries=0)
    model, words = open_model(TINY), open_tokenizer(TINY)
    for question in QUESTIONS:
        turn = {"role": "user", "content": asked(TEXT.rstrip(), question)}
        pieces = client.chat.completions.create(
            model="model", messages=[turn], stream=True, max_tokens=12, temperature=0
        )
        said = [piece.choices[0].delta.content for piece in pieces if piece.choices[0].delta.content]
        assert len(said) > 1, "it came in one piece"
        assert "".join(said).strip() == session(model, words).ask(question).text
    whole = client.completions.create(model="model", prompt="The House", max_tokens=12, temperature=0)
    ids = words("The House", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert whole.choices[0].text == words.decode(out, skip_special_tokens=True)


@needs_openai
@pytest.mark.parametrize("stream", [False, True])
def test_a_role_that_the_template_does_not_know_is_the_clients_mistake(url, stream):
    import httpx

    messages = [{"role": "user", "content": "Who?"}, {"role": "tool", "content": "4", "tool_call_id": "a"}]
    asked = {"model": "model", "messages": messages, "stream": stream, "max_tokens": 2}
    answer = httpx.post(f"{url}/chat/completions", json=asked, timeout=100, trust_env=False)
    said = "the chat template refuses the messages: the roles are system, user and assistant, not tool"
    assert (answer.status_code, answer.json()) == (400, {"error": said})


def test_the_served_model_is_listed_and_no_other(url):
    import httpx

    listed = httpx.get(f"{url}/models", trust_env=False)
    assert listed.status_code == 200, listed.text
    assert [model["id"] for model in listed.json()["data"]] == ["model"]
