"""The passage that is cited is the one a reader would look up, at the lines and characters that an editor shows."""

import pytest

from longlora.data.casebook import Casebook, build, words
from longlora.data.reading import Document, located, read_documents
from longlora.data.sentences import Span
from longlora.data.wording import UNSAID
from longlora.evaluation.evidence import Evidence

TEXT = """# The harbour

The harbour of Vellmoor was built in 1873
by the engineer Tobias Renn. It has three quays.

# The mill

The old mill burned down in 1911. It belonged to Anna Kessel, who grew barley and rye on the hill.
The mill was built in 1873, too.
"""


@pytest.fixture
def evidence():
    return Evidence(Document("village", TEXT))


def test_a_verbatim_answer_is_found_where_the_question_points(evidence):
    harbour = evidence.passage("When was the harbour of Vellmoor built?", "1873")
    mill = evidence.passage("When was the mill built?", "1873")
    assert harbour.text == "The harbour of Vellmoor was built in 1873 by the engineer Tobias Renn."
    assert (harbour.lines, harbour.heading) == ((3, 4), "The harbour")
    assert mill.text == "The mill was built in 1873, too." and mill.lines == (9, 9)
    assert TEXT[harbour.start : harbour.end].split() == harbour.text.split()
    assert harbour.place() == f'lines 3-4, characters {harbour.start}-{harbour.end}, under "The harbour"'


def test_an_answer_in_other_words_is_found_by_its_rare_ones(evidence):
    found = evidence.passage("Who owned it?", "A woman called Anna Kessel owned it")
    assert found.text.startswith("It belonged to Anna Kessel")


def test_a_part_of_a_word_is_not_the_word(evidence):
    assert "three" in evidence.passage("How many?", "three").text
    assert evidence.passage("", "hree") is None


@pytest.mark.parametrize(
    ("text", "question", "answer", "found"),
    [
        ("彼は東京で生まれた。今は大阪に住んでいる。", "どこに?", "大阪", "今は大阪に住んでいる。"),
        ("工厂建于1873年。工人有二百名。", "何时建的?", "1873", "工厂建于1873年。"),
        ("रामायण पढ़ी गई.\n\nराम घर गया.", "", "राम", "राम घर गया."),
        ("का आया।\n\nकि गया।", "", "कि", "कि गया।"),  # they differ in their vowel signs alone
        ("เขาเกิดที่เชียงใหม่\n\nเขาทำงานที่ภูเก็ต", "", "ภูเก็ต", "เขาทำงานที่ภูเก็ต"),
    ],
)
def test_words_are_found_in_every_script(text, question, answer, found):
    assert Evidence(Document("d", text)).passage(question, answer).text == found


def test_where_nothing_is_said_nothing_is_cited(evidence):
    assert evidence.passage("Who was mayor?", UNSAID) is None
    assert evidence.passage("Zzz?", "qqq") is None
    assert evidence.passage("Zzz?", " ") is None
    assert Evidence(Document("signs", "+ - +")).passage("x", "y") is None


def test_the_number_of_an_item_is_not_cited():
    steps = Evidence(Document("steps", "1. Call.\n2. Wait.\n3. Pay 3 euros.\n"))
    assert steps.passage("How much?", "3").text == "Pay 3 euros."


def test_only_what_the_model_read_is_cited(evidence):
    second = Span(TEXT.index("# The mill"), len(TEXT))
    found = evidence.passage("When was the harbour of Vellmoor built?", "1873", within=second)
    assert found.lines == (9, 9)


def test_a_sentence_that_reaches_into_what_the_model_read_is_cited():
    text = "It is a long story, and the king's treasure lies under the old oak. The mill has burned down."
    evidence, question = Evidence(Document("d", text)), "Where does the treasure lie?"
    for window in (Span(20, len(text)), Span(0, 62)):
        assert evidence.passage(question, "under the old oak", within=window).text.startswith("It is a long story")
    assert evidence.passage(question, "under the old oak", within=Span(68, len(text))).text.startswith("The mill")


def test_lines_without_full_stops_are_cited_one_by_one_where_they_are_many():
    log = "\n".join(f"  job {n * 7} of worker {n} took {n % 13} s" for n in range(200))
    evidence = Evidence(Document("log", log))
    found = evidence.passage("Which worker did job 539?", "worker 77")
    assert (found.text, found.lines) == ("job 539 of worker 77 took 12 s", (78, 78))
    assert log[found.start : found.end] == found.text
    late = evidence.passage("Which worker did job 1260?", "worker 180", within=Span(len(log) // 2, len(log)))
    assert late.lines == (181, 181)
    verse = "Of arms and the man I sing,\nwho first from Troy\ncame to Lavinian shores\n"
    assert Evidence(Document("verse", verse)).passage("Who came?", "the man").lines == (1, 3)


def test_pages_are_named(tmp_path):
    document = Document("paper", "First page here.\n\nSecond page there.\n\n", pages=(0, 18))
    assert Evidence(document).passage("?", "there").page == 2


def test_for_right_answers_the_passage_is_the_evidence():
    settings = Casebook(
        lengths=[1500], depths=[0.0, 0.5, 1.0], kinds=["cloze", "number", "facts"], samples=3, collections=0.5, seed=3
    )
    for case in build(read_documents(located("sotu"))[:40], settings, measure=words).cases:
        passage = Evidence(Document("excerpt", case.document)).passage(case.question, case.answers[0])
        places = [case.document.index(e) for e in case.evidence]
        assert any(at <= passage.start < at + len(e) for at, e in zip(places, case.evidence, strict=True))
