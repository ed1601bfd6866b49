"""Run dvc.yaml under Prefect. The graph is DVC's; retries, logs and tags are Prefect's; the record is MLflow's and git's.

One task run per stage, named by it. A run happens in its own worktree, under a lock of its key: the same key again is how a run is
resumed, and what was done is not done twice. A lock of the flow run itself, held longer, tells others that it is alive.
"""

import os
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import State, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Completed, Crashed
from prefect.task_runners import ThreadPoolTaskRunner

from flows import cancelling
from flows.memory import must_fit
from flows.mlflow_writer import MlflowWriter, NotOpenedError
from flows.own_run import name_run, own_deployment, own_id
from flows.parameters import checked_meanwhile
from flows.progress import Progress
from flows.run_dir import RunDir, brought, open_run_dir
from tasks import hooks, locks, servers, storage, supervise, workspace
from tasks.config import must_find_remote_folder
from tasks.declared import TaskOptions, declared
from tasks.errors import one_line
from tasks.stage_process import InterruptedStageError, ParameterError
from tasks.stages import Stage
from tasks.tags import GIT, RECORD, REF, REMOTE, VERDICT
from tasks.watching import Watched, look, watched

AT_WORK = [StateType.RUNNING, StateType.CANCELLING]


def jobs() -> int:
    """How many stages may run at once, by LONGLORA_JOBS.

    Raises:
        ValueError: that is no number from 1 on.
    """
    said = os.environ.get("LONGLORA_JOBS", "1")
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(f"LONGLORA_JOBS={said}: must be a whole number from 1 on")
    return int(said)


class Jobs(ThreadPoolTaskRunner[Any]):
    """As many threads as LONGLORA_JOBS says when a flow begins; this file is imported by whoever deploys it, too."""

    def duplicate(self) -> ThreadPoolTaskRunner[Any]:
        return ThreadPoolTaskRunner(max_workers=jobs())


RUNNER: Any = Jobs()  # what `flow` says it takes leaves out Prefect's own runners of tasks


# json: Prefect keeps the exception that a flow ends by, whatever `persist_result` says, and as a pickle by default
@flow(name="pipeline", task_runner=RUNNER, persist_result=False, result_serializer="json")
def pipeline(
    recipe: str | None = None,
    overrides: list[str] | None = None,
    scheduled: bool = False,
    promote: bool = False,
    watch: str | None = None,
    anyway: bool = False,
    beside: str | None = None,
    if_worse: float | None = None,
) -> str | State[None]:
    """Bring every stage up to date in a worktree of its own, and record the run. Returns the run's key.

    Args:
        recipe: a file of recipes/, by its name.
        overrides: `section.key=value`, laid over the recipe.
        scheduled: refuse a checkout with uncommitted changes.
        promote: promote the run's model afterwards.
        watch: a file or folder that a stage reads; without new data there nothing is done, and the flow ends as "Unchanged".
        anyway: also where the training would not fit into this machine's memory.
        beside: a model that is measured on the same data: champion, candidate, or a run.
        if_worse: with `beside` the champion: nothing more is done, and the flow ends as "StillGood", unless the champion's
            metric is worse by more than this share than when it was promoted.

    Raises:
        RefusalError: the model does not deserve promotion.
        ValueError: bad parameters, a training that cannot fit, or a dirty checkout when scheduled.
        StageError: a stage ended with an error; its last words.
    """
    where = workspace.project(Path.cwd())
    turn = turn_of(watch, recipe=recipe, overrides=overrides or [], if_worse=if_worse, scheduled=scheduled)
    with locks.if_free(where, turn) if turn else nullcontext(True) as free:
        if not free:
            return Completed(name="Busy", message="an earlier run is not done yet; the next one sees what it left")
        with failure_told(Facts()):
            servers.use_environment(where)  # a worker may not have it
            seen = watched(where, watch, recipe=recipe, overrides=overrides or []) if watch else None
            if seen and not seen.changed:
                return Completed(name="Unchanged", message=f"{seen.path} is as it was when a run last finished")
            added = brought(where, beside) + ([seen.addition()] if seen else [])
            snapshot = workspace.snapshot(where, recipe=recipe, overrides=overrides, additions=added)
            if scheduled and snapshot.dirty:
                raise ValueError(
                    f"{where.tree} has uncommitted changes, and a scheduled run must be reproducible: commit them first"
                )
        return run_snapshot(where, snapshot, anyway=anyway, promote=promote, if_worse=if_worse, seen=seen)


def turn_of(
    watch: str | None, *, recipe: str | None, overrides: list[str], if_worse: float | None, scheduled: bool
) -> str | None:
    """The name of the lock that one process at a time holds, to its promotion's end: of those that look at the same, or that a
    deployment has due. None for a run that is neither.

    A run may last longer than its schedule waits. Those that came meanwhile would wait, each in a process and in one of the
    worker's places, and promote again. Prefect's own limit of a deployment is no way: it ends a training whose server was started
    anew, and keeps the place of a run that was killed with its server.
    """
    asked = look(watch or "", recipe=recipe, overrides=overrides)
    if watch or if_worse is not None:
        return f"look-{asked}"
    deployment = own_deployment() if scheduled else None
    return f"due-{deployment}-{asked}" if deployment else None  # whoever asks it for another training gets one


