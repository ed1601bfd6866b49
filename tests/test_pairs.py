"""Only answers are learnt, token by token; every record is trained on, held out, or named with its reason."""

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from specimens import tokenizer
from test_longqa import settings as longqa_settings
from tokenizers.processors import TemplateProcessing

from longlora.data.casebook import Casebook, DocumentCase
from longlora.data.curation import Contamination
from longlora.data.dialogue import tokenised
from longlora.data.instructions import Turn, read_records
from longlora.data.packing import read
from longlora.data.pairs import Pairs, PairSource, choose, gather, prepare, taught
from longlora.data.wording import asked
from longlora.evaluation.longqa import Question, Writer
from longlora.model.position import Position
from longlora.stages.pairs import stage

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['role'] + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
THOUGHT = "<think>\n\n</think>\n\n"
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    f"{{% if m['role'] == 'assistant' and loop.last %}}{THOUGHT}{{% endif %}}"
    "{{ m['content'] + '<eos>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    f"{{% if enable_thinking is false %}}{THOUGHT}{{% endif %}}{{% endif %}}"
)
"""As Qwen3's: the last answer stands behind what was thought, an earlier one without it; thinking is on unless it is turned off."""
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", "Who met on the 14th?"),
    Turn("assistant", "The committee."),
    Turn("user", "Who read it?"),
    Turn("assistant", "Nobody"),
)
SETTINGS = Pairs(
    sources=[],
    casebook=None,
    prompt="authors",
    faults="refuse",
    held_out=0.0,
    contamination=Contamination(cases=None, words=13, share=0.5),
    seed=1,
)


def chatting(template: str = CHATML):
    words = tokenizer()
    words.chat_template = template
    return words


def runs(pair, words):
    """The text of each run of tokens that are learnt, or not."""
    edges = [0, *(np.flatnonzero(np.diff(pair.answer.astype(int))) + 1), len(pair.tokens)]
    return [
        (words.decode(pair.tokens[a:b].tolist()), bool(pair.answer[a]))
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]


def test_in_the_authors_prompt_the_answers_and_their_end_marks_are_learnt_and_nothing_else():
    words = tokenizer()
    bare = tokenised(TURNS, tokenizer=words, prompt="authors").tokens
    mark = [("<bos>", words.bos_token_id)]
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=mark)
    pair = tokenised(TURNS, tokenizer=words, prompt="authors")
    assert runs(pair, words) == [
        ("<bos>[INST]Be brief.\n\nWho met on the 14th?[/INST]", False),
        ("The committee.<eos>", True),
        ("[INST]Who read it?[/INST]", False),
        ("Nobody<eos>", True),
    ]
    assert pair.tokens.tolist() == [words.bos_token_id, *bare]  # begin marks as the tokenizer itself sets them
    assert pair.tokens[-1] == words.eos_token_id


def test_in_a_chat_template_the_answers_and_their_end_marks_are_learnt_and_nothing_else():
    words = chatting()
    pair = tokenised(TURNS, tokenizer=words, prompt="chat")
    assert runs(pair, words) == [
        ("<|system|>\nBe brief.<eos>\n<|user|>\nWho met on the 14th?<eos>\n<|assistant|>\n", False),
        ("The committee.<eos>", True),
        ("\n<|user|>\nWho read it?<eos>\n<|assistant|>\n", False),
        ("Nobody<eos>", True),
    ]


def test_a_prompt_has_the_tokens_it_has_when_the_model_is_asked():
    words = chatting()
    pair = tokenised(TURNS[:3], tokenizer=words, prompt="chat")
    asked = words.apply_chat_template(
        [{"role": t.role, "content": t.content} for t in TURNS[:2]], add_generation_prompt=True
    )
    asked = asked["input_ids"] if not isinstance(asked, list) else asked
    assert pair.tokens[~pair.answer].tolist() == asked


