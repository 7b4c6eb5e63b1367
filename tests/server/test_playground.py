"""The page at /, as a person with a keyboard uses it, against a real server; and what it is told of models."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest

from denoised.server.playground import FOLDER, options
from tests import tiny
from tests.contract.support import folder
from tests.server.browser import chromium, needs_browser
from tests.server.live import KEY, Live, live
from tests.server.test_images import picture
from tests.tiny.pictures import picture as drawn

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]
PROMPT = "a large red circle above a small blue square"
PATIENCE = 60_000  # milliseconds that anything may take on a machine that is busy


@dataclasses.dataclass(kw_only=True)
class Seat:
    """A tab of the browser, with what it asked for and what it complained of."""

    page: Any
    asked: list[str] = dataclasses.field(default_factory=list)
    complaints: list[str] = dataclasses.field(default_factory=list)

    def type(self, **fields: Any) -> None:
        for name, value in fields.items():
            self.page.fill(f"#f-{name}", str(value))

    def shown(self, selector: str, text: str | None = None) -> Any:
        found = self.page.locator(selector, has_text=text) if text else self.page.locator(selector)
        found.first.wait_for()
        return found

    def make(self, prompt: str = PROMPT, **fields: Any) -> None:
        """Generate by the keyboard, and wait for the result."""
        count = self.page.locator(".tile").count()
        self.type(prompt=prompt, **fields)
        self.page.keyboard.press("Control+Enter")
        self.page.locator(".tile").nth(count).wait_for()

    def pixels(self, selector: str) -> np.ndarray:
        """Of a picture as the page has it: [height, width, 3]."""
        drawn: str = self.page.locator(selector).first.evaluate(
            """(image) => {
                const canvas = document.createElement("canvas");
                [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
                canvas.getContext("2d").drawImage(image, 0, 0);
                return canvas.toDataURL("image/png").split(",")[1];
            }"""
        )
        return picture(drawn)[..., :3].astype(int)


def seat(browser: Any, url: str) -> Seat:
    page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
    page.set_default_timeout(PATIENCE)
    made = Seat(page=page)
    page.on("request", lambda request: made.asked.append(request.url))
    page.on("pageerror", lambda error: made.complaints.append(str(error)))
    page.on("console", lambda said: made.complaints.append(said.text) if said.type == "error" else None)
    page.goto(f"{url}/")
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def tab(browser: Any, shapes: Live) -> Seat:
    """One tab for all: it has its key after the first test."""
    return seat(browser, shapes.url)


# ------------------------------------------------------------------ what the page is told


def test_page_is_open_and_closed_to_everything_else(shapes: Live) -> None:
    """Files come without a key, whole or not at all, and may load nothing from elsewhere; the model's data need it."""
    stranger = shapes.closing.enter_context(httpx2.Client(base_url=shapes.url))
    page = stranger.get("/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", page.text), "nothing is fetched from elsewhere"
    names = [path.name for path in FOLDER.iterdir()]
    for name in names:
        file = stranger.get(f"/playground/{name}")
        assert file.content == (FOLDER / name).read_bytes()
        assert file.headers["x-content-type-options"] == "nosniff"
        again = stranger.get(f"/playground/{name}", headers={"If-None-Match": file.headers["etag"]})
        assert again.status_code == 304
    for named in set(re.findall(r'"playground/([a-z.]+)"', page.text)):
        assert named in names
    for odd in ("nope.js", "..%2fapp.py", "%2e%2e/app.py", "index.html/x"):
        assert stranger.get(f"/playground/{odd}").status_code in (401, 404)
    assert stranger.get("/v1/playground").status_code == 401
    assert all(len(path.read_text().splitlines()) < 300 for path in FOLDER.iterdir())


def test_options_are_those_that_a_request_may_say(shapes: Live) -> None:
    """Each is taken by the server when it is sent; what the form does not show, the model does not take."""
    told = shapes.http.get("/v1/playground").json()
    assert (told["model"], told["kind"], told["size_multiple"], told["max_n"]) == ("shapes", "image", 16, 4)
    assert (told["takes_image"], told["takes_mask"], told["needs_image"]) == (False, False, False)
    fields = told["options"]["properties"]
    assert fields["num_inference_steps"]["default"] == 4
    assert fields["true_cfg_scale"] == {
        "type": "number",
        "minimum": 0,
        "maximum": 1000,
        "default": 4.0,
        "description": "classifier-free guidance with a negative prompt",
    }
    assert "num_frames" not in fields
    assert "prompt_embeds" not in fields["extra_args"]["properties"]
    body: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "blue", "n": 1, "width": 64, "height": 64, "seed": 3}
    body |= {"num_inference_steps": 2, "guidance_scale": 1.0, "true_cfg_scale": 2.0, "max_sequence_length": 64}
    assert body.keys() == fields.keys() - {"sigmas", "extra_args"}
    assert shapes.http.post("/v1/images/generations", json=body).status_code == 200


