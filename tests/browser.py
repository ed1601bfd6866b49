"""Pages as a person meets them, in headless Chromium."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    not BROWSER or not importlib.util.find_spec("playwright"),
    reason="no browser: apt-get install chromium; pip install playwright",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser. While it is open there is an event loop in this thread."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def tab(url: str, **options: Any) -> Iterator[Any]:
    """A tab of a browser of its own at `url`; it may ask nothing of another server."""
    with chromium() as browser:
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}} | options)
        page.set_default_timeout(30_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        yield page
    server = "/".join(url.split("/")[:3])
    assert all(each.startswith((server, "data:", "blob:")) for each in asked), asked


def keep(page: Any, name: str) -> None:
    """With LONGLORA_SCREENSHOTS=FOLDER the page is left there as NAME.png, to be looked at."""
    if folder := os.environ.get("LONGLORA_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
