"""Every lesson as a reader works through it: opened in JupyterLab in a real browser, all cells run, every live control moved."""

import base64
import re
import shutil
from pathlib import Path

import pytest
from browsing import drag, drag_over, jupyter_lab, open_notebook, pixels, run_all, start_all, until
from test_batch import write_notebook

LESSONS = sorted((Path(__file__).parents[1] / "notebooks").glob("0*.ipynb"))
LONG = """from cmlab.recipes import get_recipe
from cmlab.widgets import train_live

record, losses = train_live(get_recipe("moons-edm").replace(iterations=10**6, batch=16))"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over copies of the lessons, at the CI size, and a notebook that trains for hours."""
    root = tmp_path_factory.mktemp("lessons")
    for lesson in LESSONS:
        shutil.copy(lesson, root)
    write_notebook(root / "long.ipynb", LONG, "print('kept after', len(losses), 'steps:', type(record.model).__name__)")
    with jupyter_lab(root, tmp_path_factory.mktemp("jupyter"), CMLAB_FAST="1") as address:
        yield address


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_live_control_of_a_lesson_redraws_its_picture(lesson, lab, open_page):
    page = open_notebook(open_page, lab, lesson.name)
    run_all(page, seconds=300)
    widgets = page.locator(".jp-OutputArea-output:has(.widget-slider)")
    assert widgets.count() >= 1
    for k in range(widgets.count()):
        widget = widgets.nth(k)
        sliders, surfaces = widget.locator(".widget-slider"), widget.locator(".cmlab-surface")
        for j in range(sliders.count()):
            changes(page, widget, lambda: drag(page, sliders.nth(j), far_end(sliders.nth(j))))  # noqa: B023
        for menu in widget.locator("select").all():
            changes(page, widget, lambda: menu.select_option(index=1))  # noqa: B023
        for j in range(surfaces.count()):
            changes(page, widget, lambda: drag_over(page, surfaces.nth(j), (0.25, 0.7), (0.4, 0.75)))  # noqa: B023
            changes(page, widget, lambda: [surfaces.nth(j).press(key) for key in ("ArrowLeft", "ArrowUp", " ")])  # noqa: B023
        assert all(len(alt.split()) >= 4 for alt in widget.locator("img").evaluate_all("all => all.map(i => i.alt)"))
    assert page.outside == []


def pictures(widget) -> list:
    """The pixels of a widget's pictures: another address of the same picture is no change."""
    sources = widget.locator("img").evaluate_all("all => all.map(i => i.src)")
    return [pixels(base64.b64decode(source.split(",")[1])).tobytes() for source in sources]


def changes(page, widget, act) -> None:
    before = settled(page, widget)
    act()
    until(page, lambda: pictures(widget) != before, "a control was moved and the picture stayed as it was", seconds=20)


def settled(page, widget) -> list:
    """The pictures once nothing is on its way any more from the control that was moved before."""
    seen = pictures(widget)
    while True:
        page.wait_for_timeout(400)
        before, seen = seen, pictures(widget)
        if seen == before:
            return seen


def far_end(slider) -> float:
    """The share of a slider's track that is farther from its handle."""
    handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    at = (handle["x"] + handle["width"] / 2 - track["x"]) / track["width"]
    return 0.12 if at > 0.5 else 0.88


def test_the_stop_button_ends_a_training_that_runs_and_keeps_its_model(lab, open_page):
    page = open_notebook(open_page, lab, "long.ipynb")
    start_all(page)
    page.get_by_text(re.compile(r"Step \d+ of")).wait_for(timeout=60_000)
    page.locator(".jupyter-button", has_text="Stop").click()
    page.get_by_text(re.compile(r"kept after \d+ steps: Denoiser")).wait_for(timeout=60_000)
    assert page.get_by_text("Stopped; the model is kept.").is_visible()
