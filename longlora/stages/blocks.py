"""Tokenise the documents once; split them into training and held-out; write recall exercises."""

from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from longlora.data.blocks import Blocks, prepare
from longlora.data.heldout import elsewhere, split
from longlora.data.recall import exercises
from longlora.data.texts import read
from longlora.data.tokens import documents
from longlora.data.twins import are, first, refuse_copies
from longlora.model.position import Position, reach
from longlora.section import run, write_json


def stage(base: Path, tokens: Path, heldout: Path, counts: Path, blocks: Blocks, position: Position) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    rows = read(blocks)
    train, kept = split(list(rows["name"]), held_out=blocks.held_out, seed=blocks.seed)
    other = blocks.held_out.texts
    apart = elsewhere(other, tokenizer=tokenizer) if other else None
    evaluated = {rows[i]["name"]: rows[i]["text"] for i in kept} if apart is None else decoded(apart, tokenizer)
    if parts := refuse_copies((rows[i]["text"] for i in train), evaluated):
        # A quotation is no leak, and chunks that overlap are: which it is, only who made the texts can say.
        print(
            f"{len(parts)} of {len(evaluated)} held-out documents {are(parts)} trained on in part, word for word, {first(parts)}: "
            "scores there may be of texts that were seen"
        )
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
    report = prepare(
        blocks,
        tokenizer=tokenizer,
        exercises=drill,
        texts=rows,
        elsewhere=apart,
        out=tokens,
        heldout=heldout,
    )
    window = reach(AutoConfig.from_pretrained(base, local_files_only=True).get_text_config())
    lengths = np.array([len(document) for document in documents(tokens / "train.safetensors")])
    beyond = np.maximum(lengths - window, 0).sum() / lengths.sum()
    report["train"]["beyond_window"] = round(float(beyond), 6)
    # Short documents that share a sequence do not see each other: it is long, and what is learnt from it is not.
    print(
        f"{beyond:.1%} of the training tokens stand further into their document than the base's window, {window:,} tokens"
    )
    longest = report["heldout"]["longest"]
    if longest < position.context:  # said now: measures would refuse it after hours of training
        print(
            f"the longest held-out document has {longest:,} tokens, and position.context is {position.context:,}: nothing can be "
            "measured at that length; hold out longer documents"
        )
    write_json({"blocks": report}, counts)


def decoded(tokens: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {name: str(tokenizer.decode(ids, skip_special_tokens=True)) for name, ids in tokens.items()}


if __name__ == "__main__":
    run(stage)
