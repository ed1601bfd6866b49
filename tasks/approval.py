"""Whether a person is asked before a model becomes champion: a property of the model, in dvc.yaml.

`artifacts: NAME: meta: approval_hours: 24` asks, and waits that long. Imports no MLflow, because a run
needs to know before it begins.
"""

from dataclasses import dataclass

from tasks.declared import Artifact

HOURS = 24.0  # with --approval, for a model that names none


def waiting(key: str) -> str:
    """The name of the flow run that waits for a person's word on run `key`, and of its lock."""
    return f"promote-{key}"


@dataclass(frozen=True)
class Approval:
    """What a person said, or that nobody did."""

    approve: bool
    who: str
    why: str


def patience(model: Artifact, *, asked: bool = False) -> float | None:
    """Seconds to wait for a person's answer; None if nobody is to be asked.

    Args:
        asked: ask even if the model does not want it.

    Raises:
        ValueError: `approval_hours` is no positive number.
    """
    hours = model.meta.get("approval_hours", HOURS if asked else None)
    if hours is None:
        return None
    if isinstance(hours, bool) or not isinstance(hours, int | float) or not hours > 0:
        raise ValueError(f"artifacts.{model.name}.meta.approval_hours is {hours!r}: must be a number of hours above 0")
    return hours * 3600
