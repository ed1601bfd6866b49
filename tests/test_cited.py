"""What is cited for an answer is held to where the evidence stands, as a reader with a pencil would do it."""

import json
import math
import re
from collections import Counter

import pytest
from test_longqa import CASES, put, settings
from test_ruler import TOKENIZER, tiny

from longlora.data.casebook import Casebook, build, words
from longlora.data.reading import located, read_documents
from longlora.data.sentences import sentences
from longlora.data.wording import UNSAID
from longlora.evaluation import longqa
from longlora.evaluation.cited import Truth, cite
from longlora.evaluation.longqa import measure, read_cases
from longlora.report.gate import Gate, Rule, judge
from longlora.report.scores import read

TEXT = """# Harbour

The harbour of Vellmoor was built in 1873
by the engineer Tobias Renn. It has three quays and a lighthouse.

# Mill

The old mill burned down in 1911. It belonged to Anna Kessel, a widow with barley on the hill.
The mill was built in 1873, too. Nobody knows why it burned. The mill of Vellmoor stood empty for years.
"""
BUILT = "The harbour of Vellmoor was built in 1873\nby the engineer Tobias Renn."
OWNED = "It belonged to Anna Kessel, a widow with barley on the hill."


def found(question: str, answer: str, *evidence: str, document: str = TEXT):
    citation = cite([Truth(document, evidence)], questions=[question], answers=[answer])[0]
    return None if citation is None else (citation.answer, citation.question)


@pytest.mark.parametrize(
    ("question", "answer", "evidence", "expected"),
    [
        ("Who owned the mill?", "Anna Kessel", OWNED, (True, False)),
        ("When was the harbour of Vellmoor built?", "1873", BUILT, (True, True)),
        ("When was the harbour of Vellmoor built?", "1911", BUILT, (False, True)),  # a wrong answer leads astray
        ("Who owned the mill?", "Tobias Renn", OWNED, (False, False)),
        ("When was the harbour of Vellmoor built?", UNSAID, BUILT, (False, True)),
        ("When was the harbour of Vellmoor built?", "", BUILT, (False, True)),
        ("Zzz?", "qqq", BUILT, (False, False)),
    ],
)
def test_the_answer_and_the_question_alone_are_held_to_the_evidence(question, answer, evidence, expected):
    assert found(question, answer, evidence) == expected


def test_a_case_without_evidence_is_not_counted():
    assert found("Who was mayor?", UNSAID) is None
    assert Truth(TEXT, []).depth is None


def test_one_character_of_one_passage_is_enough_and_none_is_not():
    assert found("When was the harbour of Vellmoor built?", "1873", OWNED, "Renn.") == (True, True)
    sentence = "The harbour of Vellmoor was built in 1873 by the engineer Tobias Renn."  # another white space
    assert found("When was the harbour of Vellmoor built?", "1873", sentence) == (True, True)
    assert found("When was the harbour of Vellmoor built?", "1873", "It has three quays") == (False, False)


def test_a_heading_is_no_evidence_though_its_word_stands_elsewhere_too():
    text = "# Army\n\nThe fleet grew by nine ships.\n\n# Navy\n\nThe Army was paid in silver.\n"
    question, grew = "Under which heading does this sentence stand?\nThe fleet grew by nine ships.", "The fleet grew"
    assert found(question, "Army", "Army", grew, document=text) == (False, True)
    assert found(question, "Army", "Army", document=text) is None


def test_the_same_words_are_evidence_wherever_they_stand():
    text = "Bread costs two pence. Milk is dear. The mayor says so. Bread costs two pence, he says."
    for answer in ("Bread costs two pence", "Bread costs two pence, he says"):
        assert found("Who?", answer, "costs two pence", document=text)[0]
    assert [text[slice(*s)] for s in Truth(text, ["two pence"]).spans] == ["two pence"] * 2


@pytest.mark.parametrize(
    ("text", "passage", "places"),
    [
        ("The other man, he said, is the heir.", "he", [15]),
        ("The he he said.", "he he", [4]),
        ("_He said it._ So he said.", "He said it.", [1]),
        ("It is 1873, not 18730.", "1873", [6]),
        ("Cafe\u0301, cafe.", "cafe", [7]),
        ("Cafe\u0301.", "Cafe", []),
        ("Bundes\u00adregierung", "regierung", [7]),  # only inside of a word
        ("서울은 한국의 수도이다.", "서울", [0]),
        ("서울은 한국의 수도이다.", "한국의 수도", [4]),
        ("東京都に住む。", "京都", [1]),
        ("की", "क", []),
    ],
)
def test_a_passage_is_found_as_whole_words(text, passage, places):
    assert [start for start, _ in Truth(text, [passage]).spans] == places


