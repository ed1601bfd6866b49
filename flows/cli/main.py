"""The command line. Help needs nothing but typer: each command imports what it uses."""

import errno
import gc
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from typer.exceptions import TyperException

from flows.cli import model_commands, promotion_commands, run_commands
from flows.cli.options import Anyway, Beside, Overrides, Promote, Recipe, here
from tasks.errors import UserError, one_line

# full, gone, or not for us to write: no defect of ours
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM}
app = typer.Typer(
    help="Extend a language model's context with LongLoRA: run the pipeline, compare runs, promote models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    recipe: Recipe = None,
    overrides: Overrides = None,
    beside: Beside = None,
    promote: Promote = False,
    anyway: Anyway = False,
) -> None:
    """Bring every stage up to date, in a folder of its own, and record the run."""
    where = here()
    from flows.cli.terminal import show_plan, show_report
    from flows.parameters import checked_meanwhile
    from flows.run_dir import brought, is_finished, open_run_dir
    from tasks import approval, locks, servers, storage, workspace

    with ExitStack() as until_the_end:

        def prefect_api() -> Callable[[], None]:
            return until_the_end.enter_context(servers.prefect_api(where))

        # a server of our own needs some seconds: it starts while we look at the stages, if there is surely something to do,
        # and no need of a server with a page; and before anything else in a project's first run, where it makes its database
        ready = None if promote or workspace.was_used(where) else prefect_api()
        snapshot = workspace.snapshot(where, recipe=recipe, overrides=overrides, additions=brought(where, beside))
        lock = until_the_end.enter_context(ExitStack())  # the flow frees it sooner
        lock.enter_context(locks.hold(where, snapshot.key))
        if not (ready or promote or storage.noted(where, snapshot.key)):
            ready = prefect_api()
        run_dir = open_run_dir(where, snapshot)
        if promote and (model := run_dir.artifact("model")) and approval.patience(model):
            servers.running_prefect(where)  # where a person can answer: said now, not at the end
        done = is_finished(run_dir)
        if done:
            show_plan(run_dir.stages)
            print("every stage is unchanged, and the run is recorded")
        else:
            ready = ready or prefect_api()
            with checked_meanwhile(run_dir), signals_later():
                # a second's work, meanwhile; and not sooner: it reads the server's address when it is imported
                from flows.pipeline import Opened, pipeline_of
            show_plan(run_dir.stages)  # of parameters that are right
            ready()
            pipeline_of(snapshot, promote=promote, anyway=anyway, opened=Opened(run_dir, lock))
    show_report(run_dir)
    if promote and done:
        promotion_commands.promote_run(where, snapshot.key)


@app.command()
def sweep(
    axes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE...",
            help="Such as adapter.rank=8,16; with --trials also a range, such as fit.learning_rate=1e-4..1e-3:log.",
        ),
    ],
    recipe: Recipe = None,
    overrides: Overrides = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Search with at most this many runs, each chosen by the scores of those before."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default="1", help="The seed of the search.")] = None,
) -> None:
    """Run every combination of these values, or search among them, one run after the other; show the results as one table."""
    where = here()
    from flows.cli.sweep import sweep as sweep_runs

    results = sweep_runs(where, axes, recipe=recipe, overrides=overrides or [], trials=trials, seed=seed)
    failed = sum(bool(result.failure) for result in results)
    if failed:
        raise ValueError(f"{failed} of {len(results)} runs failed; the same command again runs them again")


@app.command()
def runs(every: Annotated[bool, typer.Option("--all", help="All runs, not only the newest 50.")] = False) -> None:
    """List the runs: what was set, the verdict, the score, the title."""
    where = here()
    from flows.cli.listing import show_runs
    from tasks import runs, tracking

    show_runs(tracking.connect(), where, runs.model_at(where), every=every)


@app.command()
def deploy(
    name: Annotated[str, typer.Option(help="The deployment's name.")] = "pipeline",
    cron: Annotated[
        str | None, typer.Option(help="When to run: minute hour day month weekday, such as '0 3 * * 1'.")
    ] = None,
    interval: Annotated[float | None, typer.Option(help="Seconds between two runs.")] = None,
    timezone: Annotated[str | None, typer.Option(help="The time zone of --cron.", show_default="UTC")] = None,
    watch: Annotated[
        str | None, typer.Option(help="Run only if this file or folder, which a stage must read, has changed.")
    ] = None,
    if_worse: Annotated[
        float | None,
        typer.Option(help="Train only if the champion has become worse by more than this share, such as 0.05."),
    ] = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
    beside: Beside = None,
    promote: Promote = False,
) -> None:
    """Put the pipeline on a schedule."""
    if timezone is not None and not cron:
        raise ValueError(f"--timezone {timezone}: is of --cron, which is not given")
    where = here()
    from flows.deploy import deploy as deploy_pipeline

    print(
        deploy_pipeline(
            where,
            name=name,
            cron=cron,
            interval=interval,
            timezone=timezone or "UTC",
            recipe=recipe,
            overrides=overrides or [],
            promote=promote,
            watch=watch,
            if_worse=if_worse,
            beside=beside,
        )
    )


