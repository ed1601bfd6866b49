"""Read, validate and tokenise question-answer pairs; write questions on the documents, if asked for."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from longlora.data.blocks import Blocks
from longlora.data.casebook import DocumentCase, build, tokens, write
from longlora.data.heldout import elsewhere, split
from longlora.data.pairs import Pairs, choose, gather, prepare, taught
from longlora.data.reading import Document
from longlora.data.texts import read
from longlora.model.position import Position
from longlora.section import run


def stage(base: Path, out: Path, counts: Path, blocks: Blocks, pairs: Pairs, position: Position) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    found = gather(pairs)
    cases: dict[str, list[DocumentCase]] = {}
    missing: dict[str, list[str]] = {}
    held_out: list[str] = []
    if pairs.casebook or pairs.sources:
        rows, other = read(blocks), blocks.held_out.texts
        sides = split(list(rows["name"]), held_out=blocks.held_out, seed=blocks.seed)
        held_out = [rows[i]["text"] for i in sides[1]]
        if other:
            apart = elsewhere(other, tokenizer=tokenizer).values()
            held_out = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in apart]
        for side, members in zip(("train", "heldout"), sides, strict=True):
            documents = [Document(rows[i]["name"], rows[i]["text"]) for i in members]
            if documents and pairs.casebook:
                built = build(documents, pairs.casebook, measure=tokens(tokenizer))
                cases[side], missing[side] = built.cases, built.missing
                if built.missing:
                    print(f"{side}: {len(built.missing)} questions that no excerpt allowed, {built.missing[0]} first")
    chosen = choose(found, pairs, built=taught(cases.get("train", [])), held_out=held_out)
    report = prepare(chosen, settings=pairs, tokenizer=tokenizer, context=position.context, out=out)
    write(cases.get("heldout", []), out / "cases.jsonl")
    counts.parent.mkdir(parents=True, exist_ok=True)
    written = {
        "built": len(cases.get("train", [])),
        "missing": len(missing.get("train", [])),
        "built_held_out": len(cases.get("heldout", [])),
        "missing_held_out": len(missing.get("heldout", [])),
    }
    counts.write_text(json.dumps({"pairs": report | written}, indent=2) + "\n")


if __name__ == "__main__":
    run(stage)
