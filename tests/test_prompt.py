"""The token ids of every prompt are pinned: models were trained on them, and scores are compared that were asked with them."""

import hashlib
import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
from test_asking import TINY
from test_longqa import settings as longqa_settings
from test_pairs import CHATML
from test_passkey import TEMPLATE, byte_level, sentencepiece_like, tiny
from test_ruler import TEXTS
from transformers import PreTrainedTokenizerBase

from longlora.asking.asking import Session
from longlora.asking.sinks import Dialogue
from longlora.data import prompt
from longlora.data.dialogue import tokenised
from longlora.data.instructions import Turn
from longlora.data.prompt import LINE, continuation, frame, haystack, hidden
from longlora.evaluation import longeval, longqa, passkey, ruler
from longlora.model.load import open_tokenizer
from longlora.model.template import authors_template

DOCUMENT = "The committee met in 1873.\n\nMr. Renn read the report: nobody else did.  Über 260 pages!\n" * 5
QUESTION = "Who read the report?"
TURNS = (
    Turn("system", "Be brief."), Turn("user", "Who met?"), Turn("assistant", "The committee."),
    Turn("user", QUESTION), Turn("assistant", "Mr. Renn."),
)  # fmt: skip
PINNED = {
    ("pairs_of_bytes", "plain"): "bc864af16e9e39d0",
    ("pairs_of_bytes", "authors"): "809b35ee8c0f6329",
    ("pairs_of_bytes", "chat"): "4c0774625729add8",
    ("marked_bytes", "plain"): "d97f2120f2364a9b",
    ("marked_bytes", "authors"): "7fe2f1ee10aac241",
    ("marked_bytes", "chat"): "900cc9ceaa89fcf8",
    ("spaced_pieces", "plain"): "1a6fbbf5aea5d490",
    ("spaced_pieces", "authors"): "da2eb1db31d2a72d",
    ("spaced_pieces", "chat"): "7508f2d3503b9c96",
    ("of_the_demo", "plain"): "dbe2b6b09f53b7ff",
    ("of_the_demo", "authors"): "a739d7567cfc461c",
    ("of_the_demo", "chat"): "bd157c9b5cb2c19f",
}
"""sha256 of the ids as JSON, of all prompts of a tokenizer and a kind. What changes one changes what models were taught."""


def pairs_of_bytes() -> PreTrainedTokenizerBase:
    """As GPT-2's; its prompts have no begin mark."""
    return byte_level()


def marked_bytes() -> PreTrainedTokenizerBase:
    """One that puts a begin mark before every text, which its chat template has none of."""
    made = byte_level(0, marks=True)
    made.chat_template = CHATML
    return made


def spaced_pieces() -> PreTrainedTokenizerBase:
    """As Llama 2's: a begin mark and a space before every text."""
    made = sentencepiece_like()
    made.chat_template = TEMPLATE
    return made


def of_the_demo() -> PreTrainedTokenizerBase:
    made = open_tokenizer(TINY)
    made.chat_template = CHATML
    return made


def prompts(tokenizer: PreTrainedTokenizerBase, kind: str) -> Iterator[list[int]]:
    """One of each prompt that there is of a kind."""
    if kind != "authors":
        written = passkey.Writer(tokenizer, prompt=kind).write("70123", length=480, depth=0.37)
        yield written.question + written.answer
        riddles = ruler.Writer(tokenizer, texts=TEXTS, prompt=kind)
        for task in ("multikey", "tracking", "common"):
            yield riddles.write(task, length=2600, generator=random.Random(3))[0]
        asker = longeval.Writer(tokenizer, prompt=kind)
        for make in (longeval.own_lines, longeval.own_topics):
            yield asker.ids(make(random.Random(4), count=3))
    asked = longqa.Question(document=DOCUMENT, question=QUESTION, answers=["Mr. Renn"])
    for length in (2000, 420):  # with the whole document, and without its middle
        yield longqa.Writer(tokenizer, settings=longqa_settings(length=length, prompt=kind)).write(asked).ids
    model = tiny(max_position_embeddings=4096)
    session = Session(model, tokenizer=tokenizer, text=DOCUMENT, max_new_tokens=9, prompt=kind)
    yield session.prefix_ids(session.text) + session.question_ids(QUESTION)
    talk = Dialogue(model, tokenizer=tokenizer, size=64, max_new_tokens=9, prompt=kind)
    yield talk.turn("Who met?")
    for last in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("x")):
        talk.unread = [last]
        yield talk.turn(QUESTION)
    if kind != "plain":
        pair = tokenised(TURNS, tokenizer=tokenizer, prompt=kind)
        yield pair.tokens.tolist()
        yield pair.answer.tolist()
    if kind == "authors":
        yield list(authors_template(tokenizer).encode())


