"""Chaos: SIGKILL at seeded points, in any process of a run; the same command again must end as if nothing had happened.

`make chaos` does 30 points and prints what happened at each; the first few are part of the normal suite. A point is a target and a
moment, both drawn from its number. The end is compared with a run that nobody harmed: the commit of a run holds every hash.
The real pipeline, made small, is killed again and again on its way (`make long`).
"""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import dummy
import psutil
import pytest
import yaml
from test_pipeline import ask, key_of, mlflow_runs
from test_supervise import wait_until_gone

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
POINTS = int(os.environ.get("CHAOS_POINTS", "2"))
KILLS = int(os.environ.get("CHAOS_KILLS", "12"))  # of the real pipeline
SETTINGS = ["--set", "train.steps=6", "--set", "train.seconds=0.05"]
LINES = 22  # that an undisturbed run prints, roughly
TARGETS = {  # a word of the process's command line, and how many such processes a run has
    "flow": ("longlora", 1),
    "stage": ("dummy.stage", 6),
    "engine": ("tasks.single", 6),
    "supervisor": ("supervise.py", 6),
    "mlflow": ("mlflow", 1),
    "prefect": ("prefect", 1),
}


@dataclass
class Point:
    number: int
    target: str = field(init=False)
    nth: int = field(init=False)
    """Which process of its kind."""
    line: int = field(init=False)
    """After how many lines of output, for the kinds of which there is one."""
    delay: float = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(self.number)
        self.target = list(TARGETS)[self.number % len(TARGETS)]
        self.nth = draw.randint(1, TARGETS[self.target][1])
        self.line = draw.randint(1, LINES)
        self.delay = draw.uniform(0, 0.3)


@pytest.fixture(scope="module")
def unharmed(template, tmp_path_factory, prefect_url) -> Iterator[tuple[str, Path]]:
    """The commit of a run that nobody harmed, and an empty MLflow database: to make one takes seconds."""
    home = tmp_path_factory.mktemp("unharmed")
    dummy.git(home, "clone", "--quiet", str(template), "dummy")
    folder = home / "dummy"
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{home}/empty.db").search_experiments()
    (folder / ".longlora").mkdir()
    shutil.copy(home / "empty.db", folder / ".longlora" / "mlflow.db")
    done = dummy.longlora(folder, "run", *SETTINGS, env={"PREFECT_API_URL": prefect_url})
    assert done.returncode == 0, done.stderr
    yield dummy.git(folder, "rev-parse", f"refs/longlora/runs/{key_of(folder, *SETTINGS[1::2])}"), home / "empty.db"


def start(folder: Path, env: dict[str, str]) -> "subprocess.Popen[str]":
    command = [str(Path(sys.executable).with_name("longlora")), "run", *SETTINGS, "--promote"]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_at(point: Point, process: "subprocess.Popen[str]", said: list[str], servers: list[psutil.Process]) -> str:
    """Wait for the point, and kill. What was killed, or '' if the run ended before."""
    word, _ = TARGETS[point.target]
    seen: list[psutil.Process] = []
    run = psutil.Process(process.pid)
    while process.poll() is None:
        if point.target in ("flow", "mlflow", "prefect"):
            if len(said) >= point.line:
                seen = [run] if point.target == "flow" else servers or named(run, word)
        else:
            seen += [child for child in named(run, word) if child not in seen]
        if len(seen) >= point.nth:
            time.sleep(point.delay)
            return f"{point.target} {point.nth}" if all([killed(each) for each in seen[point.nth - 1 :]]) else ""
        time.sleep(0.01)
    return ""


def named(run: psutil.Process, word: str) -> list[psutil.Process]:
    """The run's processes whose command has `word`, their supervisors apart."""
    found = []
    for child in run.children(recursive=True):
        try:
            words = " ".join(child.cmdline())
            if word in words and (("supervise.py" in words) == (word == "supervise.py")) and "sh -c" not in words:
                found.append(child)
        except psutil.Error:
            continue
    return found


