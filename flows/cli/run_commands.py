"""The commands about runs that are recorded: compare, reproduce, export, gc."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import Dtype, Run, here

app = typer.Typer()


@app.command()
def compare(
    one: Annotated[
        str, typer.Argument(help="A run's key or MLflow id, or their beginning; or champion, staging, candidate.")
    ],
    other: Annotated[str, typer.Argument(help="Another run, in the same way.")],
    html: Annotated[Path | None, typer.Option(help="Write it as a page too, with the curves drawn.")] = None,
) -> None:
    """Show two runs side by side: parameters and data that differ, metrics by length."""
    where = here()
    from flows.cli.compare import compare as compare_runs

    compare_runs(where, one, other, html=html)


@app.command()
def reproduce(
    run: Run = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="Compute every stage again, and compare.")] = False,
    remote: Annotated[
        str | None, typer.Option(help="Address of a DVC remote that has its data, if this clone's does not.")
    ] = None,
) -> None:
    """Bring a recorded run back, here or on another clone, and show hash by hash that it is the same."""
    where = here()
    from flows.cli.reproduce import reproduce as reproduce_run

    reproduce_run(where, run, remote=remote, rerun=rerun)


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="A new or empty folder; with --gguf, a new file.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="champion, staging, candidate, or a run; with --gguf, also a model's folder."
        ),
    ] = "champion",
    gguf: Annotated[bool, typer.Option("--gguf", help="One GGUF file, for llama.cpp; Llama models only.")] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="The type of a GGUF file's matrices; default: as they are stored.")
    ] = None,
    hub: Annotated[
        str | None, typer.Option(help="Also upload it to OWNER/NAME on the Hugging Face hub; private if it is new.")
    ] = None,
) -> None:
    """Write a model, checked by hash: a plain folder of merged safetensors and card, or one GGUF file."""
    from flows.cli.export import export as export_model

    print(export_model(target, model=model, gguf=gguf, dtype=dtype, hub=hub))


@app.command()
def gc(
    keep: Annotated[int, typer.Option(help="How many of the newest runs stay.")] = 5,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints", help="Also list checkpoints of unfinished trainings, which would then start over."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
) -> None:
    """List what may be deleted, with sizes: old runs' folders, and cached data that no kept run, branch, tag or checkout needs."""
    where = here()
    from flows.cli import listing
    from tasks import leftovers, locks, registry, storage, tracking

    with locks.hold(where, "gc"):
        versions = storage.ours(where, registry.commits(tracking.connect()))
        found = leftovers.leftovers(where, keep=keep, versions=versions, checkpoints=checkpoints)
        listing.show_leftovers(found, where)
        if yes:
            leftovers.remove(where, found)
        for path in leftovers.being_read(where):
            print(f"left, for a process reads from it: {listing.shown(path, where)}")
        if not checkpoints and (kept := sum(each.size for each in leftovers.cut_off(where))):
            print(
                f"left, for trainings that did not end go on from there: {kept / 1e6:,.3f} MB of checkpoints (--checkpoints)"
            )
        if cache := leftovers.shared_cache(where):
            print(f"left, for other projects may share it: {cache} (DVC's cache.dir, outside of this project)")
    if found:
        said = f"--keep {keep}{' --checkpoints' if checkpoints else ''} --yes"
        print("deleted" if yes else f"nothing was deleted: `longlora gc {said}` deletes it")