@dataclass
class Opened:
    """A run whose folder is open, under the lock of its key, which `lock` frees."""

    run_dir: RunDir
    lock: ExitStack


def pipeline_of(
    snapshot: workspace.Snapshot, promote: bool = False, anyway: bool = False, opened: Opened | None = None
) -> None:
    """`pipeline` for a snapshot that was made before, whatever its files have become since, in a process that no worker would end
    if the run is cancelled; `opened`: it is open, and its parameters are known to be right."""

    # within, for what is open is no parameter that Prefect could keep
    @flow(name="pipeline", task_runner=RUNNER, persist_result=False, result_serializer="json")
    def its_flow(snapshot: workspace.Snapshot, promote: bool, anyway: bool) -> str | State[None]:
        with cancelling.cancellable() as cancelled:
            try:
                where = workspace.project(Path.cwd())
                return run_snapshot(where, snapshot, anyway=anyway, promote=promote, opened=opened)
            except (TerminationSignal, InterruptedStageError):
                if not cancelled.is_set():
                    raise
                cancelling.wait_for_stages()
                return Cancelled(message="cancelled; the same run again goes on where it stopped")

    its_flow(snapshot, promote, anyway)


def run_snapshot(
    where: workspace.Project,
    snapshot: workspace.Snapshot,
    *,
    anyway: bool,
    promote: bool,
    opened: Opened | None = None,
    if_worse: float | None = None,
    seen: Watched | None = None,
) -> str | State[None]:
    """Compute and record what `snapshot` says, and promote its model if asked to, under the locks of this flow run and of the
    snapshot's key. Returns the key, or how the flow ends if there was nothing to do. Arguments and errors are `pipeline`'s."""
    with locks.hold(where, flow_lock(own_id())):  # to its end: a promotion is part of it
        facts = Facts(key=snapshot.key)
        with opened.lock if opened else locks.hold(where, snapshot.key), failure_told(facts):
            run_dir = begin(where, snapshot, opened)
            facts.model = run_dir.name
            with closing(run_dir.dvc):
                if if_worse is not None:
                    from flows.decay import still_good  # it imports MLflow

                    if said := still_good(run_dir, by=if_worse):
                        return Completed(name="StillGood", message=said)
                with nullcontext() if opened else checked_meanwhile(run_dir):
                    run_dir.dvc.warm()  # it imports DVC meanwhile
                must_fit(run_dir, anyway=anyway)  # it reads parameters that are right by now
                run_and_record(run_dir)
        if promote:
            # MLflow is imported by now, and not before the first stage runs
            from flows.promote import promote as promote_flow
            from tasks.promotion import RefusalError

            try:
                with failure_told(facts, RefusalError):
                    print(promote_flow(snapshot.key), flush=True)
            except RefusalError:  # an answer; whatever else ends a promotion, the next look tries it again
                remember(seen)
                raise
        remember(seen)
        return snapshot.key


@dataclass
class Facts:
    """What is known of a run so far."""

    key: str | None = None
    model: str | None = None


@contextmanager
def failure_told(facts: Facts, *but: type[Exception]) -> Generator[None]:
    """Tell the hooks of a failure inside. An interruption is none; the exceptions `but` are told elsewhere."""
    try:
        yield
    except (InterruptedStageError, *but):
        raise
    except Exception as error:
        hooks.tell("failed", one_line(error), key=facts.key, model=facts.model)
        raise


def remember(seen: Watched | None) -> None:
    if seen:
        seen.remember()


def begin(where: workspace.Project, snapshot: workspace.Snapshot, opened: Opened | None) -> RunDir:
    """The run's folder, nothing of an earlier attempt at work in it. Call it under the lock of its key.

    Raises:
        ValueError, UserError: its data or its record could not be kept, for a remote is not there or refuses it.
    """
    must_find_remote_folder(where)
    storage.must_take(where, snapshot)
    tell_of_the_dead(where)
    name_run(f"{snapshot.recipe or 'params'}-{snapshot.key}", tags=[workspace.home(where)])
    run_dir = opened.run_dir if opened else open_run_dir(where, snapshot)
    for stage in run_dir.stages:
        declared(TaskOptions, stage.meta, at=f"stages: {stage.name}: meta")
    run_dir.dvc.must_reach_remote()
    supervise.take_over(run_dir.folder)
    return run_dir


