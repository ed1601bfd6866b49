"""Telling others what happened: a webhook, a command, both named in the environment.

LONGLORA_HOOK_URL gets a POST with JSON, LONGLORA_HOOK_COMMAND the same on its stdin. What happened has happened: a hook that
fails is said on stderr, and changes nothing. Addresses may carry secrets in their path, so only the host is ever printed.
"""

import json
import os
import shlex
import subprocess
import sys
from typing import Literal
from urllib.parse import urlsplit

import httpx

from tasks.web import request

Event = Literal["promoted", "rolled back", "refused", "failed"]
PATIENCE = 10.0  # seconds for a webhook to answer; a command may take six times that


def tell(event: Event, message: str, **facts: str | None) -> None:
    """Give `event`, a sentence about it, and `facts` to the hooks that the environment names."""
    text = json.dumps({"event": event, "message": message, **facts})
    for variable, send in {"LONGLORA_HOOK_URL": post, "LONGLORA_HOOK_COMMAND": run}.items():
        target = os.environ.get(variable)
        failure = send(target, text) if target else ""
        if failure:
            print(f"warning: {variable}: {failure}; '{event}' stands, and was not told", file=sys.stderr)


def post(url: str, text: str) -> str:
    """POST `text`; what went wrong, or ''."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must be an http or https address"
    headers = {"content-type": "application/json"}
    try:
        reply = request("POST", url, content=text.encode(), headers=headers, timeout=PATIENCE)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{parts.hostname} did not take it ({type(error).__name__})"
    return "" if reply.is_success else f"{parts.hostname} did not take it (status {reply.status_code})"


def run(command: str, text: str) -> str:
    """Run `command` (words as a shell would split them, no shell) with `text` on its stdin; what went wrong, or ''."""
    try:
        words = shlex.split(command)
        done = subprocess.run(words, input=text, text=True, stdout=subprocess.DEVNULL, timeout=6 * PATIENCE)
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return f"did not run ({type(error).__name__})"
    return f"ended with status {done.returncode}" if done.returncode else ""
