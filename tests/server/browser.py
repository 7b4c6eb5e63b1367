"""Headless Chromium for tests and for the pictures of the docs; who lacks it is told how to get it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

MISSING = "needs Chromium: apt-get install chromium"


def executable() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


needs_browser = pytest.mark.skipif(executable() is None, reason=MISSING)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Without its sandbox, which a container's root cannot have; it sees our own pages alone."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()