def test_a_template_that_can_not_show_answers_is_refused():
    with pytest.raises(ValueError, match="has none: use authors"):
        tokenised(TURNS, tokenizer=tokenizer(), prompt="chat")
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="this one has none"):
        tokenised(TURNS, tokenizer=endless, prompt="authors")
    with pytest.raises(ValueError, match="the template rewrites earlier turns"):
        tokenised(TURNS, tokenizer=chatting(FORGETFUL), prompt="chat")


def test_where_a_template_lets_a_model_think_only_the_answer_is_learnt_and_asking_has_the_prompt_of_training():
    words = chatting(THINKING)
    turns = (Turn("user", asked("The committee met.", "Who met?")), Turn("assistant", "The committee."))
    pair = tokenised(turns, tokenizer=words, prompt="chat")
    prompt = f"<|user|>\n{turns[0].content}<eos>\n<|assistant|>\n<think>\n\n</think>\n\n"
    assert runs(pair, words) == [(prompt, False), ("The committee.<eos>", True)]
    writer = Writer(words, settings=longqa_settings(prompt="chat", length=900))
    case = Question(document="The committee met.", question="Who met?", answers=["x"])
    assert writer.write(case).ids == pair.tokens[~pair.answer].tolist()


def test_thoughts_that_a_template_leaves_out_later_or_opens_by_itself_are_refused():
    with pytest.raises(ValueError, match="rewrites earlier turns.*records of one answer each"):
        tokenised(TURNS, tokenizer=chatting(THINKING), prompt="chat")
    whatever_is_said = "{% if enable_thinking is false %}" + THOUGHT
    for opening in ("", "<think>\n"):
        template = THINKING.replace(whatever_is_said, "{% if true %}" + opening)
        with pytest.raises(ValueError, match=r"opens a turn with '.*', and then an answer does not follow as it is"):
            tokenised(TURNS[1:3], tokenizer=chatting(template), prompt="chat")


