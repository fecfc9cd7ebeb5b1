"""A real browser for the tests, which may ask this machine only, and JupyterLab for it to open."""

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
from pathlib import Path

import numpy as np
from PIL import Image
from test_batch import wait_for

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip
LOCAL = re.compile(r"(file:///|(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:)")
TOKEN = "reader"
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell in the page, seen or not
    "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false", "doNotDisturbMode": True},
}
CONNECTED = """async () => {
  const sessions = await (await fetch('/api/sessions')).json();
  return sessions.some(s => s.notebook.path === PATH && s.kernel.connections > 0 && s.kernel.execution_state === 'idle');
}"""
IDLE = (
    """() => document.querySelector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"""
)
PROMPTS = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
  .map(prompt => prompt.textContent).filter(text => text.includes('['))"""


def answer(page, route) -> None:
    """Lets a page ask this machine; what else it asks for is noted in page.outside and refused."""
    if LOCAL.match(route.request.url):
        route.continue_()
    else:
        page.outside.append(route.request.url)
        route.abort()


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("L"), float)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def jupyter_lab(root: Path, home: Path, **environment: str):
    """JupyterLab over a folder; everything it keeps lies in home. Yields its address."""
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
        env=os.environ | {name: str(home / folder) for name, folder in folders.items()} | environment,
        stderr=(home / "log").open("w"), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: f"http://127.0.0.1:{port}/lab" in (home / "log").read_text(), server)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)  # ends its kernels too
        server.wait()


def open_notebook(open_page, lab: str, path: str):
    """The page of a notebook, once its kernel is there and idle."""
    page = open_page(f"{lab}/lab/tree/{path}?token={TOKEN}&reset", width=1400)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    connected = CONNECTED.replace("PATH", json.dumps(path))
    until(page, lambda: page.evaluate(connected), "the page must be connected to its kernel")
    until(page, lambda: page.evaluate(IDLE), "the kernel must be idle")
    return page


def until(page, holds, reason: str, seconds: float = 90) -> None:
    """Waits for holds() to be true. (page.wait_for_function takes the promise of an async function for a yes.)"""
    for _ in range(int(seconds * 5)):
        if holds():
            return
        page.wait_for_timeout(200)
    raise AssertionError(reason)


def start_all(page) -> None:
    """Runs all cells from the menu, as a reader does."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('li.lm-Menu-item[data-command="runmenu:run-all"]').click()


def run_all(page, seconds: float = 90) -> None:
    """Runs all cells and waits until the last is done."""
    start_all(page)
    done = lambda: all(re.search("[0-9]", text) for text in page.evaluate(PROMPTS))  # noqa: E731
    until(page, done, "every cell must have run", seconds)


def drag_over(page, place, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws a line with the mouse over a place, from one point to another, given as shares of its width and height."""
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    page.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=8)
    page.mouse.up()


def drag(page, slider, fraction: float) -> None:
    """Moves the handle of a slider to a fraction of its track, with the mouse."""
    slider.scroll_into_view_if_needed()
    handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    middle = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * fraction, middle, steps=8)
    page.mouse.up()
