"""Tokenise the documents once; split them into training and held-out; write recall exercises."""

from pathlib import Path

from transformers import AutoTokenizer

from longlora.data.blocks import Blocks, prepare
from longlora.data.heldout import elsewhere, split
from longlora.data.recall import exercises
from longlora.data.texts import read
from longlora.model.position import Position
from longlora.section import run, write_json


def stage(base: Path, tokens: Path, heldout: Path, counts: Path, blocks: Blocks, position: Position) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    rows = read(blocks)
    train, _ = split(list(rows["name"]), held_out=blocks.held_out, seed=blocks.seed)
    drill = exercises(
        [rows[i]["text"] for i in train] if blocks.recall.count else [],
        tokenizer=tokenizer,
        length=position.context,
        reach=blocks.recall.reach,
        nearness=blocks.recall.nearness,
        passkey=blocks.recall.passkey,
        count=blocks.recall.count,
        seed=blocks.seed,
    )
    other = blocks.held_out.texts
    report = prepare(
        blocks,
        tokenizer=tokenizer,
        exercises=drill,
        texts=rows,
        elsewhere=elsewhere(other, tokenizer=tokenizer) if other else None,
        out=tokens,
        heldout=heldout,
    )
    write_json({"blocks": report}, counts)


if __name__ == "__main__":
    run(stage)
