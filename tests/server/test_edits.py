"""/v1/images/edits, and pictures in chats: uploads, data: URLs, masks, and what is refused of them."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from diffusers import DiffusionPipeline, QwenImageInpaintPipeline
from PIL import Image

from denoised.runtime.load import BUILTIN
from tests import tiny
from tests.contract.support import folder, plain
from tests.server.live import Live, live
from tests.server.test_images import picture
from tests.tiny.pictures import picture as drawn

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]
EDITOR = "qwen_image_edit_plus"
DEFAULTS = {"num_inference_steps": 2, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def editor() -> Iterator[Live]:
    settings: Any = {"max_pixels": 128 * 128, "plugins": ("tests.contract.rank_setup",)}
    with live(folder(EDITOR), max_body_mb=1, default_sampling_params=DEFAULTS, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def painter() -> Iterator[Live]:
    """The built-in model in diffusers' inpainting pipeline, which nobody here declared."""
    with tempfile.TemporaryDirectory() as path:
        whole = DiffusionPipeline.from_pretrained(BUILTIN["shapes"])
        QwenImageInpaintPipeline(**whole.components).save_pretrained(path)
        defaults = {"num_inference_steps": 6, "height": 128, "width": 128, "true_cfg_scale": 4.0, "strength": 1.0}
        with live(path, default_sampling_params=defaults, skip_warm_up=True, served_model_name="painter") as made:
            yield made


def png(image: Image.Image, format: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **more)
    return file.getvalue()


def expected(images: list[Image.Image], seed: int) -> np.ndarray:
    request = {"prompt": "a cat", "image": images, **DEFAULTS}
    [pixels] = plain(EDITOR, request, seed, "np")
    return (np.asarray(pixels) * 255).round().astype(int)[0]


def test_several_pictures_give_what_the_plain_pipeline_gives(editor: Live) -> None:
    """As uploads by the official client; as data: URLs in a chat and in the form."""
    images = [drawn(64, 64, seed=1), drawn(96, 48, seed=2)]
    raw = [png(image) for image in images]
    wanted = expected(images, 4)
    answer = editor.client.images.edit(image=raw, prompt="a cat", extra_body={"seed": 4})
    assert np.abs(picture(answer.data[0].b64_json) - wanted).max() <= 1
    urls = [f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in raw]
    parts: Any = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message: Any = {"role": "user", "content": [{"type": "text", "text": "a cat"}, *parts]}
    name = editor.client.models.list().data[0].id
    chat = editor.client.chat.completions.create(model=name, messages=[message], extra_body={"seed": 4})
    [part] = chat.choices[0].message.content
    assert np.abs(picture(part["image_url"]["url"].partition(",")[2]) - wanted).max() <= 1
    form = {"prompt": "a cat", "seed": "4", "url": urls}
    other = editor.http.post("/v1/images/edits", data=form)
    assert np.abs(picture(other.json()["data"][0]["b64_json"]) - wanted).max() <= 1


def test_stream_of_edits(editor: Live) -> None:
    seen = [
        event.type
        for event in editor.client.images.edit(image=png(drawn(64, 64, seed=1)), prompt="a cat", stream=True)
    ]
    assert seen[-1] == "image_edit.completed"
    assert "image_edit.progress" in seen


def test_pictures_are_turned_as_their_exif_says(editor: Live) -> None:
    upright = drawn(96, 48, seed=3)
    exif = Image.Exif()
    exif[0x0112] = 8  # lies on its side: to be turned by 90 degrees
    lying = png(upright.rotate(-90, expand=True), exif=exif)
    answer = editor.client.images.edit(image=lying, prompt="a cat", extra_body={"seed": 4})
    assert np.abs(picture(answer.data[0].b64_json) - expected([upright], 4)).max() <= 1


