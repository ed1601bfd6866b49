"""The run's page in a real browser, on a desk and a telephone: nothing missing, nothing sticks out, nothing asked of the network.

With LONGLORA_SCREENSHOTS=FOLDER the screenshots are left there to be looked at.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_report import PERPLEXITY, report

BROWSER = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not BROWSER or not importlib.util.find_spec("playwright"),
        reason="no browser: apt-get install chromium; pip install playwright",
    ),
]
STICKS_OUT = """() => [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, .picture")
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
CUT = """() => [...document.querySelectorAll("td, th, p, h1, h2, span, small, strong")].filter(e => !e.closest(".scroll")
    && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline").map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("refused", [(), ("retrieves",)])
def test_the_page_is_whole_at_every_width(browser, tmp_path, width, refused):
    perplexity = PERPLEXITY | {name: PERPLEXITY["yarn"] for name in ("linear", "full", "a-label-that-is-rather-long")}
    page = report(tmp_path, perplexity=perplexity, refused=refused) / "index.html"
    tab = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    assert tab.inner_text(".verdict h2") == ("Refused" if refused else "Passed")
    drawn = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(drawn) == 3 and all(done and natural > 1000 and shown >= 340 for done, natural, shown in drawn)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate(STICKS_OUT) == [] and tab.evaluate(CUT) == []
    assert len({round(e.bounding_box()["height"]) for e in tab.query_selector_all(".figures div")}) <= 2
    picture = tmp_path / f"{width}{'-refused' if refused else ''}.png"
    tab.screenshot(path=picture, full_page=True)
    with Image.open(picture) as shot:
        colours = shot.convert("RGB").getcolors(1 << 24)
        assert shot.width == width and shot.height > 1500 and colours is not None and len(colours) > 500
    if folder := os.environ.get("LONGLORA_SCREENSHOTS"):
        shutil.copy(picture, Path(folder) / picture.name)
    tab.close()
    assert asked[0].startswith("file:") and all(a.startswith("data:") for a in asked[1:]), asked
