"""Make a run's model the champion, as a flow: it can be scheduled, and is seen. What it does is said in tasks/promotion.py."""

from pathlib import Path

from prefect import flow

from tasks import promotion, tracking
from tasks.workspace import project


@flow(name="promote")
def promote(run: str | None = None) -> str:
    """Register run `run` (its key or MLflow id; default: the last finished one) as candidate, and then as champion.

    Returns what was done, as a sentence.

    Raises:
        RefusalError: it stays candidate; a reason per line.
        ValueError: there is no such run, or it is not finished.
    """
    where, client = project(Path.cwd()), tracking.connect()
    return promotion.promote(client, where, promotion.chosen(client, where, run))
