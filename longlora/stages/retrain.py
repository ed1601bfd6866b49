"""Fine-tune once more, under another attention pattern. The folder is named by it."""

from pathlib import Path

from longlora.adapter import Adapter
from longlora.attention import Attention
from longlora.fit import Fit, train
from longlora.position import Position
from longlora.retrain import Retrain, under
from longlora.section import run


def stage(
    tokens: Path,
    pairs: Path,
    base: Path,
    tuned: Path,
    history: Path,
    cost: Path,
    position: Position,
    attention: Attention,
    adapter: Adapter,
    fit: Fit,
    retrain: Retrain,
) -> None:
    train(
        tokens,
        pairs=pairs,
        base=base,
        out=tuned,
        history=history,
        cost=cost,
        position=position,
        attention=under(attention, pattern=tuned.name, settings=retrain),
        adapter=adapter,
        settings=fit,
    )


if __name__ == "__main__":
    run(stage)
