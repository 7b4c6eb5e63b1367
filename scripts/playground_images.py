"""The pictures of the playground in docs/images, made with Chromium from a server of the built-in model.

python -m scripts.playground_images docs/images
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from tests.server.browser import chromium
from tests.server.live import live
from tests.server.test_playground import Seat, seat

SIZE = {"width": 1180, "height": 900}
PROMPTS = ("a green ring left of a yellow star", "a small orange cross", "three purple triangles")


def shoot(page: Any, path: Path) -> None:
    """As a PNG of few colours, which is a third of the bytes."""
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    few = image.quantize(256)
    image.quantize(palette=few, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(path, path.stat().st_size, "bytes")


def compared(tab: Seat, path: Path) -> None:
    """A past picture and the one with another prompt beside it."""
    for prompt in PROMPTS:
        tab.make(prompt, num_inference_steps=16)
    tab.make("a large red circle above a small blue square", num_inference_steps=24, seed=7)
    tab.page.locator(".tile").first.click()
    tab.make("a large red circle above a small green star")
    tab.shown(".compared")
    shoot(tab.page, path)


def drafts(tab: Seat, path: Path) -> None:
    """The second of four drafts, on its way."""
    tab.page.set_viewport_size({**SIZE, "height": 690})
    tab.type(prompt="a large yellow star and a small blue circle", num_inference_steps=28, seed=40)
    tab.page.fill("#fork-steps", "7")
    tab.page.click("#draft")
    tab.shown(".draft[data-state=ready] >> nth=3")
    tab.page.keyboard.press("2")
    tab.shown(".draft[data-state=runs] .bar i.kept >> nth=6")
    tab.shown(".draft[data-state=runs] .bar i.done >> nth=2")
    shoot(tab.page, path)


def main(folder: Path) -> None:
    with live(max_num_seqs=4) as server, chromium() as browser:
        tab = seat(browser, server.url)
        tab.page.set_viewport_size(SIZE)
        tab.shown("html[data-ready]")
        tab.page.emulate_media(color_scheme="light")
        compared(tab, folder / "playground-light.png")
        tab.page.emulate_media(color_scheme="dark")
        drafts(tab, folder / "playground-dark.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
