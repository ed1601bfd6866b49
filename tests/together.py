"""Several real processes on the loopback interface, as a launcher would start them.

They are forked from a server that has imported what is slow to import, so that a test does not pay for it once per process.
"""

import faulthandler
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

SLOW = ["torch", "transformers.trainer", "peft", "longlora.training.fit", "training"]
PATIENCE = 120.0  # seconds, on a machine that does other things too


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def enter(env: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(PATIENCE - 10)  # of a process that hangs, where: before it is killed
    os.environ.update(env)
    torch.set_num_threads(1)
    function(*arguments)


def start(count: int, function: Callable[..., None], *arguments: Any, **env: str) -> list[Any]:
    """`count` processes that call `function`, a function of a module, with `arguments`; `env` on top of a launcher's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    port = free_port()
    processes = [
        context.Process(target=enter, args=(environment(rank, count, port) | env, function, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes: list[Any]) -> list[int]:
    """Their exit statuses. When one fails the others, which wait for it, are killed after a moment, as launchers do."""
    deadline = time.monotonic() + PATIENCE
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode for p in processes if not p.is_alive()):
            deadline = min(deadline, time.monotonic() + 3)
        time.sleep(0.02)
    for process in processes:
        with suppress(ValueError):
            process.kill()
        process.join()
    return [p.exitcode for p in processes]


def run(count: int, function: Callable[..., None], *arguments: Any, **env: str) -> None:
    """As `start`; returns when all are done, and all did well."""
    codes = ended(start(count, function, *arguments, **env))
    assert codes == [0] * count, f"exit statuses {codes}"
