"""Every record is either a dialogue or named with what is wrong with it."""

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from longlora.data.instructions import Turn, read_hub, read_records
from longlora.data.wording import asked

GOOD = {"instruction": "Sum up the book.", "output": "It is short.", "file": "book.txt", "rating": 5}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who came?"},
        {"role": "assistant", "content": "Nobody."},
    ]
}
CASE = {"document": "Nobody came.", "question": "Who came?", "answers": ["Nobody", "No one"]}


def written(tmp_path, *records, name="rows.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return tmp_path / name


def test_the_three_kinds_of_record_become_dialogues(tmp_path):
    found = read_records(written(tmp_path, GOOD, CHAT, CASE, {**GOOD, "context": "The book.", "input": "Now."}))
    assert [[(t.role, t.content) for t in d.turns] for d in found.dialogues] == [
        [("user", "Sum up the book."), ("assistant", "It is short.")],
        [("system", "Be brief."), ("user", "Who came?"), ("assistant", "Nobody.")],
        [("user", asked("Nobody came.", "Who came?")), ("assistant", "Nobody")],
        [("user", "The book.\n\nSum up the book.\n\nNow."), ("assistant", "It is short.")],
    ]
    assert found.unread == {"rating": 2} and found.bad == []
    assert found.dialogues[0].documents == ("book.txt",)


@pytest.mark.parametrize(
    ("record", "field", "reason"),
    [
        ({"output": "x"}, "instruction", "is missing"),
        ({"instruction": "x", "output": " \n"}, "output", "is empty"),
        ({"instruction": "x", "output": ["y"]}, "output", "should be a valid string"),
        (["x"], "record", "is a list, not an object with named fields"),
        ({"question": "x", "document": "y", "answers": []}, "answers", "List should have at least 1 item"),
        ({"messages": CHAT["messages"][:2]}, "messages", "the last turn is not the assistant's"),
        ({"messages": CHAT["messages"][1:] * 2 + CHAT["messages"][2:]}, "messages", "turn 5 is the assistant's"),
        ({"messages": [{"role": "tool", "content": "x"}] * 2}, "messages.0.role", "should be 'system', 'user' or"),
        ({"instruction": "a \ud83d b", "output": "x"}, "instruction", r"holds half of a character, '\ud83d'"),
        ({**GOOD, "file": "\ude00"}, "file", r"holds half of a character, '\ude00'"),
    ],
)
def test_a_bad_record_is_named_by_line_field_and_reason(tmp_path, record, field, reason):
    found = read_records(written(tmp_path, GOOD, record, CHAT))
    assert [d.place.rpartition(" ")[2] for d in found.dialogues] == ["1", "3"]
    assert found.bad[0].place == f"{tmp_path / 'rows.jsonl'} line 2"
    assert found.bad[0].field == field and reason in found.bad[0].reason
    assert found.read == 3
    assert found.summary().startswith("3 records, 2 good, 1 bad; first: ")


def test_a_broken_line_costs_that_line_alone(tmp_path):
    file = written(tmp_path, GOOD, CHAT)
    file.write_text(file.read_text().replace('"rating"', "rating"))
    found = read_records(file)
    assert len(found.dialogues) == 1
    assert found.bad[0].reason.startswith("is not JSON: ") and "line 1" in found.bad[0].place


def test_a_record_that_is_nested_too_deep_is_named(tmp_path):
    file = written(tmp_path, GOOD)
    with file.open("a") as rows:
        rows.write("\n" + "[" * 100_000 + "\n")
    assert [b.reason for b in read_records(file).bad] == ["is nested too deep to be read"]
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="rows.jsonl line 1: is nested too deep to be read"):
        read_records(file)


def test_a_json_list_is_read_with_the_lines_where_its_records_begin(tmp_path):
    file = tmp_path / "list.json"
    file.write_text(json.dumps([GOOD, {"output": "x"}, CHAT, CASE], indent=2))
    found = read_records(file)
    starts = [i for i, line in enumerate(file.read_text().splitlines(), start=1) if line == "  {"]
    assert [d.place for d in found.dialogues] == [f"{file} line {starts[i]}" for i in (0, 2, 3)]
    assert found.bad[0].place == f"{file} line {starts[1]}"
    file.write_text("\ufeff[]")
    assert read_records(file).read == 0


def test_records_of_one_line_are_told_apart(tmp_path):
    file = tmp_path / "list.json"
    file.write_text(json.dumps([{"output": "x"}, GOOD, {"output": "y"}]) + "\n")
    found = read_records(file)
    assert (found.read, len(found.dialogues)) == (3, 1)
    assert [b.place for b in found.bad] == [f"{file} line 1", f"{file} line 1, record 3"]


def test_what_messages_have_beside_their_words_is_named(tmp_path):
    told = [*CHAT["messages"][:2], {**CHAT["messages"][2], "weight": 0, "tool_calls": None}]
    found = read_records(written(tmp_path, {"messages": told}))
    assert found.unread == {"messages.weight": 1}


