"""The static site as a reader opens it: from the disk, without a network, on a desk or a phone."""

import re
from pathlib import Path

import pytest
from browsing import until

LESSONS = sorted((Path(__file__).parents[1] / "notebooks").glob("0*.ipynb"))


def test_a_reader_finds_a_word_without_a_network(site, open_page):
    page = open_page(f"file://{site}/search.html?q=Tweedie", width=1200)
    page.locator("#search-results li").first.wait_for()
    assert page.locator("#search-results li", has_text="probability-flow ODE").count() >= 1
    assert page.outside == []


@pytest.mark.parametrize("name", ["index", *(f"lessons/{path.stem}" for path in LESSONS), "reference/sampling"])
def test_a_page_fits_a_phone_and_asks_nobody(name, site, open_page):
    page = open_page(f"file://{site}/{name}.html", width=390)
    until(page, lambda: page.evaluate("document.readyState") == "complete", "the page must load")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    formulas = "[...document.querySelectorAll('div.math > math')]"
    assert page.evaluate(f"{formulas}.every(one => one.getBoundingClientRect().left >= 0)"), (
        "a formula shows its beginning"
    )
    assert page.outside == [] and page.errors == []


def test_the_page_is_dark_where_the_reader_is(site, open_page):
    def paper(scheme: str) -> int:
        page = open_page(f"file://{site}/lessons/00_start_here.html", scheme=scheme)
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    assert paper("dark") < 150 < 600 < paper("light")
