"""Fold the adapter into the base."""

from pathlib import Path

from longlora.model.merge import merge
from longlora.section import run


def stage(base: Path, adapter: Path, extended: Path) -> None:
    difference = merge(base, adapter, out=extended)
    print(f"merged; logits differ by at most {difference:.1e} of the largest")


if __name__ == "__main__":
    run(stage)
