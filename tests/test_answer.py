"""Answers under longrope: as by reading the whole text for every token, across the end of the base's window, too."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from longlora.asking.asking import Session
from longlora.evaluation.answer import answers, rooms
from longlora.model.load import open_model, open_tokenizer
from longlora.model.position import extend

TINY = Path(__file__).parent.parent / "tiny/model"
WINDOW = 512
ROOM = 24
torch.set_num_threads(1)


def under(method: str, place: Path) -> PreTrainedModel:
    extend(AutoConfig.from_pretrained(TINY), method=method, context=1024).save_pretrained(place)
    for file in TINY.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, place / file.name)
    return open_model(place)


@pytest.fixture(scope="module")
def longrope(tmp_path_factory) -> PreTrainedModel:
    return under("longrope", tmp_path_factory.mktemp("models") / "longrope")


@torch.inference_mode()
def read_anew(model: PreTrainedModel, prompt: list[int], room: int) -> list[int]:
    """The greedy answer by a whole reading for each of its tokens."""
    ids = list(prompt)
    for _ in range(room):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def prompts(length: int) -> list[list[int]]:
    """Texts of which the model's continuation depends on how their tokens are turned."""
    text = list(b"The committee met, and Mr. Renn read the report of 1873 to the members of the House and Senate. " * 8)
    return [text[shift : shift + length] for shift in (0, 11, 40)]


@pytest.mark.parametrize("length", [WINDOW - ROOM, WINDOW - ROOM + 2, WINDOW - 9, WINDOW - 1, WINDOW, WINDOW + 1])
def test_an_answer_that_grows_beyond_the_window_is_that_of_whole_readings(longrope, length):
    ids = prompts(length)
    longrope.generation_config.eos_token_id = None
    assert answers(longrope, prompts=ids, max_new_tokens=[ROOM] * 3) == [read_anew(longrope, p, ROOM) for p in ids]


def test_long_work_says_how_far_it_is(longrope, monkeypatch, capsys):
    longrope.generation_config.eos_token_id = None
    different = [prompts(length)[0] for length in (20, 30, 40)]
    answers(longrope, prompts=different, max_new_tokens=[2] * 3)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("longlora.evaluation.answer.TELL", 0.0)
    answers(longrope, prompts=different, max_new_tokens=[2] * 3)
    assert capsys.readouterr().out == "1 of 3 answers\n2 of 3 answers\n3 of 3 answers\n"


def test_what_has_ended_before_the_windows_end_is_not_gone_on_with(longrope):
    ids = prompts(WINDOW - 9)
    longrope.generation_config.eos_token_id = None
    whole = [read_anew(longrope, p, ROOM) for p in ids]
    early = next(token for token in whole[0][:5] if any(token not in other[:9] for other in whole[1:]))
    longrope.generation_config.eos_token_id = [early]
    found = answers(longrope, prompts=ids, max_new_tokens=[ROOM] * 3)
    longrope.generation_config.eos_token_id = None
    assert found == [all_of[: all_of.index(early)] if early in all_of else all_of for all_of in whole]


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_before_its_end_mark_whatever_else_is_in_the_batch(several):
    """A mark may be a word of the tokenizer, and so may be what a batch is filled up with."""
    model, ids = open_model(TINY), prompts(60)
    model.generation_config.eos_token_id = None
    whole = answers(model, prompts=ids, max_new_tokens=[ROOM] * 3)
    early = next(token for token in whole[0][3:] if whole[0].index(token) < ROOM - 2 and token not in whole[1])
    model.generation_config.eos_token_id = [early, whole[1][-1]] if several else early
    together = answers(model, prompts=ids, max_new_tokens=[ROOM] * 3)
    alone = [answers(model, prompts=[each], max_new_tokens=[ROOM])[0] for each in ids]
    assert together == alone and together[0] == whole[0][: whole[0].index(early)]


@pytest.mark.parametrize(
    ("length", "parts"),
    [(WINDOW - ROOM + 1, [ROOM]), (WINDOW - ROOM + 2, [ROOM - 1, 1]), (WINDOW, [1, ROOM - 1]), (WINDOW + 1, [ROOM])],
)
def test_the_room_is_parted_where_a_reading_first_exceeds_the_window(longrope, length, parts):
    assert rooms(longrope, length=length, room=ROOM) == parts


def test_under_other_scalings_the_room_is_whole(tmp_path):
    assert rooms(under("yarn", tmp_path), length=WINDOW - 3, room=ROOM) == [ROOM]


@pytest.mark.parametrize("short", [36, 20, 9, 1, 0])
def test_an_asked_answer_too_and_it_is_told_once(short, longrope):
    words = open_tokenizer(TINY)
    text, question = "Mr. Renn read the report of 1873 to the members of the House. " * 8, "Who read it?"
    longrope.generation_config.eos_token_id = None
    empty = Session(longrope, tokenizer=words, text="x", max_new_tokens=40)
    around = len(empty.prefix_ids("")) + len(empty.question_ids(question))
    here = Session(
        longrope, tokenizer=words, text="x" + text[-(WINDOW - around - short - 1) :].strip(), max_new_tokens=40
    )
    tokens = here.prefix_ids(here.text) + here.question_ids(question)
    assert len(rooms(longrope, length=len(tokens), room=40)) == 2
    told: list[str] = []
    answer = here.ask(question, say=told.append)
    new = read_anew(longrope, tokens, 40)
    ended = next((n for n, token in enumerate(new) if token in here.ends), 40)
    assert answer.text == words.decode(new[:ended], skip_special_tokens=True).strip() == "".join(told)
