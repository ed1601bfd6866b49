"""A project small enough to run in a second: six stages of plain Python on real git and real DVC."""

import io
import os
import subprocess
import sys
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

STAGE = '''
"""Every stage of the dummy project: `python -m dummy.stage KIND [path]...`."""
import json, os, pathlib, sys, time

import yaml

kind, *paths = sys.argv[1:]
paths = [pathlib.Path(p) for p in paths]
params = yaml.safe_load(pathlib.Path("params.yaml").read_text())
for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
notes = pathlib.Path(os.environ.get("LONGLORA_CHECKPOINTS", "."))
notes.mkdir(parents=True, exist_ok=True)
with (notes / "executions").open("a") as file:
    print(kind, *[p.stem for p in paths[:1]], file=file)
print(f"{kind} starts", flush=True)
if kind == "fetch":
    (base,) = paths
    base.mkdir()
    (base / "weights").write_text("b")
elif kind == "train":
    base, tuned, history = paths
    train = params["train"]
    if train["fail"]:
        print("error: train.fail is set", file=sys.stderr)
        raise SystemExit(2)
    tries = notes / "tries"
    tried = len(tries.read_text()) if tries.exists() else 0
    if tried < train["flaky"]:
        tries.write_text("x" * (tried + 1))
        print("connection lost", file=sys.stderr)
        raise SystemExit(1)
    with history.open("w") as file:
        print("step,loss", file=file, flush=True)
        for step in range(1, train["steps"] + 1):
            time.sleep(train["seconds"])
            print(f"{step},{1 / step}", file=file, flush=True)
            print(f"step {step}/{train['steps']}  loss {1 / step:.4f}  1,{step:03} tokens/s  0 s left  0.25 GB", flush=True)
    tuned.mkdir()
    (tuned / "weights").write_text((base / "weights").read_text() * train["rank"])
elif kind == "score":
    model, report = paths
    size = len((model / "weights").read_text())
    lengths = {str(n): size / n for n in params["score"]["lengths"]}
    report.write_text(json.dumps({"score": {model.name: lengths}, "whole": True}))
elif kind == "gate":
    *scores, verdict = paths
    better = json.loads(scores[1].read_text())["score"]["tuned"]
    least = params["gate"]["least"]
    rules = [{"name": "size", "passed": v >= least, "reason": f"{v} at {n}, {least} needed"} for n, v in better.items()]
    verdict.write_text(json.dumps({"passed": all(r["passed"] for r in rules), "rules": rules}))
elif kind == "report":
    verdict, folder = paths
    folder.mkdir()
    (folder / "summary.md").write_text(f"# Dummy\\n\\nVerdict: {verdict.read_text()}\\n\\n![Score](score.png)\\n")
    (folder / "a.png").write_bytes(b"another picture")
    (folder / "score.png").write_bytes(b"a picture")
    (folder / "page.html").write_text("<p>dummy</p>")
else:
    raise SystemExit(f"unknown stage {kind}")
'''

DVC = """
vars:
  - models: models
    metrics: metrics

stages:
  fetch:
    desc: Bring the base.
    meta: {retries: 1, retry_delay_seconds: 0, tags: [network]}
    cmd: python -m dummy.stage fetch ${models}/base
    deps: [dummy/stage.py]
    outs: ["${models}/base"]
  train:
    desc: Make it longer.
    meta: {retries: 2, retry_delay_seconds: 0, tags: [gpu]}
    cmd: python -m dummy.stage train ${models}/base ${models}/tuned ${metrics}/history.csv
    deps: [dummy/stage.py, "${models}/base"]
    params: [train]
    outs: ["${models}/tuned"]
    plots:
      - ${metrics}/history.csv: {x: step, y: loss}
  score:
    desc: Measure it.
    matrix: {model: [base, tuned]}
    cmd: python -m dummy.stage score ${models}/${item.model} ${metrics}/score/${item.model}.json
    deps: [dummy/stage.py, "${models}/${item.model}"]
    params: [score]
    metrics: ["${metrics}/score/${item.model}.json"]
  score_rivals:
    desc: Measure what stands beside.
    matrix: {model: "${rivals.models}"}
    cmd: python -m dummy.stage score rivals/${item.model} ${metrics}/score/${item.model}.json
    deps: [dummy/stage.py, "rivals/${item.model}"]
    params: [score]
    metrics: ["${metrics}/score/${item.model}.json"]
  gate:
    desc: Judge it.
    cmd: python -m dummy.stage gate ${metrics}/score/base.json ${metrics}/score/tuned.json ${metrics}/verdict.json
    deps: [dummy/stage.py, "${metrics}/score/base.json", "${metrics}/score/tuned.json"]
    params: [gate]
    metrics: ["${metrics}/verdict.json"]
  report:
    desc: Tell it.
    cmd: python -m dummy.stage report ${metrics}/verdict.json reports
    deps: [dummy/stage.py, "${metrics}/verdict.json"]
    outs: [reports]

artifacts:
  dummy:
    path: ${models}/tuned
    type: model
    desc: A model of a few letters.
    labels: [toy]
    meta:
      better: {metric: score/tuned, order: higher, data: "${models}/base"}
      beside: {list: rivals.models, folder: rivals}
  summary:
    path: reports
    type: report
"""

