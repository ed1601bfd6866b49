"""Read, validate and tokenise question-answer pairs; write questions on the documents, if asked for."""

from pathlib import Path

from transformers import AutoTokenizer

from longlora.data.blocks import Blocks
from longlora.data.pairs import Pairs, make
from longlora.model.position import Position
from longlora.section import run, write_json


def stage(base: Path, out: Path, counts: Path, blocks: Blocks, pairs: Pairs, position: Position) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    report = make(pairs, blocks=blocks, tokenizer=tokenizer, context=position.context, out=out)
    write_json({"pairs": report}, counts)


if __name__ == "__main__":
    run(stage)
