"""The commands that decide which model is champion: promote, approve, rollback, history."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import Run, here

if TYPE_CHECKING:
    from tasks.workspace import Project

app = typer.Typer()
Why = Annotated[str, typer.Option("--why", help="The reason, for the record.")]


@app.command()
def promote(
    run: Run = None,
    approval: Annotated[bool, typer.Option("--approval", help="Have a person approve it.")] = False,
) -> None:
    """Register a run's model; make it champion if its verdict passes and it beats the present one."""
    promote_run(here(), run, approval=approval)


def promote_run(where: "Project", wanted: str | None, *, approval: bool = False) -> None:
    from tasks import promotion, runs, servers, tracking
    from tasks.approval import patience

    client = tracking.connect()
    run = runs.chosen(client, where, wanted)
    said = promotion.nothing_to_do(client, where, run)
    if not said:
        if patience(runs.model_at(where), runs.source_and_model(where, run)[1], asked=approval):
            servers.running_prefect(where)  # one of our own would have no page, and no address to answer at
        with servers.prefect_api(where) as ready:
            from flows.promote import promote as promote_flow

            ready()
            said = promote_flow(wanted, approval=approval)
    print(said)


@app.command()
def approve(
    run: Annotated[str, typer.Argument(help="The key or MLflow id, or their beginning, of a run that waits.")],
    why: Why,
    no: Annotated[bool, typer.Option("--no", help="Decline: it stays candidate.")] = False,
) -> None:
    """Answer a promotion that waits for a person's approval."""
    where = here()
    from tasks import servers, tracking

    os.environ["PREFECT_API_URL"] = servers.running_prefect(where)
    from flows.promote import approve as answer

    print(answer(where, tracking.connect(), run, approve=not no, why=why))


@app.command()
def rollback(
    why: Why = "",
    to: Annotated[
        str | None, typer.Option(help="An earlier champion: its version, or its run's key or the beginning of that.")
    ] = None,
) -> None:
    """Make the champion before the present one, or any earlier one, champion again."""
    where = here()
    from tasks import promotion, tracking

    promotion.rollback(tracking.connect(), where, why, to=to, done=print)


@app.command()
def history() -> None:
    """List every move of the champion: from, to, when, who, why."""
    where = here()
    from flows.cli.listing import show_history
    from tasks import registry, runs, tracking

    client, name = tracking.connect(), runs.model_at(where).name
    show_history(name, registry.moves(client, name), registry.keys(client, name))
