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


def patience(*models: Artifact, asked: bool = False) -> float | None:
    """Seconds to wait for a person's answer; None if nobody is to be asked.

    Args:
        models: the model as the checkout has it, and as its run had it, which may be from before anybody was to be asked: the
            first that asks is obeyed.
        asked: ask even if none wants it.

    Raises:
        ValueError: `approval_hours` is no positive number.
    """
    for model in models:
        hours = model.meta.get("approval_hours")
        if hours is None:
            continue
        if isinstance(hours, bool) or not isinstance(hours, int | float) or not hours > 0:
            raise ValueError(
                f"artifacts.{model.name}.meta.approval_hours is {hours!r}: must be a number of hours above 0"
            )
        return hours * 3600
    return HOURS * 3600 if asked else None