def test_a_heading_may_be_a_word_that_stands_often_and_a_word_of_a_text_may_not(tmp_path):
    text = "# Army\n\nThe Army was paid. The fleet was paid.\n"
    case = {"document": text, "question": "Which heading?", "answers": ["Army"]}
    assert read_cases(put(tmp_path / "a.jsonl", case | {"evidence": ["Army", "The Army was paid.", "The fleet"]}))
    for passage, times in (("was paid", 2), ("paid.", 2), ("h", 2)):
        with pytest.raises(ValueError, match=rf":1: evidence: '{passage}' stands {times} times .* too short to point"):
            read_cases(put(tmp_path / "a.jsonl", case | {"evidence": [passage]}))


def test_the_depth_is_where_the_first_passage_begins():
    assert Truth(TEXT, [OWNED, BUILT]).depth == TEXT.index("The harbour") / len(TEXT)
    assert Truth(TEXT, ["Mill", OWNED]).depth == TEXT.index(OWNED) / len(TEXT)


def by_hand(document: str, question: str, answer: str | None) -> tuple[int, int] | None:
    """The cited sentence by the definition: cosines of (1 + log tf) x idf, idf = log((1 + S) / (1 + df)) + 1."""
    spans = sentences(document)
    bags = [Counter(re.findall(r"\w+", document[a:b].lower())) for a, b in spans]

    def vector(bag: Counter[str]) -> dict[str, float]:
        known = {w: sum(w in other for other in bags) for w in bag}
        idf = {w: math.log((1 + len(bags)) / (1 + df)) + 1 for w, df in known.items() if df}
        weights = {w: (1 + math.log(bag[w])) * idf[w] for w in idf}
        length = math.sqrt(sum(x * x for x in weights.values()))
        return {w: x / length for w, x in weights.items()}

    def near(text: str) -> list[float]:
        wanted = vector(Counter(re.findall(r"\w+", text.lower())))
        return [sum(x * wanted.get(w, 0.0) for w, x in vector(bag).items()) for bag in bags]

    if answer is None:
        score = near(question)
    else:
        plain = [" ".join(document[a:b].split()).lower() for a, b in spans]
        padded = [f" {re.sub(r'[^a-z0-9]', ' ', text)} " for text in plain]
        verbatim = [f" {re.sub(r'[^a-z0-9]', ' ', answer.lower())} " in text for text in padded]
        score = [a + 0.5 * q + v for a, q, v in zip(near(answer), near(question), verbatim, strict=True)]
    best = max(range(len(spans)), key=lambda i: (round(score[i], 9), -i))
    return tuple(spans[best]) if score[best] > 0 else None


def test_a_reference_by_hand_finds_the_same_on_the_casebooks_cases():
    settings = Casebook(
        lengths=[200, 400], depths=[0.0, 1.0], kinds=["cloze", "number", "facts", "count", "absent"], samples=3,
        collections=0.5, seed=5,
    )  # fmt: skip
    cases = build(read_documents(located("sotu"))[:20], settings, measure=words).cases
    answers = [case.answers[0] if i % 3 else cases[i - 1].answers[0] for i, case in enumerate(cases)]
    truths = [Truth(case.document, case.evidence) for case in cases]
    citations = cite(truths, questions=[c.question for c in cases], answers=answers)
    seen = Counter()
    for case, answer, citation in zip(cases, answers, citations, strict=True):
        if case.kind == "absent":
            assert citation is None and case.evidence == []
            continue
        marked = {at + i for e in case.evidence for at in places(e, case.document) for i in range(len(e))}
        for said, hit in ((answer, citation.answer), (None, citation.question)):
            cited = None if said == UNSAID else by_hand(case.document, case.question, said)
            assert hit is bool(cited and marked & set(range(*cited))), (case.question, said)
            seen[hit] += 1
    assert min(seen.values()) > 5 and len(seen) == 2


def places(words: str, text: str) -> list[int]:
    return [i for i in range(len(text)) if text.startswith(words, i)]


ASKED = [
    {"question": "Who owned the mill?", "answers": ["Anna Kessel"], "evidence": [OWNED]},
    {"question": "When was the harbour of Vellmoor built?", "answers": ["1873"], "evidence": [BUILT]},
    {"question": "Who was mayor?", "answers": [UNSAID], "evidence": []},
]


