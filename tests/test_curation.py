"""What is trained on: each once, nothing the evaluation asks, no document on both sides."""

import json
import unicodedata

import numpy as np
import pytest

from longlora.data.curation import Contamination, about_held_out, apart, beside, statistics, uncontaminated, unique
from longlora.data.instructions import Dialogue, Turn

WORDS = [f"w{i}" for i in range(400)]
NONE = Contamination(cases=None, words=13, share=0.5)


def dialogue(asked: str, said: str = "Yes.", *, document: str = "d", place: str = "p") -> Dialogue:
    return Dialogue((Turn("user", asked), Turn("assistant", said)), tuple(document.split("+")), place)


def test_what_says_the_same_is_kept_once():
    rows = [dialogue("Who came?", place="1"), dialogue("who  came", place="2"), dialogue("Who came?", "No.", place="3")]
    kept, left = unique(rows)
    assert [d.place for d in kept] == ["1", "3"]
    assert [(b.place, b.field, b.reason) for b in left] == [("2", "duplicate", "says the same as 1")]


@pytest.mark.parametrize(
    "disguise",
    [
        "\u200b".join,
        "\u00ad".join,
        lambda text: f"\u202b{text}\u202c",
        lambda text: text.replace("fi", "\ufb01"),
        lambda text: "".join(chr(ord(c) + 0xFEE0) if c.isascii() and c.isalpha() else c for c in text),
        lambda text: " ".join(f"_{word}_" for word in text.split()),
        lambda text: unicodedata.normalize("NFD", text.upper()),
        lambda text: text.replace(" ", "\r\n\u00a0"),
    ],
)
def test_signs_that_nobody_sees_and_other_forms_of_one_hide_nothing(disguise):
    text = "the five fish of an élève " + " ".join(WORDS[:80])
    kept, left = unique([dialogue(text), dialogue(disguise(text))])
    assert (len(kept), [b.field for b in left]) == (1, ["duplicate"])
    assert [b.field for b in about_held_out([dialogue(disguise(text))], [text], NONE)[1]] == ["contamination"]


def test_vowel_signs_tell_words_apart():
    assert len(unique([dialogue("का"), dialogue("कि")])[0]) == 2


def test_a_passage_of_a_script_without_spaces_is_found_in_another():
    text = "".join(chr(0x4E00 + i) for i in range(400))
    rows = [dialogue(text[100:180], place="an excerpt"), dialogue(text[100:120] + text[380:180:-1], place="few of it")]
    kept, left = about_held_out(rows, [text], NONE)
    assert [(d.place) for d in kept] == ["few of it"] and [b.place for b in left] == ["an excerpt"]


def test_signs_without_words_are_not_all_the_same():
    assert len(unique([dialogue("+"), dialogue("-")])[0]) == 2


@pytest.fixture
def cases(tmp_path):
    rows = [
        {"document": " ".join(WORDS[:100]), "question": "Which word is the last?", "answers": ["w99"]},
        {"document": " ".join(WORDS[200:300]), "question": "Which word is the first?", "answers": ["w200"]},
    ]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Contamination(cases=str(tmp_path / "cases.jsonl"), words=13, share=0.5)


def test_what_holds_an_evaluation_case_is_left_out(cases):
    rows = [
        dialogue("Read: " + " ".join(WORDS[100:200]), place="other words"),
        dialogue("Read: " + " ".join(WORDS[20:98]).upper(), place="most of the first document"),
        dialogue("Read: " + " ".join(WORDS[80:120]), place="a fifth of it"),
        dialogue("Question: Which word is the first?", "w200", place="the second question"),
        dialogue("Question: Which word is the first?", "w201", place="another answer"),
    ]
    kept, left = uncontaminated(rows, cases)
    assert [d.place for d in kept] == ["other words", "a fifth of it", "another answer"]
    assert [b.place for b in left] == ["most of the first document", "the second question"]
    assert "evaluation case" in left[0].reason and left[0].reason.endswith("line 1")
    assert uncontaminated(rows, NONE) == (rows, [])


def test_a_held_out_text_that_is_shorter_than_a_passage_is_found_whole():
    texts = [" ".join(WORDS[:40]), " ".join(WORDS[40:70])]
    rows = [
        dialogue(" ".join(WORDS[100:400] + WORDS[:40]), place="all of the first"),
        dialogue(" ".join(WORDS[100:400] + WORDS[40:62]), place="most of the second"),
        dialogue(" ".join(WORDS[100:400] + WORDS[:20]), place="some of the first"),
    ]
    kept, left = about_held_out(rows, texts, NONE)
    assert [d.place for d in kept] == ["some of the first"] and len(left) == 2


def test_all_turns_of_a_case_are_looked_for_but_no_word_that_every_text_has(cases, tmp_path):
    said = [" ".join(WORDS[:100]), "Yes.", "Go on.", "No.", "Who came to the town?", "Ada came."]
    roles = ("user", "assistant") * 3
    row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]}
    (tmp_path / "cases.jsonl").write_text(json.dumps(row))
    rows = [
        dialogue("Read: " + " ".join(WORDS[10:90]), place="its document"),
        dialogue("Who came to the town?", "Ada came.", place="its question and answer"),
        dialogue("They go on, and somebody asks: who came to the town?", "Ben.", place="words of it"),
    ]
    kept, left = uncontaminated(rows, cases)
    assert [d.place for d in kept] == ["words of it"] and len(left) == 2


