"""The run's page in a real browser, on a desk and a telephone: nothing missing, nothing sticks out, nothing asked of the network.

With LONGLORA_SCREENSHOTS=FOLDER the screenshots are left there to be looked at.
"""

import os
import shutil
from pathlib import Path

import pytest
from browser import chromium, needs_browser
from PIL import Image
from test_report import PERPLEXITY, RULER, inputs, node, outs, put

from longlora.stages.report import stage

pytestmark = [pytest.mark.slow, needs_browser]
STICKS_OUT = """() => [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, .picture")
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
CUT = """() => [...document.querySelectorAll("td, th, p, h1, h2, span, small, strong")].filter(e => !e.closest(".scroll")
    && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline").map(e => e.outerHTML.slice(0, 80))"""


COLUMNS = """() => [...document.querySelectorAll(".scores")].map(t => [...t.rows[0].cells].map(
    c => Math.round(c.getBoundingClientRect().right)))"""
FIRST_CUT = """() => [...document.querySelectorAll(".scores th:nth-child(2)")]
    .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.parentElement.innerText)"""


def put_every_measure(scores: Path) -> None:
    """What a run can have beside perplexity and passkeys, with names as long as they come."""
    for label in ("base", "yarn", "extended"):
        bands = {str(60 * n): node(1.2) for n in range(1, 9)}
        put(scores / f"positions/{label}.json", {"position_nats": {label: bands}})
        ruler = {"prompt": "chat", **RULER, **{length: RULER["60"] for length in ("120", "480")}}
        put(scores / f"ruler/{label}.json", {"ruler": {label: ruler}})
        lengths = {n: node(0.5, depth={"0.00": node(0.5), "1.00": node(0.5)}) for n in ("64", "128", "256", "512")}
        whole = {
            name: node(0.5) for name in ("exact", "f1", "rouge1", "rouge2", "rougeL", "evidence", "evidence_floor")
        }
        parts = {f"longqa_{name}": {label: lengths} for name in ("exact", "f1", "evidence", "evidence_floor")}
        put(
            scores / f"longqa/{label}.json",
            {"longqa": {label: {"prompt": "authors", "cases": 8, "cut": 3, **whole}}, **parts},
        )
        tasks = {f"longbench_hotpotqa_{n}": {"qa_f1_score": node(0.1)} for n in range(5)}
        put(scores / f"harness/{label}.json", {"harness": {label: {"prompt": "chat", **tasks}}})


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("refused", "pictures"), [((), 3), (("retrieves",), 5)])
def test_the_page_is_whole_at_every_width(browser, tmp_path, width, refused, pictures):
    perplexity = PERPLEXITY | {name: PERPLEXITY["yarn"] for name in ("linear", "full", "a-label-that-is-rather-long")}
    paths = inputs(tmp_path, perplexity=perplexity, refused=refused)
    if pictures == 5:
        put_every_measure(paths["scores"])
    stage(**paths, **outs(tmp_path))
    page = tmp_path / "reports/index.html"
    tab = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    assert tab.inner_text(".verdict h2") == ("Refused" if refused else "Passed")
    drawn = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(drawn) == pictures and all(done and natural > 1000 and shown >= 340 for done, natural, shown in drawn)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate(STICKS_OUT) == [] and tab.evaluate(CUT) == [] and tab.evaluate(FIRST_CUT) == []
    lines = tab.evaluate(COLUMNS) if width == 1280 else []
    assert all(ends == other for ends in lines for other in lines if len(ends) == len(other))
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
