"""Write the report from what the other stages found."""

import os
from pathlib import Path

from longlora.report.card import card, recipe_of
from longlora.report.findings import gather
from longlora.report.page import page
from longlora.report.pictures import draw
from longlora.report.summary import summary
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
    beside: Path,
) -> None:
    """Write summary, pictures, page and model card to the new folder `reports`, and the card again `beside` the weights.

    The same findings give the same bytes. What differs between two equal runs (times, memory) is on the page alone.
    """
    findings = gather(
        scores, verdict=verdict, history=history, cost=cost, base=base, texts=texts, pairs=pairs, recipe=recipe
    )
    reports.mkdir(parents=True)
    draw(findings, out=reports)
    (reports / "summary.md").write_text(summary(findings))
    (reports / "README.md").write_text(card(findings))
    (reports / "index.html").write_text(page(findings, pictures=reports, recipe=recipe_of(findings)))
    pictures = Path(os.path.relpath(reports, beside.parent))
    beside.write_text(card(findings, weights="extended", pictures=pictures))


if __name__ == "__main__":
    run(stage)