@pytest.mark.parametrize("kind", ["plain", "authors", "chat"])
@pytest.mark.parametrize("tokenizer", [pairs_of_bytes, marked_bytes, spaced_pieces, of_the_demo])
def test_prompts_have_the_ids_that_they_always_had(tokenizer, kind):
    made = list(prompts(tokenizer(), kind))
    assert len({*map(str, made)}) == len(made)
    said = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
    assert said == PINNED[tokenizer.__name__, kind]


@pytest.mark.parametrize("kind", ["authors", "chat"])
@pytest.mark.parametrize("tokenizer", [pairs_of_bytes, marked_bytes, spaced_pieces, of_the_demo])
def test_the_next_turn_of_a_dialogue_has_the_ids_of_training(tokenizer, kind):
    made = tokenizer()
    made.chat_template = made.chat_template and made.chat_template.replace("<eos>", made.eos_token)
    talk = Dialogue(tiny(max_position_embeddings=4096), tokenizer=made, size=64, max_new_tokens=9, prompt=kind)
    pair = tokenised(TURNS[1:], tokenizer=made, prompt=kind)
    ids, first = pair.tokens.tolist(), talk.turn("Who met?")
    assert ids[: len(first)] == first
    end = next(place for place in range(len(first), len(ids)) if not pair.answer[place]) - 1  # of the first answer
    talk.unread = ids[end : end + 1]
    ended = talk.turn(QUESTION)
    assert ended == ids[end : end + len(ended)]
    talk.unread = ids[end - 1 : end]  # it was cut before its end mark
    assert talk.turn(QUESTION) == [ids[end - 1], *ended]


@pytest.mark.parametrize("said", ["", "{{ m.content }} {{ m.content }}"])
def test_a_template_that_does_not_say_the_users_words_once_is_refused(said):
    made = pairs_of_bytes()
    made.chat_template = f"{{% for m in messages %}}{said}{{% endfor %}}"
    with pytest.raises(ValueError, match="says the user's words once, as they are, and this one says them [02] times"):
        frame(made, "chat", plain=" ")


@pytest.mark.parametrize("tokenizer", [pairs_of_bytes, marked_bytes, spaced_pieces, of_the_demo])
def test_running_text_has_the_same_ids_in_pieces_and_at_once(tokenizer, monkeypatch):
    made, texts = tokenizer(), [DOCUMENT, *TEXTS]
    at_once = haystack(made, texts).tolist()
    assert at_once == continuation(made, " ".join(" ".join(texts).split()), after=LINE)
    monkeypatch.setattr(prompt, "PIECE", 7)
    assert haystack(made, texts).tolist() == at_once
    assert haystack(made, [" "]).size == 0


def test_a_haystack_begins_again_where_it_ends_and_lines_stand_at_their_cuts():
    hay = np.arange(100, 105, dtype=np.uint32)
    body = hidden([[1, 2], [3]], hay=hay, start=4, cuts=[2, 7], length=8)
    assert body == [104, 100, 1, 2, 101, 102, 103, 104, 100, 3, 101]