def test_a_document_in_a_system_turn_is_one_and_what_only_says_how_to_answer_is_none(cases, tmp_path):
    def chat(system, asked, said="Yes.", place="p"):
        return Dialogue((Turn("system", system), Turn("user", asked), Turn("assistant", said)), ("d",), place)

    brief = "You are a helpful assistant and you always answer in one short sentence."
    for system in (" ".join(WORDS[:100]), brief):
        said = zip(("system", "user", "assistant"), (system, "Which word is the last?", "w99"), strict=True)
        (tmp_path / "cases.jsonl").write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in said]}))
        rows = [chat(" ".join(WORDS[10:90]), "Who?", place="its document"), chat(brief, "Who came?", place="another")]
        assert [b.place for b in uncontaminated(rows, cases)[1]] == (["its document"] if system != brief else [])
    held_out = [chat(f"{brief} {' '.join(WORDS[:100])}", "Who?", place="h")]
    rows = [chat(" ".join(WORDS[:100]), "When?", place="the same"), *(chat(brief, f"{n}?", place="2") for n in "abc")]
    assert [b.place for b in beside(rows, held_out, NONE)[1]] == ["the same"]


def test_no_right_answer_of_a_case_is_taught_without_its_document_not_only_the_first(cases, tmp_path):
    question = "Where did the widow Ada Renn live?"
    case = {"document": " ".join(WORDS), "question": question, "answers": ["London", "in London"]}
    (tmp_path / "cases.jsonl").write_text(json.dumps(case))
    rows = [dialogue(question, said, place=said) for said in ("In London.", "London", "Rome")]
    assert [d.place for d in uncontaminated(rows, cases)[0]] == ["Rome"]


def test_cases_that_are_not_whole_are_refused(cases, tmp_path):
    (tmp_path / "cases.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(ValueError, match="1 records, 0 good, 1 bad"):
        uncontaminated([dialogue("x")], cases)


def test_what_holds_a_passage_of_a_held_out_text_is_left_out():
    text = " ".join(WORDS[:200])
    rows = [
        dialogue("Read: " + " ".join(WORDS[50:90]), place="an excerpt"),
        dialogue("Read: " + " ".join(WORDS[200:400] * 2 + WORDS[100:170]), place="a passage among others"),
        dialogue("Read: " + " ".join(WORDS[200:400] + WORDS[100:130]), place="a quotation"),
        dialogue("Read: " + " ".join(WORDS[300:340]), place="other words"),
    ]
    kept, left = about_held_out(rows, [text], NONE)
    assert [d.place for d in kept] == ["a quotation", "other words"]
    assert [(b.place, b.field) for b in left] == [(d.place, "contamination") for d in rows[:2]]
    assert about_held_out(rows, [], NONE) == (rows, [])


def test_a_document_under_two_names_is_on_one_side():
    text, form = " ".join(WORDS[:100]), " ".join(WORDS[300:])
    held_out = [dialogue(f"{form}\n{text}\n\nWho?", document="a", place="h")]
    rows = [
        dialogue("Where?\n" + text.upper().replace(" ", "\n"), document="b", place="the same"),
        dialogue(" ".join(WORDS[200:300]), " ".join(WORDS[10:80]), place="in its answer"),
        dialogue(" ".join(WORDS[200:300] + WORDS[:60]), place="a quotation"),
        *(dialogue(f"{form}\nWho is {n}?", document="c", place="the same form") for n in range(4)),
    ]
    kept, left = beside(rows, held_out, NONE)
    assert [d.place for d in kept] == ["a quotation", *["the same form"] * 4]
    assert [(b.place, b.field) for b in left] == [("the same", "split"), ("in its answer", "split")]
    assert left[0].reason == "holds a passage of h, which is held out"
    assert beside(rows, [], NONE) == (rows, [])


def test_no_document_is_on_both_sides_and_the_seed_decides():
    rows = [dialogue(f"{i}", document=f"d{i % 20}") for i in range(130)]
    rows += [dialogue(f"{i}", document=f"d{i}+d{i + 1}") for i in range(19)]
    split = apart(rows, share=0.15, seed=3)
    train, held_out = ({name for d in side for name in d.documents} for side in (split.train, split.held_out))
    assert train.isdisjoint(held_out) and len(held_out) == 3
    assert sum(map(len, split)) == 149 and 3 <= len(split.left) <= 6
    assert split.left[0].field == "split"
    assert apart(rows, share=0.15, seed=3) == split
    assert apart(rows, share=0.15, seed=4) != split
    assert apart(rows, share=0.0, seed=3) == (rows, [], [])
    with pytest.raises(ValueError, match=r"held_out = 0.02 of 20 documents is less than half of one"):
        apart(rows, share=0.02, seed=3)
    with pytest.raises(ValueError, match=r"held_out = 0.9 of 2 documents leaves none"):
        apart([dialogue("x", document="a"), dialogue("x", document="b")], share=0.9, seed=1)


def test_statistics_agree_with_numpy():
    lengths = [int(n) for n in np.random.default_rng(1).integers(0, 5000, 801)]
    found = statistics(lengths)
    assert (found["count"], found["total"], found["most"]) == (801, sum(lengths), max(lengths))
    assert found["median"] == int(np.median(lengths))
    edges = [0, *[2**i for i in range(14)]]
    counts, _ = np.histogram(lengths, edges)
    assert found["histogram"] == {str(e): int(c) for e, c in zip(edges, counts, strict=False) if c}
    assert statistics([]) == {"count": 0}
