"""A person is asked, in Prefect's page or on the command line; what they said, or that they did not, stays in the history."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import dummy
import pytest
from browser import keep, needs_browser, tab
from test_pipeline import ask
from test_promote import alias, empty, mlflow_server, shop  # noqa: F401

from tasks.approval import patience
from tasks.declared import Artifact

pytestmark = pytest.mark.slow


def model(**meta: object) -> Artifact:
    return Artifact("dummy", "models/tuned", "model", "", [], dict(meta))


def test_a_person_is_asked_where_the_model_or_the_command_wants_it():
    assert patience(model()) is None
    assert patience(model(), asked=True) == 24 * 3600
    assert patience(model(approval_hours=0.5)) == patience(model(approval_hours=0.5), asked=True) == 1800
    for wrong in (0, -1, True, "soon", float("nan")):
        with pytest.raises(ValueError, match="approval_hours is .*: must be a number of hours above 0"):
            patience(model(approval_hours=wrong))


def test_a_run_from_before_anybody_was_to_be_asked_is_asked_about_too(desk, monkeypatch):
    from flows import promote as flow
    from tasks.promotion import RefusalError

    client, where, key = desk
    dummy.write(
        where.tree / "dvc.yaml",
        dummy.DVC.lstrip().replace("    meta:\n      better", "    meta:\n      approval_hours: 2\n      better"),
    )
    waited = []
    monkeypatch.setattr(
        flow, "ask", lambda *given: waited.append(given[-1]) or flow.Approval(False, "Grace", "not yet")
    )
    try:
        with pytest.raises(RefusalError, match="not approved by Grace: not yet"):
            flow.promote(key)
    finally:
        dummy.git(where.tree, "checkout", "dvc.yaml")
    assert waited == [7200]
    assert alias(client, "champion") == "1"


@pytest.fixture
def desk(empty, shop, prefect_url, monkeypatch):  # noqa: F811
    """The shop, its good model champion; the environment in which its better one can be asked for."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    promote, client, where = empty
    promote("good")
    monkeypatch.chdir(where.tree)
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    with temporary_settings({PREFECT_API_URL: prefect_url}):  # in this process Prefect has read its settings already
        yield client, where, shop[1]["better"]


