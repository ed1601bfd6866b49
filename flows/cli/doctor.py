"""What this machine has and lacks, one line each."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Literal, NamedTuple

import psutil
from packaging.specifiers import SpecifierSet

from flows.cli.terminal import console, plain_table
from tasks.config import remote_of
from tasks.machine import gpu_names
from tasks.servers import found_prefect, is_local_tracking, must_be_reachable
from tasks.storage import without_credentials
from tasks.workspace import Project, git, person

# what these must be, and what happens otherwise
BOUNDS = {
    "fastapi": ("<0.151", "Prefect's deployments and then its server fail"),
    "sqlalchemy": ("<2.1", "Prefect's scheduler dies without a word"),
    "transformers": (">=5", "the attention interface is another"),
}


class Finding(NamedTuple):
    what: str
    state: Literal["ok", "note", "lacks"]
    """`note`: fine without it; `lacks`: something asked for will not work."""
    said: str


def either(what: str, found: object, said: str, *, otherwise: str, bad: Literal["note", "lacks"] = "lacks") -> Finding:
    """`said` if there is something `found`; if not, what is `otherwise`, and how bad that is."""
    return Finding(what, "ok", said) if found else Finding(what, bad, otherwise)


def examine(where: Project) -> Iterator[Finding]:
    """Everything worth knowing before a run."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield from packages()
    yield from machine(where)
    yield from repository(where)
    yield from servers(where)


def packages() -> Iterator[Finding]:
    for name in dict.fromkeys(("torch", "transformers", "peft", "prefect", "dvc", "mlflow", *BOUNDS)):
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, "lacks", "not installed")
            continue
        bound, otherwise = BOUNDS.get(name, ("", ""))
        fits = not bound or SpecifierSet(bound).contains(found)
        yield either(name, fits, found, otherwise=f"{found}, and must be {bound}: {otherwise}")
    schemes = {entry.name for entry in entry_points(group="mlflow.artifact_repository")}
    lacking = "missing: install the project with pip, or registered models cannot be loaded"
    yield either("dvc:// for MLflow", "dvc" in schemes, "installed", otherwise=lacking)
    uses = {"deepspeed": "several GPUs", "flash_attn": "fast attention on GPUs", "bitsandbytes": "QLoRA"}
    for name, use in uses.items():
        spec = importlib.util.find_spec(name)
        yield either(name.replace("_", "-"), spec, "installed", otherwise=f"not installed (for {use})", bad="note")


def machine(where: Project) -> Iterator[Finding]:
    found = gpu_names()
    yield Finding("GPUs", "note" if found == "none" else "ok", found)
    memory = psutil.virtual_memory()
    yield Finding(
        "CPUs", "ok", f"{os.cpu_count()}, {memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB memory free"
    )
    free = shutil.disk_usage(where.root).free / 2**30
    yield Finding("disk", "ok" if free > 10 else "lacks", f"{free:.0f} GiB free at {where.root}")


def repository(where: Project) -> Iterator[Finding]:
    yield Finding("git", "ok", f"{git('--version', cwd=where.root).removeprefix('git version ')}, as {person(where)}")
    changed = len(git("status", "--porcelain", cwd=where.tree).splitlines())
    said = f"{changed} changed files: runs are recorded as dirty, scheduled ones refused" if changed else "clean"
    yield Finding(
        "checkout", "note" if changed else "ok", f"{git('rev-parse', '--short', 'HEAD', cwd=where.tree)}, {said}"
    )
    remote = without_credentials(remote_of(where.tree))
    yield either("DVC remote", remote, remote, otherwise="none: `dvc remote add -d NAME URL`; data stays in the cache")
    git_remote = without_credentials(os.environ.get("LONGLORA_GIT_REMOTE", ""))
    unset = "nowhere (LONGLORA_GIT_REMOTE is not set)"
    yield either("runs pushed to", git_remote, git_remote, otherwise=unset, bad="note")


def servers(where: Project) -> Iterator[Finding]:
    try:
        known = without_credentials(found_prefect(where) or "")
        yield Finding(
            "Prefect", "ok", known or "no server is up: a run starts one for itself (`longlora up` keeps one)"
        )
    except ValueError as error:
        yield Finding("Prefect", "lacks", str(error))
    try:
        must_be_reachable("MLFLOW_TRACKING_URI")
        yield Finding(
            "MLflow", "ok", "the project's own database" if is_local_tracking(where) else "MLFLOW_TRACKING_URI answers"
        )
    except ValueError as error:
        yield Finding("MLflow", "lacks", str(error))


def show(findings: list[Finding]) -> None:
    marks = {"ok": "[green]ok", "note": "[yellow]-", "lacks": "[red]lacks"}
    table = plain_table("", "", "", header=False)
    for finding in findings:
        table.add_row(finding.what, marks[finding.state], finding.said)
    console().print(table)
