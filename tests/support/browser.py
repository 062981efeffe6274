"""A real Chromium driven by the tests: what it shows, its requests, its errors and warnings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

# Chromium as root in a container, without background requests.
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The operating system's own Chromium, headless."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        reason = "no Chromium on this machine; install the package `chromium`"
        if os.environ.get("CI"):
            pytest.fail(reason)  # a skip would hide it where everything must be tested
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(_FLAGS))
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and what happened on it.

    Attributes:
        page: Playwright's page.
        requests: Addresses of all requests except the file itself.
        complaints: Errors that scripts threw, and errors and warnings in the console.
    """

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Check that nothing was fetched and that there are no complaints."""
        assert self.requests == []
        assert self.complaints == []


@contextmanager
def opened(
    browser: Browser,
    path: Path,
    *,
    width: int = 1280,
    height: int = 900,
    scheme: str = "light",
    scripts: bool = True,
) -> Iterator[Opened]:
    """Open a file in a separate browser window without network."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        java_script_enabled=scripts,
        offline=True,
    )
    opened = Opened(context.new_page())
    address = path.resolve().as_uri()

    def asked(request: Request) -> None:
        if request.url.partition("#")[0] != address:
            opened.requests.append(request.url)

    def said(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            opened.complaints.append(message.text)

    opened.page.on("request", asked)
    opened.page.on("console", said)
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.goto(address)
    yield opened
    context.close()
