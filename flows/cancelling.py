"""Cancelling, from Prefect's page, of a run that no worker supervises: it ends as on SIGTERM, and Prefect is told that it did."""

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.own_run import own_id
from tasks import supervise

LOOK = 3.0  # seconds between two looks at the flow run's state


@contextmanager
def cancellable() -> Generator[threading.Event]:
    """End this process by SIGTERM if somebody cancels this flow run; the event tells a cancel from another signal."""
    cancelled, over = threading.Event(), threading.Event()
    threading.Thread(target=watch, args=(own_id(), PREFECT_API_URL.value(), cancelled, over), daemon=True).start()
    try:
        yield cancelled
    finally:
        over.set()


def watch(run: UUID, server: str | None, cancelled: threading.Event, over: threading.Event) -> None:
    """Look until it is `cancelled` or `over`. A thread does not inherit Prefect's settings; without `server` it would start one."""
    # one client for all looks: to make one takes a tenth of a second of a core that trains
    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        while not over.wait(LOOK):
            try:
                state = client.read_flow_run(run).state
            except httpx.HTTPError:  # nobody answers: the run goes on, and so does the look
                continue
            except ObjectNotFound:  # deleted in the page, which ends nothing
                return
            if state and state.type in (StateType.CANCELLING, StateType.CANCELLED) and not over.is_set():
                cancelled.set()
                supervise.interrupt()
                os.kill(os.getpid(), signal.SIGTERM)
                return


def wait_for_stages() -> None:
    """Wait until the stages that were told to end have: they may save a checkpoint first, and are killed after their grace."""
    while supervise.running:
        time.sleep(0.1)
