"""Recall exercises ask for what they told, no further on than they may."""

import random
import re

import pytest
from specimens import tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longlora.data.passkey_words import PREAMBLE
from longlora.data.recall import BARE, FIRST_FORM, FORMS, LABELS, exercise, exercises, new_facts
from longlora.evaluation.passkey import Writer

TEXTS = [
    "The committee met on the 14th of March and heard nine witnesses about harbours, lighthouses and mail. " * 30,
    "Nobody has read the report on canals; whoever borrowed it should return the volume before winter. " * 20,
]
WORDS = [f"{a}{b}" for a in ("amber", "birch", "cedar", "delta") for b in ("field", "stone", "water", "wood", "town")]


def drawn(seed: int, *, length: int = 700, reach: int = 300, nearness: float = 2.0):
    return exercise(
        TEXTS,
        words=WORDS * 30,
        tokenizer=tokenizer(),
        length=length,
        reach=reach,
        nearness=nearness,
        dice=random.Random(seed),
    )


def some(*, length: int = 190, reach: int = 130, count: int = 7, seed: int = 3) -> list[list[int]]:
    return list(exercises(TEXTS, tokenizer=tokenizer(), length=length, reach=reach, nearness=2, count=count, seed=seed))


def value_in(question: str) -> str:
    """The last word or number of a question with its answer."""
    return re.findall(r"\w+", question)[-1]


@pytest.mark.parametrize("length", [64, 190, 701])
def test_every_exercise_fills_its_block(length):
    assert {len(tokens) for tokens in some(length=length, reach=64)} == {length}


def test_as_many_as_asked_for_and_the_same_for_the_same_seed():
    assert len(some(count=5)) == 5
    assert some() == some()
    assert some(count=5) == some()[:5]
    assert all(a != b for a, b in zip(some(seed=3), some(seed=4), strict=True))


def test_a_tokenizer_that_drops_line_breaks_is_refused_where_exercises_are_asked_for():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "report": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    settings = {"length": 190, "reach": 130, "nearness": 2, "seed": 3}
    settings["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(ValueError, match="tokenizer has no token for a line break: set blocks.recall.count: 0"):
        list(exercises(TEXTS, count=2, **settings))
    assert not list(exercises(TEXTS, count=0, **settings))


def test_every_exercise_begins_with_the_begin_mark():
    assert {tokens[0] for tokens in some()} == {tokenizer().bos_token_id}


@pytest.mark.parametrize("reach", [80, 300, 700])
def test_every_answer_lies_within_reach_of_its_fact(reach):
    distances = [end - first for seed in range(40) for first, _, _, end in drawn(seed, reach=reach).asked]
    assert max(distances) <= reach
    assert max(distances) > 0.8 * reach


@pytest.mark.parametrize(("nearness", "low", "high"), [(2.0, 0.15, 0.5), (0.5, 0.6, 0.9)])
def test_nearness_says_how_much_of_the_reach_is_used(nearness, low, high):
    asked = [drawn(seed, length=900, reach=450, nearness=nearness).asked for seed in range(40)]
    assert low < sum(end - first for facts in asked for first, _, _, end in facts) / sum(map(len, asked)) / 450 < high


def test_every_answer_was_told_before_it_is_asked():
    """The fact is the only place before the question that holds the value."""
    decode = tokenizer().decode
    asked = 0
    for seed in range(30):
        tokens, places = drawn(seed)
        for first, last, start, end in places:
            asked += 1
            value = value_in(decode(tokens[start:end]))
            assert value in decode(tokens[first:last])
            if value.isdigit() and len(value) > 4:
                assert value not in decode(tokens[:first]) + decode(tokens[last:start])
    assert asked > 100


def test_no_two_facts_of_an_exercise_are_about_the_same_thing():
    facts = new_facts(WORDS * 30, random.Random(8))
    told = [next(facts)[0] for _ in range(len(WORDS) - 2)]
    bare = [fact for fact in told if not any(word in fact.split(value_in(fact))[0] for word in WORDS)]
    assert len(told) == len({re.sub(r"\d{3,}", "", fact) for fact in told})
    assert len(bare) <= len(LABELS)


def test_exercises_take_every_form_and_the_prompt_of_the_authors():
    whole = "".join(tokenizer().decode(drawn(seed).tokens) for seed in range(40))
    for fact, question in (FIRST_FORM[True], *FORMS):
        for part in (fact, question):
            known = re.escape(part.strip()).replace(r"\{value\}", r"[\w ]+").replace(r"\{name\}", r"\w+")
            assert re.search(known.replace(r"\{label\}", "(" + "|".join(LABELS) + ")"), whole), part
    assert PREAMBLE in whole
    assert "There and back again. The grass is green." in whole
    assert all("{name}" not in fact for fact, _ in (*FIRST_FORM.values(), *FORMS[: BARE - 1]))
    assert all("{name}" in fact for fact, _ in FORMS[BARE - 1 :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reach": 191}, "reach = 191 must be at most position.context = 190"),
        ({"reach": 20}, "reach = 20 has no room .* at least 64"),
    ],
)
def test_an_impossible_reach_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        some(**change)


def test_texts_without_words_are_refused():
    with pytest.raises(ValueError, match="hold no words"):
        list(exercises(["1 2 3"], tokenizer=tokenizer(), length=190, reach=130, nearness=2, count=1, seed=3))


def test_no_exercise_reads_no_text():
    assert list(exercises([], tokenizer=tokenizer(), length=128, reach=300, nearness=1.0, count=0, seed=1)) == []


def test_exercises_without_the_pass_key_prompt_have_none_of_its_words():
    def words(passkey: bool) -> str:
        drills = exercises(
            TEXTS, tokenizer=tokenizer(), length=700, reach=500, nearness=1, count=40, seed=5, passkey=passkey
        )
        return " ".join(tokenizer().decode(tokens) for tokens in drills).lower()

    asked = Writer(tokenizer(), prompt="plain").write("12345", length=700, depth=0.5)
    prompt = tokenizer().decode(asked.question + asked.answer).lower()
    told = [part.strip() for part in re.split(r"[.?\n]|12345", prompt) if len(part.split()) > 2]
    assert {"the grass is green", "what is the pass key", "is the pass key"} <= {*told}
    assert [part for part in told if part not in words(True)] == []
    assert [part for part in told if part in words(False)] == []
