"""Stages that are tagged `gpu` queue on a slot of the machine, whatever run and project they are of."""

import os
import subprocess
import sys
import time
from pathlib import Path

import dummy
import pytest
from test_stages import NAMES, run_dir_of, statuses
from test_supervise import STUBBORN, alive

from tasks import machine, slots, supervise
from tasks.slots import Slots
from tasks.stage_process import InterruptedStageError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LONGLORA_GPU_SLOTS", "1")


@pytest.fixture
def gpus(monkeypatch):
    """Say which GPUs a process sees."""

    def sees(*uuids: str) -> None:
        slots.places.cache_clear()
        monkeypatch.setattr(slots, "visible_gpus", lambda: [(uuid, 80.0) for uuid in uuids])

    yield sees
    slots.places.cache_clear()


def test_a_slot_says_who_has_it_and_is_free_again(monkeypatch):
    one, two = Slots(), Slots()
    assert one.take("stage 'fit' of /here (process 7)") == ""
    assert two.take("another").endswith(" is taken by stage 'fit' of /here (process 7)")
    one.close()
    assert two.take("another") == ""
    monkeypatch.setenv("LONGLORA_GPU_SLOTS", "2")
    three, four = Slots(), Slots()
    assert three.take("third") == ""
    assert four.take("fourth").endswith("another")
    monkeypatch.setenv("LONGLORA_GPU_SLOTS", "0")
    assert Slots().take("whoever") == ""
    for wrong in ("-1", "many", ""):
        monkeypatch.setenv("LONGLORA_GPU_SLOTS", wrong)
        with pytest.raises(ValueError, match=f"^LONGLORA_GPU_SLOTS={wrong}: must be a whole number, 0 for no queue$"):
            Slots()


@pytest.mark.parametrize(
    ("said", "status"), [("NVIDIA-SMI has failed because it has no driver.", 9), ("No devices were found", 0)]
)
def test_an_nvidia_smi_without_a_driver_or_a_gpu_is_a_machine_without_one(tmp_path, monkeypatch, said, status):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    slots.places.cache_clear()
    assert Slots().take("one") == ""
    assert [place[:4] for place in slots.places()] == ["cpu-"]
    assert machine.gpu_names() == "none"
    slots.places.cache_clear()


def test_an_nvidia_smi_that_hangs_is_said(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(machine, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match=r"^nvidia-smi did not answer in 0\.2 s: see whether the GPUs' driver hangs$"):
        machine.gpu_names()


def test_a_file_system_without_locks_is_named_with_the_way_out(monkeypatch):
    def refuse(*given):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(slots.fcntl, "flock", refuse)
    with pytest.raises(
        ValueError, match=r"Function not implemented, so stages can not queue: LONGLORA_GPU_SLOTS=0 runs"
    ):
        Slots().take("one")


def test_who_sees_other_gpus_does_not_wait_and_who_shares_one_waits_for_all_of_his(gpus):
    gpus("GPU-a", "GPU-b")
    one = Slots()
    assert one.take("one") == ""
    gpus("GPU-b", "GPU-c")
    two = Slots()
    assert two.take("two") == "GPU-b is taken by one"
    gpus("GPU-c")
    three = Slots()
    assert three.take("three") == ""
    one.close()
    assert two.take("two") == "GPU-c is taken by three"
    gpus("GPU-a", "GPU-b")
    assert Slots().take("four") == ""  # nothing is kept by who has only a part


def test_a_slot_is_not_free_before_the_processes_of_a_run_that_was_killed_are_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGLORA_GRACE", "1")
    ours, others = Slots(), Slots()
    ours.take("one")
    child = supervise.Child(
        [sys.executable, "-u", "-c", STUBBORN], cwd=tmp_path, env=os.environ, handles=ours.handles()
    )
    ours.close()  # as our death does
    assert others.take("two")
    child.close()
    assert others.take("two") == ""


RUN = """
import sys, time
from pathlib import Path
from tasks.workspace import project, snapshot
from flows.run_dir import open_run_dir
where = project(Path(sys.argv[1]))
run_dir = open_run_dir(where, snapshot(where, overrides=sys.argv[2:]))
for stage in run_dir.stages:
    run_dir.dvc.bring_up_to_date(stage.name, log=lambda line: print("at", time.monotonic(), line))
run_dir.dvc.close()
"""


def test_two_trainings_started_together_do_not_overlap_share_the_cache_and_end_right(folder):
    run_dir = run_dir_of(folder)
    run_dir.dvc.bring_up_to_date("fetch")
    run_dir.dvc.close()
    ranks = ("train.rank=5", "train.rank=6")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), rank, "train.seconds=0.7"], stdout=subprocess.PIPE, text=True
        )
        for rank in ranks
    ]
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    lines = [[line.split(maxsplit=2) for line in text.splitlines() if line.startswith("at ")] for text in said]
    spans = sorted([float(at) for _, at, line in own if line.startswith(("train starts", "step 3"))] for own in lines)
    assert [len(span) for span in spans] == [2, 2]
    assert spans[0][1] < spans[1][0]
    waited = [line for own in lines for _, _, line in own if line.startswith("waiting: ")]
    assert any(" is taken by stage 'train' of " in line for line in waited)
    assert dummy.executions(folder).count("fetch base") == 1
    for rank in ranks:
        assert statuses(run_dir_of(folder, rank, "train.seconds=0.7")) == dict.fromkeys(NAMES, "unchanged")


def test_a_run_that_waits_says_for_whom_and_ends_when_it_is_told_to(folder, monkeypatch):
    monkeypatch.setattr(supervise, "interrupted", False)
    other, run_dir, said = Slots(), run_dir_of(folder), []
    other.take("stage 'fit' of another clone")

    def hear(line: str) -> None:
        said.append(line)
        if line.startswith("waiting"):
            supervise.interrupt()

    run_dir.dvc.run_stage("fetch", on_line=hear, on_tick=lambda: None)  # needs no GPU
    with pytest.raises(InterruptedStageError):
        run_dir.dvc.run_stage("train", on_line=hear, on_tick=lambda: None)
    run_dir.dvc.close()
    assert said[-1].endswith(" is taken by stage 'fit' of another clone")
    assert dummy.executions(folder) == ["fetch base"]
    deadline = time.monotonic() + 10
    while alive(Path(run_dir.folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(Path(run_dir.folder))
