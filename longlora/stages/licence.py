"""Facts about the licences of base, texts and pairs."""

import json
from pathlib import Path

from longlora.model.licence import Licence, measure
from longlora.section import run


def stage(base: Path, texts: Path, pairs: Path, scores: Path, licence: Licence) -> None:
    result = measure(
        json.loads(base.read_text()),
        texts=json.loads(texts.read_text()),
        pairs=json.loads(pairs.read_text())["sources"],
        licence=licence,
    )
    scores.parent.mkdir(parents=True, exist_ok=True)
    scores.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(stage)
