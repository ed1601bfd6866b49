"""Two runs side by side: what differs and nothing else, in the terminal and as a page."""

import json
import re
import time
from datetime import UTC, datetime

import dummy
import pytest
from browser import keep, needs_browser, tab
from PIL import Image
from test_promote import mlflow_server  # noqa: F401

from tasks.listening import LOCAL
from tasks.stages import Out
from tasks.workspace import Project, project, snapshot, worktree

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(template, tmp_path_factory, mlflow_server):  # noqa: F811
    """A project with two runs in MLflow, their files written by hand; its folder and their keys."""
    from tasks import tracking

    home = tmp_path_factory.mktemp("compare")
    dummy.git(home, "clone", "--quiet", str(template), "dummy")
    folder = home / "dummy"
    text = (folder / "dvc.yaml").read_text().replace("  dummy:\n", "  compared:\n")  # an experiment of its own
    dummy.write(folder / "dvc.yaml", text)
    dummy.commit(folder)
    where, keys = project(folder), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        for rank, loss in ((8, 0.5), (16, 0.25)):
            state = snapshot(where, overrides=[f"train.rank={rank}", "score.lengths=[2,4]"])
            work = worktree(where, state)
            tracker = tracking.Tracker(tracking.connect(), where, state, experiment="compared", folder=work)
            dummy.write(work / "metrics" / "history.csv", f"step,loss\n1,1.0\n2,{loss}\n")
            interval = f'{{"value": {rank / 4}, "low": 1, "high": 9}}'
            scores = f'{{"4": {interval}, "2": {rank}.5, "3": {3 + rank / 1e6}}}'
            dummy.write(work / "metrics" / "s.json", f'{{"score": {scores}, "whole": true}}')
            tracker.stage("train", [Out("metrics/history.csv", "plot", {"x": "step"}), Out("metrics/s.json", "metric")])
            same, other = Out("models/base", "out", md5="aa.dir"), Out("models/tuned", "out", md5=f"b{rank}.dir")
            tracker.stage("more", [same, other])
            (work / "reports").mkdir()
            Image.new("RGB", (40, 30), "teal").save(work / "reports" / "score.png")
            tracker.stage("report", [Out("reports", "out")])
            tracker.describe(f"# Rank {rank}", "reports/score.png")
            tracker.client.log_metric(tracker.run_id, "system/cpu_utilization_percentage", rank)
            tracker.finish("FINISHED")
            keys.append(state.key)
    return folder, keys


