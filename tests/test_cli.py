"""The command line: fast help, one-line errors."""

import errno
import json
import re
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import dummy
import pytest
import typer

from flows.cli.ask import model_folder
from flows.cli.main import app, plain_errors, signals_later
from tasks.workspace import project

HEAVY = {"torch", "transformers", "prefect", "mlflow", "dvc", "pandas", "numpy", "omegaconf"}


def test_help_loads_nothing_heavy_and_is_quick():
    code = (
        "import sys; sys.argv = ['longlora', '--help']\n"
        "from flows.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split("LOADED")[1].split())
    assert not loaded & HEAVY
    for word in (
        "run",
        "sweep",
        "promote",
        "approve",
        "rollback",
        "history",
        "runs",
        "compare",
        "reproduce",
        "plan",
        "eval",
        "ask",
        "chat",
        "page",
        "serve",
        "longqa",
        "export",
        "gc",
        "deploy",
        "up",
        "ui",
        "worker",
        "doctor",
    ):
        assert f" {word} " in done.stdout


def commands(at, *path: str) -> list[tuple[str, ...]]:
    """The words of every command and group below `at`."""
    below = getattr(at, "commands", {}).items()
    return [path, *(words for name, each in below for words in commands(each, *path, name))]


@pytest.mark.parametrize("words", commands(typer.main.get_command(app)), ids=" ".join)
def test_every_command_has_help(words, capsys):
    assert app([*words, "--help"], standalone_mode=False) == 0
    assert capsys.readouterr().out.split()[0] == "Usage:"


def test_the_plan_is_json_for_programs():
    here = Path(__file__).parent.parent
    done = dummy.called(here, "plan", "--recipe", "llama2-7b-8k", "--gpus", "8", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    flops = found["flops_forward"]
    assert flops["total"] == pytest.approx(flops["attention"] + flops["projections"] + flops["ffn"] + flops["other"])
    assert flops["total"] == pytest.approx(117.1e12, rel=0.005)  # Table 11, S2-Attn at 8,192 tokens
    assert found["fits"] is True and found["hours"] > 0 and found["gb_per_gpu"] > 0


def test_the_plan_lays_checkpoints_off_to_the_host_where_params_do():
    long = ["plan", "--recipe=llama2-7b-32k", "--set=position.context=204800", "--set=fit.mlp_tile=8192", "--json"]
    root = Path(__file__).parent.parent
    away, here = (
        json.loads(dummy.called(root, *long, f"--set=fit.activation_offloading={said}").stdout)
        for said in ("true", "false")
    )
    assert here["remedy"]["changes"] == ["fit.activation_offloading=true"]
    assert away["gb_per_gpu"] == pytest.approx(here["remedy"]["gb_per_gpu"])
    assert away["fits"] and away["gb_on_host"] > here["gb_on_host"]


def test_the_plan_tells_our_program_from_the_papers():
    """Table 12: full fine-tuning of 7B at 8,192 tokens, 46.3 GB. DeepSpeed kept the paper's weights in 16 bit."""
    whole = ["adapter.method=full", "attention.pattern=full", "fit.loss_chunk=8192"]
    asked = ["plan", "--recipe", "llama2-7b-8k", *(f"--set={each}" for each in whole), "--gpus=8", "--zero=2", "--json"]
    here = Path(__file__).parent.parent
    ours, papers = (
        json.loads(dummy.called(here, *asked, *more).stdout)["gb_per_gpu"] for more in ([], ["--half-weights"])
    )
    assert papers == pytest.approx(46.3, rel=0.15)
    assert ours > papers + 12.5  # GB that the weights' other two bytes alone take


@pytest.fixture(scope="module")
def no_runs(tmp_path_factory) -> str:
    """A database of MLflow's in which no test has left a run; each project would take four seconds to make its own."""
    return dummy.mlflow_database(tmp_path_factory.mktemp("mlflow"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--recipe", "bgi"], "error: no recipe 'bgi'; did you mean 'big'?"),
        (["run", "--set", "train.rnk=3"], "error: unknown key 'train.rnk'; did you mean 'rank'?"),
        (["run", "--set", "train.rank=many"], "error: train.rank = 'many': must be a number, as in train.rank = 8"),
        (["run", "--set", "train.rank"], "error: --set 'train.rank': must be key=value, such as fit.steps=200"),
        (
            ["run", "--set", "train.rank=$(touch pwned)"],
            "error: train.rank = '$(touch pwned)': must be a number, as in train.rank = 8",
        ),
        (["eval", "models/base"], "error: nothing to measure: name --lm-eval TASKS, or --cases FILE"),
        (["eval", "nowhere", "--lm-eval", "scrolls"], "error: no model at nowhere (no config.json there"),
        (["plan", "--gpu", "a100"], "error: unknown GPU 'a100'"),
        (["up", "--prefect-port", "99999"], "error: --prefect-port 99999: must be 1 to 65535"),
        (
            ["deploy", "--timezone", "Europe/Berlin"],
            "error: --timezone Europe/Berlin: is of --cron, which is not given",
        ),
        (["gc", "--keep", "-1"], "error: --keep -1: must be 0 or more"),
        (["compare", "zz", "yy"], "error: no run 'zz': `longlora runs` lists them"),
        (["reproduce", "../x"], "error: run '../x': must be 4 to 12 digits of its key"),
        (["export", "dummy"], "error: dummy is not empty: a model is exported to a new or empty folder"),
        (
            ["deploy", "--cron", "0 3 * * *"],
            "error: no Prefect server is up: start one with `longlora up`, or set PREFECT_API_URL",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_1(folder, no_runs, arguments, said):
    done = dummy.called(folder, *arguments, env={"MLFLOW_TRACKING_URI": no_runs})
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert not (folder / "pwned").exists()
    assert dummy.git(folder, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["promote", "zz"], "error: no run 'zz': `longlora runs` lists them"),
        (["plan"], "error: params: backbone lacks 'source'"),
        (["approve", "zz", "--why", "yes"], "error: no Prefect server is up: start one with `longlora up`, or set "),
        (["export", "new"], "error: dummy has no champion yet: `longlora promote`, or name a run with --model"),
    ],
)
def test_a_mistake_is_one_line_of_the_program_too_which_imports_all_and_makes_its_database(folder, arguments, said):
    """Neither a warning nor a line of a logger that was made before stderr was ours is beside it."""
    done = dummy.longlora(folder, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith(said)
    assert dummy.git(folder, "status", "--porcelain") == ""


def test_a_warning_is_seen_beside_what_a_command_says_in_the_tests_own_process(folder, no_runs, monkeypatch):
    monkeypatch.setattr("flows.cli.listing.show_runs", lambda *_, **__: warnings.warn("a library speaks", stacklevel=1))
    done = dummy.called(folder, "runs", env={"MLFLOW_TRACKING_URI": no_runs})
    assert "UserWarning: a library speaks" in done.stderr


EDITED = """
import sys
from contextlib import nullcontext
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import dummy
import flows.pipeline
from flows.cli.main import run
from tasks import servers
from tasks.locks import is_held
from tasks.workspace import project, snapshot

where = project(Path("."))
print("at first", snapshot(where).key)

def edit():
    dummy.write(where.root / "recipes" / "new.yaml", "train: {{rank: 3}}")
    print("then", snapshot(where).key)

def ran(state, *, opened, **words):
    print("ran", state.key, opened.run_dir.snapshot == state and is_held(where, state.key))

flows.pipeline.pipeline_of = ran
servers.prefect_api = lambda where: nullcontext(edit)
run()
"""


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a process that was started in the background of a shell has not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_until_what_would_swallow_it_is_imported():
    seen = []
    with pytest.raises(KeyboardInterrupt):
        with signals_later():
            try:
                signal.raise_signal(signal.SIGINT)
                seen.append("imported")
            except KeyboardInterrupt:
                seen.append("swallowed")
        seen.append("went on")
    assert seen == ["imported"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_wrong_parameters_are_all_that_a_run_says(tmp_path):
    """No list of stages above the line, which would be taken for a run that began."""
    root = Path(__file__).parents[1]
    dummy.git(tmp_path, "clone", "--quiet", str(root), "own")
    done = dummy.longlora(tmp_path / "own", "run", "--set", "perplexity.last=4096")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: params: perplexity") and done.stderr.count("\n") == 1


def test_what_is_shown_is_what_runs_whatever_is_edited_while_prefect_starts(folder):
    tests = Path(__file__).parent
    script = EDITED.format(tests=str(tests), root=str(tests.parent))
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, then, ran = (re.search(rf"^{word} (.+)$", done.stdout, re.M)[1] for word in ("at first", "then", "ran"))
    assert f"{first} True" == ran
    assert first != then
    assert f"run {first} in " in done.stdout


@pytest.mark.parametrize("variable", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_a_server_that_is_not_there_is_said_before_anything_runs(folder, variable, prefect_url):
    address = {"PREFECT_API_URL": prefect_url, variable: "http://ada:secret@127.0.0.1:1/api"}
    done = dummy.longlora(folder, "run", env=address)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: nobody answers at http://127.0.0.1:1 ([Errno 111] Connection refused): start it, or change {variable}\n"
    )
    assert dummy.executions(folder) == []


def test_outside_a_project_it_says_what_is_missing(tmp_path):
    done = dummy.longlora(tmp_path, "run")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is not in a git repository" in done.stderr


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (".", "is a folder, and must be a file"),
        ("file/scores.json", "{here}/file is a file, and must be a folder"),
    ],
)
def test_a_result_that_can_not_be_written_is_said_before_the_work(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    said = re.escape(f" {path}: {said.format(here=tmp_path)}")
    for words in (
        ["eval", "nowhere", "--lm-eval", "x", "--out", path],
        ["longqa", "build", "nowhere", path],
        ["longqa", "write", "nowhere", path, "--url", "http://127.0.0.1:1", "--model", "m"],
    ):
        with pytest.raises(ValueError, match=f"^(--out|OUT){said}$"):
            app(words, standalone_mode=False)


@pytest.mark.parametrize("command", [["build"], ["write", "--url", "http://127.0.0.1:1", "--model", "m"]])
def test_questions_are_not_written_over_a_document(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(text := "The lighthouse of the old harbour is 31 metres high, and white.\n" * 20)
    with pytest.raises(ValueError, match=r"^OUT a.txt: is named as a document, and questions are JSON lines: a.jsonl$"):
        app(["longqa", *command, "a.txt", "a.txt"], standalone_mode=False)
    assert (tmp_path / "a.txt").read_text() == text and list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "m", "--lm-eval", "a, ", "--out", "new"], "--lm-eval 'a, ': a name is empty"),
        (["eval", "m", "--cases", "c.jsonl", "--limit", "3"], "--limit 3: is of --lm-eval, which names no task"),
        (["eval", "m", "--cases", "c.jsonl", "--tasks", "own"], "--tasks own: is of --lm-eval, which names no task"),
        (["plan", "--half-weights"], "--half-weights: it is under ZeRO"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(words, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        app(words, standalone_mode=False)


@pytest.mark.parametrize(
    ("closed", "words", "status", "said"),
    [
        ("<&-", ["ask", "--model", str(Path(__file__).parent.parent / "tiny/model"), "--document", "a.txt"], 0, ""),
        (">&-", ["longqa", "build", "nowhere", "qa.jsonl"], 1, "error: no file, folder or installed package 'nowhere'"),
        ("2>&-", ["longqa", "build", "nowhere", "qa.jsonl"], 1, ""),
    ],
)
def test_a_stream_that_the_caller_closed_is_as_the_null_device(tmp_path, closed, words, status, said):
    (tmp_path / "a.txt").write_text("The lighthouse is white.")
    program = Path(sys.executable).with_name("longlora")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", program, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == status and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_file_does_not_take_the_number_of_a_stream_that_is_closed(tmp_path):
    """It would be written to as if it were the terminal."""
    code = "from flows.cli.start import open_closed; open_closed(); print(open('new', 'w').fileno() > 2)"
    command = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.stdout == b"True\n"


def test_without_git_or_a_folder_to_be_in_it_says_so(tmp_path):
    (bare := tmp_path / "bin").mkdir()
    done = dummy.longlora(tmp_path, "runs", env={"PATH": str(bare)})
    assert done.stderr.startswith("error: there is no program `git` on the PATH") and done.stderr.count("\n") == 1
    program = Path(sys.executable).with_name("longlora")
    gone = ["sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh", program, "runs"]
    done = subprocess.run(gone, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: the current folder is gone: change to one that is there\n")


def test_a_model_that_is_no_folder_is_named_also_outside_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="^no folder 'modle' in .*, and no runs to look it up in: .* not in a git repository"
    ):
        model_folder("modle")


def test_what_the_user_can_act_on_is_one_line_and_a_defect_keeps_its_traceback():
    from tasks.promotion import RefusalError
    from tasks.stage_process import InterruptedStageError, StageError

    for kind in (ValueError, StageError, InterruptedStageError, RefusalError):
        with pytest.raises(SystemExit, match="^error: said$"), plain_errors():
            raise kind("said")
    with pytest.raises(RuntimeError, match="^said$"), plain_errors():
        raise RuntimeError("said")


def test_what_mlflow_prefect_git_and_dvc_refuse_is_one_line_that_names_them(folder):
    import httpx
    from mlflow.exceptions import MlflowException
    from prefect.exceptions import PrefectHTTPStatusError
    from pygit2 import GitError

    from tasks.runs import model_at

    with pytest.raises(SystemExit, match=r"^error: MLflow: the database is \(its schema\) old$"), plain_errors():
        raise MlflowException("the database is\n  (its schema) old")
    asked = httpx.Request("POST", "http://127.0.0.1:4200/api/flow_runs")
    with pytest.raises(SystemExit, match=r"^error: Prefect: 500, the disk is full$"), plain_errors():
        raise PrefectHTTPStatusError("500,\n the disk is full", request=asked, response=httpx.Response(500))
    with pytest.raises(SystemExit, match="^error: git: the repository is not owned by you$"), plain_errors():
        raise GitError("the repository is not owned by you")
    dvc = folder / "dvc.yaml"
    dvc.write_text(dvc.read_text().replace("desc: Judge it.", "desk: Judge it."))
    dummy.commit(folder)
    wrong = "validation failed in revision '.*': stages.gate.desk: extra keys not allowed$"
    with pytest.raises(SystemExit, match=f"^error: DVC: './dvc.yaml' {wrong}"), plain_errors():
        model_at(project(folder), "HEAD")


def test_names_with_shell_characters_stay_names(folder):
    (folder / "recipes" / "x; touch pwned.yaml").write_text("train: {rank: 3}\n")
    dummy.commit(folder)
    (folder / ".longlora" / "worktrees").mkdir(parents=True)  # in a first run the server comes before the recipe
    done = dummy.longlora(folder, "run", "--recipe", "x; touch pwned", env={"PREFECT_API_URL": "http://127.0.0.1:1"})
    assert "nobody answers" in done.stderr  # it came as far as the server, with the recipe read
    assert not (folder / "pwned").exists()


def test_doctor_names_what_is_there_and_what_is_not(folder):
    done = dummy.longlora(folder, "doctor")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stdout
    for what in ("python ok", "torch ok", "sqlalchemy ok", "dvc:// for MLflow ok", "DVC remote ok", "GPUs"):
        assert what in said
    (folder / ".dvc" / "config").write_text("")
    done = dummy.called(folder, "doctor")
    assert done.returncode == 1
    assert "DVC remote lacks none" in " ".join(done.stdout.split())


def test_doctor_shows_addresses_without_their_credentials(folder, monkeypatch):
    from flows.cli import doctor

    (folder / ".dvc" / "config.local").write_text(
        "['remote \"local\"']\n    url = https://ada:SECRET@dvc.example/runs\n"
    )
    monkeypatch.setenv("LONGLORA_GIT_REMOTE", "https://ada:SECRET@git.example/runs.git")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite://")
    monkeypatch.setattr(doctor, "found_prefect", lambda where: "http://ada:SECRET@127.0.0.1:4200/api")
    where = project(folder)
    said = {each.what: each.said for each in (*doctor.repository(where), *doctor.servers(where))}
    assert said["DVC remote"] == "https://dvc.example/runs"
    assert said["runs pushed to"] == "https://git.example/runs.git"
    assert said["Prefect"] == "http://127.0.0.1:4200/api"
    assert "SECRET" not in str(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gc", "--keep", "many"], "error: Invalid value for '--keep': "),
        (["eval", "models", "--lm-eval", "x", "--limit", "-4"], "error: Invalid value for '--limit': "),
        (
            ["longqa", "write", "docs", "qa.jsonl", "--url", "http://127.0.0.1:9", "--model", "m", "--budget", "-1"],
            "error: Invalid value for '--budget': ",
        ),
        (["rnu"], "error: No such command 'rnu'"),
        (["run", "--recipee", "big"], "error: No such option: --recipee"),
        (["compare", "one"], "error: Missing argument 'other': `longlora compare --help` says what there is"),
    ],
)
def test_a_wrong_word_is_one_line_and_status_2(folder, arguments, said):
    done = dummy.longlora(folder, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(said)


def test_a_run_names_its_page_and_not_each_picture_in_it(tmp_path, capsys):
    from types import SimpleNamespace

    from flows.cli.terminal import show_report

    files = [tmp_path / name for name in ("a.png", "index.html")]
    for shown, hidden in ((files, "a.png"), (files[:1], "index.html")):
        found = SimpleNamespace(
            summary=str, report=lambda shown=shown: shown, snapshot=SimpleNamespace(key="k"), folder="x"
        )
        show_report(found)
        said = capsys.readouterr().out
        assert hidden not in said and str(shown[-1]) in said


def test_a_disk_that_is_full_or_gone_or_not_ours_is_one_line_and_another_trouble_with_files_keeps_its_traceback():
    said = "^error: .*No space left on device: 'weights': the same command goes on"
    with pytest.raises(SystemExit, match=said), plain_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "weights")
    with pytest.raises(SystemExit, match="^error: .*Permission denied: '/checkout/.longlora': "), plain_errors():
        raise PermissionError(errno.EACCES, "Permission denied", "/checkout/.longlora")
    with pytest.raises(FileNotFoundError), plain_errors():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "weights")


AT_AN_IMPORT = """
import os, signal, sys

class CtrlC:
    def find_spec(name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC)
sys.argv = ["longlora", "runs"]
from {script} import main
main()
"""


@pytest.mark.parametrize("module", ["flows.cli.main", "typer", "rich", "tasks.errors", "tasks.workspace", "mlflow"])
def test_ctrl_c_while_modules_are_imported_ends_in_silence(folder, module):
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    script = settings["project"]["scripts"]["longlora"].removesuffix(":main")
    code = AT_AN_IMPORT.format(module=module, script=script)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
