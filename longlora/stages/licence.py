"""Facts about the licences of base, texts and pairs."""

import json
from pathlib import Path

from longlora.model.licence import Licence, measure
from longlora.section import run, write_json


def stage(base: Path, texts: Path, pairs: Path, scores: Path, licence: Licence) -> None:
    result = measure(
        json.loads(base.read_text()),
        texts=json.loads(texts.read_text()),
        pairs=json.loads(pairs.read_text())["sources"],
        licence=licence,
    )
    write_json(result, scores)


if __name__ == "__main__":
    run(stage)
