"""Training in several real processes is the training of one: the same blocks, curve and adapter, written once."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import together
import torch
import yaml
from safetensors.torch import load_file
from specimens import ADAPTER, ATTENTION, FIT, POSITION
from training import history, run, weights

from longlora.parallel.ranks import FOREIGN, Ranks, from_environment
from longlora.training import fit as module
from longlora.training.trainer import noise_seed

pytestmark = pytest.mark.slow  # real processes
ROOT = Path(__file__).parent.parent
EACH = {"micro_batch_size": 1}  # one block at a time, so that the global batch of 4 can be shared out in several ways


def shares(replicas: int, *, degree: int = 1, micro: int = 1) -> list[list[int]]:
    world = replicas * degree
    return [Ranks(r, world, degree).share(24, micro_batch_size=micro) for r in range(world)]


@pytest.mark.parametrize(("replicas", "micro"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (4, 3), (6, 2)])
def test_step_t_trains_on_the_same_blocks_whatever_the_number_of_processes(replicas, micro):
    batch, each = 12, 12 // replicas
    for step in range(2):
        blocks = itertools.chain(*(s[step * each : (step + 1) * each] for s in shares(replicas, micro=micro)))
        assert sorted(blocks) == list(range(step * batch, (step + 1) * batch))


def test_processes_of_one_sequence_get_the_same_blocks():
    a, b, c, d = shares(2, degree=2)
    assert a == b
    assert c == d
    assert not set(a) & set(c)


@pytest.mark.parametrize(
    ("world", "degree", "said"),
    [
        ("4", "3", r"= 3 must divide the number of processes, 4; the nearest is 2"),
        ("2", "0", "=0: must be a whole number from 1 on"),
        ("2", "x", "=x: must be a whole number from 1 on"),
    ],
)
def test_a_degree_that_does_not_fit_is_refused(monkeypatch, world, degree, said):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LONGLORA_SEQUENCE_PARALLEL", degree)
    with pytest.raises(ValueError, match=said):
        from_environment()


def test_a_degree_that_is_empty_is_one_that_is_not_set(monkeypatch):
    monkeypatch.setenv("LONGLORA_SEQUENCE_PARALLEL", "")
    assert from_environment().degree == 1


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK"])
def test_processes_that_would_not_meet_are_refused(monkeypatch, missing):
    """As under an operator that sets RANK and WORLD_SIZE alone: with GPUs, each would train on its share by itself."""
    for name, value in together.environment(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    assert from_environment() == Ranks(1, 2)
    monkeypatch.delenv(missing)
    with pytest.raises(
        ValueError, match=f"^WORLD_SIZE = 2 without {missing}, so .* start them with torchrun, or set it in"
    ):
        from_environment()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert from_environment().world == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [("DYNAMO_BACKEND", "INDUCTOR"), ("MIXED_PRECISION", "fp16"), ("USE_FSDP", "true"), ("USE_DEEPSPEED", "true")],
)
def test_a_launcher_that_says_how_to_train_is_refused(monkeypatch, name, said):
    monkeypatch.delenv("LONGLORA_ZERO", raising=False)
    for each in FOREIGN:  # as `accelerate launch` sets them by itself, and an earlier training may have left them
        monkeypatch.setenv(f"ACCELERATE_{each}", "false" if each.startswith("USE") else "no")
    assert from_environment().world == 1
    monkeypatch.setenv(f"ACCELERATE_{name}", said)
    with pytest.raises(
        ValueError, match=f"^ACCELERATE_{name}={said} .* chooses how to train, which params.yaml does: LONG"
    ):
        from_environment()
    monkeypatch.setenv("LONGLORA_ZERO", "2")
    if name == "USE_DEEPSPEED":
        assert from_environment().world == 1  # our own: accelerate sets it, too


def train_here(place: Path, name: str, changes: dict) -> None:
    os.environ["LONGLORA_CHECKPOINTS"] = str(place / "checkpoints")
    run(place, name, **changes)


def log_writes(place: Path, name: str, changes: dict) -> None:
    """Train, and note every file that this process opens for writing."""
    with (place / f"opened-by-{os.environ['RANK']}").open("w") as log:

        def note(event: str, arguments: tuple) -> None:
            path, mode = (*arguments, "", "")[:2]
            if event == "open" and isinstance(mode, str) and set(mode) & set("wax+") and str(place) in str(path):
                print(path, file=log, flush=True)
            if event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree") and str(place) in str(path):
                print(path, file=log, flush=True)

        sys.addaudithook(note)
        train_here(place, name, changes)


def nearly_equal(a: Path, b: Path, *, curve: float = 1e-4, weight: float = 2e-4) -> None:
    """Two runs, by their histories and adapters."""
    ours, theirs = history(a.with_suffix(".csv")), history(b.with_suffix(".csv"))
    assert len(ours) == len(theirs) > 1
    for x, y in zip(ours, theirs, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=curve)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=10 * curve)
    x, y = (load_file(f / "adapter_model.safetensors") for f in (a, b))
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=weight)


def test_two_processes_train_what_one_does_and_only_the_first_writes(place):
    run(place, "one", **EACH)
    together.run(2, log_writes, place, "two", EACH)
    nearly_equal(place / "two", place / "one")
    assert sorted(f.name for f in (place / "two").iterdir()) == sorted(f.name for f in (place / "one").iterdir())
    assert len(json.loads((place / "two.json").read_text())["two"]) >= 5
    assert (place / "opened-by-1").read_text() == ""
    for kind in ("two.csv", "two.json", "partial-2", "two/recipe.json"):
        assert kind in (place / "opened-by-0").read_text()


def test_noise_belongs_to_the_blocks_whatever_the_number_of_processes(place):
    changes = {**EACH, "neftune_noise_alpha": 5.0, "adapter": ADAPTER.model_copy(update={"dropout": 0.2})}
    run(place, "one", **changes)
    together.run(2, train_here, place, "two", changes)
    nearly_equal(place / "two", place / "one")


def test_no_two_micro_batches_and_places_have_the_same_noise():
    seeds = {
        (replicas, degree): [
            noise_seed(5, micro_batch_index=n, ranks=Ranks(r, replicas * degree, degree))
            for n in range(12 // replicas)
            for r in range(replicas * degree)
        ]
        for replicas in (1, 2, 4)
        for degree in (1, 2)
    }
    for (_, degree), drawn in seeds.items():
        assert len(set(drawn)) == len(drawn) == 12 * degree
        assert drawn == seeds[1, degree]
    assert noise_seed(6, micro_batch_index=0, ranks=Ranks(0, 1)) != seeds[1, 1][0]


def killed_at_five(place: Path, name: str, changes: dict) -> None:
    step = module.LongTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    module.LongTrainer.training_step = killed  # type: ignore[method-assign]
    train_here(place, name, changes)


def test_a_killed_run_resumes_bit_for_bit_and_with_another_number_of_processes(place):
    """Three, so that the order of summation over processes can differ."""
    changes = {"global_batch_size": 3, "micro_batch_size": 1}
    together.run(3, train_here, place, "whole", changes)
    codes = together.ended(together.start(3, killed_at_five, place, "resumed", changes))
    assert set(codes) == {-signal.SIGKILL}
    assert [f.name for f in (place / "checkpoints").rglob("checkpoint-*")] == ["checkpoint-4"]
    shutil.copytree(place / "checkpoints", place / "kept")
    together.run(3, train_here, place, "resumed", changes)
    assert weights(place / "resumed") == weights(place / "whole")
    assert (place / "resumed.csv").read_bytes() == (place / "whole.csv").read_bytes()
    assert not list((place / "checkpoints").rglob("checkpoint-*"))
    shutil.rmtree(place / "checkpoints")
    (place / "kept").rename(place / "checkpoints")
    run(place, "alone", **changes)
    assert not list((place / "checkpoints").rglob("checkpoint-*"))
    nearly_equal(place / "alone", place / "whole")


def test_a_run_that_was_killed_between_two_rows_has_the_same_history_on_any_number_of_processes(place):
    changes = {"logging_steps": 3, **EACH}
    together.run(2, train_here, place, "whole", changes)
    together.ended(together.start(2, killed_at_five, place, "resumed", changes))
    shutil.copytree(place / "checkpoints", place / "kept")
    together.run(2, train_here, place, "resumed", changes)
    assert [row["step"] for row in history(place / "whole.csv")] == [3, 6]
    assert (place / "resumed.csv").read_bytes() == (place / "whole.csv").read_bytes()
    shutil.rmtree(place / "checkpoints")
    (place / "kept").rename(place / "checkpoints")
    run(place, "alone", **changes)
    nearly_equal(place / "alone", place / "whole")


def test_a_signal_to_one_process_stops_all_after_the_same_step(place):
    processes = together.start(2, train_here, place, "tuned", {"steps": 400, **EACH})
    await_checkpoint(place)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert together.ended(processes) == [143, 143]
    (left,) = (place / "checkpoints").rglob("checkpoint-*")
    step = json.loads((left / "trainer_state.json").read_text())["global_step"]
    assert left.name == f"checkpoint-{step}"
    assert not (place / "tuned").exists()


def await_checkpoint(place: Path) -> None:
    deadline = time.monotonic() + together.PATIENCE
    while not list((place / "checkpoints").rglob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)


def finds_nothing_on_the_second_node(place: Path, name: str, changes: dict) -> None:
    if os.environ["RANK"] == "1":
        module.latest = lambda checkpoints: None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"checkpoints of steps 2, 0 in .* set LONGLORA_CHECKPOINTS to a folder"):
        train_here(place, name, changes)


def test_processes_that_see_different_checkpoints_do_not_start(place):
    changes = {"steps": 400, **EACH}
    processes = together.start(2, train_here, place, "tuned", changes)
    await_checkpoint(place)
    for process in processes:
        process.kill()
    together.ended(processes)
    (left,) = (place / "checkpoints").rglob("checkpoint-*")
    left.rename(left.with_name("checkpoint-2"))
    together.run(2, finds_nothing_on_the_second_node, place, "tuned", changes)


def test_the_stage_runs_under_torchrun(place):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    the_stage_trains_what_one_process_does(place, [*torchrun, f"--master-port={together.free_port()}"], env={}, **EACH)


def the_stage_trains_what_one_process_does(place: Path, launcher: list[str], *, env: dict[str, str], **changes) -> None:
    """As dvc.yaml starts it, with the launcher, of two processes, in place of python."""
    sections = {"position": POSITION, "attention": ATTENTION, "adapter": ADAPTER}
    params = {name: s.model_dump() for name, s in sections.items()}
    params["fit"] = FIT.model_copy(update=changes).model_dump() | {"betas": list(FIT.betas)}
    (place / "params.yaml").write_text(yaml.safe_dump(params))
    (place / "pairs").mkdir()
    run(place, "one", **changes)
    paths = [str(place / name) for name in ("tokens", "pairs", "base", "two", "two.csv", "two.json")]
    done = subprocess.run(
        [*launcher, "-m", "longlora.stages.fit", *paths],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=together.PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6") == 1
    nearly_equal(place / "two", place / "one")