PARAMS = """
train: {rank: 8, steps: 3, seconds: 0.0, fail: false, flaky: 0}
score: {lengths: [4, 2]}
gate: {least: 1.0}
rivals: {models: []}
"""

FILES = {
    "dummy/__init__.py": "",
    "dummy/stage.py": STAGE.lstrip(),
    "dvc.yaml": DVC.lstrip(),
    "params.yaml": PARAMS.lstrip(),
    "recipes/big.yaml": "train: {rank: 16}\n",
    ".gitignore": "/.longlora\n/models\n/metrics\n/reports\n/rivals/[a-z0-9]*/\n__pycache__/\n",
    ".dvcignore": "",
    ".dvc/config": "[core]\n    analytics = false\n    remote = local\n['remote \"local\"']\n    url = ../.longlora/remote\n",
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
}

ENV = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_NAME": "Tester" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "tester@example.org" for who in ("AUTHOR", "COMMITTER")},
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",  # what dies of a signal says where
    "LONGLORA_GPU_SLOTS": "0",  # or tests of two checkouts would wait for each other
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def make(folder: Path) -> Path:
    """The project in `folder`, committed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        write(folder / name, text)
    git(folder, "init", "--quiet", "--initial-branch", "main")
    commit(folder)
    return folder


def with_a_stage_of_the_library(folder: Path) -> None:
    """Its parameters are then the library's to check, and wrong: our gate has no `rules`."""
    stage = "  judge: {desc: Judge., cmd: python -m longlora.stages.gate metrics metrics/judged.json, params: [gate]}\n"
    write(folder / "dvc.yaml", DVC.lstrip().replace("\nartifacts:", f"{stage}\nartifacts:"))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def git(folder: Path, *arguments: str) -> str:
    env = {**os.environ, **ENV}
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, env=env, capture_output=True, text=True
    ).stdout.strip()


def mlflow_database(folder: Path) -> str:
    """The address of a new MLflow database in `folder`, all of its tables made."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    MlflowClient(uri).search_experiments()
    return uri


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "dummy")


def executions(folder: Path) -> list[str]:
    """What stages of the project really ran, in order."""
    path = folder / ".longlora" / "checkpoints" / "executions"
    return path.read_text().splitlines() if path.exists() else []


def clean_environment() -> dict[str, str]:
    """Ours, without what would lead to somebody's servers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW", "LONGLORA"))}
    return {**kept, **ENV}


def longlora(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """The command, to its end."""
    command = [str(Path(sys.executable).with_name("longlora")), *arguments]
    return subprocess.run(
        command, cwd=folder, env={**clean_environment(), **(env or {})}, capture_output=True, text=True
    )


def called(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """As `longlora`, but in this process: MLflow and DVC, which take seconds to import, are imported once for all tests. Not for
    commands that start a run or a server, or become another program. A warning is on stderr, as there, not in pytest's list."""
    from flows.cli.main import app, plain_errors

    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    settings = {**clean_environment(), **(env or {})}
    with (
        chdir(folder),
        patch.dict(os.environ, settings, clear=True),
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.showwarning = lambda *shown: print(warnings.formatwarning(*shown[:4]), end="", file=err)
        try:
            with plain_errors():
                status = app(arguments, standalone_mode=False)
        except SystemExit as ended:
            status = ended.code
        if isinstance(status, str):  # as Python ends with it
            print(status, file=err)
            status = 1
    return subprocess.CompletedProcess(arguments, int(str(status or 0)), out.getvalue(), err.getvalue())