def killed(process: psutil.Process) -> bool:
    try:
        process.kill()
        return True
    except psutil.NoSuchProcess:
        return False


def listen(process: "subprocess.Popen[str]") -> list[str]:
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(iter(process.stdout.readline, "")), daemon=True).start()
    return said


def serve_mlflow(folder: Path, port: int, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    from tasks import daemon
    from tasks.listening import LOOPBACK
    from tasks.up import mlflow_command
    from tasks.workspace import project

    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        log = folder / ".longlora" / "mlflow.log"
        server = daemon.start(mlflow_command(project(folder), port), log)
        daemon.wait_for(f"http://{LOOPBACK}:{port}/health", server, log)
    return server


@pytest.mark.parametrize("number", range(POINTS))
def test_a_run_that_was_killed_anywhere_ends_the_same(number, unharmed, folder, prefect_url, monkeypatch):
    from tasks import daemon
    from tasks.outputs import compared
    from tasks.servers import free_port

    commit, database = unharmed
    point, started = Point(number), time.monotonic()
    (folder / ".longlora").mkdir()
    shutil.copy(database, folder / ".longlora" / "mlflow.db")
    env = {**dummy.clean_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if point.target != "prefect":
        env["PREFECT_API_URL"] = prefect_url
    server, port = None, free_port()
    if point.target == "mlflow":
        server = serve_mlflow(folder, port, env)
        env["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
    key = key_of(folder, *SETTINGS[1::2])
    work = folder / ".longlora" / "worktrees" / key

    process = start(folder, env)
    said = listen(process)
    hit = kill_at(point, process, said, psutil.Process(server.pid).children(recursive=True)[:1] if server else [])
    if server and hit:
        server.wait()
        server = serve_mlflow(folder, port, env)
    try:
        process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        hit += ", then the flow"
    first = process.returncode
    wait_until_gone(work, 20)

    attempts = 1
    while process.returncode and attempts < 4:
        process = start(folder, env)
        last, _ = process.communicate(timeout=300)
        attempts += 1
    assert process.returncode == 0, last
    at = f"{hit or f'nothing: {point.target} {point.nth} had ended'}, {len(said)} lines said"
    print(f"\npoint {number}: killed {at}; first status {first}, {attempts} starts, {time.monotonic() - started:.0f} s")

    assert dummy.git(folder, "rev-parse", f"refs/longlora/runs/{key}") == commit
    assert all(out.equal for out in compared(folder, commit, work, varying=set()))
    wait_until_gone(work, 5)
    must_be_recorded_once(f"sqlite:///{folder}/.longlora/mlflow.db", key, steps=6)
    if point.target != "prefect":
        states = [run["state"]["type"] for run in ask(prefect_url, "flow_runs", about(folder))]
        assert states.count("RUNNING") == 0
        assert states.count("COMPLETED") >= 1
    if server:
        daemon.stop(server)


def about(folder: Path) -> dict:
    from tasks.workspace import home, project

    return {"flow_runs": {"tags": {"all_": [home(project(folder))]}}}


def must_be_recorded_once(uri: str, key: str, *, steps: int) -> None:
    """One finished run, each point of its curve once; one version, one champion, an unbroken record of its moves."""
    from mlflow import MlflowClient

    from tasks import registry

    client = MlflowClient(uri)
    (run,) = mlflow_runs(uri, key)
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "history/loss")
    assert [point.step for point in points] == list(range(1, steps + 1))
    (version,) = client.search_model_versions("name = 'dummy'")
    aliases = client.get_registered_model("dummy").aliases
    assert {name: str(number) for name, number in aliases.items()} == dict.fromkeys(
        ("champion", "candidate"), str(version.version)
    )
    assert [(move.origin, move.to) for move in registry.moves(client, "dummy")][-1:] == [(None, str(version.version))]


SMALL = [
    "fit.steps=6",
    "fit.save_steps=2",
    "fit.logging_steps=1",
    "position.context=1024",
    "blocks.recall.count=8",
    "blocks.recall.reach=1024",
    "perplexity.lengths=[512,1024]",
    "perplexity.samples=2",
    "passkey.lengths=[512,1024]",
    "passkey.samples=1",
]


def start_real(folder: Path, env: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    command = [str(Path(sys.executable).with_name("longlora")), "run", *(w for each in SMALL for w in ("--set", each))]
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT)


def kill_on_the_way(number: int, process: "subprocess.Popen[bytes]") -> str:
    """Let some stages pass, and kill one process of the run while one is at work. What was killed; '' if it ended before."""
    draw, run = random.Random(number), psutil.Process(process.pid)
    word = ["longlora run", "longlora.stages", "tasks.single", "supervise.py"][number % 4]
    seen: dict[int, str] = {}
    wanted, delay = draw.randint(1, 3), draw.uniform(0, 12)
    while process.poll() is None:
        at = named(run, "longlora.stages")
        for each in at:
            with suppress(psutil.Error):  # it has ended
                seen[each.pid] = " ".join(each.cmdline()[2:4])
        if len(seen) >= wanted and at:
            time.sleep(delay)
            found = [run] if word == "longlora run" else named(run, word)[-1:]
            if found and process.poll() is None and killed(found[0]):
                return f"{word}, {delay:.1f} s after the start of {seen.get(at[0].pid)}"
        time.sleep(0.02)
    return ""


def hashes(folder: Path, key: str) -> dict[str, str]:
    """Every output that does not hold times, of the run's record."""
    from dvc.repo import Repo

    lock = yaml.safe_load(dummy.git(folder, "show", f"refs/longlora/runs/{key}:dvc.lock"))
    with Repo(str(folder / ".longlora" / "worktrees" / key)) as repo:
        varying = {out.def_path for out in repo.index.outs if "varies" in out.annot.labels}
    found = {out["path"]: out["md5"] for entry in lock["stages"].values() for out in entry["outs"]}
    return {path: md5 for path, md5 in found.items() if path not in varying}


@pytest.mark.long
def test_the_real_pipeline_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path, prefect_url):
    env = {**dummy.clean_environment(), "PREFECT_API_URL": prefect_url}
    for name in ("unharmed", "harmed"):
        dummy.git(tmp_path, "clone", "--quiet", str(Path(__file__).parent.parent), name)
    unharmed = start_real(tmp_path / "unharmed", env, tmp_path / "unharmed.log")
    folder, log = tmp_path / "harmed", tmp_path / "harmed.log"
    key, starts, hits = key_of(folder, *SMALL), 1, []
    process = start_real(folder, env, log)
    while len(hits) < KILLS and process.returncode != 0:
        if hit := kill_on_the_way(len(hits), process):
            hits.append(hit)
            print(f"\nkill {len(hits)}: {hit}", end="", flush=True)
        if process.poll():
            process, starts = start_real(folder, env, log), starts + 1
    while process.wait():
        assert starts < KILLS + 4, log.read_text()
        process, starts = start_real(folder, env, log), starts + 1
    assert hits and unharmed.wait() == 0, (tmp_path / "unharmed.log").read_text()
    print(f"\n{len(hits)} kills, {starts} starts")
    assert hashes(folder, key) == hashes(tmp_path / "unharmed", key)
    assert len(hashes(folder, key)) > 15
    wait_until_gone(folder / ".longlora" / "worktrees" / key, 5)
    (run,) = mlflow_runs(f"sqlite:///{folder}/.longlora/mlflow.db", key)
    assert run.info.status == "FINISHED"
    states = [run["state"]["type"] for run in ask(prefect_url, "flow_runs", about(folder))]
    assert (states.count("RUNNING"), states.count("COMPLETED")) == (0, 1)
