"""Make a run's model the champion, as a flow: it can be scheduled, and is seen. What it does is said in tasks/promotion.py.

If the model wants approval, the flow pauses until a person answers, in Prefect's page or by `longlora approve`, or too much time
has passed. The rules are asked first, so that nobody has to judge what would be refused, and again after, for the champion may be
another by then.
"""

import time
from contextlib import suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run, resume_flow_run
from prefect.input import RunInput
from pydantic import Field

from flows.own_run import name_run
from tasks import hooks, promotion, runs, tracking
from tasks.approval import Approval, patience, waiting
from tasks.locks import hold
from tasks.tags import KEY
from tasks.workspace import Project, person, project

LOOK = 2  # seconds between two looks for an answer
FOLLOW = 60.0 + hooks.LONGEST  # seconds for the flow that was answered to do it, and to tell of it


class Answer(RunInput):
    """What Prefect's page asks for."""

    # without a default the newer page sends nothing for a switch that was left off
    approve: bool = Field(False, description="On: it becomes champion. Off: the answer is no, and it stays candidate.")
    who: str = Field(pattern=r"\S", description="Your name, for the record.")
    why: str = Field(pattern=r"\S", description="Your reason, for the record.")


# json: as in flows/pipeline.py
@flow(name="promote", persist_result=False, result_serializer="json")
def promote(run: str | None = None, approval: bool = False) -> str:
    """Register run `run` (its key or MLflow id; default: the last finished one) as candidate, and then as champion.

    Returns what was done, as a sentence.

    Args:
        approval: have a person approve it, even if the model's `approval_hours` in dvc.yaml does not ask for that.

    Raises:
        RefusalError: it stays candidate; a reason per line.
        ValueError: there is no such run, or it is not finished.
    """
    where, client = project(Path.cwd()), tracking.connect()
    chosen = runs.chosen(client, where, run)
    _, model = runs.source_and_model(where, chosen)
    name_run(waiting(chosen.data.tags[KEY]))  # by which `approve` finds it
    seconds = patience(runs.model_at(where), model, asked=approval)
    if seconds is None or promotion.nothing_to_do(client, where, chosen):
        return promotion.promote(client, where, chosen)
    with hold(where, waiting(chosen.data.tags[KEY])):  # nobody is asked twice at once
        said = promotion.nothing_to_do(client, where, chosen)
        return said or promotion.promote(client, where, chosen, approval=ask(client, where, chosen, seconds))


def ask(client: MlflowClient, where: Project, run: Run, seconds: float) -> Approval:
    """Pause this flow until a person answers, or for `seconds`."""
    key = run.data.tags[KEY]
    try:
        question = promotion.propose(client, where, run)
        print(f"{question}\nwaiting {seconds / 3600:g} h for: longlora approve {key} --why TEXT [--no]", flush=True)
        said = pause_flow_run(
            wait_for_input=Answer.with_initial_data(description=question),
            timeout=max(1, round(seconds)),
            poll_interval=LOOK,
        )
    except FlowPauseTimeout:
        return Approval(False, "nobody", f"no answer in {seconds / 3600:g} h")
    except BaseException:  # Ctrl-C, SIGTERM or a cancel: who is gone waits for no answer
        with suppress(Exception):  # what ended the question is told; MLflow may be what is gone
            promotion.withdraw(client, where, run)
        raise
    return Approval(said.approve, said.who, said.why)


def approve(where: Project, client: MlflowClient, wanted: str, *, approve: bool, why: str) -> str:
    """Answer the flow that waits for a word on run `wanted`. Returns what came of it.

    Raises:
        ValueError: none waits, the reason is empty, or the flow does not go on.
    """
    if not why.strip():
        raise ValueError("--why is empty: the reason is kept in the history")
    run = runs.chosen(client, where, wanted)
    runs.must_be_ours(run)
    key = run.data.tags[KEY]
    paused = asking(key)
    try:
        resume_flow_run(paused.id, run_input={"approve": approve, "who": person(where), "why": why})
    except (RuntimeError, FlowPauseTimeout) as error:
        raise ValueError(f"promotion of run {key}: {error}") from None
    state = followed(paused, key)
    if approve and not state.is_completed():
        raise ValueError(f"approved, and yet not promoted: {state.message}")
    return f"run {key} is approved and promoted" if approve else f"run {key} is not approved, and stays candidate"


def followed(answered: FlowRun, key: str) -> State:
    """How the flow that was answered ended.

    Raises:
        ValueError: it does not go on.
    """
    deadline = time.monotonic() + FOLLOW
    with get_client(sync_client=True) as client:
        while not (state := client.read_flow_run(answered.id).state) or not state.is_final():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"the process that waited does not go on: `longlora promote {key} --approval` asks again"
                )
            time.sleep(0.5)
    return state


def asking(key: str) -> FlowRun:
    """The flow run that waits for a word on run `key`.

    Raises:
        ValueError: there is none.
    """
    paused = FlowRunFilter(
        name=FlowRunFilterName(any_=[waiting(key)]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=paused)
    if not found:
        raise ValueError(
            f"no promotion of run {key} waits for approval: `longlora promote {key} --approval` asks for it"
        )
    return max(found, key=lambda each: each.created.timestamp() if each.created else 0.0)
