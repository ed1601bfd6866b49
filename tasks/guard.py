"""`python -m tasks.guard prefect server start ...`: Prefect's server, for programs and its own page alone.

By itself it does what any page tells it that the user visits, and a worker runs whatever command it is told. CORS alone does not
help: a POST without a content type needs nobody's leave, a websocket neither, and a page whose name is pointed at our address
counts as the server's own. A browser says which page a request is from, and what it took for the server's name.
"""

import gc
import os
import sys
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from tasks import fresh_database
from tasks.access import ORIGINS

LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}  # nobody else's name can be pointed at our address and be one of these


class Guard:
    """An ASGI application behind a check of the headers Host and Origin."""

    def __init__(self, app: Any, origins: list[str]) -> None:
        self.app, self.origins = app, set(origins)
        self.names = LOCAL_NAMES | {urlsplit(each).hostname for each in origins} - {None}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self.admits(
            {name: value.decode("latin-1") for name, value in scope["headers"]}
        ):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": f"not from another page, see {ORIGINS}\n".encode()})

    def admits(self, headers: dict[bytes, str]) -> bool:
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        own = origin is None or origin in self.origins or urlsplit(origin).netloc == host
        return "*" in self.origins or (own and urlsplit(f"//{host}").hostname in self.names)


def main() -> None:
    gc.disable()  # what is imported stays: to look it through again and again takes a fifth of the start
    run, origins = uvicorn.run, os.environ[ORIGINS].split(",")

    def guarded(app: Any, **options: Any) -> None:
        gc.freeze()
        gc.enable()
        run(Guard(app, origins), **options)

    fresh_database.make()
    uvicorn.run = guarded  # Prefect has no setting for it; what its own services ask their application stays as it is
    from prefect.cli import app as prefect

    sys.argv = sys.argv[1:]
    prefect()


if __name__ == "__main__":
    main()
