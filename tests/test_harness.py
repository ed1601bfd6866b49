"""lm-evaluation-harness measures our models, on a task of our own, without a network; the report reads what it wrote."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import dummy
import pytest
from specimens import FLOAT32
from test_ruler import TOKENIZER, tiny

from longlora.evaluation.harness import QUANTILE, Harness, interval, measure, metrics
from longlora.evaluation.interval import binomial
from longlora.model.load import open_model, open_tokenizer
from longlora.report.findings import figures
from longlora.report.gate import Gate, Rule, judge
from longlora.report.scores import read
from longlora.stages.harness import stage

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

TINY = Path(__file__).parent.parent / "tiny/model"
QUESTIONS = [
    ("The grass is green. The sky is blue. The sun is yellow. The grass is", [" green", " xvqzk"], 0),
    ("The Congress of the United", [" qzjxv", " States"], 1),
    ("The Senate and the House of", [" Representatives", " zzkkjjqq"], 0),
    ("My fellow", [" kqqzxjw", " citizens"], 0),  # a wrong key: three of four are right
]
TASK = """task: sayings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [json.dumps({"text": t, "choices": c, "answer": a}) for t, c, a in QUESTIONS]
    (tmp_path / "sayings.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/sayings.yaml").write_text(TASK.format(file=tmp_path / "sayings.jsonl"))
    return tmp_path / "tasks"


def settings(own: Path | None, **changes) -> Harness:
    given = {"tasks": ["sayings"], "folder": own and str(own), "num_fewshot": None, "limit": None}
    return Harness(**given | {"prompt": "plain", "seed": 1} | changes)


def loglikelihoods(text: str, choices: list[str]) -> list[float]:
    """Slow and plain: the sum over the choice's tokens, each after all before it."""
    import torch

    model, tokenizer = open_model(TINY), open_tokenizer(TINY)
    sums = []
    for choice in choices:
        before, whole = tokenizer(text)["input_ids"], tokenizer(text + choice)["input_ids"]
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        sums.append(sum(logits[i - 1, whole[i]].item() for i in range(len(before), len(whole))))
    return sums


def test_the_stage_asks_the_harness_and_writes_scores_that_the_report_reads(tasks, tmp_path):
    stage(TINY, tmp_path / "scores/model.json", settings(tasks), FLOAT32)
    found = json.loads((tmp_path / "scores/model.json").read_text())["harness"]["model"]
    right = [max(range(2), key=loglikelihoods(t, c).__getitem__) == a for t, c, a in QUESTIONS]
    assert sum(right) == 3
    accuracy = found["sayings"]["acc"]
    assert accuracy["value"] == 0.75
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(binomial(3, 4), abs=1e-6)
    assert figures(found)["sayings acc"].value == 0.75
    limited = measure(
        open_model(TINY), label="m", tokenizer=open_tokenizer(TINY), settings=settings(tasks, limit=2, num_fewshot=0)
    )  # fmt: skip
    assert (limited["harness"]["m"]["limit"], "limit" in found) == (2, False)
    assert (limited["harness"]["m"]["num_fewshot"], "num_fewshot" in found) == (0, False)
    of_two = limited["harness"]["m"]["sayings"]["acc"]
    assert (of_two["value"], of_two["high"], limited["harness"]["m"]["cut"]) == (1.0, 1.0, 0)
    assert of_two["low"] == pytest.approx(0.025**0.5, abs=1e-6)


def test_an_unknown_task_is_answered_with_the_nearest(tasks, monkeypatch):
    from lm_eval import tasks as harness_tasks

    manager = harness_tasks.TaskManager  # without its thousands, which take half a minute
    monkeypatch.setattr(harness_tasks, "TaskManager", lambda **given: manager(**given | {"include_defaults": False}))
    with pytest.raises(ValueError, match="the harness has no task 'sayingz'; did you mean 'sayings'"):
        measure(tiny(), label="m", tokenizer=TOKENIZER, settings=settings(tasks, tasks=["sayings", "sayingz"]))
    with pytest.raises(ValueError, match="the harness has no task 'quite other'$"):
        measure(tiny(), label="m", tokenizer=TOKENIZER, settings=settings(tasks, tasks=["quite other"]))


