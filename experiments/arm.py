"""One arm of a table: train as it says, merge, measure as any run is measured."""

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PrinterCallback, set_seed

from experiments import patterns
from longlora.adapter import Adapter, save
from longlora.attention import Attention, enable
from longlora.blocks import PackedBlocks, documents
from longlora.fit import Fit, arguments, build, causal_model, optimizer
from longlora.loss import chunk_loss
from longlora.merge import merge
from longlora.perplexity import Perplexity, measure
from longlora.plain import open_model
from longlora.position import Position
from longlora.ranks import Ranks
from longlora.section import read_params, section_of
from longlora.trainer import LongTrainer


def settings_of(file: Path, name: str) -> dict[str, Any]:
    """`common` with what arm `name` says differently."""
    params = read_params(file)
    merged = OmegaConf.to_container(OmegaConf.merge(params["common"], params["arms"][name]))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def train(settings: dict[str, Any], *, seed: int, tokens: Path, base: Path, out: Path) -> dict[str, float]:
    """Write the adapter (or the model) `out`; returns the last training loss and the seconds of a step."""
    position, attention = section_of(Position, settings, "position"), section_of(Attention, settings, "attention")
    adapter = section_of(Adapter, settings, "adapter")
    fit = section_of(Fit, settings, "fit").model_copy(update={"seed": seed})
    samples = fit.steps * fit.global_batch
    blocks = PackedBlocks(tokens, length=position.context, samples=samples, recall_share=0, seed=seed)
    set_seed(seed)
    model = build(base, position=position, adapter=adapter, dtype=fit.dtype)
    restore_head = chunk_loss(causal_model(model), chunk=fit.loss_chunk)
    if settings["pattern"]:
        patterns.enable(causal_model(model), settings["pattern"], ratio=attention.group_ratio)
    else:
        enable(causal_model(model), attention)
    trainer = LongTrainer(
        model=model,
        train_dataset=blocks,
        args=arguments(fit, checkpoints=out.with_name("checkpoints"), accumulation=fit.accumulation(1), zero=None),
        ranks=Ranks(rank=0, world=1),
        adam=partial(optimizer, model, fit),
    )
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    trainer.train()
    seconds = (time.monotonic() - began) / fit.steps
    restore_head()
    save(model, out)
    return {"loss": trainer.state.log_history[-2]["loss"], "seconds_per_step": round(seconds, 3)}


def main(name: str, seed: int, file: Path, tokens: Path, base: Path, scores: Path) -> None:
    settings = settings_of(file, name)
    with tempfile.TemporaryDirectory() as folder:
        adapter, merged = Path(folder, "adapter"), Path(folder, "merged")
        trained = train(settings, seed=seed, tokens=tokens, base=base, out=adapter)
        merge(base, adapter, out=merged)
        measured = measure(
            open_model(merged),
            label=name,
            documents=documents(tokens / "heldout.safetensors"),
            settings=section_of(Perplexity, settings, "perplexity"),
            parts=Path(folder, "parts.csv"),
        )
    scores.parent.mkdir(exist_ok=True)
    by_length = {length: score["value"] for length, score in measured["perplexity"][name].items() if length.isdecimal()}
    result = {"arm": name, "seed": seed, "perplexity": by_length, **trained}
    scores.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(Path, sys.argv[3:]))