def test_what_differs_is_shown_by_length_and_what_is_equal_is_only_counted(pair, mlflow_server, tmp_path):  # noqa: F811
    folder, (one, other) = pair
    page = tmp_path / "page.html"
    done = dummy.longlora(
        folder, "compare", one[:8], other, "--html", str(page), env={"MLFLOW_TRACKING_URI": mlflow_server}
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["train.rank", "8", "16"] in rows
    assert not any(row[:1] == ["seconds"] for row in rows)  # a run may be resumed days after
    assert "system/" not in done.stdout  # what the machine did
    assert "parameters: 1 of 8 differ" in done.stdout
    assert "data: 1 of 2 differ" in done.stdout
    assert ["models/tuned", "b8.dir", "b16.dir"] in rows
    assert ["score", "3", "3.000008", "3.000016", "+8e-06"] in rows  # which four digits would not tell apart
    assert "metrics: 4 of 5 differ" in done.stdout and "whole" not in done.stdout
    assert ["score", "2", "8.5", "16.5", "+8"] in rows
    assert ["score", "4", "2", "(1", "to", "9)", "4", "(1", "to", "9)", "+2"] in rows
    assert ["history/loss", "2", "0.5", "0.25", "-0.25"] in rows  # the last point alone
    assert ["set", "train.rank=8", "score.lengths=[2,4]", "train.rank=16", "score.lengths=[2,4]"] in rows
    text = page.read_text()
    assert text.count("<svg") == 1 and "history/loss" in text and "train.rank" in text
    assert "src=" not in text and "https://" not in text.replace("https://matplotlib.org", "")
    assert not page.with_suffix(".partial").exists()


def test_of_a_curve_each_run_shows_its_own_last_point():
    from flows.cli.compare import Side, scores

    curves = ({1: 1.0, 2: 0.5}, {1: 1.0, 2: 0.5, 1500: 0.25}, {})
    one, other, none = (Side("", None, {"history/loss": curve, "score": {2: 1.0}}, {}) for curve in curves)

    def shown(*sides: Side) -> list[str]:
        return [str(next(iter(column.cells))) for column in scores([*sides], {"history"}).columns]

    assert shown(one, other) == ["history/loss", "2 / 1,500", "0.5", "0.25", "-0.25"]
    assert shown(one, none) == ["history/loss", "2", "0.5", "-", ""]


def test_thousands_are_parted_in_every_number():
    from flows.cli.compare import Side, scores

    speeds = [Side("", None, {"speed": {0: speed}}, {}) for speed in (9500.25, 3367.0)]
    assert [str(next(iter(column.cells))) for column in scores(speeds, set()).columns][2:] == [
        "9,500",
        "3,367",
        "-6,133",
    ]


def test_a_large_count_is_shown_whole():
    from flows.cli.compare import Side, scores

    counts = [Side("", None, {"tokens": {0: count}}, {}) for count in (10_420_000.0, 10_420_001.0)]
    assert [str(next(iter(column.cells))) for column in scores(counts, set()).columns][2:4] == [
        "10,420,000",
        "10,420,001",
    ]
    fewer = [Side("", None, {"parameters": {0: count}}, {}) for count in (55_552.0, 44_800.0)]
    assert str(next(iter(scores(fewer, set()).columns[4].cells))) == "-10,752"


def test_in_a_narrow_terminal_nothing_is_cut(pair, mlflow_server, monkeypatch, capsys):  # noqa: F811
    from rich.console import Console

    from flows.cli import compare, listing
    from tasks import runs, tracking

    folder, keys = pair
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    for module in (compare, listing):
        monkeypatch.setattr(module, "console", lambda: Console(width=70))
    client, where = tracking.connect(), project(folder)
    listing.show_runs(client, where, runs.model_at(where), every=False)
    compare.compare(where, *keys, html=None)
    said = capsys.readouterr().out
    assert "…" not in said and all(key in said for key in keys)


def test_the_newest_runs_are_listed_and_all_of_them_if_asked(pair, mlflow_server, monkeypatch, capsys):  # noqa: F811
    from flows.cli import listing
    from tasks import runs, tracking

    folder, (old, new) = pair
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setattr(listing, "NEWEST", 1)
    client, where = tracking.connect(), project(folder)
    for every, rows in ((False, [new]), (True, [new, old])):
        listing.show_runs(client, where, runs.model_at(where), every=every)
        said = capsys.readouterr().out
        assert [key for key in (new, old) if key in said] == rows
        assert ("--all shows the others too" in said) is not every


def test_runs_are_listed_with_times_in_utc_as_the_history_has_them(pair, mlflow_server, monkeypatch, capsys):  # noqa: F811
    from flows.cli import listing
    from tasks import runs, tracking

    folder, keys = pair
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    client, where = tracking.connect(), project(folder)
    try:
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("TZ", "Asia/Tokyo")
            time.tzset()
            listing.show_runs(client, where, runs.model_at(where), every=False)
    finally:
        time.tzset()
    header, *rows = capsys.readouterr().out.splitlines()
    assert "started (UTC)" in header
    for key in keys:
        started = datetime.fromtimestamp(runs.chosen(client, where, key).info.start_time / 1000, UTC)
        assert f"{key}  {started:%Y-%m-%d %H:%M}  " in "\n".join(rows)


@needs_browser
def test_mlflows_own_pages_show_both_runs_and_each_one_whole(pair, mlflow_server):  # noqa: F811
    from mlflow import MlflowClient

    client, keys = MlflowClient(mlflow_server), pair[1]
    experiment = client.get_experiment_by_name("compared").experiment_id
    ids = [client.search_runs([experiment], f"tags.`longlora.key` = '{key}'")[0].info.run_id for key in keys]
    with tab(f"{mlflow_server}/#/compare-runs?runs={json.dumps(ids)}&experiments={json.dumps([experiment])}") as page:
        page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
        page.locator(".js-plotly-plot").get_by_text("train.rank").first.wait_for()  # parallel coordinates
        page.get_by_text("longlora.snapshot").wait_for()
        keep(page, "mlflow-compare")
        text = page.inner_text("body")
        rows = [re.split(r"\s*\t\s*", row) for row in text.splitlines()]
        assert ["train.rank", "8", "16"] in rows and ["gate.least", "1.0", "1.0"] in rows
        assert ["longlora.key", *keys] in rows
        assert ["data.models/base", "aa.dir", "aa.dir"] in rows and ["data.models/tuned", "b8.dir", "b16.dir"] in rows
        names = ["history/loss", "score", "score/high", "score/low", "system/cpu_utilization_percentage", "whole"]
        values = ["0.5", "0.25", "2", "4", "9", "9", "1", "1", "8", "16", "1", "1"]  # those of the longest length
        assert text.split("Metrics\nShow diff only\n")[1].split("\nArtifacts\n")[0].split() == [*names, *values]

        page.goto(f"{mlflow_server}/#/experiments/{experiment}/runs/{ids[1]}")
        page.get_by_text("Rank 16").wait_for()  # the description, as Markdown
        page.wait_for_function("[...document.images].some(i => i.src.includes('score.png') && i.naturalWidth === 40)")
        keep(page, "mlflow-run")
        page.goto(f"{mlflow_server}/#/experiments/{experiment}/runs/{ids[1]}/model-metrics")
        page.locator(".js-plotly-plot").nth(1).wait_for()
        keep(page, "mlflow-metrics")


@needs_browser
def test_from_the_address_that_up_prints_the_switch_leads_to_runs_and_stays(pair, mlflow_server, tmp_path, monkeypatch):  # noqa: F811
    from types import SimpleNamespace

    from tasks import up

    monkeypatch.setattr(up, "RestartingServer", lambda *words, **more: SimpleNamespace(name="MLflow"))
    port = int(mlflow_server.rpartition(":")[2])
    (tmp_path / ".longlora").mkdir()
    address, _, hint = up.start_mlflow(Project(tmp_path, tmp_path), LOCAL, port).page.partition(" ")
    with tab(address) as page:
        page.get_by_text(hint.split("*")[1], exact=True).click()
        page.get_by_role("link", name="compared", exact=True).first.click()
        page.wait_for_url("**/runs?**")
        page.locator("a[href*='/runs/']").first.click()
        page.get_by_role("link", name="Runs", exact=True).first.wait_for()
        assert page.get_by_text("Evaluation runs").count() == 0


def test_a_run_is_not_compared_with_itself(pair, mlflow_server):  # noqa: F811
    folder, (key, _) = pair
    done = dummy.called(folder, "compare", key, key[:8], env={"MLFLOW_TRACKING_URI": mlflow_server})
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == f"error: {key} and {key[:8]} are the same run: `longlora runs` lists what there is to compare\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0000", "1111"], "error: no run '0000': `longlora runs` lists them"),
        (["a", "b", "--html", "page.txt"], "error: --html page.txt: must be a file that ends in .html"),
        (
            ["a", "b", "--html", "nowhere/page.html"],
            "error: --html nowhere/page.html: must be a file that ends in .html",
        ),
    ],
)
def test_a_mistake_is_one_line(pair, mlflow_server, arguments, said):  # noqa: F811
    done = dummy.called(pair[0], "compare", *arguments, env={"MLFLOW_TRACKING_URI": mlflow_server})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(said)
