"""The browser that several test files share."""

import contextlib

import pytest
from browsing import CHROMIUM, FLAGS, answer
from playwright.sync_api import sync_playwright


@pytest.fixture(scope="session")
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
