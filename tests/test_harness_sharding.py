"""The harness over several real processes gives the scores of one, each process asks only its share, and all end together."""

import json
import os
import signal
import sys
from pathlib import Path

import dummy
import pytest
import together
import torch
import yaml
from specimens import FLOAT32
from test_harness import QUESTIONS, TINY, settings
from transformers import LlamaForCausalLM

from flows.cli.evaluate import fingerprint
from longlora.evaluation import harness
from longlora.model.load import open_model, open_tokenizer
from longlora.section import run
from longlora.stages.harness import stage

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

ASKED = [
    *QUESTIONS,
    QUESTIONS[1],
    ("The people of the United", [" States", " grubl"], 1),
    ("We will", [" zzzk", " not"], 1),
]
COMMON = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{file}.jsonl, train: {folder}/shots.jsonl}}}}
test_split: test
fewshot_split: train
doc_to_text: "{{{{text}}}}"
"""
CHOICE = 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
ACCURACY = "{metric: acc, aggregation: mean, higher_is_better: true}"
MIDDLE = "{metric: acc_norm, aggregation: median, higher_is_better: true}"  # its error is bootstrapped
WRITING = """output_type: generate_until
doc_to_target: "{{{{choices[answer]}}}}"
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
generation_kwargs: {{until: ["."], max_gen_toks: 6, do_sample: {sample}, temperature: {temperature}}}
"""
TASKS = {
    "choosing": CHOICE + f"metric_list: [{ACCURACY}, {MIDDLE}]\n",
    "shown": CHOICE + f"metric_list: [{ACCURACY}]\nnum_fewshot: 2\n",
    "writing": WRITING.format(sample="false", temperature=0.0),
    "reading": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}]\n',
    "guessing": WRITING.format(sample="true", temperature=0.9),
}
MEASURED = ["choosing", "shown", "writing", "reading"]


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A folder of tasks, and in `other` one whose questions differ."""
    place = tmp_path_factory.mktemp("dealt")
    for folder, questions in ((place / "tasks", ASKED), (place / "other", [*ASKED[:-1], ("We can", [" a", " b"], 1)])):
        folder.mkdir()
        put(folder / "asked.jsonl", questions)
        put(folder / "shots.jsonl", [(f"Example {n}: the", [f" {n}", " word"], n % 2) for n in range(9)])
        for name, rest in TASKS.items():
            (folder / f"{name}.yaml").write_text(COMMON.format(name=name, folder=folder, file="asked") + rest)
    return place


def put(file: Path, questions: list[tuple[str, list[str], int]]) -> None:
    file.write_text("".join(json.dumps({"text": t, "choices": c, "answer": a}) + "\n" for t, c, a in questions))


def measured(place: Path, count: int) -> None:
    """One process's part of all, and of a limit below the number of processes; it says how many passes it took."""
    import datasets
    import lm_eval
    from lm_eval import evaluator

    datasets.config.HF_DATASETS_CACHE = place / "cache"
    evaluator.add_env_info = lambda found: None  # it asks pip, for ten seconds
    harness.BOOTSTRAPS = 1000  # type: ignore[misc]
    rank = os.environ.get("RANK", "0")
    passes, counted = [], []
    forward, evaluate = LlamaForCausalLM.forward, lm_eval.simple_evaluate

    def one_more(self, *args, **kwargs):
        passes.append(1)
        return forward(self, *args, **kwargs)

    def kept(*args, **kwargs):
        found = evaluate(*args, **kwargs)
        counted.append(
            found and {"n": found["n-samples"], "error": found["results"]["choosing"]["acc_norm_stderr,none"]}
        )
        return found

    LlamaForCausalLM.forward, lm_eval.simple_evaluate = one_more, kept
    torch.set_num_threads(1)
    try:
        for name, limit in (("all", None), ("two", 2)):
            given = settings(place / "tasks", tasks=MEASURED, limit=limit)
            stage(TINY, place / f"{count}/{name}-{rank}.json", given, FLOAT32)
    finally:
        LlamaForCausalLM.forward, lm_eval.simple_evaluate = forward, evaluate
    (place / f"{count}-{rank}.json").write_text(json.dumps({"passes": len(passes), "counted": counted}))


def told(place: Path, count: int, rank: int) -> dict:
    return json.loads((place / f"{count}-{rank}.json").read_text())


