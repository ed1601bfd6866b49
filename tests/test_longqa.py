"""Answers are scored as SQuAD and ROUGE say, the best of the right answers counts, and a bad line is named."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given as anything
from hypothesis import strategies
from specimens import FLOAT32
from test_ruler import TOKENIZER, tiny

from longlora.data.dialogue import tokenised
from longlora.data.instructions import Turn
from longlora.data.wording import asked
from longlora.data.words import words
from longlora.evaluation import longqa
from longlora.evaluation.answer import answers
from longlora.evaluation.interval import share
from longlora.evaluation.longqa import (
    LongQA,
    Question,
    Writer,
    answer_of,
    exact,
    f1,
    measure,
    read_cases,
    rouge_l,
)
from longlora.stages.longqa import stage

torch.set_num_threads(1)  # matrices this small are slower on two

CASES = [
    {"document": "Ada lived in London. " * 20, "question": "Where did Ada live?", "answers": ["London", "in London"]},
    {"document": "The mill burnt down in 1871. " * 9, "question": "When?", "answers": ["in 1871"], "more": 1},
    {"document": "Nobody knows. " * 40, "question": "Who?", "answers": ["nobody"]},
]


def put(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(*files, **changes) -> LongQA:
    given = {
        "cases": [str(f) for f in files],
        "held_out": False,
        "length": 900,
        "max_new_tokens": 12,
        "prompt": "plain",
    }
    return LongQA(**given | changes)


@pytest.mark.parametrize(
    ("said", "wanted", "matches", "overlap"),
    [
        ("The London!", "london", 1.0, 1.0),
        ("in London", "London", 0.0, 2 / 3),
        ("to be or not to be", "to be", 0.0, 2 * 2 / (6 + 2)),
        ("Rome", "London", 0.0, 0.0),
        ("", "London", 0.0, 0.0),
        ("東京", "東京", 1.0, 1.0),
        ("東京都。", "東京", 0.0, 2 * 2 / (3 + 2)),
        ("2020年の東京", "2020 東京", 0.0, 2 * 3 / (5 + 3)),
        ("กรุงเทพ", "กรุงเก่า", 0.0, 2 * 4 / (6 + 6)),  # ก รุ ง เ ท พ, ก รุ ง เ ก่ า
        ("की", "का", 0.0, 0.0),
        ("नमस्ते!", "नमस्ते", 1.0, 1.0),
        ("cafe\u0301", "caf\u00e9", 1.0, 1.0),
        ("«Ja», sagte er…", "ja sagte er", 1.0, 1.0),
        ("5 €", "5", 0.0, 2 / 3),
        ("$5_000", "5000", 1.0, 1.0),
        ("Bundes\u00adregierung", "Bundesregierung", 1.0, 1.0),
        ("\u200fשלם\u200b", "שלם", 1.0, 1.0),
    ],
)
def test_exact_match_and_f1_are_squads(said, wanted, matches, overlap):
    assert exact(said, wanted) == matches
    assert f1(said, wanted) == pytest.approx(overlap)


def longest_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """By the definition, without a table."""

    @cache
    def of(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + of(i + 1, j + 1) if a[i] == b[j] else max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


SENTENCES = strategies.lists(strategies.sampled_from(["one", "two", "three", "Ünder", "the", "東"]), max_size=9).map(
    " ".join
)


@anything(said=SENTENCES, wanted=SENTENCES)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(said, wanted):
    ours, theirs = tuple(words(said)), tuple(words(wanted))
    common = longest_common(ours, theirs)
    expected = 2 * common / (len(ours) + len(theirs)) if common else 0.0
    assert rouge_l(said, wanted) == pytest.approx(expected)
    assert rouge_l(said, wanted) <= f1(said, wanted) + 1e-12


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"document": "x", "question": "y"}, ":2: answers: Field required"),
        ({"document": "x", "question": "y", "answers": []}, ":2: answers: List should have at least 1 item"),
        ({"document": " \n", "question": "y", "answers": ["z"]}, ":2: document: String should match pattern"),
        ({"document": "x", "question": "y", "answers": ["the !"]}, ":2: answers: 'the !' holds no word"),
        ({"document": "x", "question": "y", "answers": "z"}, ":2: answers: Input should be a valid array"),
    ],
)
def test_a_malformed_case_is_named_by_file_and_line(tmp_path, row, said):
    file = put(tmp_path / "q.jsonl", CASES[0], row)
    with pytest.raises(ValueError) as error:
        read_cases(file)
    assert str(error.value).startswith(f"{file}{said}")


@pytest.mark.parametrize("prompt", ["plain", "authors", "chat"])
def test_a_document_that_is_too_long_loses_its_middle_and_nothing_else(prompt):
    document = " ".join(str(n) for n in range(1000))
    question = Question(document=document, question="Which?", answers=["x"])
    writer = Writer(TOKENIZER, settings=settings(prompt=prompt))
    ids, _, cut = writer.write(question)
    text = TOKENIZER.decode(ids)
    assert cut and len(ids) + 12 == 900
    assert "0 1 2 3 4 5" in text and "998 999\n\nQuestion: Which?" in text and " 500 " not in text
    whole, length, uncut = Writer(TOKENIZER, settings=settings(length=9000, prompt=prompt)).write(question)
    assert not uncut and document in TOKENIZER.decode(whole)
    assert length == writer.write(question).tokens == len(TOKENIZER(document, add_special_tokens=False)["input_ids"])
    with pytest.raises(
        ValueError, match="100 tokens are too few for the question 'Which[?]', without a document it is"
    ):
        Writer(TOKENIZER, settings=settings(length=100, prompt=prompt)).write(question)


def test_the_authors_prompt_has_the_tokens_of_training():
    question = Question(document="Ada lived in London.", question="Where?", answers=["London"])
    ids = Writer(TOKENIZER, settings=settings(prompt="authors")).write(question).ids
    turns = (Turn("user", asked(question.document, question.question)), Turn("assistant", "London"))
    pair = tokenised(turns, tokenizer=TOKENIZER, prompt="authors")
    assert ids == pair.tokens[~pair.answer].tolist()


def test_held_out_cases_of_the_casebook_are_asked_where_that_is_said(tmp_path):
    own, held_out = put(tmp_path / "q.jsonl", *CASES[:2]), put(tmp_path / "cases.jsonl", CASES[2])
    for said, count in ((False, 2), (True, 3)):
        given = settings(own, held_out=said)
        found = measure(tiny(), label="m", tokenizer=TOKENIZER, settings=given, held_out=held_out)
        assert found["longqa"]["m"]["cases"] == count
    given = settings(held_out=True)
    assert (
        measure(tiny(), label="m", tokenizer=TOKENIZER, settings=given, held_out=held_out)["longqa"]["m"]["cases"] == 1
    )


@pytest.mark.parametrize("prompt", ["authors", "chat"])
def test_a_base_model_answers_to_the_end_of_the_line_and_one_that_was_taught_to_in_paragraphs(prompt):
    assert answer_of(" London\nQuestion: and", prompt="plain") == "London"
    assert answer_of("\nIt is London.\n\nHe says so.\n", prompt=prompt) == "It is London.\n\nHe says so."
    assert answer_of("", prompt="plain") == ""


def test_an_answer_ends_with_the_mark_that_ends_a_turn_whatever_stands_behind_it(tmp_path, monkeypatch):
    """A mark that is no end of a generation config, and the padding of a batch."""
    ids = [TOKENIZER(said, add_special_tokens=False)["input_ids"] for said in ("London", "Where now")]
    written = [[*ids[0], TOKENIZER.eos_token_id, *ids[1]]]
    monkeypatch.setattr(longqa, "answers", lambda *given, **named: written)
    given = settings(put(tmp_path / "q.jsonl", CASES[0]), prompt="authors")
    assert measure(tiny(), label="m", tokenizer=TOKENIZER, settings=given)["longqa"]["m"]["exact"]["value"] == 1


def test_the_best_of_the_right_answers_counts(tmp_path, monkeypatch):
    said = ["in london.", "it was 1871", "everybody"]

    def perfect(model, *, prompts, max_new_tokens, kept, documents):
        return [TOKENIZER(s, add_special_tokens=False)["input_ids"] for s in said]

    monkeypatch.setattr(longqa, "answers", perfect)
    file = put(tmp_path / "q.jsonl", *CASES)
    result = measure(tiny(), label="m", tokenizer=TOKENIZER, settings=settings(file))["longqa"]["m"]
    assert (result["cases"], result["cut"], result["prompt"]) == (3, 0, "plain")
    assert result["exact"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert result["f1"]["value"] == pytest.approx(np.mean([1, 2 * 1 / (3 + 2), 0]), abs=1e-6)
    assert result["rouge_l"]["value"] == result["f1"]["value"]
    documents = [each["document"] for each in CASES]
    low, high = share(np.array([1.0, 0.0, 0.0]), groups_N=documents)
    assert (result["exact"]["low"], result["exact"]["high"]) == pytest.approx((low, high), abs=1e-6)


QUESTIONS = ("Where did Ada live?", "Who lived in London, and for how long?", "When?")


@pytest.mark.parametrize("prompt", ["plain", "authors", "chat"])
@pytest.mark.parametrize("length", [900, 300])  # whole, and cut in the middle
def test_a_document_is_read_once_for_all_its_questions_and_their_answers_stay_the_same(
    tmp_path, monkeypatch, prompt, length
):
    model, seen, given = tiny(), [], settings(prompt=prompt, length=length)
    cases = [CASES[0] | {"question": q} for q in QUESTIONS]
    prompts = [Writer(TOKENIZER, settings=given).write(Question(**case)).ids for case in cases]
    apart = answers(model, prompts=prompts, max_new_tokens=[12] * 3)
    found = []
    monkeypatch.setattr(longqa, "answers", lambda *a, **k: found.append(answers(*a, **k)) or found[0])
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: seen.append(k["input_ids"].numel()) or forward(**k))
    file = put(tmp_path / "q.jsonl", *cases)
    measure(model, label="m", tokenizer=TOKENIZER, settings=settings(file, prompt=prompt, length=length))
    assert found == [apart]
    same = next(n for n, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert same > min(map(len, prompts)) / 3
    assert sum(seen) == same + sum(len(p) - same + len(a) - 1 for p, a in zip(prompts, apart, strict=True))


def test_no_case_is_an_error():
    with pytest.raises(ValueError, match="longqa.cases names no file"):
        measure(tiny(), label="m", tokenizer=TOKENIZER, settings=settings())


def test_stage_goes_on_where_it_was_cut_off_and_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", str(tmp_path / "kept"))
    tiny().save_pretrained(tmp_path / "odd")
    TOKENIZER.save_pretrained(tmp_path / "odd")
    given = settings(put(tmp_path / "q.jsonl", *CASES))
    stage(tmp_path / "odd", tmp_path / "none", tmp_path / "a/odd.json", given, FLOAT32)
    left = iter([None, None])
    from longlora.evaluation import answer

    keep = answer.keep
    monkeypatch.setattr(answer, "keep", lambda *a: (keep(*a), next(left)))  # the third group is not reached
    with pytest.raises((StopIteration, RuntimeError)):
        stage(tmp_path / "odd", tmp_path / "none", tmp_path / "b/odd.json", given, FLOAT32)
    monkeypatch.undo()
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", str(tmp_path / "kept"))
    assert not (tmp_path / "b/odd.json").exists() and list((tmp_path / "kept").iterdir())
    stage(tmp_path / "odd", tmp_path / "none", tmp_path / "b/odd.json", given, FLOAT32)
    assert (tmp_path / "a/odd.json").read_bytes() == (tmp_path / "b/odd.json").read_bytes()