@pytest.fixture
def source(tmp_path):
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i}.", "file": f"book{i % 10}"} for i in range(40)]
    rows += [rows[3], {"instruction": "x", "output": ""}, {"instruction": "y " * 200, "output": "z", "file": "long"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return PairSource(kind="file", name=str(tmp_path / "rows.jsonl"), split=None, take=None, license="none")


def test_a_record_that_a_template_refuses_is_named(tmp_path):
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [asdict(turn) for turn in TURNS]}))
    source = PairSource(kind="file", name=str(tmp_path / "a.jsonl"), split=None, take=None, license="none")
    settings = SETTINGS.model_copy(update={"sources": [source], "prompt": "chat"})
    chosen = choose(gather(settings), settings)
    with pytest.raises(
        ValueError, match=r"a.jsonl line 1: .* refuses turns of system, user \(System role not supported"
    ):
        prepare(chosen, settings=settings, tokenizer=chatting(strict), context=64, out=tmp_path / "out")
    lax = settings.model_copy(update={"faults": "leave_out"})
    with pytest.raises(
        ValueError, match=r"pairs: not one of 1 can be trained on. The first: .*a.jsonl line 1, messages: "
    ):
        prepare(chosen, settings=lax, tokenizer=chatting(strict), context=64, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with (tmp_path / "a.jsonl").open("a") as lines:
        lines.write("\n" + json.dumps({"messages": [asdict(turn) for turn in TURNS[1:]]}))
    chosen = choose(gather(lax), lax)
    counts = prepare(chosen, settings=lax, tokenizer=chatting(strict), context=256, out=tmp_path / "out")
    assert (counts["read"], counts["train"], counts["left_out"]) == (2, 1, {"malformed": 1})
    assert "a.jsonl line 1,messages," in (tmp_path / "out/left_out.csv").read_text()


def test_a_template_that_ends_no_answer_is_refused_for_the_model_would_never_stop(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [asdict(turn) for turn in TURNS]}))
    source = PairSource(kind="file", name=str(tmp_path / "a.jsonl"), split=None, take=None, license="none")
    settings = SETTINGS.model_copy(update={"sources": [source], "prompt": "chat"})
    chosen, endless = choose(gather(settings), settings), chatting(CHATML.replace("<eos>", ""))
    with pytest.raises(
        ValueError, match=r"a.jsonl line 1: pairs.prompt = chat: the template writes no end mark behind"
    ):
        prepare(chosen, settings=settings, tokenizer=endless, context=256, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    authors = settings.model_copy(update={"prompt": "authors"})
    assert prepare(chosen, settings=authors, tokenizer=endless, context=256, out=tmp_path / "out")["train"] == 1


def test_every_record_is_trained_on_held_out_or_named(source, tmp_path):
    settings = SETTINGS.model_copy(update={"sources": [source], "faults": "leave_out", "held_out": 0.2, "seed": 3})
    chosen = choose(gather(settings), settings)
    counts = prepare(chosen, settings=settings, tokenizer=tokenizer(), context=64, out=tmp_path / "out")
    with (tmp_path / "out/left_out.csv").open() as stream:
        left = list(csv.DictReader(stream))
    assert [r["field"] for r in left] == ["output", "duplicate", "length"]
    assert left[2]["reason"].endswith("tokens, position.context = 64")
    assert counts["read"] == 43 == counts["train"] + counts["held_out"] + len(left)
    assert counts["left_out"] == {"duplicate": 1, "length": 1, "malformed": 1}
    assert len(read(tmp_path / "out/train.safetensors")) == counts["train"] == counts["answer_tokens"]["count"]
    provenance = json.loads((tmp_path / "out/provenance.json").read_text())
    assert provenance == {"sources": [{"source": "file", "name": source.name, "license": "none"}]}
    again = read_records(tmp_path / "out/heldout.jsonl")
    assert [d.turns for d in again.dialogues] == [d.turns for d in chosen.held_out]


@pytest.mark.parametrize("named", [False, True])
def test_no_document_is_on_both_sides_whatever_its_lines_and_names(tmp_path, named):
    """Lines are shorter than questions, or each record has another name for its document."""
    rows = []
    for book in range(8):
        text = "\n".join(" ".join(f"w{book}x{line}y{n}" for n in range(6)) for line in range(20)) + "."
        for number in range(6):
            question = f"What does it say of matter {number} of those in book {book}, in as few words as can be?"
            names = {"sources": [f"copy {number} of {book}"]} if named else {}
            rows.append({"document": text, "question": question, "answers": [f"{book}."]} | names)
    if not named:
        turns = ("user", "assistant")
        rows = [
            {"messages": [{"role": r, "content": c} for r, c in zip(turns, said, strict=True)]}
            for said in ((f"{row['document']}\n{row['question']}", row["answers"][0]) for row in rows)
        ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = PairSource(kind="file", name=str(tmp_path / "rows.jsonl"), split=None, take=None, license="none")
    settings = SETTINGS.model_copy(update={"sources": [source], "held_out": 0.1 if named else 0.3})
    chosen = choose(gather(settings), settings)
    train, held_out = ({d.turns[1].content for d in side} for side in (chosen.train, chosen.held_out))
    assert train and held_out and train.isdisjoint(held_out)
    assert len(chosen.train) + len(chosen.held_out) + len(chosen.left) == 48
    assert {b.field for b in chosen.left} == ({"split"} if named else set())


def test_counts_are_of_records_and_lengths_of_what_is_trained_on(tmp_path, capsys):
    rows = [
        {"instruction": "What is it?", "output": "It is.", "system": "Be brief.", "history": []},
        {"instruction": "", "output": ""},
        {"instruction": "y " * 200, "output": "z", "system": "Be long."},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = PairSource(kind="file", name=str(tmp_path / "rows.jsonl"), split=None, take=None, license="none")
    settings = SETTINGS.model_copy(update={"sources": [source], "faults": "leave_out"})
    chosen = choose(gather(settings), settings)
    counts = prepare(chosen, settings=settings, tokenizer=tokenizer(), context=64, out=tmp_path / "out")
    assert counts["left_out"] == {"length": 1, "malformed": 1}
    assert counts["read"] == 3 == counts["train"] + sum(counts["left_out"].values())
    assert counts["tokens"]["count"] == 1 and counts["tokens"]["most"] <= 64
    assert counts["keys_not_read"] == 2
    assert "keys not read: history (1), system (2)" in capsys.readouterr().out


def test_what_a_casebook_writes_is_checked_as_records_are(source, tmp_path):
    case = DocumentCase("Ada saw it in May.", "Who saw it?", ["Ada"], [], "cloze", 0.0, 5, ["book1"])
    other = replace(case, question="When did Ada see it, and who else was there?", answers=["in May, and nobody was"])
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"instruction": other.question, "output": other.answers[0]}) + "\n")
    checked = SETTINGS.contamination.model_copy(update={"cases": str(cases), "words": 3, "share": 0.9})
    settings = SETTINGS.model_copy(
        update={"sources": [source], "faults": "leave_out", "held_out": 0.5, "contamination": checked}
    )
    built = taught([case, case, other])
    plain, chosen = choose(gather(settings), settings), choose(gather(settings), settings, built=built)
    assert chosen.train == [*plain.train, built[0]]  # though its document may be held out among the records
    assert chosen.held_out == plain.held_out
    assert [(b.place, b.field) for b in chosen.left if b.place.startswith("case")] == [
        ("case 2 (cloze)", "duplicate"),
        ("case 3 (cloze)", "contamination"),
    ]


