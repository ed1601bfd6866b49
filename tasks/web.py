"""HTTP requests of our own. No redirection is followed: it would take credentials along."""

import logging
import ssl
from functools import cache
from typing import Any

import httpx

logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole addresses, and a webhook's may hold a secret


def request(method: str, url: str, **options: Any) -> httpx.Response:
    """As httpx.request, trusting whom this machine trusts.

    Raises:
        httpx.HTTPError: there is no answer.
    """
    return httpx.request(method, url, verify=authorities(), **options)


@cache
def authorities() -> ssl.SSLContext:
    """This machine's; httpx would read its own list of them anew at each request, while we wait for a server ten times a second."""
    return ssl.create_default_context()
