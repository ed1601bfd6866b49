"""The process that `longlora serve` becomes: transformers' own server, in which what a chat template refuses (a role, an order of
turns) is a mistake of the client's, told in one line with status 400. By itself it says 500, and not why."""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers.cli.serving import server
from transformers.cli.transformers import app

build_server = server.build_server


def with_refusals(*given: object, **settings: object) -> FastAPI:
    """In place of transformers' function, which the server calls once."""
    made = build_server(*given, **settings)  # type: ignore[arg-type]
    made.add_exception_handler(TemplateError, refused)
    return made


async def refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": f"the chat template refuses the messages: {error}"}, status_code=400)


if __name__ == "__main__":
    server.build_server = with_refusals
    app()