def test_a_task_that_needs_a_package_more_is_one_line(tasks):
    (tasks / "scored.py").write_text('raise ImportError("Please install jieba")\n')
    own = tasks / "sayings.yaml"
    own.write_text(own.read_text() + "process_results: !function scored.score\n")
    with pytest.raises(ValueError, match="^harness.tasks sayings: Please install jieba$"):
        measure(tiny(), label="m", tokenizer=TOKENIZER, settings=settings(tasks))


def test_data_that_is_not_there_and_a_file_that_is_no_yaml_are_one_line(tasks, tmp_path):
    (tmp_path / "sayings.jsonl").unlink()
    with pytest.raises(ValueError, match="^harness.tasks sayings: .*sayings.jsonl"):
        measure(tiny(), label="m", tokenizer=TOKENIZER, settings=settings(tasks))
    (tasks / "sayings.yaml").write_text("task: [sayings\n")
    with pytest.raises(ValueError, match=r"sayings.yaml is no YAML: while parsing a flow sequence .* line 1"):
        measure(tiny(), label="m", tokenizer=TOKENIZER, settings=settings(tasks))


@pytest.mark.parametrize("task", ["ruler", "ruler_vt", "niah_single_1", "babilong_qa1"])
def test_tasks_that_take_their_lengths_from_the_harness_alone_are_refused_with_its_command(task):
    """RULER's would fail, and BABILong's ask without any filler."""
    with pytest.raises(ValueError, match=f"'{task}' takes its lengths .* lm_eval run .* --tasks {task} --metadata"):
        settings(None, tasks=["longbench_qasper", task])


def test_the_command_measures_a_folder_outside_of_a_run(tasks, tmp_path):
    lines = {"prompt": "line a: REGISTER_CONTENT is <5>. Which?", "expected_number": 5, "random_idx": ["a", 0]}
    (tmp_path / "1_lines.jsonl").write_text(json.dumps(lines) + "\n")
    command = [
        "eval",
        str(TINY),
        "--lm-eval",
        "sayings",
        "--tasks",
        str(tasks),
        "--cases",
        str(tmp_path / "1_lines.jsonl"),
    ]
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = dummy.longlora(tmp_path, *command, "--out", str(tmp_path / "found/tiny.json"), env=env)
    assert done.returncode == 0, done.stderr
    assert "sayings: acc 0.75" in done.stdout and "lines 1_lines: " in done.stdout
    scores = json.loads((tmp_path / "found/tiny.json").read_text())
    assert scores["harness"]["model"]["sayings"]["acc"]["value"] == 0.75
    assert scores["longeval_lines"]["model"]["1_lines"]["trials"] == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": []}, "harness.tasks names no task"),
        ({"prompt": "chat"}, "needs a tokenizer with a chat template"),
        ({"folder": "nowhere"}, "harness.folder: no folder nowhere"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_asked(changes, said):
    plain = open_tokenizer(TINY)
    with pytest.raises(ValueError, match=said):
        measure(tiny(), label="m", tokenizer=plain, settings=settings(None, **changes))


def test_metrics_keep_their_filters_apart_and_an_unknown_error_gives_no_interval():
    row = {
        "alias": "x", "sample_len": 4, "f1,none": 0.5, "f1_stderr,none": "N/A", "em,strict": 0.25, "em_stderr,strict": 0.1,
    }  # fmt: skip
    assert metrics(row, trials=40) == {
        "f1": {"value": 0.5, "low": None, "high": None},
        "em strict": {"value": 0.25, "low": 0.054004, "high": 0.445996},
    }


@pytest.mark.parametrize("scores", [[0, 1, 1, 1], [1, 1], [0, 0, 0], [0.5, 1.0, 0.5, 0.0], [0.5, 0.5, 0.5]])
def test_shares_of_right_and_wrong_have_exact_intervals_and_what_never_differs_has_none(scores):
    from lm_eval.api.metrics import mean, mean_stderr

    value, error, trials = mean(scores), mean_stderr(scores), len(scores)
    given = interval(value, error, trials=trials)
    if set(scores) <= {0, 1}:
        assert given == pytest.approx(binomial(sum(scores), trials), abs=1e-9)
    elif error:
        assert given == pytest.approx((value - QUANTILE * error, value + QUANTILE * error))
    else:
        assert all(map(math.isnan, given))
    assert all(map(math.isnan, interval(1.0, 0.0, trials=None)))  # of a group


def asked_as_ours_and_as_the_harness_does(positions: int):
    """Our model in the harness, and the harness's own, of so many positions; and the rows of logits that were made."""
    from lm_eval.models.huggingface import HFLM

    from longlora.evaluation.harness_sharding import Dealt

    model, rows = tiny(), []
    model.config.max_position_embeddings = positions
    model.lm_head.register_forward_hook(lambda m, i, output: rows.append(output.shape[1]))
    return *(kind(pretrained=model, tokenizer=TOKENIZER, batch_size=1) for kind in (Dealt, HFLM)), rows


def test_logits_are_made_for_continuations_alone_and_score_as_the_harness_does():
    ours, theirs, rows = asked_as_ours_and_as_the_harness_does(64)
    requests = [
        (("a", str(n)), context, [*range(20, 20 + n)])
        for context in ([*range(60, 90)], [*range(100, 112)])
        for n in (1, 4, 2)
    ]
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert max(rows) == 4 and ours.cut == 0
    assert [total for total, _ in found] == pytest.approx(
        [total for total, _ in theirs._loglikelihood_tokens(requests, disable_tqdm=True)], rel=1e-5
    )


def test_prompts_beyond_the_positions_are_cut_as_the_harness_does_and_counted(monkeypatch, capsys):
    ours, theirs, _ = asked_as_ours_and_as_the_harness_does(16)
    requests = [(("a", "b"), [*range(60, 90)], [20, 21]), (("c", "d"), [*range(60, 75)], [20, 21])]
    found, expected = (lm._loglikelihood_tokens(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)
    assert ours.cut == 1  # the other one's last token is predicted only
    for text in ("The grass is green.", "green"):
        ids, expected = (lm.tok_batch_encode([text], left_truncate_len=6)[0].tolist() for lm in (ours, theirs))
        assert ids == expected and len(ids[0]) <= 6
    assert ours.cut == 2
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **given: setattr(given["model"], "cut", 2) or {"results": {}})
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: SimpleNamespace(all_tasks=["sayings"]))
    scores = measure(ours.model, label="m", tokenizer=TOKENIZER, settings=settings(None))
    assert scores == {"harness": {"m": {"prompt": "plain", "cut": 2}}}
    assert "2 prompts were longer than the model's 16 positions, and lost their beginning" in capsys.readouterr().out