def test_options_of_other_kinds(shapes: Live) -> None:
    """By what `__call__` takes, no model by name."""
    video = dataclasses.replace(
        shapes.engine.info,
        kind="video",
        parameters=frozenset(
            {"self", "prompt", "num_frames", "strength", "attention_kwargs", "use_resolution_binning"}
        ),
        branching_config=frozenset({"flow_shift"}),
        defaults={"fps": 16, "num_frames": 9},
    )
    fields = options(video, max_n=4)["properties"]
    assert fields.keys() == {"prompt", "num_frames", "fps", "strength", "seed", "flow_shift", "extra_args"}
    assert (fields["num_frames"]["default"], fields["fps"]["default"]) == (9, 16)
    assert fields["extra_args"]["properties"].keys() == {"use_resolution_binning"}
    sound = dataclasses.replace(video, kind="audio", parameters=frozenset({"prompt", "audio_end_in_s"}), defaults={})
    assert options(sound, max_n=4)["properties"].keys() == {
        "input",
        "audio_length",
        "seed",
        "flow_shift",
        "extra_args",
    }


# ------------------------------------------------------------------ the page


@needs_browser
def test_key_is_asked_for_and_kept_in_the_tab(tab: Seat) -> None:
    tab.shown("#key-dialog[open]")
    tab.page.fill("#key", "no-key-of-ours")
    tab.page.keyboard.press("Enter")
    tab.shown("#key-problem:not([hidden])")
    tab.page.fill("#key", KEY)
    tab.page.keyboard.press("Enter")
    tab.shown("html[data-ready]")
    assert tab.page.evaluate("[localStorage, sessionStorage].map((s) => JSON.stringify(s).includes('key-of-a'))") == [
        *(False, True)
    ]
    assert tab.shown("#f-prompt").evaluate("(e) => e === document.activeElement")
    tab.complaints.clear()  # Chromium's own, of the two 401s


@needs_browser
def test_generate_shows_steps_and_previews_and_the_right_picture(shapes: Live, tab: Seat) -> None:
    tab.type(prompt=PROMPT, seed=11, num_inference_steps=12)
    tab.page.keyboard.press("Control+Enter")
    tab.shown("#bar i.done")
    assert re.fullmatch(r"Step \d+ of 12( · about .* left)?", tab.shown("#status", "Step").inner_text())
    tab.shown(".previews img")
    tab.shown(".receipt")
    assert tab.page.locator("#running").is_hidden()
    body = {"prompt": PROMPT, "seed": 11, "num_inference_steps": 12}
    answer = shapes.http.post("/v1/images/generations", json=body).json()
    assert np.abs(tab.pixels(".media img") - picture(answer["data"][0]["b64_json"])).max() <= 1
    receipt = json.loads(tab.page.locator(".receipt pre").text_content())
    assert (receipt["seed"], receipt["steps"]) == (11, 12)


@needs_browser
def test_escape_cancels_and_frees_the_ranks(shapes: Live, tab: Seat) -> None:
    before = shapes.stats()
    tab.type(prompt=PROMPT, num_inference_steps=9000)
    tab.page.keyboard.press("Control+Enter")
    tab.shown("#bar i.done, #status:text('Step 1 ')")
    tab.page.keyboard.press("Escape")
    shapes.until(shapes.idle, 20)
    assert shapes.stats().errors_total["aborted"] == before.errors_total.get("aborted", 0) + 1
    tab.shown("#generate:enabled")
    assert tab.page.locator("#alert").is_hidden(), "what one asked for is no error"
    assert tab.page.locator(".tile").count() == 1


@needs_browser
def test_same_seed_and_one_thing_changed(tab: Seat) -> None:
    """A past picture brings its settings and its seed; the next one stands beside it, with what was changed."""
    tab.type(prompt="something else", num_inference_steps="", seed="")
    tab.page.locator(".tile").first.click()
    assert tab.page.input_value("#f-prompt") == PROMPT
    assert tab.page.input_value("#f-seed") == "11"
    tab.shown("#changes", "Seed 11 is kept")
    tab.type(true_cfg_scale=1)
    tab.shown("#changes .chip", "True CFG scale: 4 → 1")
    before = tab.pixels(".media img")
    tab.page.keyboard.press("Control+Enter")
    tab.shown(".compared")
    assert tab.page.locator(".compared .changes li").all_inner_texts() == ["True CFG scale\n4\n→\n1"]
    assert np.array_equal(tab.pixels("figure:nth-of-type(1) img"), before)
    assert not np.array_equal(tab.pixels("figure:nth-of-type(2) img"), before)


