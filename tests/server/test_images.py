"""/v1/images/generations and /v1/chat/completions by the official client: right pictures, streams, hanging up."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import time
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from denoised.runtime.load import BUILTIN
from tests import tiny
from tests.server.conftest import STEPS
from tests.server.live import KEY, Live

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]
PROMPT = "a large red circle above a small blue square"


@pytest.fixture(scope="module")
def plain() -> Any:
    """The unmodified pipeline's pictures for PROMPT."""
    pipeline = DiffusionPipeline.from_pretrained(BUILTIN["shapes"])
    pipeline.set_progress_bar_config(disable=True)

    def make(seed: int, count: int = 1, **more: Any) -> list[np.ndarray]:
        torch.set_num_threads(1)
        settings = {"height": 128, "width": 128, "num_inference_steps": STEPS, "true_cfg_scale": 4.0} | more
        generator = torch.Generator().manual_seed(seed)
        made = pipeline(
            PROMPT, negative_prompt="", num_images_per_prompt=count, generator=generator, **settings
        ).images
        return [np.asarray(image) for image in made]

    return make


def picture(b64: str, format: str = "PNG") -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    assert image.format == format
    assert not image.getexif()
    assert not getattr(image, "text", None)
    return np.asarray(image)


def test_pictures_are_those_of_the_plain_pipeline(shapes: Live, plain: Any) -> None:
    """Two of them, by seed, at default settings that the server was started with; and the receipt comes twice."""
    raw = shapes.client.images.with_raw_response.generate(prompt=PROMPT, n=2, extra_body={"seed": 5})
    answer = raw.parse()
    for given, wanted in zip(answer.data, plain(5, count=2), strict=True):
        assert np.abs(picture(given.b64_json).astype(int) - wanted).max() <= 1
    assert (answer.size, answer.output_format, answer.background) == ("128x128", "png", "opaque")
    assert (answer.receipt["steps"], answer.receipt["seed"]) == (STEPS, 5)
    assert f"{STEPS} steps" in raw.headers["X-Denoised-Receipt"]
    assert "seed 5" in raw.headers["X-Denoised-Receipt"]
    assert raw.headers["X-Request-Id"].startswith("img_")


def test_every_parameter_arrives(shapes: Live, plain: Any) -> None:
    """Under OpenAI's names and under ours, in the body's top level and in extra_args."""
    body = {"seed": 3, "num_inference_steps": 2, "true_cfg_scale": 2.0, "extra_args": {"max_sequence_length": 64}}
    answer = shapes.client.images.generate(prompt=PROMPT, size="64x96", extra_body=body)
    [wanted] = plain(3, num_inference_steps=2, true_cfg_scale=2.0, width=64, height=96, max_sequence_length=64)
    assert np.abs(picture(answer.data[0].b64_json).astype(int) - wanted).max() <= 1
    assert answer.receipt["steps"] == 2