def run_and_record(run_dir: RunDir) -> None:
    """Run and record; whatever happens, no process is left, and MLflow knows how it ended."""
    writer = MlflowWriter(run_dir)
    status = "KILLED"  # by KeyboardInterrupt, or what Prefect makes of SIGTERM
    try:
        run_stages(run_dir, writer)
        storage.must_agree(run_dir.folder, [stage.name for stage in run_dir.stages])
        commit = record(run_dir, writer)
        run_id = writer.wait()
        status = "FINISHED"
    except InterruptedStageError:
        raise
    except Exception:
        status = "FAILED"
        raise
    finally:
        run_dir.dvc.close()
        supervise.stop_all()  # a stage still runs if this thread was interrupted
        writer.finish(status)
    storage.note(
        run_dir.where, run_dir.snapshot.key, storage.Finished(commit, run_id, storage.without_credentials(writer.uri))
    )


def flow_lock(flow: UUID) -> str:
    """The name of the lock that the process of flow run `flow` (its id) holds until it returns."""
    return f"{locks.FLOW}{flow}"


def tell_of_the_dead(where: workspace.Project) -> None:
    """Say of the flow runs of this project that count as running, but whose process is gone, that they crashed, which the hooks
    are told, or were cancelled."""
    with get_client(sync_client=True) as client:
        running = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[workspace.home(where)]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=AT_WORK)),
        )
        for other in client.read_flow_runs(flow_run_filter=running):
            if locks.is_held(where, flow_lock(other.id)):
                continue
            state = client.read_flow_run(other.id).state_type
            if state not in AT_WORK:  # it ended since it was found, and freed its lock then
                continue
            cancelled, said = state is StateType.CANCELLING, "its process ended without a word"
            client.set_flow_run_state(other.id, (Cancelled if cancelled else Crashed)(message=said), force=True)
            if not cancelled:
                hooks.tell("failed", said, key=other.name.rpartition("-")[2], model=None)


def run_stages(run_dir: RunDir, writer: MlflowWriter) -> None:
    """Every stage as a task, each after its upstream; what does not depend on a failed stage still runs.

    Raises:
        StageError: the first one that failed.
    """
    futures: dict[str, Any] = {}
    for stage in run_dir.stages:
        options: dict[str, Any] = {"name": stage.name, "task_run_name": stage.name, "description": stage.desc}
        upstream = [futures[name] for name in stage.upstream]
        # by Prefect's types, `wait_for` goes with `return_state` alone
        its_task: Any = run_stage.with_options(**(options | stage.meta))
        futures[stage.name] = its_task.submit(run_dir, stage, writer, wait_for=upstream)
    for future in futures.values():
        future.wait()
    for state in (future.state for future in futures.values()):
        if state.is_failed() or state.is_crashed():
            raise state.result(raise_on_failure=False)


def worth_another_try(task: Any, run: TaskRun, state: State) -> bool:
    """A mistake in the parameters stays one, as what MLflow refuses does, and an interruption is meant; anything else (network,
    memory) may pass."""
    return not isinstance(state.result(raise_on_failure=False), ParameterError | InterruptedStageError | NotOpenedError)


@task(cache_policy=NO_CACHE, retry_condition_fn=worth_another_try)
def run_stage(run_dir: RunDir, stage: Stage, writer: MlflowWriter) -> State[None]:
    """Bring one stage up to date, its output in this task's log, its results in MLflow."""
    log, status = partial(get_run_logger().info, "%s"), stage.status
    if status == "stale":
        curve = next((Path(out.path).stem for out in stage.outs if out.kind == "plot"), stage.name)
        progress = Progress(stage.name, curve)

        def hear(line: str) -> None:
            log(line)
            progress.hear(line)

        def look() -> None:
            writer.follow(list(stage.outs), progress.points)
            progress.show()

        status = run_dir.dvc.bring_up_to_date(stage.name, log=hear, on_tick=look)
        progress.end(log)
        writer.points(progress.points)
    writer.stage(stage.name, run_dir.dvc.outs(stage))
    if status == "stale":
        return Completed(message=stage.desc)
    print(f"{stage.name} | {status}", flush=True)
    return Completed(name="Cached", message=f"{status}: {stage.desc}")


@task(task_run_name="record", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5)
def record(run_dir: RunDir, writer: MlflowWriter) -> str:
    """Keep the run: its commit under its own ref, its data on the remote, both named in MLflow. Returns the commit."""
    where, snapshot = run_dir.where, run_dir.snapshot
    commit = storage.record(where, snapshot, run_dir.folder)
    must_find_remote_folder(where)  # it may be lost since the run began
    remote = run_dir.dvc.push()
    address = storage.publish(where, snapshot.key, commit)
    text = run_dir.summary()
    if text:
        create_markdown_artifact(text, key=f"run-{snapshot.key}", description=text.splitlines()[0].strip("*# "))
    writer.summary(
        text,
        run_dir.picture(),
        {
            RECORD: commit,
            REF: storage.kept_ref(commit),
            REMOTE: storage.without_credentials(remote),
            GIT: address,
            VERDICT: run_dir.verdict(),
        },
    )
    return commit
