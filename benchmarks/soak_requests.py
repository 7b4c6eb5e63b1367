"""What a soak sends: a catalogue of requests with their right answers, wrong requests, and the ways to send."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from denoised import Omni, OmniDiffusionSamplingParams

Body = dict[str, Any]
KEYS = ("key-of-a", "key-of-b")
MAX_PRIORITY = 5
PATIENCE = 600.0
# Steps of requests that are to be cancelled: enough that few of them end before.
LONG = 60
_COLORS = ("red", "blue", "green", "yellow", "purple", "orange")
_FORMS = ("circle", "square", "triangle", "star")


def catalogue(count: int = 24) -> list[Body]:
    """Distinct requests of one or two pictures, two sizes, 2 to 6 steps, with and without guidance."""
    return [
        {
            "prompt": f"a large {_COLORS[i % 6]} {_FORMS[i % 4]} above a small {_COLORS[(i + 2) % 6]} square",
            "size": "128x128" if i % 6 == 4 else "64x64",
            "num_inference_steps": 2 + i % 5,
            "n": 1 + (i % 4 == 3),
            "seed": i,
            **({"true_cfg_scale": 4.0, "negative_prompt": "blurry"} if i % 2 else {"true_cfg_scale": 1.0}),
        }
        for i in range(count)
    ]


def solo(bodies: Sequence[Body]) -> list[list[str]]:
    """Each by itself, through an engine of one rank: the digests of its pictures."""
    with Omni(num_threads=1, deterministic=True) as omni:
        return [[digest(image) for image in _alone(omni, body)] for body in bodies]


def _alone(omni: Omni, body: Body) -> list[Any]:
    width, height = map(int, body["size"].split("x"))
    names = ("num_inference_steps", "true_cfg_scale", "seed")
    params = OmniDiffusionSamplingParams(
        width=width, height=height, num_outputs_per_prompt=body["n"], **{name: body[name] for name in names}
    )
    prompt: Any = {name: body[name] for name in ("prompt", "negative_prompt") if name in body}
    (output,) = omni.generate([prompt], [params], use_tqdm=False)
    assert output.error is None, output.error
    images: list[Any] = output.images
    return images


def digest(picture: Any) -> str:
    """Of a picture's size and pixels."""
    return hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes()).hexdigest()


def _of_png(b64: str | None) -> str:
    return digest(Image.open(io.BytesIO(base64.b64decode(b64 or ""))))


# ------------------------------------------------------------------ answered