def test_answers_as_long_as_all_positions_are_refused_in_one_line():
    from lm_eval.api.instance import Instance

    ours, _, rows = asked_as_ours_and_as_the_harness_does(16)
    asked = Instance("generate_until", {}, ("Who?", {"until": ["."], "max_gen_toks": 16}), 0, ("writing", 0, 1))
    with pytest.raises(
        ValueError, match="^task writing has answers of up to 16 tokens, which leaves no room .* 16 positions"
    ):
        ours.generate_until([asked], disable_tqdm=True)
    assert rows == []


def test_a_metric_that_is_not_a_number_is_null_told_as_such_and_refused_by_the_gate(
    tasks, tmp_path, monkeypatch, capsys
):
    nan = {"word_perplexity,none": math.inf, "acc,none": math.nan, "acc_stderr,none": math.nan, "em,none": 0.5}
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **given: {"results": {"sayings": nan}})
    stage(TINY, tmp_path / "harness/model.json", settings(tasks), FLOAT32)
    nothing = dict.fromkeys(("value", "low", "high"))
    scores = json.loads((tmp_path / "harness/model.json").read_text())["harness"]["model"]["sayings"]
    assert scores["acc"] == scores["word_perplexity"] == nothing and scores["em"]["value"] == 0.5
    assert "sayings: word_perplexity NaN, acc NaN, em 0.5" in capsys.readouterr().out
    rule = Rule(name="it knows", metric="harness/model/sayings/acc", at_least=0.0)
    verdict = judge(Gate(rules=[rule], more_rules=[], not_asked=[]), scores=read(tmp_path / "harness"))
    assert not verdict["passed"] and verdict["rules"][0]["reason"].endswith("is not a number")
