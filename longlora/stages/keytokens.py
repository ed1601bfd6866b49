"""Key tokens of the held-out documents, as one evaluator picks them."""

import json
from pathlib import Path

from longlora.blocks import documents
from longlora.longppl import LongPPL, key_tokens
from longlora.plain import open_model
from longlora.section import run


def stage(evaluator: Path, heldout: Path, keys: Path, longppl: LongPPL) -> None:
    picked = key_tokens(open_model(evaluator), documents=documents(heldout), settings=longppl)
    keys.parent.mkdir(parents=True, exist_ok=True)
    keys.write_text(json.dumps(picked) + "\n")


if __name__ == "__main__":
    run(stage)
