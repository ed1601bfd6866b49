"""Fold the adapter into the base."""

from pathlib import Path

from longlora.model.merge import merge
from longlora.section import run


def stage(base: Path, adapter_folder: Path, extended: Path) -> None:
    difference = merge(base, adapter_folder, out=extended)
    print(f"merged; logits differ by at most {difference:.1e} of the largest")


if __name__ == "__main__":
    run(stage)
