"""Write the report from what the other stages found."""

from pathlib import Path

from longlora.report.findings import gather
from longlora.report.report import write
from longlora.section import run


def stage(
    base: Path,
    texts: Path,
    pairs: Path,
    recipe: Path,
    scores: Path,
    verdict: Path,
    history: Path,
    cost: Path,
    reports: Path,
) -> None:
    findings = gather(
        scores, verdict=verdict, history=history, cost=cost, base=base, texts=texts, pairs=pairs, recipe=recipe
    )
    write(findings, out=reports)


if __name__ == "__main__":
    run(stage)
