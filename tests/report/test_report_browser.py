"""The page in a real browser: at two widths, light and dark; skipped where there is none."""

import itertools
import re

import pytest

from browser import SCHEMES, WIDTHS, Browser, find_browser
from lcr_fast.report.make import report

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium is installed ($CHROMIUM names another)"
)


@pytest.fixture(scope="module")
def browser():
    with Browser(find_browser()) as running:
        yield running


@pytest.fixture(scope="module")
def page(hostile_run):
    out = hostile_run / "seen.html"
    report(hostile_run / "run", out, data=hostile_run / "data", n_users=3)
    return out


def _cases():
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        often = (width < 600) == (scheme == "dark")  # each once, both in two looks
        yield pytest.param(width, scheme, marks=() if often else pytest.mark.full)


@pytest.mark.parametrize(("width", "scheme"), list(_cases()))
def test_it_fits_and_is_silent(browser, page, width, scheme):
    seen = browser.look(page, width, scheme)
    assert seen.complaints == []
    assert seen.overflow <= 0
    assert seen.wide == []
    assert "<img src=x onerror=alert(1)>" in seen.text
    assert seen.png.startswith(b"\x89PNG")
    assert len(seen.png) > 50_000
    colours = []
    for name in ("color", "backgroundColor"):
        told = browser.evaluate(f"getComputedStyle(document.body).{name}")
        colours.append(sum(map(int, re.findall(r"\d+", told))))
    ink, paper = colours
    assert (ink > paper) == (scheme == "dark")
    assert abs(ink - paper) > 450


def test_a_browser_that_complains_is_heard(browser, tmp_path):
    """What the tests above look for would be seen: an error, a request, something too wide."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><body><p style='width:3000px'>wide</p>"
        "<img src='absent.png'><script>console.error('told'); throw Error('thrown')</script>"
    )
    seen = browser.look(page, 390, "light")
    told = " ".join(seen.complaints)
    assert all(word in told for word in ("told", "thrown", "fetched", "absent.png"))
    assert seen.overflow > 2000
    assert seen.wide == ["P."]
