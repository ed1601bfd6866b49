"""LongEval: published cases are read as they are, own cases have their length and one right answer, scoring is exact."""

import json
import random
import re
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from specimens import FLOAT32
from test_ruler import TOKENIZER, tiny

from flows.cli import evaluate
from longlora.evaluation import answer, longeval
from longlora.evaluation.answer import answers, keeping, read_kept
from longlora.evaluation.longeval import (
    ROOM,
    LongEval,
    Question,
    Writer,
    measure,
    own_lines,
    own_topics,
    read_cases,
    right,
)
from longlora.model.load import open_model
from longlora.model.rescale import rescale
from longlora.stages.longeval import stage

torch.set_num_threads(1)  # matrices this small are slower on two

# The shape of LongChat's files, with words of ours.
LINES = {
    "random_idx": ["odd-kid", 1], "expected_number": 2416, "num_lines": 2, "token_size": 99,
    "correct_line": "line odd-kid: REGISTER_CONTENT is <2416>\n",
    "prompt": "Here are lines.\n\nline big-bull: REGISTER_CONTENT is <3119>\nline odd-kid: REGISTER_CONTENT is <2416>\n\nWhich "
    "<REGISTER_CONTENT> is in line odd-kid? I need the number. ", "prompt_length": -1,
}  # fmt: skip
TOPICS = {
    "test_id": 0, "prompt": "USER: I would like to discuss the topic of the art of bread. What was the first topic?",
    "topics": ["The art of bread", "The art of bread and wine", "The history of glass"], "prompt_length": -1,
}  # fmt: skip


def put(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(**changes) -> LongEval:
    given = {"tasks": ["lines", "topics"], "lengths": [1500, 2600], "samples": 2, "cases": []}
    return LongEval(**given | {"prompt": "plain", "seed": 1} | changes)


def test_published_cases_of_both_tasks_are_read_as_they_are(tmp_path):
    older = LINES | {"random_idx": [7, 7], "expected_number": 5}
    lines = read_cases(put(tmp_path / "2_lines.jsonl", LINES, older))
    assert lines[0] == Question("lines", LINES["prompt"], "The <REGISTER_CONTENT> in line odd-kid is <", ["2416"])
    assert lines[1].right == ["5"] and "line 7 is" in lines[1].lead
    assert read_cases(put(tmp_path / "t.jsonl", TOPICS))[0].right == TOPICS["topics"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [LINES, {"prompt": "x", "test_id": 1}],
            ":2: neither 'expected_number' (lines) nor 'topics'; there are prompt, test_id",
        ),
        ([LINES, TOPICS], ":2: a case of topics in a file of lines"),
        ([TOPICS | {"topics": []}], ":1: topics: List should have at least 1 item"),
        ([LINES | {"expected_number": "many"}], ":1: expected_number: Input should be a valid integer"),
        ([LINES | {"prompt": ""}], ":1: prompt: String should have at least 1 character"),
    ],
)
def test_a_malformed_case_is_named_by_its_line(tmp_path, rows, said):
    file = put(tmp_path / "c.jsonl", *rows)
    with pytest.raises(ValueError) as error:
        read_cases(file)
    assert str(error.value).startswith(f"{file}{said}")


def test_an_own_record_holds_the_asked_line_once_with_its_number():
    for seed in range(20):
        question = own_lines(random.Random(seed), count=60)
        pairs = re.findall(r"line (\S+): its number is <(\d+)>", question.prompt)
        assert len(pairs) > 50 and len({name for name, _ in pairs}) == len(pairs)
        asked = re.search(r"number of line (\S+)\?", question.prompt).group(1)
        assert dict(pairs)[asked] == question.right[0]


def test_an_own_conversation_begins_with_the_topic_that_is_asked_for():
    question = own_topics(random.Random(3), count=12)
    said = re.findall(r"the topic of (.+)\.", question.prompt)
    assert said == question.right and len(set(said)) == 12
    assert len(re.findall("topic of", own_topics(random.Random(3), count=300).prompt)) == 300


