"""A malformed case is named by file and line, in one line."""

import pytest

from longlora.data.cases import Case, case, read_lines


class Pair(Case):
    name: str
    count: int


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a", "count": 1}\n{"name": \n', ":2: is not JSON: Expecting value at column 10"),
        ('\n\n[1, 2]\n', ":3: a case is an object, {...}, not a list"),
        ("\n \n", ": no case in it"),
        ('{"name": "a"}', ":1: count: Field required"),
        ('{"name": "a", "count": 1}\n{"name": 3, "count": "1"}', ":2: name: Input should be a valid string; count: Input"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named_by_file_and_line(tmp_path, text, said):
    file = tmp_path / "x.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        for place, row in read_lines(file):
            case(Pair, row, place=place)
    assert str(error.value).startswith(f"{file}{said}") and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no case file at nowhere.jsonl: it is not there"):
        read_lines(tmp_path.relative_to(tmp_path) / "nowhere.jsonl")
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        read_lines(tmp_path)


def test_other_keys_and_empty_lines_do_no_harm(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"name": "a", "count": 1, "more": [2]}\n\n{"name": "b\u00e9", "count": 2}\n')
    pairs = [case(Pair, row, place=place) for place, row in read_lines(tmp_path / "x.jsonl")]
    assert pairs == [Pair(name="a", count=1), Pair(name="bé", count=2)]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (b'{"a": "caf\xe9"}', ":2: byte 11 of the line is not UTF-8"),
        (b"[" * 100_000, ":2: is nested too deep to be read"),
        (b'{"a": ', ":2: is not JSON: "),
        (b'{"a": 1, "b": [{"c": 2, "a": 3, "c": 4}]}', ":2: has 'c' twice"),
    ],
)
def test_a_line_that_can_not_be_read_is_named(tmp_path, second, said):
    (tmp_path / "cases.jsonl").write_bytes(b'{"a": 1}\n' + second + b"\n")
    with pytest.raises(ValueError, match=said):
        read_lines(tmp_path / "cases.jsonl")


def test_lines_end_where_json_lines_says(tmp_path):
    """A line separator inside a string, a mark before the first line, and Windows' line ends are no faults."""
    raw = '\ufeff{"a": "b\u2028c\u0085d"}\r\n\r\n{"a": 2}'.encode()
    (tmp_path / "cases.jsonl").write_bytes(raw)
    rows = read_lines(tmp_path / "cases.jsonl")
    assert [(place.rpartition(":")[2], row["a"]) for place, row in rows] == [("1", "b\u2028c\u0085d"), ("3", 2)]
