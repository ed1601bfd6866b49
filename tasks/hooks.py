"""Telling others what happened: a webhook, a command, a notification block of Prefect's, each named in the environment.

LONGLORA_HOOK_URL gets a POST with JSON, LONGLORA_HOOK_COMMAND the same on its stdin, LONGLORA_HOOK_BLOCK (its type and name, such
as slack-webhook/team) the same as text. A hook that fails is reported on stderr, and changes nothing.
Addresses may carry secrets in their path, so only the host is ever printed, and of a block only its name.
"""

import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx

from tasks import servers
from tasks.errors import one_line
from tasks.web import request
from tasks.workspace import project

Event = Literal["promoted", "rolled back", "refused", "failed"]
PATIENCE = 10.0  # seconds for a webhook to answer
LONG = 60.0  # seconds for a command, or a block and Prefect's server, whose client tries again for minutes
LONGEST = PATIENCE + 2 * LONG  # seconds that `tell` may take where a Prefect server is up


def tell(event: Event, message: str, **facts: str | None) -> None:
    """Give `event`, a sentence about it, and `facts` to the hooks that the environment names."""
    told = {"event": event, "message": message, **facts}
    for variable, send in {
        "LONGLORA_HOOK_URL": post,
        "LONGLORA_HOOK_COMMAND": run,
        "LONGLORA_HOOK_BLOCK": notify,
    }.items():
        target = os.environ.get(variable)
        try:
            failure = send(target, told) if target else ""
        except Exception as error:  # what a hook meets is not ours to foresee; its words may hold its secrets
            failure = f"failed ({type(error).__name__})"
        if failure:
            print(f"warning: {variable}: {failure}; '{event}' stands, and was not told", file=sys.stderr)


def post(url: str, told: dict[str, str | None]) -> str:
    """POST what is told as JSON; what went wrong, or ''."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must be an http or https address"
    headers = {"content-type": "application/json"}
    try:
        reply = request("POST", url, content=json.dumps(told).encode(), headers=headers, timeout=PATIENCE)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{parts.hostname} did not take it ({type(error).__name__})"
    return "" if reply.is_success else f"{parts.hostname} did not take it (status {reply.status_code})"


def run(command: str, told: dict[str, str | None]) -> str:
    """Run `command` (words as a shell would split them, no shell) with JSON on its stdin; what went wrong, or ''."""
    try:
        words = shlex.split(command)
        done = subprocess.run(words, input=json.dumps(told), text=True, stdout=subprocess.DEVNULL, timeout=LONG)
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return f"did not run ({type(error).__name__})"
    return f"ended with status {done.returncode}" if done.returncode else ""


def notify(block: str, told: dict[str, str | None]) -> str:
    """Give the sentence, with a line per fact, to a notification block of Prefect's; what went wrong, or ''.

    Blocks are on its server: the one that is up, else one of our own, which has the same database.
    """
    if not all(block.partition("/")):
        return "must be a block's type and name, such as slack-webhook/team"
    facts = [f"{name}: {text}" for name, text in told.items() if text and name not in ("event", "message")]
    try:
        # if it is lost, so is what was to be told; nothing else is
        with servers.prefect_api(project(Path.cwd()), restarts=0, on_lost=lambda said: None) as ready:
            ready()
            said: list[str] = []
            words = (f"longlora: {told['event']}", "\n".join([f"{told['message']}", *facts]))
            giving = threading.Thread(target=lambda: said.append(give(block, *words)), daemon=True)
            giving.start()
            giving.join(LONG)
            return said[0] if said else f"{block} did not take it in {LONG:g} s"
    except (OSError, ValueError) as error:  # what starting a server says
        return one_line(error)


def give(block: str, subject: str, body: str) -> str:
    """Have the block send it; what went wrong, or ''."""
    from prefect.blocks.abstract import NotificationBlock  # Prefect takes seconds to import
    from prefect.blocks.core import Block
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"]}):
        try:
            found = Block.load(block)
            if not isinstance(found, NotificationBlock):
                return f"{block} is no notification block"
            with found.raise_on_failure():
                # a coroutine only where a loop runs, and here none does
                found.notify(body, subject)  # pyright: ignore[reportUnusedCoroutine]
        except Exception as error:  # a block is anybody's code; what it says may hold its secrets
            if isinstance(error.__cause__, ObjectNotFound):
                return f"Prefect has no block {block}: make it on its page (`longlora up`)"
            return f"{block} did not take it ({type(error).__name__})"
    return ""
