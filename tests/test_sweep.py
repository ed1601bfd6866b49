"""A sweep: every combination once, or those that a search draws; a failure among them does not stop the rest, nothing begins on bad
input."""

import math
import statistics
from contextlib import nullcontext
from pathlib import Path

import dummy
import pytest
from test_pipeline import mlflow_runs

from tasks.workspace import project, snapshot


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("a.b=1,2", ["a.b=1", "a.b=2"]),
        ("a.b=[4,2],[8]", ["a.b=[4,2]", "a.b=[8]"]),
        ("a.b='x,y', z", ["a.b='x,y'", "a.b=z"]),
        ("a.b={c: 1, d: 2},{c: 3}", ["a.b={c: 1, d: 2}", "a.b={c: 3}"]),
        ("a.b=2.0e-5", ["a.b=2.0e-5"]),
    ],
)
def test_values_are_parted_by_commas_outside_of_brackets_and_quotes(axis, values):
    from flows.cli.axes import axis_values

    assert axis_values(axis) == values


def test_the_points_are_the_product_with_the_keys_that_single_runs_have(folder):
    from flows.cli.sweep import name_of, points
    from tasks.workspace import snapshot

    where = project(folder)
    found = points(where, ["train.rank=5,6", "gate.least=1,2,3"], recipe="big", overrides=["train.steps=2"])
    assert [point.values for point in found] == [
        (f"train.rank={rank}", f"gate.least={least}") for rank in (5, 6) for least in (1, 2, 3)
    ]
    single = snapshot(where, recipe="big", overrides=["gate.least=2", "train.steps=2", "train.rank=6"])
    assert found[4].snapshot.key == single.key
    assert name_of(found) == name_of(found[::-1]) != name_of(found[1:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.rnk=1,2"], "error: unknown key 'train.rnk'; did you mean 'rank'?"),
        (["train.rank=1,many"], "error: train.rank = 'many': must be a number, as in train.rank = 8"),
        (["train.rank=1,"], "error: sweep 'train.rank=1,': a value is empty"),
        (["train.rank"], "error: sweep 'train.rank': must be key=value,value, such as adapter.rank=8,16"),
        (["train.rank=1,1"], "error: train.rank=1 and train.rank=1 are the same run: give each value once"),
        (["train.rank=1", "train.rank=2"], "error: train.rank: is given twice; name it once, with all its values"),
        (["train.rank=1,2", "--set", "train.rank=3"], "error: train.rank: is given twice"),
        (["train.rank=1,2", "--recipe", "bgi"], "error: no recipe 'bgi'; did you mean 'big'?"),
        (
            ["train.rank=1..9"],
            "error: sweep 'train.rank=1..9': is a range: say how many runs search it, such as --trials 12",
        ),
        (["train.rank=1,2", "--seed", "3"], "error: --seed 3: is of the draws of a search, so give --trials, too"),
        (["train.rank=9..1", "--trials", "2"], "error: sweep 'train.rank=9..1': "),
        (["train.seconds=0.0..1.0:log", "--trials", "2"], "error: sweep 'train.seconds=0.0..1.0:log': "),
        (["train.rnk=1..9", "--trials", "2"], "error: unknown key 'train.rnk'; did you mean 'rank'?"),
        (["train.rank=1..9,20", "--trials", "2"], "error: train.rank = '1..9': must be a number"),
        (["train.rank=1..9", "--trials", "2", "--set", "train.rank=3"], "error: train.rank: is given twice"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_begins(folder, arguments, said):
    done = dummy.called(folder, "sweep", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert not (folder / ".longlora" / "worktrees").exists()


def test_a_run_that_dvc_or_mlflow_ends_is_a_failed_run_and_not_the_end_of_the_sweep(folder, monkeypatch):
    from dvc.exceptions import DvcException
    from mlflow.exceptions import MlflowException

    from flows.cli import sweep

    where = project(folder)
    monkeypatch.setattr(sweep, "open_run_dir", lambda where, state: None)
    monkeypatch.setattr(sweep, "is_finished", lambda run_dir: False)
    for point, error in zip(
        sweep.points(where, ["train.rank=5,6"], recipe=None, overrides=[]),
        [DvcException("no such\nremote"), MlflowException("busy")],
        strict=True,
    ):

        def run(state, error=error):
            raise error

        assert sweep.attempt(where, point, run) == " ".join(str(error).split())


@pytest.mark.parametrize(
    ("axis", "found"),
    [
        ("a.b=1..64", "IntDistribution(high=64, log=False, low=1, step=1)"),
        ("a.b= 4..64:log ", "IntDistribution(high=64, log=True, low=4, step=1)"),
        ("a.b=1e-4..1.0e-3:log", "FloatDistribution(high=0.001, log=True, low=0.0001, step=None)"),
        ("a.b=-1.5..2", "FloatDistribution(high=2.0, log=False, low=-1.5, step=None)"),
        *(
            (axis, "None")
            for axis in ("a.b=1..2,5", "a.b=../1", "a.b=..", "a.b=1", "a.b=[1..2]", "a.b=1..2:lin", "a.b")
        ),
    ],
)
def test_a_range_is_two_numbers_and_nothing_else(axis, found):
    from flows.cli.axes import range_of

    assert str(range_of(axis)) == found


@pytest.mark.parametrize(
    ("axis", "shown"),
    [
        ("a.b=1e1..1e3:log", ["10", "31.62", "1000"]),
        ("a.b=0.0..1e3", ["0", "62.5", "1000"]),
        ("a.b=1e-4..1e-2:log", ["0.0001", "0.001", "0.01"]),
        ("a.b=2000.0..4000.0", ["2000", "3000", "4000"]),  # with four digits, all are whole
        ("a.b=10..1000:log", ["10", "1000"]),
        ("a.b=0.9..0.99999", ["0.9", "0.95", "0.99999"]),  # with four digits, the end is 1
    ],
)
def test_of_a_range_that_is_not_of_whole_numbers_one_that_is_none_is_looked_at_first(axis, shown):
    from flows.cli.axes import range_of
    from flows.cli.search import Search
    from tasks.comparison import Better

    search = Search({"a.b": range_of(axis)}, Better("m", "lower"), seed=1)
    assert search.looked_at() == [(f"a.b={number}",) for number in shown]


def test_each_key_s_values_are_looked_at_beside_the_first_ones_of_the_others():
    from flows.cli.axes import range_of
    from flows.cli.search import Search
    from tasks.comparison import Better

    search = Search({"a": ["a=3", "a=1", "a=2"], "b": range_of("b=0.0..0.6")}, Better("m", "lower"), seed=1)
    beside = [(f"a={a}", f"b={b}") for a, b in [(3, 0), (1, 0), (2, 0), (3, 0.3), (3, 0.6)]]
    assert search.looked_at() == beside  # (2, 0.6) may be wrong, and (1, 0.6) right


def searched(score, *, order: str = "lower", trials: int = 30, seed: int = 1) -> list[tuple[float, str]]:
    """What a search draws of a rate and a kind, told `score` of them: a score, and how many rules refuse."""
    from flows.cli.axes import range_of
    from flows.cli.search import Search
    from tasks.comparison import Better

    search = Search(
        {"rate": range_of("rate=1e-5..1e-1:log"), "kind": ["kind=a", "kind=b"]}, Better("m", order), seed=seed
    )
    found = []
    for _ in range(trials):
        trial, (rate, kind) = search.ask()
        found.append((float(rate.removeprefix("rate=")), kind))
        number, refusals = score(*found[-1])
        search.tell(trial, number, refusals=refusals)
    return found


def test_a_search_draws_nearer_to_the_best_that_is_not_refused():
    def away(rate, kind):
        return abs(math.log10(rate) + 2) + (kind == "kind=b")

    for order, sign in (("lower", 1), ("higher", -1)):
        late = searched(lambda *values, sign=sign: (sign * away(*values), 0), order=order)[15:]
        assert statistics.median(away(*values) for values in late) < 0.5
    late = searched(lambda rate, kind: (away(rate, kind), 2 * (rate > 1e-4)))[15:]
    assert statistics.median(rate for rate, _ in late) < 3e-4  # the best by score is at 1e-2


def test_a_search_draws_the_same_again_whatever_failed():
    def score(rate, kind):
        return (None, 0) if kind == "kind=b" else (math.nan if rate > 1e-2 else rate, 0)

    first = searched(score)
    assert first[:12] == searched(score, trials=12)
    assert first != searched(score, seed=2)
    assert all(1e-5 <= rate <= 1e-1 and float(f"{rate:.4g}") == rate for rate, _ in first)


def test_a_combination_that_is_drawn_again_is_not_run_again(folder, monkeypatch, capsys):
    from flows.cli import sweep
    from flows.cli.sweep import Result

    begun = []
    monkeypatch.setattr(sweep.servers, "prefect_api", lambda where: nullcontext(lambda: None))
    monkeypatch.setattr(sweep.tracking, "connect", lambda: None)
    monkeypatch.setattr(sweep, "attempt", lambda where, point, run: begun.append(point.values) or "")
    monkeypatch.setattr(sweep, "known", lambda c, w, m, point, **_: Result(point, "", "passed", 1.0, 0, 0))
    results = sweep.sweep(project(folder), ["train.rank=1,2"], recipe=None, overrides=[], trials=8)
    assert sorted(begun) == sorted(each.point.values for each in results) == [("train.rank=1",), ("train.rank=2",)]
    assert "run 2 of 8, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("others", "best"), [(("4", "a", "score.places=8"), "best"), (("4", "b", "score.places=8"), "")]
)
def test_the_best_is_said_of_scores_that_compare_alone(folder, capsys, others, best):
    from flows.cli import sweep
    from tasks import runs
    from tasks.comparison import better_of

    where = project(folder)
    one, two = sweep.points(where, ["train.rank=5,6"], recipe=None, overrides=[])
    results = [
        sweep.Result(one, "", "passed", 1.0, 4, 0, ("4", "a", "score.places=8")),
        sweep.Result(two, "", "passed", 2.0, 4, 0, others),
    ]
    sweep.show(results, better_of(runs.model_at(where)), "a name")
    said = capsys.readouterr().out
    assert [line.split()[6:] for line in said.splitlines() if two.snapshot.key in line] == [[best] if best else []]
    assert ("no best: " in said) == (not best)


def test_a_search_is_not_over_how_its_own_score_is_measured_nor_over_what_refuses_its_runs(own):
    text = (own / "dvc.yaml").read_text()
    dummy.write(own / "dvc.yaml", text.replace('data: "${models}/base"}', 'data: "${models}/base", params: train}'))
    dummy.commit(own)
    ruled = ["--set", "gate.rules=[{metric: score/base}]"]
    dummy.write(own / "params.yaml", dummy.PARAMS.replace("least: 1.0", "least: 1.0, rules: []"))
    dummy.commit(own)
    for axis, told in (
        ("train.rank=1..9", "score/tuned is measured"),
        ("gate.least=0.1,0.9", "the gate judges"),
        ("score.lengths=[4],[2]", "score/base is measured"),
    ):
        done = dummy.called(own, "sweep", axis, "--trials", "2", *ruled)
        assert (done.returncode, done.stdout) == (1, "")
        key = axis.partition("=")[0]
        assert done.stderr.startswith(f"error: sweep {key}: says how {told}, and a search goes by that: ")
        assert done.stderr.count("\n") == 1


def test_a_search_may_be_over_the_source_that_is_trained_on_where_another_is_held_out():
    from flows.cli.sweep import must_not_judge
    from tasks import runs

    root = Path(__file__).parent.parent
    text, model = (root / "params.yaml").read_text(), runs.model_at(project(root))
    others = "texts: {source: text, name: other, split: null, field: text, license: CC0-1.0}"
    assert "texts: null" in text
    must_not_judge(["blocks.name"], model, text.replace("texts: null", others))
    with pytest.raises(ValueError, match=r"^sweep blocks\.held_out\.texts\.name: says how held-out texts are chosen"):
        must_not_judge(["blocks.held_out.texts.name"], model, text.replace("texts: null", others))


@pytest.mark.parametrize(
    ("recipe", "key", "told"),
    [
        (None, "perplexity.seed", "perplexity/extended is measured"),
        (None, "passkey.seed", "passkey/extended is measured"),
        ("smollm2-135m-16k", "ruler.seed", "ruler/extended/short is measured"),
        ("smollm2-135m-sft", "longqa.max_new_tokens", "longqa/extended/exact is measured"),
        (None, "blocks.seed", "held-out texts are chosen"),
        (None, "blocks.held_out.share", "held-out texts are chosen"),
        (None, "blocks", "held-out texts are chosen"),
        *((None, f"blocks.{part}", "held-out texts are chosen") for part in ("source", "name", "split", "field")),
        ("smollm2-135m-sft", "pairs.casebook.kinds", "longqa/extended/exact is measured"),
        (None, "pairs.casebook", None),
        (None, "blocks.recall.count", None),
        (None, "licence.checked", "the gate judges"),
        (None, "precision.dtype", "perplexity/extended is measured"),
        (None, "ruler.seed", None),
        (None, "blocks.recall.seed", None),
        (None, "pairs.seed", None),
        (None, "fit.learning_rate", None),
    ],
)
def test_of_this_project_a_search_is_not_over_what_measures_or_judges_its_runs(recipe, key, told):
    from flows.cli.sweep import must_not_judge
    from tasks import runs
    from tasks.overlay import merged

    root = Path(__file__).parent.parent
    laid = (root / "recipes" / f"{recipe}.yaml").read_text() if recipe else None
    params = merged((root / "params.yaml").read_text(), recipe=laid)
    if told is None:
        must_not_judge([key], runs.model_at(project(root)), params)
        return
    with pytest.raises(ValueError, match=f"^sweep {key}: says how {told}, and a search goes by that: "):
        must_not_judge(["fit.steps", key], runs.model_at(project(root)), params)


@pytest.mark.usefixtures("environment")
def test_a_search_goes_on_where_it_stopped_and_beyond_and_is_of_the_files_as_they_were(own, monkeypatch, capsys):
    from flows.cli import sweep
    from flows.cli.sweep import Result

    where, keys = project(own), []
    monkeypatch.setattr(sweep.servers, "prefect_api", lambda where: nullcontext(lambda: None))
    monkeypatch.setattr(sweep.tracking, "connect", lambda: None)

    def attempt(where, point, run):
        keys.append(point.snapshot.key)
        dummy.write(own / "params.yaml", dummy.PARAMS.replace("steps: 3", f"steps: {3 + len(keys)}"))
        dummy.write(own / "recipes" / "big.yaml", "train: {seconds: 1.0}\n")
        return ""

    def result(client, where, model, point, *, failure, sweep):
        return Result(point, failure, "passed", float(point.values[0].partition("=")[2]), 4, 0)

    monkeypatch.setattr(sweep, "attempt", attempt)
    monkeypatch.setattr(sweep, "result", result)
    found, said = [], []
    for trials in (4, 7):
        dummy.git(own, "checkout", ".")
        axes = ["train.rank=2..4000", "train.seconds=1e-4..1e-2:log"]
        found.append(sweep.sweep(where, axes, recipe="big", overrides=["gate.least=3"], trials=trials))
        said.append(capsys.readouterr().out.rpartition("in MLflow")[2])
    assert found[1][:4] == found[0]
    assert len({each.point.snapshot.key for each in found[1]}) == 7
    assert keys[4:8] == keys[:4]
    assert said[0] == said[1]  # the same tag
    dummy.git(own, "checkout", ".")
    for point in (each.point for each in found[1]):
        assert point.snapshot == snapshot(where, recipe="big", overrides=["gate.least=3", *point.values])


@pytest.mark.parametrize("trials", [None, 4])
def test_what_mlflow_does_not_tell_is_a_failed_run_and_the_table_is_shown_whatever_ends_the_sweep(
    folder, monkeypatch, capsys, trials
):
    from mlflow.exceptions import MlflowException

    from flows.cli import sweep
    from flows.cli.sweep import Result

    asked, begun = [], []

    def connect():
        asked.append("at the start, and after each run")
        if len(asked) == 5:
            raise ValueError("nobody answers at http://127.0.0.1:1")

    def attempt(where, point, run):
        begun.append(point.values[0])
        return "no room" if len(begun) == 3 else ""

    def known(client, where, model, point, *, failure, sweep):
        if len(begun) == 2:
            raise [ValueError("no recorded\nverdict"), MlflowException("gone")][trials is None]
        return Result(point, failure, "" if failure else "passed", None if failure else 2.0, 4, 0)

    monkeypatch.setattr(sweep.servers, "prefect_api", lambda where: nullcontext(lambda: None))
    for name, replaced in {"attempt": attempt, "known": known}.items():
        monkeypatch.setattr(sweep, name, replaced)
    monkeypatch.setattr(sweep.tracking, "connect", connect)
    axes = ["train.rank=1..4000"] if trials else ["train.rank=4,5,6,7"]
    with pytest.raises(ValueError, match="nobody answers"):
        sweep.sweep(project(folder), axes, recipe=None, overrides=[], trials=trials)
    rows = [line.split() for line in capsys.readouterr().out.split("score/tuned")[1].splitlines()[1:5]]
    assert [row[1:] for row in rows] == [
        [begun[0].partition("=")[2], "passed", "2", "at", "4", "best"],
        [begun[1].partition("=")[2], "failed", *(["no", "recorded", "verdict"] if trials else ["gone"])],
        [begun[2].partition("=")[2], "failed", "no", "room"],
        [begun[3].partition("=")[2], "failed", "it", "was", "not", "recorded"],
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("run_flow")
def test_a_search_is_told_how_many_rules_refuse_a_run(own):
    from flows.cli import sweep

    results = sweep.sweep(project(own), ["train.rank=4..24"], recipe=None, overrides=["gate.least=4.0"], trials=3)
    rank = [int(each.point.values[0].partition("=")[2]) for each in results]
    assert [each.score for each in results] == [
        r / 4 for r in rank
    ]  # at the longer length, and twice that at the other
    assert [each.refusals for each in results] == [(r / 4 < 4) + (r / 2 < 4) for r in rank]
    assert {each.verdict for each in results} == {"refused", "passed"}


@pytest.mark.slow
def test_a_sweep_runs_all_though_one_fails_and_ends_as_one_table(folder: Path, prefect_url):
    from mlflow import MlflowClient

    env = {"PREFECT_API_URL": prefect_url}
    command = ["sweep", "train.rank=5,7", "train.fail=false,true", "--set", "gate.least=1.5"]
    done = dummy.longlora(folder, *command, env=env)
    assert done.returncode == 1
    assert done.stderr == "error: 2 of 4 runs failed; the same command again runs them again\n"
    rows = [line.split() for line in done.stdout.split("score/tuned")[1].splitlines()[1:5]]
    assert [row[1:] for row in rows[::2]] == [
        ["5", "false", "refused", "1.25", "at", "4"],
        ["7", "false", "passed", "1.75", "at", "4", "best"],
    ]
    failed = ["true", "failed", "stage", "'train':", "train.fail", "is", "set"]
    assert [row[1:] for row in rows[1::2]] == [[rank, *failed] for rank in "57"]

    uri, where = f"sqlite:///{folder}/.longlora/mlflow.db", done.stdout.rpartition("in MLflow: ")[2].strip()
    client = MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    together = client.search_runs(experiments, where)
    assert {run.data.tags["longlora.key"] for run in together} == {row[0] for row in rows}
    assert sorted(run.info.status for run in together) == ["FAILED"] * 2 + ["FINISHED"] * 2

    before = dummy.executions(folder)
    again = dummy.longlora(
        folder, "sweep", "train.rank=7,5", "--set", "gate.least=1.5", env=env
    )  # part of the other: computed already
    assert (again.returncode, again.stderr) == (0, "")
    assert dummy.executions(folder) == before
    (run,) = mlflow_runs(uri, rows[2][0])
    assert len(run.data.tags["longlora.sweeps"].split()) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("run_flow")
def test_every_run_is_of_the_files_as_they_were_when_the_sweep_began(own, mlflow_uri, monkeypatch):
    from flows.cli import sweep

    attempt, before = sweep.attempt, {}

    def edited(where, point, run):
        before[point.snapshot.key] = point.snapshot.commit
        dummy.write(own / "params.yaml", dummy.PARAMS.replace("steps: 3", f"steps: {3 + len(before)}"))
        dummy.write(own / "recipes" / "big.yaml", "train: {rank: 1}\n")
        return attempt(where, point, run)

    monkeypatch.setattr(sweep, "attempt", edited)
    results = sweep.sweep(project(own), ["gate.least=1,2"], recipe="big", overrides=[])
    assert [(each.failure, each.verdict) for each in results] == [("", "passed"), ("", "passed")]
    assert len(before) == 2
    for key, commit in before.items():
        assert dummy.git(own, "rev-parse", f"refs/longlora/runs/{key}~") == commit
        (run,) = mlflow_runs(mlflow_uri, key)
        assert (run.data.params["train.rank"], run.data.params["train.steps"]) == ("16", "3")
        assert run.data.tags["longlora.recipe"] == "big"
