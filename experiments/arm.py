"""One arm of a table: trained by the pipeline's own code, merged, and measured as any run is measured."""

import csv
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments import patterns
from longlora.adapter import Adapter
from longlora.attention import Attention
from longlora.blocks import documents
from longlora.fit import Fit, train
from longlora.merge import merge
from longlora.passkey import Passkey
from longlora.passkey import measure as find_keys
from longlora.perplexity import Perplexity
from longlora.perplexity import measure as read_on
from longlora.plain import open_model, open_tokenizer
from longlora.position import Position
from longlora.section import read_params, section_of


def settings_of(folder: Path, study: str, name: str) -> dict[str, Any]:
    """The demo's params.yaml, under what `study` says for all its arms, under what its arm `name` says.

    Args:
        folder: of the project; its experiments/arms.yaml holds the arms.
    """
    arms = read_params(folder / "experiments" / "arms.yaml")[study]
    merged = OmegaConf.merge(read_params(folder / "params.yaml"), arms["common"], arms["arms"][name])
    return {str(key): value for key, value in dict(OmegaConf.to_container(merged)).items()}  # type: ignore[call-overload]


def trained(settings: dict[str, Any], *, seed: int, tokens: Path, base: Path, out: Path) -> dict[str, float]:
    """Write the adapter (or the model) `out`; returns the last training loss and the processor's seconds per step."""
    fit = section_of(Fit, settings, "fit").model_copy(update={"seed": seed})
    history = out.with_name("history.csv")
    began = time.process_time()
    with patterns.in_place_of_s2(settings["pattern"]) if settings.get("pattern") else nullcontext():
        train(
            tokens,
            base=base,
            out=out,
            history=history,
            cost=out.with_name("cost.json"),
            position=section_of(Position, settings, "position"),
            attention=section_of(Attention, settings, "attention"),
            adapter=section_of(Adapter, settings, "adapter"),
            settings=fit,
        )
    seconds = (time.process_time() - began) / fit.steps
    with history.open() as file:
        loss = float(list(csv.DictReader(file))[-1]["loss"])
    return {"loss": round(loss, 6), "seconds_per_step": round(seconds, 3)}


def main(study: str, name: str, seed: int, tokens: Path, heldout: Path, base: Path, scores: Path) -> None:
    settings = settings_of(Path.cwd(), study, name)
    with tempfile.TemporaryDirectory() as folder:
        adapter, merged = Path(folder, "adapter"), Path(folder, "merged")
        os.environ["LONGLORA_CHECKPOINTS"] = folder  # two patterns would share a checkpoint else: no section names them
        cost = trained(settings, seed=seed, tokens=tokens, base=base, out=adapter)
        merge(base, adapter, out=merged)
        model = open_model(merged)
        read = read_on(
            model,
            label=name,
            documents=documents(heldout),
            settings=section_of(Perplexity, settings, "perplexity"),
            parts=Path(folder, "parts.csv"),
        )
        found = find_keys(
            model,
            label=name,
            tokenizer=open_tokenizer(merged),
            settings=section_of(Passkey, settings, "passkey"),
        )
    by_length = {length: score["value"] for length, score in read["perplexity"][name].items() if length.isdecimal()}
    keys = {length: score["value"] for length, score in found["passkey"][name].items() if length.isdecimal()}
    scores.parent.mkdir(parents=True, exist_ok=True)
    result = {"arm": name, "seed": seed, "perplexity": by_length, "passkey": keys, **cost}
    scores.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), *map(Path, sys.argv[4:]))  # type: ignore[call-arg]
