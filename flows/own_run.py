"""The flow run that this process works on, by Prefect's client."""

from collections.abc import Iterable
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import deployment, flow_run


def own_id() -> UUID:
    """Its id, which Prefect's runtime gives as text and its client takes as a UUID."""
    return UUID(str(flow_run.get_id()))


def own_deployment() -> str | None:
    """The id of the deployment that it is of; None where a person began it."""
    return deployment.get_id()


def name_run(name: str, *, tags: Iterable[str] = ()) -> None:
    """Name it, and add `tags` to its own."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(own_id(), name=name, tags=[*flow_run.get_tags(), *tags])