@pytest.mark.slow
def test_several_processes_give_the_scores_of_one(ready):
    for count in (1, 2, 3):
        together.run(count, measured, ready, count, DISABLE_MULTIPROC="1")  # of the bootstrap
    alone = told(ready, 1, 0)
    whole, part = alone["counted"]
    assert {task: n["effective"] for task, n in whole["n"].items()} == dict.fromkeys(MEASURED, 7)
    assert {task: n["effective"] for task, n in part["n"].items()} == dict.fromkeys(MEASURED, 2)
    assert 0 < whole["error"] < 1
    for count in (2, 3):
        assert sorted(f.name for f in (ready / str(count)).iterdir()) == ["all-0.json", "two-0.json"]
        for name in ("all-0.json", "two-0.json"):
            assert (ready / str(count) / name).read_bytes() == (ready / "1" / name).read_bytes()
        assert told(ready, count, 0)["counted"] == alone["counted"]
        shares = [told(ready, count, rank)["passes"] for rank in range(count)]
        assert min(shares) > 0 and max(shares) < 0.7 * alone["passes"]  # of equal documents, one may ask each


def as_a_stage(place: Path, case: str) -> None:
    """What dvc.yaml's command does, with what the process says in a file of its own; `case` goes wrong."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = place / "cache"
    rank, folder = int(os.environ["RANK"]), place / "tasks"
    os.dup2(os.open(place / f"{case}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    changes: dict = {"tasks": ["choosing"]}
    if case in ("broken", "killed"):
        from lm_eval.models.huggingface import HFLM

        asked = HFLM._loglikelihood_tokens

        def ends(self, *args, **kwargs):
            if case == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            asked(self, *args, **kwargs)
            raise RuntimeError("the card fell out")

        if rank == 1:
            HFLM._loglikelihood_tokens = ends
    elif case == "chance":
        changes = {"tasks": ["guessing"]}
    elif case == "mistake":
        changes = {"prompt": "chat"}
    elif case == "differing" and rank == 1:
        folder = place / "other"
    here = place / f"{case}-{rank}.run"
    here.mkdir()
    os.chdir(here)
    given = settings(folder, **changes).model_dump()
    (here / "params.yaml").write_text(yaml.safe_dump({"harness": given, "precision": FLOAT32.model_dump()}))
    sys.argv = ["harness", str(TINY), str(place / f"{case}.json")]
    run(stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "teller", "line", "codes"),
    [
        ("broken", 1, "RuntimeError: the card fell out\nin process 1 of 0 to 2, which ends all of them", [2, 1, 2]),
        ("killed", 0, "error: another process has ended", [2, -9, 2]),
        ("mistake", 0, "error: prompt = chat needs a tokenizer with a chat template", [2, 2, 2]),
        ("chance", 0, "error: task guessing draws its answers by chance (do_sample)", [2, 2, 2]),
        ("differing", 0, "error: the processes were given different requests", [2, 2, 2]),
    ],
)
def test_what_fails_in_one_process_ends_all_and_is_said_once(ready, case, teller, line, codes):
    assert together.ended(together.start(3, as_a_stage, ready, case)) == codes
    said = [(ready / f"{case}-{rank}").read_text() for rank in range(3)]
    assert line in said[teller]
    for rank, text in enumerate(said):
        blamed = [ln for ln in text.splitlines() if ln.startswith(("error:", "Traceback", "RuntimeError"))]
        assert bool(blamed) == (rank == teller), text
    if case != "broken":  # a defect keeps its traceback
        assert "Traceback" not in said[teller] and said[teller].count("error: ") == 1
    assert not (ready / f"{case}.json").exists()


@pytest.mark.slow
def test_the_command_starts_the_launcher_that_the_environment_names(ready, tmp_path, monkeypatch):
    command = ["eval", str(TINY), "--lm-eval", "shown", "--tasks", str(ready / "tasks"), "--limit", "3", "--out"]
    env = {"HF_DATASETS_CACHE": str(ready / "cache"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = (
        f"{sys.executable} -m torch.distributed.run --nproc-per-node=2 "
        f"--master-addr=127.0.0.1 --master-port={together.free_port()}"
    )
    done = dummy.longlora(tmp_path, *command, "two.json", env={**env, "LONGLORA_EVALUATION_LAUNCHER": launcher})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shown: acc ") == done.stdout.count("written to two.json") == 1
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", ready / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda found: None)
    given = settings(ready / "tasks", tasks=["shown"], limit=3)
    alone = harness.measure(open_model(TINY), label="model", tokenizer=open_tokenizer(TINY), settings=given)
    alone["harness"]["model"]["model"] = fingerprint(TINY, tmp_path / "two.json")
    assert json.loads((tmp_path / "two.json").read_text()) == alone
    lost = dummy.longlora(tmp_path, *command, "none.json", env={**env, "LONGLORA_EVALUATION_LAUNCHER": "startall -n 2"})
    assert lost.returncode == 1 and lost.stderr == "error: LONGLORA_EVALUATION_LAUNCHER: no program startall\n"
    assert not (tmp_path / "none.json").exists()