def test_faults_are_refused_with_the_first_of_them(source, tmp_path):
    settings = SETTINGS.model_copy(update={"sources": [source]})
    with pytest.raises(ValueError, match=r"43 records, 42 good, 1 bad; .* line 42, output: is empty"):
        gather(settings)
    lax = settings.model_copy(update={"faults": "leave_out"})
    with pytest.raises(ValueError, match=r"1 of 41 is longer than the context.* line 43, length: has \d+ tokens"):
        prepare(choose(gather(lax), lax), settings=settings, tokenizer=tokenizer(), context=64, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_pairs_that_are_too_long_it_is_said_by_how_much_and_what_can_be_done(source, tmp_path):
    casebook = Casebook(lengths=[400], depths=[0.5], kinds=["cloze"], samples=3, collections=0.0, seed=1)
    settings = SETTINGS.model_copy(update={"sources": [source], "faults": "leave_out"})
    words, gathered = tokenizer(), gather(settings)
    longest = max(len(tokenised(d.turns, tokenizer=words, prompt="authors").tokens) for d in gathered.dialogues)

    def said(context, **changes):
        changed = settings.model_copy(update=changes)
        with pytest.raises(ValueError, match="longer than the context") as error:
            prepare(choose(gathered, changed), settings=changed, tokenizer=words, context=context, out=tmp_path / "out")
        return str(error.value)

    assert f"the context of 64, by up to {longest - 64} tokens. Raise position.context, or " in said(
        64, faults="refuse"
    )
    assert "leave_out, which goes on with the other 40. The first: " in said(64, faults="refuse")
    none_left = said(
        4
    )  # with leave_out nothing would be left to train on, which the training would say of pairs that are named
    assert "41 of 41" in none_left and "leave_out" not in none_left and "casebook" not in none_left
    assert "or lower pairs.casebook.lengths, or shorten the records (longlora" in said(4, casebook=casebook)


def test_some_of_a_source_is_drawn_from_the_seed(source):
    def drawn(seed):
        some = source.model_copy(update={"take": 7})
        settings = SETTINGS.model_copy(update={"sources": [some, source], "faults": "leave_out", "seed": seed})
        return [d.place for d in gather(settings).dialogues]

    assert len(drawn(1)) == 7 + 42
    assert drawn(1) == drawn(1) != drawn(2)


def test_a_source_is_found_below_home(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = source.model_copy(update={"name": "~/rows.jsonl"})
    assert gather(SETTINGS.model_copy(update={"sources": [home], "faults": "leave_out"})).dialogues


def test_what_is_not_drawn_is_counted(source, tmp_path):
    some = source.model_copy(update={"take": 7})
    settings = SETTINGS.model_copy(update={"sources": [some], "faults": "leave_out"})
    chosen = choose(gather(settings), settings)
    counts = prepare(chosen, settings=settings, tokenizer=tokenizer(), context=1024, out=tmp_path / "out")
    assert (counts["read"], counts["not_drawn"]) == (43, 42 - 7)
    assert counts["read"] == counts["train"] + counts["not_drawn"] + sum(counts["left_out"].values())


def test_the_stage_builds_on_training_documents_alone(tmp_path, capsys):
    from test_blocks import BLOCKS

    words = chatting()
    words.save_pretrained(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for name in "abc":
        text = " ".join(f"Sentence {n} of document {name} says what Ada Lovelace saw." for n in range(100, 160))
        (tmp_path / f"texts/{name}.txt").write_text(text)
    casebook = Casebook(
        lengths=[400], depths=[0.5], kinds=["following", "cloze", "heading"], samples=3, collections=0.0, seed=1
    )
    stage(
        tmp_path / "base",
        tmp_path / "pairs",
        tmp_path / "counts.json",
        BLOCKS.model_copy(update={"name": str(tmp_path / "texts")}),
        SETTINGS.model_copy(update={"casebook": casebook, "prompt": "chat"}),
        Position(method="yarn", context=1024),
    )
    pairs = read(tmp_path / "pairs/train.safetensors")
    texts = [words.decode(p.tokens.tolist()) for p in pairs]
    assert len(texts) == 6 and all("of document b" not in t for t in texts)
    held_out = [json.loads(line) for line in (tmp_path / "pairs/cases.jsonl").read_text().splitlines()]
    assert len(held_out) == 6 and {*map(str, (c["sources"] for c in held_out))} == {"['b']"}
    counts = json.loads((tmp_path / "counts.json").read_text())["pairs"]
    assert (counts["built"], counts["missing"]) == (6, 3)  # the texts have no headings
    assert (counts["built_held_out"], counts["missing_held_out"]) == (6, 3)
    assert "heldout: 3 questions that no excerpt allowed, heading at length 400, depth 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_stage_leaves_out_what_a_source_says_about_held_out_texts(tmp_path, elsewhere):
    from test_blocks import BLOCKS, evaluating

    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for name in "abc":
        text = " ".join(f"Sentence {n} of document {name} says what Ada Lovelace saw {n * n}." for n in range(100, 160))
        (tmp_path / f"texts/{name}.txt").write_text(text)
        rows = {"document": text[900:1800], "question": "Who saw it?", "answers": ["Ada"], "sources": [name]}
        with (tmp_path / "own.jsonl").open("a") as lines:
            lines.write(json.dumps(rows) + "\n")
    source = PairSource(kind="file", name=str(tmp_path / "own.jsonl"), split=None, take=None, license="none")
    blocks = BLOCKS.model_copy(update={"name": str(tmp_path / "texts")})
    if elsewhere:
        blocks = evaluating(blocks, name=str(tmp_path / "texts/b.txt"))
    position = Position(method="yarn", context=4096)
    settings = SETTINGS.model_copy(update={"sources": [source]})
    stage(tmp_path / "base", tmp_path / "pairs", tmp_path / "counts.json", blocks, settings, position)
    counts = json.loads((tmp_path / "counts.json").read_text())["pairs"]
    assert (counts["train"], counts["left_out"]) == (2, {"contamination": 1})
