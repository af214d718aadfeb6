"""The page of a report in a real browser: on a desktop, on a phone, in the dark, and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dtrain.measure import runfiles
from dtrain.measure.report import render

from ..browser import CHROMIUM, Browser
from .made_runs import DIAGNOSIS, change, make_run, write

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

LONG = "a_name_without_any_place_to_break_it_" * 8


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Two runs side by side, with everything that there is, and names that are much too long."""
    folder = tmp_path_factory.mktemp("pages")
    one = make_run(folder / "one", **{LONG: LONG})
    write(one, "diagnosis.json", {**DIAGNOSIS, "layers": [{**DIAGNOSIS["layers"][1], "path": LONG}]})
    change(one, "summary.json", memory={LONG: 30e6, "buckets": 10e6}, staleness=[{"0": 3, "1": 1}])
    other = make_run(folder / LONG[:80], seed=1, workers=4, scale=0.6, global_batch=128)
    plan = {"backend": "ps", "workers": 2, "batch": 32.0, "step_ms": 15.0, "step_ms_low": 12.0, "step_ms_high": 19.0}
    (folder / "page.html").write_text(render([runfiles.read(one), runfiles.read(other)], plan), encoding="utf-8")
    return folder / "page.html"


SIZES = "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height])"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
WIDER = """[...document.querySelectorAll('body *')]
    .filter(e => !e.closest('.scroll') && !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80))"""
SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')].filter(t => t.textContent)
    .map(t => t.getBoundingClientRect().height).filter(h => h))"""
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
PAINT = "[...new Set([...document.querySelectorAll('svg path')].map(p => getComputedStyle(p).fill))].sort().join()"


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark"), (320, "light")])
def test_it_opens_quietly_and_everything_has_a_place(browser, page, width, scheme):
    browser.open(page, width=width, scheme=scheme)
    assert browser.said == []
    assert browser.requests == [page.as_uri()]
    assert browser.ask(OVERFLOW) == 0
    assert browser.ask(WIDER) == []
    sizes = [size for size in browser.ask(SIZES) if size != [0, 0]]
    hidden = len(browser.ask(SIZES)) - len(sizes)
    assert hidden == 4  # of each timeline, the one for the other kind of screen
    assert len(sizes) > 20
    assert min(w for w, _ in sizes) > 200
    assert min(h for _, h in sizes) > 50


def test_text_in_pictures_can_be_read_on_a_phone(browser, page):
    browser.open(page, width=390)
    assert browser.ask(SMALLEST) > 9


def test_light_and_dark_are_unlike_in_the_page_and_in_its_pictures(browser, page):
    seen = []
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        seen.append((browser.ask(BACKGROUND), browser.ask(PAINT), browser.picture()))
    light, dark = seen
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert "rgb(0, 114, 178)" in light[1]  # backward
    assert "rgb(0, 114, 178)" not in dark[1]


def test_labels_at_the_ends_of_curves_lie_inside_their_picture(browser, page):
    browser.open(page)
    outside = browser.ask(
        """[...document.querySelectorAll('svg text')].filter(t => {
            const r = t.getBoundingClientRect(), s = t.ownerSVGElement.getBoundingClientRect();
            return r.width && (r.right > s.right + 2 || r.left < s.left - 2 || r.bottom > s.bottom + 2);
        }).map(t => t.textContent)"""
    )
    assert outside == []


def test_it_prints(browser, page):
    browser.open(page)
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF-")
    assert 3 <= pdf.count(b"/Type /Page\n") <= 40


def test_the_browser_leaves_nothing(own_temporary_directory):
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with Browser() as started:
        assert started.ask("1 + 1") == 2
        mine = {p.pid for p in psutil.Process().children(recursive=True)} - before
        assert mine
        assert list(own_temporary_directory.glob("browser-*"))
        folder = started.folder
    assert not folder.exists()
    assert not {p.pid for p in psutil.process_iter() if p.pid in mine and p.status() != psutil.STATUS_ZOMBIE}
