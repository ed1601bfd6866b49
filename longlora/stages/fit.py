"""Fine-tune the extended model."""

from pathlib import Path

from longlora.attention.shifted import Attention
from longlora.model.adapter import Adapter
from longlora.model.position import Position
from longlora.section import run
from longlora.training.fit import Fit, train


def stage(
    tokens: Path,
    pairs: Path,
    base: Path,
    adapter_folder: Path,
    history: Path,
    cost: Path,
    position: Position,
    attention: Attention,
    adapter: Adapter,
    fit: Fit,
) -> None:
    train(
        tokens,
        pairs=pairs,
        base=base,
        adapter_folder=adapter_folder,
        history=history,
        cost=cost,
        position=position,
        attention=attention,
        adapter=adapter,
        settings=fit,
    )


if __name__ == "__main__":
    run(stage)
