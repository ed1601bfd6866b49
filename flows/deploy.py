"""Put the pipeline on a schedule: prefect.yaml's deployment, with what the user asked for, given to the Prefect server."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from prefect.client.schemas.schedules import CronSchedule
from pydantic import ValidationError

from flows.parameters import must_all_be_right
from flows.run_dir import brought
from tasks.servers import running_prefect
from tasks.watching import watchable
from tasks.workspace import Project, snapshot


def deploy(
    where: Project,
    *,
    name: str,
    cron: str | None,
    interval: float | None,
    timezone: str,
    recipe: str | None,
    overrides: list[str],
    promote: bool,
    watch: str | None = None,
    if_worse: float | None = None,
    beside: str | None = None,
) -> str:
    """Deploy the pipeline as `name`. Returns what was done.

    Args:
        cron: five fields, such as "0 3 * * 1"; or
        interval: seconds between two runs; without either, it runs when asked to.
        watch: a file or folder that a stage reads: it runs only if that changed since a run last finished.
        if_worse: it trains only if the champion's metric, on the data as it is then, is worse by this share than when promoted.
        beside: a model that is measured on the same data: champion, candidate, or a run; with `if_worse` the champion is.

    Raises:
        ValueError: a wrong recipe, key, value or schedule, no such model, or no server.
    """
    when = schedules(cron, interval, timezone)
    # a slip in a key or value is said now, not at night
    now = snapshot(where, recipe=recipe, overrides=overrides)
    must_all_be_right(where, [now])
    place = watchable(where, watch) if watch else None
    for option, wanted in (("--watch", watch), ("--if-worse", if_worse)):
        if wanted is not None and not (cron or interval):
            raise ValueError(f"{option} {wanted}: say how often to look, with --interval or --cron")
    if if_worse is not None:
        if not 0 <= if_worse < 1:
            raise ValueError(f"--if-worse {if_worse:g}: a share, at least 0 and below 1, such as 0.05")
        if beside not in (None, "champion"):
            raise ValueError(f"--beside {beside}: with --if-worse it is the champion")
        beside = "champion"
    brought(where, beside)  # no such model is said now, too; each run brings its own
    address = running_prefect(where)
    entry = deployment(where)
    entry |= {"name": name, "schedules": when}
    asked = {"watch": place and str(place), "beside": beside, "if_worse": if_worse}
    entry["parameters"] |= {"recipe": recipe, "overrides": overrides, "promote": promote}
    entry["parameters"] |= {name: value for name, value in asked.items() if value is not None}
    ask_prefect(where, address, entry)
    said = moments(cron, interval, timezone, place, if_worse)
    changed = "; it has uncommitted changes, and its runs are refused until you commit them" if now.dirty else ""
    return f"pipeline/{name} runs {said}, at the commit checked out in {where.tree}; a worker must be up: `longlora up`{changed}"


def moments(cron: str | None, interval: float | None, timezone: str, place: Path | None, if_worse: float | None) -> str:
    """When it runs, in words."""
    said = f"by cron '{cron}' ({timezone})" if cron else f"every {interval:g} s" if interval else "when asked to"
    if place:
        said += f" if {place} changed"
    if if_worse is not None:
        said += f" if the champion is more than {if_worse:.1%} worse on the data as it is then"
    return said


def deployment(where: Project) -> dict[str, Any]:
    """The entry `pipeline` of prefect.yaml.

    Raises:
        ValueError: there is none.
    """
    path = where.tree / "prefect.yaml"
    entries = yaml.safe_load(path.read_text())["deployments"] if path.exists() else []
    found = next((entry for entry in entries if entry["name"] == "pipeline"), None)
    if not found:
        raise ValueError(f"{path} has no deployment 'pipeline': it says what can be deployed")
    return found


def schedules(cron: str | None, interval: float | None, timezone: str) -> list[dict[str, Any]]:
    if cron and interval:
        raise ValueError("--cron and --interval: give one of them")
    if cron:
        try:
            CronSchedule(cron=cron, timezone=timezone)
        except ValidationError as error:
            said = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            right = "; right is, for instance, '0 3 * * 1'" if "cron" in said else ""
            raise ValueError(f"--cron {cron!r} --timezone {timezone}: {said}{right}") from None
        return [{"cron": cron, "timezone": timezone}]
    if interval is not None and not 60 <= interval < float("inf"):
        raise ValueError(f"--interval {interval:g}: must be 60 seconds or more")
    return [{"interval": interval, "timezone": timezone}] if interval else []


def ask_prefect(where: Project, address: str, entry: dict[str, Any]) -> None:
    """Make the work pool, if need be, and the deployment, by Prefect's own command."""
    # prefect.yaml asks for PWD
    env = {**os.environ, "PREFECT_API_URL": address, "PREFECT_CLI_PROMPT": "false", "PWD": str(where.tree)}
    pool = entry["work_pool"]["name"]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "prefect.yaml"
        file.write_text(yaml.safe_dump({"name": "longlora", "deployments": [entry]}))

        def prefect(*arguments: str) -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, "-m", "prefect", *arguments]
            return subprocess.run(command, cwd=where.tree, env=env, capture_output=True, text=True)

        wanted = [["deploy", "--prefect-file", str(file), "--name", entry["name"]]]
        if not entry["schedules"]:  # to Prefect's command that is nothing said of them, and it leaves those there were
            wanted.append(["deployment", "schedule", "clear", f"pipeline/{entry['name']}", "--accept-yes"])
        # one that is there is left alone: made again, it would lose its pause, its limit and its template
        if prefect("work-pool", "inspect", pool).returncode:
            wanted.insert(0, ["work-pool", "create", pool, "--type", "process"])
        for arguments in wanted:
            done = prefect(*arguments)
            if done.returncode:
                said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
                raise ValueError(
                    f"prefect {' '.join(arguments[:2])}: {said[-1] if said else f'status {done.returncode}'}"
                )