@pytest.mark.parametrize("prompt", ["plain", "chat"])
@pytest.mark.parametrize("task", ["lines", "topics"])
def test_own_prompts_fill_their_length_and_leave_the_room_of_the_answer(task, prompt):
    writer = Writer(TOKENIZER, prompt=prompt)
    question = writer.own(task, length=4000, seed="s")
    used = len(writer.ids(question)) + ROOM[task]
    assert 3500 < used <= 4000
    assert question == writer.own(task, length=4000, seed="s") != writer.own(task, length=4000, seed="t")
    text = TOKENIZER.decode(writer.ids(question))
    assert text.endswith("[assistant]" if prompt == "chat" else question.lead)
    with pytest.raises(ValueError, match=rf"100 tokens are too few for {task}, the shortest takes (\d+)") as error:
        writer.own(task, length=100, seed="s")
    assert writer.own(task, length=int(str(error.value).split()[-1]), seed="s")


@pytest.mark.parametrize(
    ("text", "chat", "hit"),
    [
        (" 2416>\nline x is <9>", False, True),
        ("9> or 2416", False, False),
        ("In line odd-kid7 it is <2416>.", True, True),
        ("2416 I think, or 9", True, False),
        ("24161", True, False),
        ("no idea", True, False),
    ],
)
def test_a_line_is_right_by_its_whole_number(text, chat, hit):
    assert right(Question("lines", "", "", ["2416"]), text, chat=chat) is hit


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("the Art of Bread.", True),
        ("The first topic was: art of bread, then the history of glass", True),
        ("the history of glass, and before it the art of bread", False),
        ("the art of bread and wine", False),
        ("bread", False),
        ("", False),
    ],
)
def test_a_topic_is_right_if_it_is_named_before_all_others(text, hit):
    assert right(Question("topics", "", "", TOPICS["topics"]), text, chat=False) is hit


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a/2_lines.jsonl", "b/2_lines.jsonl"], "longeval.cases: {1} and {0} would have one score, '2_lines'"),
        (
            ["1500.jsonl"],
            "longeval.cases: {0} and the length 1500 would have one score, '1500': give the file another name",
        ),
    ],
)
def test_files_whose_scores_would_replace_others_are_refused(tmp_path, files, said):
    given = settings(cases=[str(tmp_path / file) for file in files])
    with pytest.raises(ValueError, match=re.escape(said.format(*given.cases))):
        measure(tiny(), label="m", tokenizer=TOKENIZER, settings=given)


def test_right_answers_score_full_marks_by_length_and_by_file(tmp_path, monkeypatch):
    put(tmp_path / "2_lines.jsonl", LINES, LINES, LINES)
    truth = {}
    monkeypatch.setattr(
        Writer, "ids", lambda self, q, ids=Writer.ids: truth.setdefault(tuple(ids(self, q)), q) and ids(self, q)
    )

    def perfect(model, *, prompts, max_new_tokens, kept):
        said = [truth[tuple(p)].right[0] for p in prompts]
        return [TOKENIZER(s, add_special_tokens=False)["input_ids"] for s in said]

    monkeypatch.setattr(longeval, "answers", perfect)
    given = settings(cases=[str(tmp_path / "2_lines.jsonl")])
    result = measure(tiny(), label="m", tokenizer=TOKENIZER, settings=given)
    lines, topics = result["longeval_lines"]["m"], result["longeval_topics"]["m"]
    assert list(lines) == ["prompt", "1500", "2600", "2_lines"] and list(topics) == ["prompt", "1500", "2600"]
    assert all(node["value"] == 1.0 for node in [*lines.values(), *topics.values()] if isinstance(node, dict))
    assert (lines["2_lines"]["trials"], lines["2_lines"]["high"]) == (3, 1.0)
    assert 0.29 < lines["2_lines"]["low"] < 0.3  # exact: 0.025 ** (1 / 3)
    assert 1200 < lines["1500"]["tokens"] < 1500


def test_answers_that_were_kept_are_not_asked_for_again(tmp_path):
    model, prompts, max_new_tokens = tiny(), [[5, 6, 7], [8, 9, 3, 4], [7, 6, 5]], [4, 5, 4]
    fresh = answers(model, prompts=prompts, max_new_tokens=max_new_tokens)
    assert answers(model, prompts=prompts, max_new_tokens=max_new_tokens, kept=tmp_path) == fresh
    (file,) = tmp_path.iterdir()
    cut = file.read_text().splitlines(keepends=True)
    file.write_text(cut[0] + cut[1][:5])  # what a sudden end leaves
    asked = []
    model.generate = lambda *a, generate=model.generate, **k: asked.append(a[0].shape[0]) or generate(*a, **k)
    assert answers(model, prompts=prompts, max_new_tokens=max_new_tokens, kept=tmp_path) == fresh
    assert sum(asked) == 2 and len(read_kept(file.with_name(file.name.partition(".")[0]))) == 3
    assert answers(model, prompts=prompts[:2], max_new_tokens=max_new_tokens[:2], kept=tmp_path) == fresh[:2]
    assert len(list(tmp_path.iterdir())) == 2  # other prompts, another file