@needs_browser
def test_gallery_survives_a_reload_and_is_walked_by_keys(tab: Seat) -> None:
    tab.page.reload()
    tab.shown("html[data-ready]")
    assert tab.page.locator(".tile").count() == 2
    tab.page.locator(".tile").first.focus()
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("Enter")
    receipt = json.loads(tab.page.locator(".receipt pre").text_content())
    assert (receipt["seed"], receipt["steps"]) == (11, 12)
    assert tab.page.locator(".tile").nth(1).get_attribute("aria-selected") == "true"
    tab.page.keyboard.press("ArrowLeft")
    tab.page.keyboard.press("Delete")
    tab.page.locator(".tile").nth(1).wait_for(state="detached")
    assert tab.page.locator(".receipt").count() == 1, "another one is shown"
    assert tab.page.locator(".tile").evaluate("(e) => e === document.activeElement")


@needs_browser
def test_fork_and_pick_computes_nothing_twice(shapes: Live, tab: Seat) -> None:
    """Three drafts of two steps out of six; the second goes on by its number, and is the picture of its seed."""
    tab.type(prompt=PROMPT, seed=20, num_inference_steps=6, true_cfg_scale="")
    tab.page.fill("#fork-n", "3")
    tab.page.fill("#fork-steps", "2")
    tab.page.click("#draft")
    tab.shown(".draft[data-state=ready] >> nth=2")
    tab.page.locator(".draft").first.focus()
    tab.page.keyboard.press("2")
    tab.shown(".draft[data-state=done]").click()
    receipt = json.loads(tab.page.locator(".receipt pre").text_content())
    assert (receipt["seed"], receipt["steps"], receipt["resumed_from_step"]) == (21, 6, 2)
    assert receipt["ranks"][0]["forwards"] == 2 * (6 - 2), "counted where they ran"
    assert tab.page.locator(".receipt .bar i.kept").count() == 2
    body = {"prompt": PROMPT, "seed": 21, "num_inference_steps": 6}
    answer = shapes.http.post("/v1/images/generations", json=body).json()
    assert np.abs(tab.pixels(".media img") - picture(answer["data"][0]["b64_json"])).max() <= 1
    assert tab.page.input_value("#f-seed") == "21"


@needs_browser
def test_errors_are_shown_at_their_field_and_as_text(tab: Seat) -> None:
    """What the browser can know is not sent; what the server says is text, whatever is in it."""
    tab.type(width=100)
    tab.page.keyboard.press("Control+Enter")
    assert tab.shown("#f-width[aria-invalid=true]").evaluate("(e) => e === document.activeElement")
    tab.type(width="", prompt="<img src=x onerror=alert(1)>", num_inference_steps=2, seed="")
    tab.make("<img src=x onerror=alert(1)>")
    tab.shown(".receipt .asked", "<img src=x onerror=alert(1)>")
    assert tab.page.locator("img[src=x]").count() == 0
    tab.type(width=256, height=512)
    tab.page.keyboard.press("Control+Enter")
    tab.shown("#alert", "more than max_pixels")
    tab.shown("[aria-invalid=true]")
    tab.complaints.clear()  # Chromium's own, of the 400


@needs_browser
def test_themes_narrow_windows_and_nothing_from_elsewhere(shapes: Live, tab: Seat) -> None:
    page = tab.page
    colour = "getComputedStyle(document.documentElement).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(colour) != light, "as the system has it"
    page.click("#theme")
    assert page.evaluate(colour) == light, "as the button says"
    for width in (400, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) <= 0
    unnamed = "(e) => !e.labels?.length && !e.textContent.trim() && !e.ariaLabel"
    assert (
        page.evaluate(f"[...document.querySelectorAll('input, select, textarea, button')].filter({unnamed}).length")
        == 0
    )
    assert all(url.startswith((shapes.url, "blob:")) for url in tab.asked)
    assert tab.complaints == []


# ------------------------------------------------------------------ other kinds of models


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "defaults", "result"),
    [
        ("qwen_image_edit_plus", {"height": 32, "width": 32}, ".media img"),
        ("wan22_i2v", {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 1.0, "fps": 8}, ".media video"),
        ("stable_audio", {}, ".media audio"),
    ],
)
def test_uploads_videos_and_sound(
    browser: Any, name: str, defaults: dict[str, Any], result: str, tmp_path: Any
) -> None:
    """Each through its own route, with what the page keeps of it."""

    drawn(64, 64).save(tmp_path / "in.png")
    settings: Any = {"plugins": ("tests.contract.rank_setup",)}
    with live(folder(name), default_sampling_params={"num_inference_steps": 2, **defaults}, **settings) as server:
        there = seat(browser, server.url)
        there.shown("html[data-ready]")
        there.page.locator("textarea").first.fill("a cat")
        if there.page.locator("input[type=file]").count():
            there.page.set_input_files("input[type=file]", tmp_path / "in.png")
            there.shown(".uploaded img")
        there.page.keyboard.press("Control+Enter")
        there.shown(result)
        there.page.locator(".tile").click()
        assert there.page.locator("#f-seed").input_value()
        assert there.complaints == []
        there.page.context.close()