class Sender:
    """Connections of clients of all kinds. Every way gives the digests of the pictures that came.

    run_again: answers whose receipts say that ranks died under them.
    """

    def __init__(self, url: str) -> None:
        self._url, self.run_again = url, 0
        self._http = httpx2.AsyncClient(base_url=url, timeout=PATIENCE)
        settings: Any = {"base_url": f"{url}/v1", "timeout": PATIENCE, "max_retries": 0}
        self._waiting = {key: OpenAI(api_key=key, **settings) for key in KEYS}
        self._open = {key: AsyncOpenAI(api_key=key, **settings) for key in KEYS}
        ways: Sequence[Callable[[Body, str], Awaitable[list[str]]]]
        ways = (self.json, self.streamed, self.chat, self.awaited, self.waited)
        self.ways = {way.__name__: way for way in ways}

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        for client in self._open.values():
            await client.close()
        for waiting in self._waiting.values():
            waiting.close()

    async def json(self, body: Body, key: str) -> list[str]:
        """Plain HTTP."""
        answer = await self._http.post("/v1/images/generations", json=body, headers=_header(key))
        found = answer.raise_for_status().json()
        self._read(found["receipt"])
        return [_of_png(image["b64_json"]) for image in found["data"]]

    async def streamed(self, body: Body, key: str) -> list[str]:
        """Server-sent events with previews, by the official client."""
        given, extra = _split(body)
        events = await self._open[key].images.generate(**given, stream=True, partial_images=1, extra_body=extra)
        done: Any = [event async for event in events if event.type == "image_generation.completed"]
        self._read(done[0].receipt)
        return [_of_png(event.b64_json) for event in done]

    async def chat(self, body: Body, key: str) -> list[str]:
        """The official client on a thread, as a chat."""
        messages: Any = [{"role": "user", "content": body["prompt"]}]
        extra = {name: value for name, value in body.items() if name != "prompt"}
        answer = await asyncio.to_thread(
            self._waiting[key].chat.completions.create, model="shapes", messages=messages, extra_body=extra
        )
        self._read(_receipt(answer))
        pictures: Any = [choice.message.content for choice in answer.choices]
        return [_of_png(picture[0]["image_url"]["url"].partition(",")[2]) for picture in pictures]

    async def awaited(self, body: Body, key: str) -> list[str]:
        """The official client in the event loop."""
        given, extra = _split(body)
        answer = await self._open[key].images.generate(**given, extra_body=extra)
        self._read(_receipt(answer))
        return [_of_png(image.b64_json) for image in answer.data or ()]

    async def waited(self, body: Body, key: str) -> list[str]:
        """The official client on a thread."""
        given, extra = _split(body)
        answer = await asyncio.to_thread(lambda: self._waiting[key].images.generate(**given, extra_body=extra))
        self._read(_receipt(answer))
        return [_of_png(image.b64_json) for image in answer.data or ()]

    def _read(self, receipt: dict[str, Any]) -> None:
        self.run_again += receipt["restarts"] > 0

    # -------------------------------------------------------------- hung up

    async def hang_up(self, body: Body, key: str, rng: random.Random) -> bool:
        """Ask for something long and go away; True if the answer was there before."""
        body, after = body | {"num_inference_steps": LONG}, rng.uniform(0.0, 0.6)
        way = rng.choice((self._cancelled, self._left, self._cut))
        return await way(body, key, after)

    async def _cancelled(self, body: Body, key: str, after: float) -> bool:
        """A task of the event loop that is cancelled."""
        try:
            await asyncio.wait_for(self.json(body, key), after)
        except TimeoutError:
            return False
        return True

    async def _left(self, body: Body, key: str, after: float) -> bool:
        """A stream that is left after a few events."""
        given, extra = _split(body)
        events = await self._open[key].images.generate(**given, stream=True, extra_body=extra)
        seen: list[str] = []
        async for event in events:
            seen.append(event.type)
            if len(seen) > 10 * after:
                break
        await events.close()
        return seen[-1:] == ["image_generation.completed"]

    async def _cut(self, body: Body, key: str, after: float) -> bool:
        """A connection that is closed without a word."""
        raw = json.dumps(body).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        port = int(self._url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + raw)
            await asyncio.sleep(after)
        return False

    # -------------------------------------------------------------- refused

    async def wrong(self, rng: random.Random) -> str:
        """Something that must be refused; what was said instead of the right refusal, or nothing."""
        method, path, extra, status, param = rng.choice(WRONG)
        answer = await self._http.request(method, path, **{"headers": _header(KEYS[0]), **extra})
        error = answer.json().get("error", {})
        if (answer.status_code, error.get("param")) == (status, param):
            return ""
        return f"{method} {path} {extra}: {answer.status_code} {answer.text:.200}"


def _header(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _receipt(answer: Any) -> dict[str, Any]:
    """A field that OpenAI's answers do not have."""
    found: dict[str, Any] = answer.receipt
    return found


def _split(body: Body) -> tuple[Any, Body]:
    """OpenAI's own fields, and the others."""
    own = ("prompt", "size", "n")
    return {k: body[k] for k in own}, {k: v for k, v in body.items() if k not in own}


_IMAGES, _PROMPT = "/v1/images/generations", {"prompt": "a red circle"}
_JSON = {"Content-Type": "application/json"}
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
# Method, path, what is sent, the status and the field that the answer must name.
WRONG: tuple[tuple[str, str, dict[str, Any], int, str | None], ...] = (
    ("POST", _IMAGES, {"json": _PROMPT | {"stepps": 3}}, 400, "stepps"),
    ("POST", _IMAGES, {"json": _PROMPT | {"size": "65x64"}}, 400, "width"),
    ("POST", _IMAGES, {"json": _PROMPT | {"num_inference_steps": "many"}}, 400, "num_inference_steps"),
    ("POST", _IMAGES, {"json": _PROMPT | {"n": 1000}}, 400, "n"),
    ("POST", _IMAGES, {"json": {"size": "64x64"}}, 400, "prompt"),
    ("POST", _IMAGES, {"content": b"{"}, 415, None),
    ("POST", _IMAGES, {"content": b"{", "headers": _header(KEYS[1]) | _JSON}, 400, None),
    ("POST", _IMAGES, {"json": _PROMPT | {"model": "another"}}, 404, "model"),
    ("POST", _IMAGES, {"json": _PROMPT | {"priority": MAX_PRIORITY + 1}}, 400, "priority"),
    ("POST", _IMAGES, {"json": _PROMPT, "headers": _header("nobody")}, 401, None),
    ("POST", "/v1/images/edits", {"data": _PROMPT, "files": {"image": ("x.png", _PIXEL)}}, 400, "image"),
    ("POST", "/v1/chat/completions", {"json": {"messages": []}}, 400, "messages"),
    ("POST", "/v1/videos", {"json": _PROMPT}, 400, "model"),
    ("POST", "/v1/audio/generate", {"json": {"input": "rain"}}, 400, "model"),
    ("GET", "/v1/videos/video_0", {}, 404, "video_id"),
)