def test_stage_writes_the_same_bytes_again_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", str(tmp_path / "kept"))
    tiny().save_pretrained(tmp_path / "odd")
    TOKENIZER.save_pretrained(tmp_path / "odd")
    given = settings(lengths=[1400], samples=1, cases=[str(put(tmp_path / "2_lines.jsonl", LINES))])
    for name in ("a", "b"):
        stage(tmp_path / "odd", tmp_path / name / "odd.json", given, FLOAT32)
    assert (tmp_path / "a/odd.json").read_bytes() == (tmp_path / "b/odd.json").read_bytes()
    assert json.loads((tmp_path / "a/odd.json").read_text())["longeval_lines"]["odd"]["2_lines"]["trials"] == 1
    assert list((tmp_path / "kept").iterdir()) == []


def test_models_of_the_same_weights_and_measures_of_the_same_model_keep_their_answers_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", str(tmp_path / "kept"))
    tiny().save_pretrained(tmp_path / "base")
    for method in ("linear", "yarn"):
        rescale(tmp_path / "base", method=method, context=8192, out=tmp_path / method)
    base = open_model(tmp_path / "base")
    with pytest.raises(KeyError), keeping(tmp_path / "base", base, scores=Path("ruler.json")) as kept:
        kept.mkdir(parents=True)
        raise KeyError("a run that is cut off")
    others = [
        (tmp_path / "base", base.bfloat16(), "ruler"),
        (tmp_path / "base", open_model(tmp_path / "base"), "longqa"),
    ]
    others += [(tmp_path / m, open_model(tmp_path / m), "ruler") for m in ("linear", "yarn")]
    for folder, model, scores in others:
        with keeping(folder, model, scores=Path(f"{scores}.json")) as other:
            assert not other.exists()
        assert kept.exists()
    with keeping(tmp_path / "base", open_model(tmp_path / "base"), scores=Path("ruler.json")) as again:
        assert again == kept and kept.exists()
    assert not kept.exists()
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", "")  # as if it were not set
    with keeping(tmp_path / "base", base, scores=Path("ruler.json")) as usual:
        assert usual.parent == Path(".longlora/checkpoints")


HARNESS = {"harness": {"odd": {"x": {"acc": {"value": 0.5}}}}}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """`longlora eval` of a folder, with a harness that scores at once."""
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", str(tmp_path / "kept"))
    tiny().save_pretrained(tmp_path / "odd")
    TOKENIZER.save_pretrained(tmp_path / "odd")
    asked = []
    monkeypatch.setattr(
        evaluate.harness, "measure", lambda *a, **k: asked.append(k["settings"].tasks) or deepcopy(HARNESS)
    )

    def command(*cases, tasks=("x",), out=tmp_path / "out.json"):
        evaluate.evaluate(
            tmp_path / "odd", tasks=list(tasks), folder_of_tasks=None, limit=None, cases=list(cases), chat=False,
            out=out,
        )  # fmt: skip

    return command, asked


def test_outside_of_a_run_malformed_cases_are_said_before_the_harness_is_asked(outside, tmp_path):
    command, asked = outside
    with pytest.raises(ValueError, match="c.jsonl:1: prompt: String should have"):
        command(put(tmp_path / "c.jsonl", LINES | {"prompt": ""}))
    assert asked == [] and not (tmp_path / "out.json").exists()


