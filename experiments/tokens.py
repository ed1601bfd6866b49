"""The texts of the experiments, tokenised as the pipeline does it."""

import sys
from pathlib import Path

from transformers import AutoTokenizer

from longlora.blocks import Blocks, prepare, read
from longlora.section import read_params, section_of


def main(base: Path, settings: Path, out: Path) -> None:
    blocks = section_of(Blocks, read_params(settings)["common"], "blocks")
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    heldout = out / "heldout.safetensors"
    prepare(
        blocks, tokenizer=tokenizer, exercises=iter(()), texts=read(blocks), elsewhere=None, out=out, heldout=heldout
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