@pytest.mark.parametrize(("format", "named"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(shapes: Live, format: Any, named: str) -> None:
    def made(quality: int) -> str:
        answer = shapes.client.images.generate(
            prompt=PROMPT, output_format=format, output_compression=quality, extra_body={"seed": 1}
        )
        assert answer.output_format == format
        return str(answer.data[0].b64_json)

    assert picture(made(90), named).shape == (128, 128, 3)
    assert len(made(5)) < len(made(90))


def test_async_client_and_chat(shapes: Live) -> None:
    """The same picture by both routes, asked for at the same time."""

    async def both() -> tuple[Any, Any]:
        body = {"seed": 9, "num_inference_steps": 2, "modalities": ["image"]}
        message: Any = {"role": "user", "content": [{"type": "text", "text": PROMPT}]}
        async with shapes.async_client() as client:
            return await asyncio.gather(
                client.images.generate(prompt=PROMPT, extra_body={"seed": 9, "num_inference_steps": 2}),
                client.chat.completions.create(model="shapes", messages=[message], extra_body=body),
            )

    image, chat = asyncio.run(both())
    [choice] = chat.choices
    [part] = choice.message.content
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert np.abs(picture(data).astype(int) - picture(image.data[0].b64_json)).max() <= 1
    assert (chat.receipt["steps"], choice.finish_reason, chat.model) == (2, "stop", "shapes")


def test_parameters_of_chat_may_be_written_into_a_literal_extra_body(shapes: Live) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "extra_body": {"num_inference_steps": 2, "n": 2}}
    answer = shapes.http.post("/v1/chat/completions", json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["receipt"]["steps"] == 2


def test_stream(shapes: Live) -> None:
    """Progress of every step, previews that get nearer to the picture, then the picture itself."""
    body = {"seed": 5, "num_inference_steps": 6}
    seen: dict[str, list[Any]] = {"progress": [], "partial_image": [], "completed": []}
    client = shapes.client
    for event in client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=body):
        seen[event.type.removeprefix("image_generation.")].append(event)
    assert [e.step for e in seen["progress"] if e.step] == [1, 2, 3, 4, 5, 6]
    assert {e.total_steps for e in seen["progress"] if e.step} == {6}
    [done] = seen["completed"]
    assert done.size == "128x128"
    assert done.receipt["steps"] == 6
    same = client.images.generate(prompt=PROMPT, extra_body=body)
    assert np.array_equal(picture(done.b64_json), picture(same.data[0].b64_json))
    assert [e.partial_image_index for e in seen["partial_image"]] == [0, 1]
    far, near = (
        np.abs(picture(e.b64_json).astype(int) - picture(done.b64_json)).mean() for e in seen["partial_image"]
    )
    assert near < far


def test_stream_that_is_refused_is_an_ordinary_error(shapes: Live) -> None:
    answer = shapes.http.post("/v1/images/generations", json={"prompt": "x", "stream": True, "size": "100x100"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "height"


def test_stream_that_fails_says_so_in_the_stream(shapes: Live) -> None:
    body = {"prompt": PROMPT, "stream": True, "timeout": 1.0, "num_inference_steps": 2000}
    with shapes.http.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.status_code == 200
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["code"] == "timeout"
    shapes.until(shapes.idle, 10)


# Longer than any test waits.
ENDLESS = {"prompt": PROMPT, "num_inference_steps": 9000}


def hang_up(shapes: Live, path: str, body: dict[str, Any]) -> float:
    """Send a request, wait until it computes, close the connection; the seconds until nothing runs."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", shapes.server.port)) as connection:
        steps = shapes.stats().work.steps_total
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        shapes.until(lambda: shapes.stats().work.steps_total > steps + 2)
    return shapes.until(shapes.idle, 20)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", ENDLESS),
        ("/v1/images/generations", ENDLESS | {"stream": True}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": PROMPT}], "num_inference_steps": 9000},
        ),
    ],
    ids=["images", "stream", "chat"],
)
def test_hanging_up_stops_the_work(shapes: Live, path: str, body: dict[str, Any]) -> None:
    """Within a step or so; the engine counts the abort and how long it took, and goes on."""
    before = shapes.stats()
    hang_up(shapes, path, body)
    after = shapes.stats()
    assert after.errors_total["aborted"] == before.errors_total.get("aborted", 0) + 1
    assert after.time_to_free.count == before.time_to_free.count + 1
    step = after.work.tick_seconds_total / after.work.ticks_total
    assert after.time_to_free.latest < max(3 * step, 1.0)
    assert shapes.server.serving.num_running == 0
    answer = shapes.client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 2})
    assert answer.data


def test_deadline_is_504_and_stops_the_work(shapes: Live) -> None:
    began = time.monotonic()
    answer = shapes.http.post("/v1/images/generations", json=ENDLESS | {"timeout": 1})
    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "timeout"
    assert 1 <= time.monotonic() - began < 20
    shapes.until(shapes.idle, 10)
