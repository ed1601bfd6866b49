"""A model for others: its record as a plain folder, or one GGUF file made from that."""

import tempfile
from pathlib import Path

from flows.cli.options import Dtype, here


def export(target: Path, *, model: str, gguf: bool, dtype: Dtype | None, hub: str | None = None) -> str:
    """Write `model` to `target`, and upload that to repository `hub`. Returns what was done.

    Raises:
        ValueError: a dtype without `gguf`, `target` is taken, there is no such model, its data is damaged, or llama.cpp would read
            the model otherwise than transformers; the hub does not take it.
    """
    if dtype is not None and not gguf:
        raise ValueError("--dtype is of a GGUF file: say --gguf too; a folder holds the weights as they were recorded")
    if hub:
        from tasks.hub import must_be_open

        must_be_open(hub)
    said = as_gguf(target, model=model, dtype=dtype) if gguf else recorded(target, model=model)
    if not hub:
        return said
    from tasks.hub import upload

    try:
        return f"{said}\n{upload(hub, target)} has it"
    except ValueError as error:
        raise ValueError(f"{error}. {target} is written: `hf upload {hub} {target}` uploads it") from None


def recorded(target: Path, *, model: str) -> str:
    """The model's folder, checked by hash."""
    where = here()
    from tasks import tracking

    client = tracking.connect()  # MLflow is imported before its artifact repository of ours
    from tasks.export import export as export_model

    return export_model(client, where, target, model=model)


def as_gguf(target: Path, *, model: str, dtype: Dtype | None) -> str:
    """The GGUF file of a model's folder, or of one that is brought beside it for as long."""
    place = target.absolute().parent
    if target.exists():
        raise ValueError(f"{target} is there already: a GGUF file is written to a new name")
    if not place.is_dir():
        raise ValueError(f"there is no folder {place} to write {target.name} to")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=place) as scratch:
        folder, said = Path(model), model
        if not folder.is_dir():
            folder = Path(scratch) / "model"
            recorded(folder, model=model)
            said = f"{model}, equal to its record by hash"
        from longlora.model.gguf import changes_at, write  # seconds of imports, which a wrong name need not wait for

        write(folder, out=target, dtype=dtype)
        window = changes_at(folder)
    made = f"{target}: {target.stat().st_size / 1e6:,.1f} MB, made from {said}"
    if window is None:
        return made
    return f"{made}. Opened with a context of more than {window:,} tokens, llama.cpp turns short texts as long ones"