def test_outside_of_a_run_each_part_is_written_as_it_is_done_and_answers_are_kept_until_then(
    outside, tmp_path, monkeypatch
):
    command, asked = outside
    one, two = put(tmp_path / "1_lines.jsonl", LINES), put(tmp_path / "2_lines.jsonl", LINES | {"prompt": "Another. "})
    greedy, calls = answer.greedy, []

    def cut_off(*given, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return greedy(*given, **more)

    monkeypatch.setattr(answer, "greedy", cut_off)
    with pytest.raises(KeyboardInterrupt):
        command(one, two)
    scored = {
        "harness": {
            "odd": HARNESS["harness"]["odd"] | {"model": evaluate.fingerprint(tmp_path / "odd", tmp_path / "out.json")}
        }
    }
    assert asked == [["x"]] and json.loads((tmp_path / "out.json").read_text()) == scored
    command(one, two, tasks=())
    assert len(calls) == 3  # the first file's answer was kept
    scores = json.loads((tmp_path / "out.json").read_text())
    assert scores["longeval_lines"]["odd"].keys() == {"prompt", "1_lines", "2_lines"}
    assert scores["harness"] == scored["harness"]  # which the command that goes on did not ask for
    assert list((tmp_path / "kept").iterdir()) == []


def test_outside_of_a_run_nothing_is_left_in_the_models_own_folder(outside, tmp_path, monkeypatch):
    command, _ = outside
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", "")
    monkeypatch.chdir(tmp_path / "odd")
    before = {file.name for file in (tmp_path / "odd").iterdir()}
    command(put(tmp_path / "1_lines.jsonl", LINES), tasks=())
    assert {file.name for file in (tmp_path / "odd").iterdir()} == before and (tmp_path / ".longlora").is_dir()


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors"])
def test_outside_of_a_run_scores_of_another_model_of_the_same_name_are_neither_taken_over_nor_lost(
    outside, tmp_path, changed
):
    command, _ = outside
    cases = put(tmp_path / "1_lines.jsonl", LINES)
    command()
    before = (tmp_path / "out.json").read_bytes()
    if changed == "config.json":
        rescale(tmp_path / "odd", method="yarn", context=8192, out=tmp_path / "new")
        shutil.copyfile(tmp_path / "new/config.json", tmp_path / "odd/config.json")
    else:
        other = tiny()
        other.model.norm.weight.data += 0.1
        other.save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="of another model, of the name .* of .*odd: name another --out"):
        command(cases, tasks=())
    assert (tmp_path / "out.json").read_bytes() == before


def test_outside_of_a_run_scores_that_do_not_say_of_which_model_are_kept_and_the_file_refused(outside, tmp_path):
    command, _ = outside
    (tmp_path / "out.json").write_text(json.dumps(HARNESS))
    with pytest.raises(ValueError, match="does not say of which model: name another --out"):
        command(put(tmp_path / "1_lines.jsonl", LINES), tasks=())
    assert json.loads((tmp_path / "out.json").read_text()) == HARNESS


def test_outside_of_a_run_scores_that_the_command_would_take_out_of_its_file_are_kept_and_the_file_refused(
    outside, tmp_path
):
    command, asked = outside
    one, two = put(tmp_path / "1_lines.jsonl", LINES), put(tmp_path / "2_lines.jsonl", LINES)
    out = tmp_path / "out.json"
    command(one)
    before = out.read_bytes()
    for cases, tasks, lost in [((two,), (), "1_lines"), ((one,), ("x",), "x"), ((), ("y",), "x")]:
        with pytest.raises(
            ValueError, match=rf"out.json: has scores of 'odd' \({lost}\), which .* take out: name a new file"
        ):
            command(*cases, tasks=tasks)
    assert out.read_bytes() == before and asked == [["x"]]
    command(one, two, tasks=())
    assert json.loads(out.read_text())["longeval_lines"]["odd"].keys() == {"prompt", "1_lines", "2_lines"}
    out.write_text(json.dumps({"longeval_lines": {"another": {"1_lines": {"value": 1.0}}}}))
    with pytest.raises(
        ValueError, match=r"has scores of 'another' \(1_lines\)|has scores of 'another' \(longeval_lines\)"
    ):
        command(one, tasks=())


@pytest.mark.parametrize(("name", "text"), [("odd/config.json", None), ("1_lines.jsonl", None), ("notes.json", "[1]")])
def test_outside_of_a_run_what_is_no_scores_is_not_written_over(outside, tmp_path, name, text):
    command, _ = outside
    cases = put(tmp_path / "1_lines.jsonl", LINES)
    if text:
        (tmp_path / name).write_text(text)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match=f"--out .*{name}: is there, and holds no scores"):
        command(cases, tasks=(), out=tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def test_scores_that_stand_in_the_models_own_folder_are_not_part_of_what_it_is(tmp_path):
    tiny().save_pretrained(tmp_path / "odd")
    out = tmp_path / "odd" / "scores.json"
    before = evaluate.fingerprint(tmp_path / "odd", out)
    out.write_text("{}")
    assert evaluate.fingerprint(tmp_path / "odd", out) == before
    (tmp_path / "odd" / "merges.txt").write_text("a b")
    assert evaluate.fingerprint(tmp_path / "odd", out) != before
