"""One arm of a table: trained by the pipeline's own code, merged, and measured as any run is measured."""

import csv
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import OmegaConf

from experiments import answers, patterns
from longlora.attention.shifted import Attention, group_size
from longlora.data.tokens import documents
from longlora.evaluation.passkey import Passkey
from longlora.evaluation.passkey import measure as find_keys
from longlora.evaluation.perplexity import Perplexity
from longlora.evaluation.perplexity import measure as read_on
from longlora.model.adapter import Adapter
from longlora.model.load import Precision, open_model, open_tokenizer
from longlora.model.merge import merge
from longlora.model.position import Position
from longlora.model.rescale import rescale
from longlora.section import read_params, section_of
from longlora.training.fit import Fit, train


def settings_of(folder: Path, study: str, name: str | None = None) -> dict[str, Any]:
    """The demo's params.yaml, under what `study` says for all its arms, under what its arm `name` says, if one is named.

    Args:
        folder: of the project; its experiments/arms.yaml holds the arms.
    """
    arms = read_params(folder / "experiments" / "arms.yaml")[study]
    own = arms["arms"][name] if name else {}
    merged = OmegaConf.merge(read_params(folder / "params.yaml"), arms["common"], own)
    return {str(key): value for key, value in dict(OmegaConf.to_container(merged)).items()}  # type: ignore[call-overload]


def trained(settings: dict[str, Any], *, seed: int, tokens: Path, base: Path, out: Path) -> dict[str, float]:
    """Write the adapter (or the model) `out`; returns the loss (last quarter of the steps) and the processor's seconds a step."""
    fit = section_of(Fit, settings, "fit").model_copy(update={"seed": seed})
    history = out.with_name("history.csv")
    began = time.process_time()
    with patterns.in_place_of_s2(settings["pattern"]) if settings.get("pattern") else nullcontext():
        train(
            tokens,
            base=base,
            adapter_folder=out,
            history=history,
            cost=out.with_name("cost.json"),
            position=section_of(Position, settings, "position"),
            attention=section_of(Attention, settings, "attention"),
            adapter=section_of(Adapter, settings, "adapter"),
            settings=fit,
        )
    seconds = (time.process_time() - began) / fit.steps
    with history.open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return {"loss": round(mean(losses[-(-3 * len(losses) // 4) :]), 6), "seconds_per_step": round(seconds, 3)}


def main(study: str, name: str, seed: int, data: Path, base: Path, scores: Path) -> None:
    tokens, heldout = data / "tokens", data / "heldout.safetensors"
    settings = settings_of(Path.cwd(), study, name)
    with tempfile.TemporaryDirectory() as folder:
        adapter, merged = Path(folder, "adapter"), Path(folder, "merged")
        os.environ["LONGLORA_CHECKPOINTS"] = folder  # two patterns would share a checkpoint else: no section names them
        position = section_of(Position, settings, "position")
        if settings.get("untrained"):
            cost = {}
            rescale(base, method=position.method, context=position.context, out=merged)
        else:
            cost = trained(settings, seed=seed, tokens=tokens, base=base, out=adapter)
            merge(base, adapter, out=merged)
        model = open_model(merged, section_of(Precision, settings, "precision"))
        tokenizer, texts = open_tokenizer(merged), documents(heldout)
        read = read_on(
            model,
            label=name,
            documents=texts,
            settings=section_of(Perplexity, settings, "perplexity"),
            parts=Path(folder, "parts.csv"),
        )
        found = find_keys(
            model,
            label=name,
            tokenizer=tokenizer,
            settings=section_of(Passkey, settings, "passkey"),
        )
        answered = answers.measure(
            model,
            tokenizer=tokenizer,
            texts=[tokenizer.decode(text) for text in texts],
            length=position.context,
            group=group_size(
                position.context, 0.25
            ),  # of the arms' S2-Attn, so that all arms are asked for the same distances
            count=settings["answers"]["exercises"],
            seed=settings["answers"]["seed"],
        )
    by_length = {length: score["value"] for length, score in read["perplexity"][name].items() if length.isdecimal()}
    keys = {length: score["value"] for length, score in found["passkey"][name].items() if length.isdecimal()}
    scores.parent.mkdir(parents=True, exist_ok=True)
    result = {"arm": name, "seed": seed, "perplexity": by_length, "passkey": keys, "answers": answered, **cost}
    scores.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), *map(Path, sys.argv[4:]))  # type: ignore[call-arg]
