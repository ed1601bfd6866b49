"""Documents become blocks, and every token is where it should be."""

import json
import random
import re
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from specimens import folder, tokenizer

from longlora.data.blocks import Blocks, prepare
from longlora.data.heldout import HeldOut, OtherTexts, elsewhere, split
from longlora.data.recall import Recall
from longlora.data.texts import read
from longlora.data.tokenise import tokenise
from longlora.data.tokens import documents
from longlora.data.twins import refuse_copies, refuse_twins, runs
from longlora.model.position import Position
from longlora.stages.blocks import stage

BLOCKS = Blocks(
    source="text",
    name="texts",
    split=None,
    field="text",
    license="public domain",
    held_out=HeldOut(names=["b"], share=0.0, texts=None),
    seed=3,
    recall=Recall(reach=8, count=2, nearness=2, passkey=True),
)
NO_RECALL = BLOCKS.recall.model_copy(update={"count": 0})


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in {"a": "First 1 text. " * 30, "b": "Held out. " * 25, "c": "Third. " * 50}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return BLOCKS.model_copy(update={"name": str(folder)})


def test_files_of_one_name_in_several_folders_are_documents_of_their_own(tmp_path):
    for book in "abcdef":
        (tmp_path / "books" / book).mkdir(parents=True)
        (tmp_path / "books" / book / "chapter1.txt").write_text(f"Chapter 1 of {book}. " * 9)
    (tmp_path / "books/preface.txt").write_text("Preface.")
    names = [*(f"{book}/chapter1" for book in "abcdef"), "preface"]
    share = HeldOut(names=[], share=0.5, texts=None)
    given = BLOCKS.model_copy(update={"name": str(tmp_path / "books"), "held_out": share})
    assert list(read(given)["name"]) == names
    counts = prepared(given, out=tmp_path / "tokens")
    assert (counts["train"]["documents"], counts["heldout"]["documents"]) == (3, 4)
    other = elsewhere(OtherTexts(source="text", name=given.name, split=None, field="text"), tokenizer=tokenizer())
    assert list(other) == [f"{given.name}: {name}" for name in names]


def test_documents_are_whole_whatever_the_tokenizer_file_says_of_its_training():
    words = tokenizer()
    texts = ["First 1 text. " * 30, "Short."]
    whole = [t.tolist() for t in tokenise(texts, tokenizer=words)]
    words.backend_tokenizer.enable_truncation(16)
    words.backend_tokenizer.enable_padding(length=16)
    assert [t.tolist() for t in tokenise(texts, tokenizer=words)] == whole


def test_split_is_by_document_and_seeded():
    names = [str(i) for i in range(11)]
    named = HeldOut(names=["4", "2"], share=0.0, texts=None)
    assert split(names, held_out=named, seed=0) == ([0, 1, 3, 5, 6, 7, 8, 9, 10], [2, 4])
    third = HeldOut(names=[], share=0.3, texts=None)
    assert split(names, held_out=third, seed=1) == split(names, held_out=third, seed=1)
    assert split(names, held_out=third, seed=1) != split(names, held_out=third, seed=2)
    assert len(split(names, held_out=third, seed=1)[1]) == 3
    with pytest.raises(ValueError, match="no document named 12; did you mean '2'[?]$"):
        split(names, held_out=HeldOut(names=["12"], share=0.0, texts=None), seed=0)
    with pytest.raises(ValueError, match="no document named x, y; there are 11, e.g. 0$"):
        split(names, held_out=HeldOut(names=["y", "x"], share=0.0, texts=None), seed=0)
    with pytest.raises(ValueError, match="leaves 11 documents to train on and 0 to evaluate"):
        split(names, held_out=HeldOut(names=[], share=0.0, texts=None), seed=0)