@app.command()
def up(
    host: Annotated[
        str,
        typer.Option(
            help="Address where the servers listen; beyond this machine only with credentials: docs/schedule.md."
        ),
    ] = "127.0.0.1",
    prefect_port: Annotated[int | None, typer.Option(help="The port of Prefect's page.", show_default="4200")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="The port of MLflow's page.", show_default="5000")] = None,
) -> None:
    """Run Prefect's server, a worker, and MLflow's server, until interrupted."""
    where = here()
    from tasks.listening import Host
    from tasks.up import Up
    from tasks.up import up as bring_up

    def ready(at: Host, ours: list[Up]) -> None:
        for each in ours:
            print(f"{each.server.name}: {each.page}")
        if at.wide:
            print("by plain HTTP: whoever can listen to the network reads the passwords (docs/schedule.md: TLS)")
        print("a worker runs what is scheduled; Ctrl-C ends all of it")

    bring_up(where, host=host, prefect_port=prefect_port, mlflow_port=mlflow_port, ready=ready)


app.add_typer(promotion_commands.app)
app.add_typer(run_commands.app)
app.add_typer(model_commands.app)
app.command("ui", help="The same as `up`.")(up)


@app.command()
def worker() -> None:
    """Run a worker that starts scheduled runs on this machine, for a Prefect server that is up."""
    where = here()
    from tasks import servers
    from tasks.up import worker_command

    os.environ["PREFECT_API_URL"] = servers.running_prefect(where)
    servers.must_be_reachable("MLFLOW_TRACKING_URI")  # said now, not at night
    os.execv(sys.executable, worker_command())


@app.command()
def doctor() -> None:
    """Show what this machine has and lacks. Ends with status 1 if something is lacking."""
    where = here()
    from flows.cli.doctor import examine, show

    findings = list(examine(where))
    show(findings)
    if any(finding.state == "lacks" for finding in findings):
        raise SystemExit(1)


@contextmanager
def plain_errors() -> Generator[None]:
    """A mistake or a failed stage ends in one line; a defect of ours keeps its traceback."""
    try:
        yield
    except (ValueError, UserError) as error:
        raise SystemExit(f"error: {error}") from None
    except TyperException as error:
        said = " ".join(error.format_message().split()).rstrip(".")  # '' where help was printed for want of a word
        ctx = getattr(error, "ctx", None)
        asked = f"`{ctx.command_path} --help` says what there is" if ctx else "see `longlora --help`"
        if said:
            print(f"error: {said}: {asked}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise SystemExit(f"error: {error}: the same command goes on from here when that is mended") from None
    except Exception as error:
        # by name, not imported: what a command did not need must not be loaded to say that it failed
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "CancelledRun" in kinds:
            print("error: cancelled in Prefect; the same command goes on where it stopped", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM) from None
        names = {
            "MlflowException": "MLflow",
            "DvcException": "DVC",
            "PrefectHTTPStatusError": "Prefect",
            "GitError": "git",  # as DVC reads commits, by a library that knows fewer of the user's settings
        }
        theirs = [name for kind, name in names.items() if kind in kinds]
        if not theirs:
            raise
        raise SystemExit(f"error: {theirs[0]}: {one_line(error)}") from None


def must_be_somewhere() -> None:
    """Raises ValueError: the current folder was deleted, as that of a run may be by `longlora gc`."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ValueError("the current folder is gone: change to one that is there") from None


@contextmanager
def signals_later() -> Generator[None]:
    """While Prefect is imported, Ctrl-C and SIGTERM wait: it would swallow the exception that they raise, and print a traceback."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def main() -> None:
    """The `longlora` command."""

    told = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = number
        supervise = sys.modules.get("tasks.supervise")  # what a command did not need must not be loaded now
        if supervise:
            supervise.interrupt()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        with plain_errors():
            must_be_somewhere()
            status = app(standalone_mode=False)  # an int if it ended early: --help, Ctrl-C
    except BaseException:
        if told:  # whatever became of the exception on its way
            raise SystemExit(128 + told) from None
        raise
    finally:
        gc.freeze()  # or the interpreter's end looks through all that was imported for what could be freed: a second or more
    raise SystemExit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
