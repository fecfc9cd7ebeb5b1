"""What a reader sees: the page of a tour, and a lesson in JupyterLab, in a real browser that cannot leave this machine."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from test_batch import PICTURE, PUBLISH, wait_for, write_notebook

from cmlab.tour import run_tour

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip
LOCAL = re.compile(r"(file:///|(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:)")
TOKEN = "reader"
LIVE = """import matplotlib.pyplot as plt
import ipywidgets
from cmlab.widgets import explore

def draw(height):
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.bar([0], [height])
    axes.set_ylim(0, 20)
    return figure

explore(draw, "one bar, as high as the slider says", height=ipywidgets.IntSlider(value=1, min=1, max=20))"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens pages that may ask this machine only. page.outside: what else they asked for; page.errors: what they logged."""
    with contextlib.ExitStack() as contexts:

        def open_page(url: str, width: int = 1200, scheme: str = "light"):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            contexts.callback(context.close)
            page = context.new_page()
            page.outside, page.errors = [], []
            page.route("**/*", lambda route: answer(page, route))
            page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.goto(url)
            return page

        yield open_page


def answer(page, route) -> None:
    if LOCAL.match(route.request.url):
        route.continue_()
    else:
        page.outside.append(route.request.url)
        route.abort()


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("L"), float)


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
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell in the page, seen or not
    "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false", "doNotDisturbMode": True},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over a folder with one lesson; everything it keeps lies in a temporary folder. Yields its address."""
    root, home = tmp_path_factory.mktemp("lessons"), tmp_path_factory.mktemp("jupyter")
    write_notebook(root / "lesson.ipynb", LIVE, "print('all', 'done')")
    for name, setting in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting))
    folders = dict(
        JUPYTER_CONFIG_DIR="config", JUPYTER_RUNTIME_DIR="runtime", JUPYTERLAB_SETTINGS_DIR="settings",
        JUPYTERLAB_WORKSPACES_DIR="workspaces",
    )  # fmt: skip
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={root}", "--LabApp.news_url=",
         "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
        env=os.environ | {name: str(home / folder) for name, folder in folders.items()},
        stderr=(home / "log").open("w"), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: f"http://127.0.0.1:{port}/lab" in (home / "log").read_text(), server)
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGTERM)  # ends its kernels too
    server.wait()


CONNECTED = """async () => {
  const sessions = await (await fetch('/api/sessions')).json();
  return sessions.some(s => s.kernel.connections > 0 && s.kernel.execution_state === 'idle');
}"""
IDLE = (
    """() => document.querySelector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"""
)
PROMPTS = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
  .map(prompt => prompt.textContent).filter(text => text.includes('['))"""


def test_a_readers_slider_redraws_the_figure_in_jupyterlab(lab, open_page):
    page = open_page(f"{lab}/lab/tree/lesson.ipynb?token={TOKEN}&reset", width=1400)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    until(page, lambda: page.evaluate(CONNECTED), "the page must be connected to its kernel")
    until(page, lambda: page.evaluate(IDLE), "the kernel must be idle")
    run_all(page)
    page.get_by_text("all done", exact=True).wait_for()
    figure = page.locator("img[alt='one bar, as high as the slider says']")
    low = ink(figure)
    drag(page, page.locator(".widget-slider").first, 0.9)
    until(page, lambda: ink(figure) > 2 * low, "a higher bar is more ink")
    assert page.outside == []


def until(page, holds, reason: str, seconds: float = 90) -> None:
    """Waits for holds() to be true. (page.wait_for_function takes the promise of an async function for a yes.)"""
    for _ in range(int(seconds * 5)):
        if holds():
            return
        page.wait_for_timeout(200)
    raise AssertionError(reason)


def ink(figure) -> int:
    """The number of dark pixels of an embedded picture."""
    return int((pixels(base64.b64decode(figure.get_attribute("src").split(",")[1])) < 200).sum())


def run_all(page) -> None:
    """Runs all cells from the menu, as a reader does."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('li.lm-Menu-item[data-command="runmenu:run-all"]').click()
    until(page, lambda: all(re.search("[0-9]", text) for text in page.evaluate(PROMPTS)), "every cell must have run")


def drag(page, slider, fraction: float) -> None:
    """Moves the handle of a slider to a fraction of its track, with the mouse."""
    slider.scroll_into_view_if_needed()
    handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    middle = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * fraction, middle, steps=8)
    page.mouse.up()