@pytest.mark.parametrize(("stored", "typed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_document_is_held_out_however_its_name_writes_an_umlaut(stored, typed):
    names = [unicodedata.normalize(stored, name) for name in ("a", "Größe1", "b")]
    named = HeldOut(names=[unicodedata.normalize(typed, "Größe1")], share=0.0, texts=None)
    assert split(names, held_out=named, seed=0) == ([0, 2], [1])


def test_prepared_tokens_are_the_documents_between_their_marks(texts, tmp_path):
    words = tokenizer()
    counts = prepared(texts, exercises=[[5] * 9, [6] * 9], out=tmp_path / "tokens")
    (held_out,) = documents(tmp_path / "heldout.safetensors")
    assert held_out.dtype == np.uint16
    assert held_out[0] == words.bos_token_id and held_out[-1] == words.eos_token_id
    assert words.decode(held_out[1:-1].tolist()) == "Held out. " * 25
    train = documents(tmp_path / "tokens/train.safetensors")
    assert [words.decode(d[1:-1].tolist())[:5] for d in train] == ["First", "Third"]
    assert counts["train"] == {"documents": 2, "tokens": sum(map(len, train)), "longest": max(map(len, train))}
    assert [len(d) for d in documents(tmp_path / "tokens/recall.safetensors")] == [9, 9]
    provenance = json.loads((tmp_path / "tokens/provenance.json").read_text())
    assert provenance["held_out"] == ["b"] and provenance["held_out_of"] == texts.name
    assert provenance["passkey_words"] is (texts.recall.passkey and texts.recall.count > 0)


def prepared(texts, *, out, exercises=()):
    """What the stage does."""
    words, other = tokenizer(), texts.held_out.texts
    apart = elsewhere(other, tokenizer=words) if other else None
    return prepare(
        texts,
        tokenizer=words,
        exercises=iter(exercises),
        texts=read(texts),
        elsewhere=apart,
        out=out,
        heldout=out.with_name("heldout.safetensors"),
    )


def evaluating(texts, **changes):
    other = {"source": "text", "name": "x", "split": None, "field": "text"} | changes
    return texts.model_copy(update={"held_out": HeldOut(names=[], share=0.0, texts=OtherTexts(**other))})


def test_another_source_can_be_evaluated_on_and_then_all_of_the_first_is_trained_on(texts, tmp_path):
    words = tokenizer()
    for name, given in {"one": "Unseen words. " * 9, "two": "And more of them. " * 4}.items():
        (tmp_path / f"{name}.txt").write_text(given)
    (tmp_path / "test.bin").write_bytes(np.array([0, 7, 8, 9, 0, 5, 6], dtype="<u2").tobytes())
    asked = {
        "own": evaluating(texts, name=str(tmp_path / "one.txt")),
        "bin": evaluating(texts, source="bin", name=str(tmp_path / "test.bin")),
    }
    for kind, given in asked.items():
        counts = prepared(given, out=tmp_path / kind / "tokens")
        assert counts["train"]["documents"] == 3
    (held_out,) = documents(tmp_path / "own/heldout.safetensors")
    assert words.decode(held_out[1:-1].tolist()) == "Unseen words. " * 9
    assert [d.tolist() for d in documents(tmp_path / "bin/heldout.safetensors")] == [[0, 7, 8, 9], [0, 5, 6]]
    provenance = json.loads((tmp_path / "bin/tokens/provenance.json").read_text())
    assert provenance["held_out"] == ["test-0", "test-1"]
    assert provenance["held_out_of"] == str(tmp_path / "test.bin")


@pytest.mark.parametrize("name", ["a", "b"])  # to train on, and held out
def test_an_empty_document_is_refused_by_name(texts, tmp_path, name):
    (Path(texts.name) / f"{name}.txt").write_text(" \n")
    with pytest.raises(ValueError, match=f"^blocks: 1 of 3 documents are empty, {name} first$"):
        prepared(texts, out=tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_other_held_out_texts_are_found_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "test.bin").write_bytes(np.array([0, 7, 8, 9], dtype="<u2").tobytes())
    given = OtherTexts(source="bin", name="~/test.bin", split=None, field="text")
    assert list(elsewhere(given, tokenizer=tokenizer())) == ["test-0"]


def test_a_held_out_document_that_is_trained_on_is_refused(texts, tmp_path):
    given = evaluating(texts, name=str(tmp_path / "texts/c.txt"))
    with pytest.raises(ValueError, match="1 of 1 held-out documents is also trained on, word for word, .*c first"):
        prepared(given, out=tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("marked", [True, False])
def test_a_held_out_document_that_is_trained_on_is_refused_whatever_stands_around_it(tmp_path, marked):
    words, letters = tokenizer(), np.random.default_rng(1).choice(list("abcdefghij "), 900)
    own, others = "".join(letters[:400]), "".join(letters[400:])
    trained = list(tokenise([f"{others[:200]}{own}\n", others[200:]], tokenizer=words))
    (apart,) = tokenise([own], tokenizer=words)
    held_out = {"new": np.arange(3, 90), "own": apart if marked else apart[1:-1]}
    marks = [words.bos_token_id, words.eos_token_id]
    with pytest.raises(ValueError, match=r"1 of 2 held-out .* own first \(100% of it\)"):
        refuse_twins(trained, held_out, marks=marks)
    refuse_twins([t[: len(t) // 2] for t in trained], held_out, marks=marks)  # less than half of it


def test_a_text_that_is_held_out_twice_is_refused_for_an_interval_would_count_it_twice():
    generator = np.random.default_rng(1)
    text, other, trained = (generator.integers(2, 300, 400) for _ in range(3))
    twice = {"other": other, "text": text, "again": np.concatenate([other[:90], text])}
    with pytest.raises(
        ValueError, match=r"^2 of 3 held-out documents are in others of them, .* text first \(100% of it\): "
    ):
        refuse_twins([trained], twice, marks=[])
    refuse_twins([trained], twice | {"again": np.concatenate([text[:90], trained[:90] + 300])}, marks=[])
    refuse_twins([trained], {"short": text[:9], "as short": text[:9], "none": text[:0]}, marks=[])


@pytest.mark.parametrize("kind", ["own", "bin"])
def test_a_held_out_document_is_refused_that_is_trained_on_in_another_edition(kind, texts, tmp_path, capsys):
    dice, words = random.Random(1), tokenizer()
    book = " ".join("".join(dice.choices("abcdefgh", k=dice.randint(2, 9))) for _ in range(400))
    (Path(texts.name) / "a.txt").write_text(book.upper().replace(" ", " - "))
    (Path(texts.name) / "b.txt").write_text(textwrap.fill(book, 40))
    given = texts.model_copy(update={"recall": NO_RECALL})
    if kind == "bin":
        (Path(texts.name) / "b.txt").rename(tmp_path / "b.txt")
        (tokens,) = tokenise([(tmp_path / "b.txt").read_text()], tokenizer=words)
        (tmp_path / "test.bin").write_bytes(tokens.astype("<u2").tobytes())
        given = evaluating(given, source="bin", name=str(tmp_path / "test.bin"))
    places = [tmp_path / "tokens", tmp_path / "heldout.safetensors", tmp_path / "counts.json"]
    base = folder(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"^1 of 1 held-out documents is also trained on, word for word, .*\(100% of it\)"
    ):
        stage(base, *places, given, Position(method="yarn", context=64))
    assert not any(place.exists() for place in places)
    (Path(texts.name) / "a.txt").write_text(book[: len(book) // 3])  # as much as may be quoted
    capsys.readouterr()
    stage(base, *places, given, Position(method="yarn", context=64))
    said = r"^1 of 1 held-out documents is trained on in part, word for word, .* first \((29|3\d)% of it\): scores there may be"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)


def test_documents_that_are_trained_on_in_part_are_told_the_most_first():
    dice = np.random.default_rng(1)
    half, little, none = ("".join(dice.choice(list("abcdefgh"), 1000)) for _ in range(3))
    parts = refuse_copies([half[:450].upper() + "." + little[-170:]], {"none": none, "little": little, "half": half})
    assert list(parts) == ["half", "little"]
    assert parts == pytest.approx({"half": 351 / 901, "little": 71 / 901})
    assert refuse_copies([none[:140]], {"none": none}) == {}


def test_documents_without_a_letter_are_no_copies_of_each_other():
    refuse_copies(["* * *", "..."], {"one": "***", "two": "~~~"})


def test_runs_are_the_same_wherever_they_stand_and_else_differ():
    tokens = np.random.default_rng(1).integers(2, 300, 200)
    whole = runs(tokens, marks=[None, 1])
    assert len(np.unique(whole)) == 200 - 50 + 1
    assert np.array_equal(runs(np.concatenate([[1], tokens[30:90], [1]]), marks=[0, 1]), whole[30 : 30 + 11])
    assert len(runs(tokens[:7], marks=[])) == len(runs(tokens[:0], marks=[])) == 1


def test_empty_documents_to_evaluate_on_are_named(texts, tmp_path):
    (tmp_path / "more").mkdir()
    for name, text in {"p": "words", "q": " \n"}.items():
        (tmp_path / f"more/{name}.txt").write_text(text)
    given = evaluating(texts, name=str(tmp_path / "more"))
    with pytest.raises(ValueError, match="1 of 2 documents are empty, q first"):
        prepared(given, out=tmp_path / "tokens")


def test_the_stage_counts_what_stands_beyond_the_bases_window(texts, tmp_path, capsys):
    base, given = folder(tmp_path / "base", window=64), texts.model_copy(update={"recall": NO_RECALL})
    outs = [tmp_path / name for name in ("tokens", "heldout.safetensors", "counts.json")]
    stage(base, *outs, given, Position(method="yarn", context=128))
    lengths = [len(document) for document in documents(outs[0] / "train.safetensors")]
    assert min(lengths) > 64
    share = sum(length - 64 for length in lengths) / sum(lengths)
    assert json.loads(outs[2].read_text())["blocks"]["train"]["beyond_window"] == pytest.approx(share, abs=1e-6)
    assert f"{share:.1%} of the training tokens stand further into their document" in capsys.readouterr().out


def test_held_out_documents_that_are_all_shorter_than_the_context_are_said_before_the_training(texts, tmp_path, capsys):
    base, given = folder(tmp_path / "base", window=64), texts.model_copy(update={"recall": NO_RECALL})
    for context, said in ((128, False), (100_000, True)):
        outs = [tmp_path / str(context) / name for name in ("tokens", "heldout.safetensors", "counts.json")]
        (tmp_path / str(context)).mkdir()
        stage(base, *outs, given, Position(method="yarn", context=context))
        assert ("nothing can be measured at that length" in capsys.readouterr().out) is said


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("package", "nopack", "name: package 'nopack' is not installed"),
        ("text", "nowhere", "name: no .txt file at nowhere"),
        ("jsonl", "rows.jsonl", "field: no column 'txt' in rows.jsonl"),
        ("jsonl", "empty.jsonl", "name: empty.jsonl: no line in it"),
    ],
)
def test_what_is_wrong_with_other_held_out_texts_is_said_of_their_own_key(tmp_path, monkeypatch, source, name, said):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "x"}\n')
    Path("empty.jsonl").touch()
    with pytest.raises(ValueError, match=f"^blocks.held_out.texts.{said}"):
        elsewhere(OtherTexts(source=source, name=name, split=None, field="txt"), tokenizer=tokenizer())
