"""What a reader sees: the page of a tour, and a lesson in JupyterLab, in a real browser that cannot leave this machine."""

import base64

import numpy as np
import pytest
from browsing import drag, jupyter_lab, open_notebook, pixels, run_all, until
from test_batch import PICTURE, PUBLISH, write_notebook

from cmlab.tour import run_tour

LIVE = """import matplotlib.pyplot as plt
import ipywidgets
from cmlab.widgets import explore

def draw(height):
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.bar([0], [height])
    axes.set_ylim(0, 20)
    return figure

explore(draw, "one bar, as high as the slider says", height=ipywidgets.IntSlider(value=1, min=1, max=20))"""


# --- the page of a tour ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour")
    write_notebook(folder / "notebooks" / "00_start.ipynb", PICTURE, PUBLISH)
    write_notebook(folder / "notebooks" / "01_fails.ipynb", "x = 'a long line' * 3; raise ValueError('no such sigma')")
    return run_tour(fast=True, output=folder / "run", notebooks=folder / "notebooks")


def test_the_index_is_readable_offline(tour, open_page):
    page = open_page((tour.folder / "index.html").as_uri())
    assert page.outside == [] and page.errors == []
    assert page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.alt.length > 0)") == [
        True
    ]
    assert page.locator("article").count() == 2
    assert page.get_by_text("0.25", exact=True).is_visible() and page.get_by_text("failed: 01_fails").is_visible()
    assert page.get_by_text("no such sigma").first.is_visible()
    assert pixels(page.screenshot(full_page=True)).std() > 5, "the page must not be empty"


def test_the_index_follows_the_readers_light_or_dark_scheme(tour, open_page):
    url = (tour.folder / "index.html").as_uri()
    light, dark = (np.median(pixels(open_page(url, scheme=scheme).screenshot())) for scheme in ("light", "dark"))
    assert light > 200 and dark < 60


def test_the_index_fits_a_telephone(tour, open_page):
    page = open_page((tour.folder / "index.html").as_uri(), width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_index_leads_to_the_lessons(tour, open_page):
    page = open_page((tour.folder / "index.html").as_uri())
    page.locator("#\\30 0_start").get_by_role("link", name="Read").click()
    page.wait_for_url("**/00_start.html")
    assert page.outside == [] and page.errors == []
    assert page.get_by_role("heading", name="Lesson 00_start").is_visible()
    assert page.evaluate("[...document.images].map(i => i.alt)") == ["an orange field"]
    assert page.locator("math").count() == 1


# --- a lesson in JupyterLab -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lessons")
    write_notebook(root / "lesson.ipynb", LIVE, "print('all', 'done')")
    with jupyter_lab(root, tmp_path_factory.mktemp("jupyter")) as address:
        yield address


def test_a_readers_slider_redraws_the_figure_in_jupyterlab(lab, open_page):
    page = open_notebook(open_page, lab, "lesson.ipynb")
    run_all(page)
    page.get_by_text("all done", exact=True).wait_for()
    figure = page.locator("img[alt='one bar, as high as the slider says']")
    low = ink(figure)
    drag(page, page.locator(".widget-slider").first, 0.9)
    until(page, lambda: ink(figure) > 2 * low, "a higher bar is more ink")
    assert page.outside == []


def ink(figure) -> int:
    """The number of dark pixels of an embedded picture."""
    return int((pixels(base64.b64decode(figure.get_attribute("src").split(",")[1])) < 200).sum())
