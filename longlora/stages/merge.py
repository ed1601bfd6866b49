"""Fold the adapter into the base."""

from pathlib import Path

from longlora.model.merge import merge
from longlora.section import run


def stage(base: Path, adapter_folder: Path, extended: Path) -> None:
    folded, written = merge(base, adapter_folder, out=extended)
    rounded = f", and by {written:.1e} as they are written" if written != folded else ""
    print(f"merged; logits differ by at most {folded:.1e} of the largest{rounded}")


if __name__ == "__main__":
    run(stage)