def test_questions_on_one_document_name_it_whatever_field_it_is_in_and_however_it_is_spaced(tmp_path):
    text = "It is. It is a document that has a sentence which is longer than all the questions about it. The end"
    rows = [
        {"instruction": "Who?", "input": text, "output": "x"},
        {"instruction": "Who came to the town?", "input": text, "output": "x"},
        {"instruction": f"{text.upper()}\nWhen?", "output": "x"},
        {"instruction": "When?", "context": text.replace(" ", "\n"), "file": " ", "output": "x"},
        {"document": text.replace(" ", "\u00a0"), "question": "Where?", "answers": ["x"]},
    ]
    found = read_records(written(tmp_path, *rows, {**rows[3], "context": " \n"}))
    assert len({d.documents for d in found.dialogues[:-1]}) == 1
    assert found.dialogues[-1].documents != found.dialogues[0].documents


def test_questions_on_one_document_in_a_system_turn_name_it_and_what_only_says_how_to_answer_names_nothing(tmp_path):
    text = "It has a sentence which is longer than all of the questions that may be asked about it. " * 5
    rows = [
        {"messages": [{"role": "system", "content": system}, {"role": "user", "content": asked}, CHAT["messages"][2]]}
        for system in (text, "You answer, in at most a few words and without any mistake, all questions.")
        for asked in ("Who came to the town?", "When?")
    ]
    first, second, third, fourth = (d.documents for d in read_records(written(tmp_path, *rows)).dialogues)
    assert first == second and len({first, third, fourth}) == 3


def test_a_folder_is_its_files_whatever_the_case_of_their_names(tmp_path):
    written(tmp_path, GOOD, name="A.JSONL")
    (tmp_path / "b.json").mkdir()
    assert read_records(tmp_path).read == read_records(tmp_path / "A.JSONL").read == 1


def test_parquet_and_folders_give_the_same_as_lines(tmp_path):
    plain = read_records(written(tmp_path, GOOD, CASE))
    table = pa.Table.from_pylist([{**GOOD, "question": None, "document": None, "answers": None}, CASE])
    (tmp_path / "more").mkdir()
    parquet.write_table(table, tmp_path / "more/rows.parquet")
    rows = read_records(tmp_path / "more")
    assert [d.turns for d in rows.dialogues] == [d.turns for d in plain.dialogues]
    assert [d.place.rpartition(" row ")[2] for d in rows.dialogues] == ["1", "2"]
    assert read_records(tmp_path).read == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"x": 1}, {"y": ]', r"a.json line 1, column \d+: not JSON"),
        ("a.json", b'[{"x": 1} {"y": 2}]', "neither a comma nor the end"),
        ("a.json", b"[] []", "goes on behind the end of its list"),
        ("a.jsonl", b'{"instruction": "caf\xe9"}', "not UTF-8: byte 20 is 0xe9"),
        ("a.parquet", b"PAR1", "is not a Parquet file"),
        ("a.csv", b"x", "not from '.csv'"),
    ],
)
def test_a_file_that_can_not_be_read_says_why(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_records(tmp_path / name)


def test_a_parquet_file_that_breaks_off_inside_is_one_line(tmp_path):
    table = pa.Table.from_pylist([{"instruction": f"i{i} " * 50, "output": "x"} for i in range(3000)])
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw[: len(raw) // 2] + bytes(1000) + raw[len(raw) // 2 + 1000 :])
    with pytest.raises(ValueError, match=r"a.parquet cannot be read behind row \d+: "):
        read_records(tmp_path / "a.parquet")


def test_nothing_to_read_says_so(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        read_records(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"no .json, .jsonl, .parquet file below"):
        read_records(tmp_path)


def test_two_questions_on_one_text_are_about_one_document(tmp_path):
    book = "Chapter one, in which nothing happens for a very long time.\nEnd."
    ask = "Below is a book. {}\n{}"
    rows = [{"instruction": ask.format(book, q), "output": "x"} for q in ("Who?", "When did all of it happen?")]
    found = read_records(written(tmp_path, *rows, {"instruction": ask.format("Another.", "Who?"), "output": "x"}))
    one, two, other = (d.documents for d in found.dialogues)
    assert one == two != other
    assert found.dialogues[0].turns[0] == Turn("user", rows[0]["instruction"])


def test_a_dataset_of_the_hub_is_read_row_by_row(tmp_path):
    written(tmp_path, {"instruction": "a", "output": "b"}, {"instruction": "c", "output": " "})
    found = read_hub(str(tmp_path), split=None)  # a folder stands for a hub id
    assert [d.place for d in found.dialogues] == [f"{tmp_path} row 1"]
    assert [(b.place, b.field, b.reason) for b in found.bad] == [(f"{tmp_path} row 2", "output", "is empty")]


def test_a_record_with_a_key_twice_is_bad_and_costs_itself_alone(tmp_path):
    twice = '{"instruction": "A", "output": "B", "output": "C"}'
    inside = '{"messages": [{"role": "user", "content": "A", "content": "B"}, {"role": "assistant", "content": "C"}]}'
    good = '{"instruction": "D", "output": "E"}'
    (tmp_path / "a.jsonl").write_text("\n".join((twice, inside, good)))
    (tmp_path / "a.json").write_text(f"[{twice},\n {inside},\n {good}]")
    for name in ("a.jsonl", "a.json"):
        found = read_records(tmp_path / name)
        assert [(b.place.removeprefix(f"{tmp_path}/"), b.field, b.reason) for b in found.bad] == [
            (f"{name} line 1", "output", "stands twice"),
            (f"{name} line 2", "content", "stands twice"),
        ]
        assert [d.turns[0].content for d in found.dialogues] == ["D"]