@pytest.fixture
def promote_in_background() -> "Iterator[Callable[..., subprocess.Popen[str]]]":
    begun = []

    def promote(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
        command = [str(Path(sys.executable).with_name("longlora")), "promote", *arguments]
        begun.append(subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield promote
    for process in begun:
        process.kill()


def paused(url: str, key: str) -> dict:
    """The flow run that waits for `key`, once the question is there to be answered."""
    query = {"flow_runs": {"name": {"any_": [f"promote-{key}"]}, "state": {"type": {"any_": ["PAUSED"]}}}}
    deadline = time.monotonic() + 120
    while not (found := ask(url, "flow_runs", query)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    while not ask(url, f"flow_runs/{found[0]['id']}/input", {"prefix": "paused"}):  # saved after the state
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found[0]


def test_a_model_that_is_approved_on_the_command_line_becomes_champion(desk, prefect_url, promote_in_background):
    from tasks import registry

    client, where, key = desk
    process = promote_in_background(where.tree, key[:6], "--approval")
    paused(prefect_url, key)
    assert [alias(client, name) for name in ("champion", "candidate", "staging")] == ["1", "2", "2"]
    said = subprocess.run(
        [str(Path(sys.executable).with_name("longlora")), "approve", key, "--why", "read twenty answers"],
        cwd=where.tree,
        capture_output=True,
        text=True,
    )
    assert (said.returncode, said.stderr, said.stdout) == (0, "", f"run {key} is approved and promoted\n")
    out, error = process.communicate(timeout=200)
    assert (process.returncode, error) == (0, "")
    assert out.startswith(
        f"Shall dummy version 2, of run {key}, be champion, instead of version 1? For it: the verdict passed,"
    )
    assert (
        f"\n`longlora compare {key} champion` shows both, `longlora ask --model staging --document FILE` tries it."
        in out
    )
    assert [alias(client, name) for name in ("champion", "candidate", "staging")] == ["2", "2", None]
    last = registry.moves(client, "dummy")[-1]
    assert (last.how, last.origin, last.to, last.who) == ("promote", "1", "2", "Ada")
    assert last.why.endswith("; asked by Ada, approved: read twenty answers")


@needs_browser
def test_a_person_reads_the_question_on_prefects_page_and_approves_there(desk, prefect_url, promote_in_background):
    client, where, key = desk
    process = promote_in_background(where.tree, key, "--approval")
    waiting = paused(prefect_url, key)
    with tab(f"{prefect_url.removesuffix('/api')}/runs/flow-run/{waiting['id']}") as page:
        page.get_by_role("button", name="Resume").click()
        form = page.locator(".p-modal__card")
        form.get_by_text("Your reason, for the record.").wait_for()
        said = form.inner_text()
        assert f"Shall dummy version 2, of run {key}, be champion, instead of version 1? For it: the verdict" in said
        assert f"longlora compare {key} champion shows both" in said
        assert "On: it becomes champion. Off: the answer is no, and it stays candidate." in said
        keep(page, "approval")
        submit, (who, why) = form.get_by_role("button", name="Submit"), form.locator("textarea").all()
        submit.click()
        form.get_by_text("'who' is a required property").wait_for()
        who.fill(" ")
        why.fill("read twenty answers")
        submit.click()
        page.get_by_text("Validation failed for field 'who'").first.wait_for()
        who.fill("Grace")
        form.get_by_role("switch").click()
        submit.click()
        form.wait_for(state="hidden")
    assert process.communicate(timeout=200)[1] == ""
    assert [alias(client, name) for name in ("champion", "candidate", "staging")] == ["2", "2", None]
    env = {"MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"]}
    _, header, *rows = dummy.longlora(where.tree, "history", env=env).stdout.splitlines()
    last = next(number for number, row in enumerate(rows) if " Grace " in row)
    assert (
        rows[last].startswith(time.strftime("%Y-%m-%d", time.gmtime())) and " promote  1     2   Grace " in rows[last]
    )
    assert rows[last].split()[-1] == key
    reason = slice(header.index("why"), header.index("run"))  # it may take several lines
    assert " ".join(row[reason].strip() for row in rows[last:]).endswith(
        "; asked by Ada, approved: read twenty answers"
    )


def test_one_that_is_declined_in_the_page_stays_candidate_and_one_that_nobody_judges_too(
    desk, prefect_url, promote_in_background, monkeypatch
):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_RETRY_EXTRA_CODES, temporary_settings

    from tasks import promotion, registry

    client, where, key = desk
    process = promote_in_background(where.tree, key, "--approval")
    waiting = paused(prefect_url, key)
    # what the page sends; a server whose sqlite is busy says 500, and is asked again
    with temporary_settings({PREFECT_CLIENT_RETRY_EXTRA_CODES: "500"}), get_client(sync_client=True) as prefect:
        empty_handed = {"approve": False, "who": "", "why": ""}
        assert prefect.resume_flow_run(waiting["id"], run_input=empty_handed).status.value == "REJECT"
        prefect.resume_flow_run(waiting["id"], run_input={"approve": False, "who": "Grace", "why": "too terse"})
    _, error = process.communicate(timeout=200)
    assert process.returncode == 1
    assert error.splitlines() == [
        "error: dummy version 2 stays candidate, champion stays version 1:",
        "  not approved by Grace: too terse",
    ]

    from flows.promote import promote as promote_flow

    monkeypatch.setattr("flows.promote.patience", lambda *models, asked: 2.0)
    refused = pytest.raises(promotion.RefusalError, match="not approved by nobody: no answer in")
    with temporary_settings({PREFECT_API_URL: prefect_url}), refused:
        promote_flow(key)
    assert [alias(client, name) for name in ("champion", "candidate", "staging")] == ["1", "2", None]
    record = registry.moves(client, "dummy")
    assert [(move.how, move.origin, move.to, move.who) for move in record] == [
        ("promote", None, "1", "Ada"),
        ("declined", "1", "1", "Grace"),
        ("declined", "1", "1", "nobody"),
    ]
    assert registry.predecessor(record) is None  # nothing to roll back to: nothing moved


def test_who_is_asked_no_longer_leaves_no_model_staging_and_is_told_how_one_gets_there(empty, shop, monkeypatch):  # noqa: F811
    from flows import promote as flow
    from tasks import runs

    promote, client, where = empty
    promote("good")
    run = runs.chosen(client, where, shop[1]["better"])

    def interrupted(**_: object) -> None:
        assert alias(client, "staging") == "2"
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "pause_flow_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flow.ask(client, where, run, 60.0)
    assert [alias(client, name) for name in ("champion", "candidate", "staging")] == ["1", "2", None]
    for seek in (runs.chosen, runs.address_and_key):
        with pytest.raises(ValueError, match="^dummy has no staging yet: `longlora promote --approval`, or name a run"):
            seek(client, where, "staging")


def test_whoever_approves_waits_as_long_as_all_hooks_may_take(monkeypatch):
    from types import SimpleNamespace

    from prefect.states import Completed, Running

    from flows import promote
    from tasks import hooks

    now = [0.0]
    told = (
        hooks.PATIENCE + hooks.LONG + hooks.LONG + 30.0
    )  # seconds: the promotion, then a webhook, a command and a block
    states = SimpleNamespace(read_flow_run=lambda _: SimpleNamespace(state=Completed() if now[0] > told else Running()))
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(promote, "get_client", lambda sync_client: nullcontext(states))
    monkeypatch.setattr(promote, "time", clock)
    assert promote.followed(SimpleNamespace(id="1"), "0123").is_completed()
    told = float("inf")
    with pytest.raises(ValueError, match="the process that waited does not go on"):
        promote.followed(SimpleNamespace(id="1"), "0123")


def test_nobody_is_asked_about_a_model_that_the_rules_refuse_and_the_attempt_is_named(desk, shop):  # noqa: F811
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    from flows.promote import promote as promote_flow
    from tasks import promotion, registry

    client, _, _ = desk
    with pytest.raises(promotion.RefusalError, match="size: 7.5 at 4"):
        promote_flow(shop[1]["refused"], approval=True)
    with get_client(sync_client=True) as prefect:
        (last,) = prefect.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert last.name == f"promote-{shop[1]['refused']}"
    assert len(registry.moves(client, "dummy")) == 1


def test_an_answer_that_nobody_waits_for_or_without_server_is_one_line(desk):
    from flows.promote import approve

    client, where, key = desk
    with pytest.raises(
        ValueError, match=f"no promotion of run {key} waits for approval: `longlora promote {key} --app"
    ):
        approve(where, client, key, approve=True, why="yes")
    with pytest.raises(ValueError, match="--why is empty: the reason is kept in the history"):
        approve(where, client, key, approve=True, why=" ")
    for command in (["approve", key, "--why", "yes"], ["promote", key, "--approval"]):
        done = dummy.called(where.tree, *command, env={"MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"]})
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: no Prefect server is up: start one with `longlora up`, or set PREFECT_API_URL\n"
