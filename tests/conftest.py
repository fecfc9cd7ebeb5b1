"""What test files share: the browser, the built site. What needs something beside the package is collected only where it is."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from browsing import CHROMIUM, FLAGS, answer
from reference_code import FOLDER

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks when imported; CMLAB_KERNELS still decides what goes there
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` starts programs; tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
collect_ignore = [] if (FOLDER / "cm" / "unet.py").is_file() else ["test_reference.py"]
if CHROMIUM is None:
    collect_ignore += [path.name for path in Path(__file__).parent.glob("test_*_browser.py")]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty torch home without network; returns where it keeps weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: no network, at once
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the site, built from this repository."""
    from cmlab.site import build

    return build(tmp_path_factory.mktemp("site") / "html", Path(__file__).parents[1]).parent


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

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