def scores(tmp_path, monkeypatch, *said: str) -> dict:
    """Scores of a model that says `said`, over the cases above and one without the key."""
    ids = [TOKENIZER(s, add_special_tokens=False)["input_ids"] for s in said]
    monkeypatch.setattr(longqa, "answers", lambda model, *, prompts, max_new_tokens, kept, documents: ids)
    file = put(tmp_path / "q.jsonl", *({"document": TEXT} | row for row in ASKED), CASES[0])
    return measure(tiny(), label="extended", tokenizer=TOKENIZER, settings=settings(file), held_out=None)


def test_the_scores_have_evidence_over_the_cases_that_have_some(tmp_path, monkeypatch):
    result = scores(tmp_path, monkeypatch, "Anna Kessel", "1873", UNSAID, "London")
    both = result["longqa"]["extended"]
    assert both["cases"] == both["exact"]["trials"] == 4
    assert both["evidence"] == {"value": 1.0, "low": None, "high": None, "trials": 2}  # both on one document
    assert (both["evidence_floor"]["value"], both["evidence_floor"]["trials"]) == (0.5, 2)
    by_length = result["longqa_evidence"]["extended"]
    assert sum(node["trials"] for node in by_length.values()) == 2
    assert sum(node["trials"] for node in result["longqa_f1"]["extended"].values()) == 4
    depths = result["longqa_depth"]["extended"]
    assert {end: node["evidence"]["trials"] for end, node in depths.items()} == {"0.25": 1, "0.50": 1}


def test_without_any_evidence_nothing_is_said_of_it(tmp_path, monkeypatch):
    monkeypatch.setitem(ASKED[0], "evidence", [])
    monkeypatch.setitem(ASKED[1], "evidence", [])
    result = scores(tmp_path, monkeypatch, "Anna Kessel", "1873", UNSAID, "London")
    assert "evidence" not in result["longqa"]["extended"] and "evidence_floor" not in result["longqa"]["extended"]
    assert result.keys() == {"longqa", "longqa_exact", "longqa_f1"}


CITES = Rule(
    name="its answers point to the evidence", metric="longqa/extended/evidence", at_least=0.25,
    plus="longqa/extended/evidence_floor",
)  # fmt: skip
DEEP = Rule(name="also deep in a document", metric="longqa_depth/extended/0.50/evidence", at_least=1.0)
LONG = Rule(name="also in long ones", metric="longqa_f1/extended/target", at_least=0.5)


def verdict(folder, *rules: Rule) -> dict[str, tuple[bool, str]]:
    judged = judge(Gate(rules=list(rules), more_rules=[], not_asked=[]), scores=read(folder))
    return {rule["name"]: (rule["passed"], rule["reason"]) for rule in judged["rules"]}


def test_the_gate_refuses_a_model_whose_answers_do_not_point_to_the_evidence(tmp_path, monkeypatch):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/integrity.json").write_text(
        json.dumps({"integrity": {"target": {"value": 512, "reason": "trained"}}})
    )

    def judged(*said: str) -> dict[str, tuple[bool, str]]:
        (tmp_path / "s/longqa.json").write_text(json.dumps(scores(tmp_path, monkeypatch, *said)))
        return verdict(tmp_path / "s", CITES, DEEP, LONG)

    good = judged("Anna Kessel", "1873", UNSAID, "London")
    assert {name: passed for name, (passed, _) in good.items()} == dict.fromkeys(
        [CITES.name, DEEP.name, LONG.name], True
    )
    bad = judged("Tobias Renn", "1873", UNSAID, "London")
    assert bad[CITES.name] == (
        False,
        "longqa/extended/evidence is 0.5, required: at least 0.75 (0.25 + longqa/extended/evidence_floor = 0.5)",
    )
    assert bad[DEEP.name] == (False, "longqa_depth/extended/0.50/evidence is 0, required: at least 1")
    lost = judged("", "", "", "")
    assert lost[LONG.name] == (False, "longqa_f1/extended/512 is 0, required: at least 0.5")


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        (["Renn was mayor."], ":1: evidence: 'Renn was mayor.' does not stand in the document"),
        ([" "], ":1: evidence.0: String should match pattern"),
        (BUILT, ":1: evidence: Input should be a valid array"),
    ],
)
def test_evidence_that_can_not_be_found_is_named_by_file_and_line(tmp_path, evidence, said):
    file = put(tmp_path / "q.jsonl", {"document": TEXT} | ASKED[0] | {"evidence": evidence})
    with pytest.raises(ValueError) as error:
        read_cases(file)
    assert str(error.value).startswith(f"{file}{said}")