@pytest.mark.parametrize("kind", ["transparent", "white"])
def test_mask_says_where_to_paint(painter: Live, kind: str) -> None:
    """Left of the middle only, whichever way the mask says it; and it paints there."""
    start = Image.new("RGB", (128, 128), (40, 160, 200))
    if kind == "transparent":
        mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
        mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    else:
        mask = Image.new("L", (128, 128), 0)
        mask.paste(255, (0, 0, 64, 128))
    answer = painter.client.images.edit(
        image=png(start), mask=png(mask), prompt="a large red circle", extra_body={"seed": 1}
    )
    changed = np.abs(picture(answer.data[0].b64_json).astype(int) - np.asarray(start)).mean(axis=(0, 2))
    assert changed[80:].max() < changed[:48].mean() / 4
    assert answer.receipt["model"]


def broken_png() -> bytes:
    return png(drawn(64, 64, seed=1))[:200]


def bomb() -> bytes:
    """A few bytes that would be 100 megapixels."""
    return png(Image.new("1", (10_000, 10_000)))


def animated() -> bytes:
    frames = [drawn(32, 32, seed=i) for i in range(3)]
    return png(frames[0], "WEBP", save_all=True, append_images=frames[1:])


GOOD = png(drawn(64, 64, seed=1))


@pytest.mark.parametrize(
    ("fields", "files", "param", "says"),
    [
        ({}, {}, "image", "image is missing"),
        ({"image": "/etc/passwd"}, {}, "image", "not known"),
        ({}, {"image": b"none"}, "image", "no readable picture"),
        ({}, {"image": broken_png()}, "image", "no readable picture"),
        ({}, {"image": bomb()}, "image", "more than max_pixels"),
        ({}, {"image": animated()}, "image", "3 frames"),
        ({}, {"image": png(drawn(32, 32, seed=1), "GIF")}, "image", "PNG, JPEG or WebP"),
        ({}, {"image": GOOD, "mask": GOOD}, None, "does not take it"),
        ({}, {"image": GOOD, "mask": png(drawn(32, 32, seed=1))}, "mask", "64 x 64"),
        ({}, {"image": GOOD, "markup": GOOD}, "markup", "is no upload"),
        ({"url": "http://127.0.0.1/x.png"}, {}, "url", "fetches no URLs"),
        ({"url": "file:///etc/passwd"}, {}, "url", "fetches no URLs"),
        ({"url": "data:text/plain;base64,AAAA"}, {}, "url", "no data: URL of a picture"),
        ({"url": "data:image/png;base64,!!!"}, {}, "url", "no base64"),
        ({"seed": "x"}, {"image": GOOD}, "seed", "must be a whole number"),
        ({"n": "9" * 30}, {"image": GOOD}, "n", "at most"),
        ({"input_fidelity": "high"}, {"image": GOOD}, "input_fidelity", "cannot honour"),
        ({"sedd": "1"}, {"image": GOOD}, "sedd", "did you mean seed?"),
        ({"seed": ["1", "2"]}, {"image": GOOD}, "seed", "given twice"),
    ],
)
def test_refusals(editor: Live, fields: dict[str, Any], files: dict[str, bytes], param: str | None, says: str) -> None:
    texts = [(name, [given] if isinstance(given, str) else given) for name, given in fields.items()]
    parts: list[Any] = [(name, (None, value)) for name, values in texts for value in values]
    parts += [("prompt", (None, "x")), *((name, ("f", raw)) for name, raw in files.items())]
    answer = editor.http.post("/v1/images/edits", files=parts)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert says in error["message"]
    assert param is None or error["param"] == param


def test_text_to_image_route_needs_no_picture_but_this_model_does(editor: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="image is missing"):
        editor.client.images.generate(prompt="a cat")


def test_values_in_forms_have_the_types_of_their_fields(editor: Live) -> None:
    """Numbers, lists, objects by brackets, booleans: as the official client writes them."""
    body = {"sigmas": [1.0, 0.5], "true_cfg_scale": 2, "extra_args": {"max_sequence_length": 64}}
    answer = editor.client.images.edit(image=GOOD, prompt="a cat", n=2, stream=False, extra_body=body)
    assert len(answer.data) == 2
    assert answer.receipt["steps"] == 2


def test_upload_that_is_too_large_is_413(editor: Live) -> None:
    answer = httpx2.post(f"{editor.url}/v1/images/edits", files={"image": ("f", bytes(2**20))}, data={"prompt": "x"})
    assert answer.status_code == 413
