"""What clients ask of a server in the benchmarks, and how: pictures by the built-in model, at random but by a seed."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

Ask = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Of one request: seconds until it was there, seconds until its work began and ticks that began in them, (seconds
    since it came, ETA) told."""

    seconds: float
    queued: float
    queued_ticks: int = 0
    told: list[tuple[float, float]] = field(default_factory=list)

    def eta_errors(self) -> list[float]:
        left = [(eta, self.seconds - at) for at, eta in self.told if 0.1 < at / self.seconds < 0.9]
        return [abs(eta - real) / real for eta, real in left]


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a server is, and the keys of its tenants."""

    url: str
    keys: tuple[str, str] = ("none", "none")
    has_metrics: bool = False

    def client(self, tenant: int) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=600)


# ---- what is asked


def _ask(rng: random.Random, *, sizes: list[int], steps: list[int], guided: float) -> Ask:
    color, thing = rng.choice(["red", "blue", "green", "yellow", "purple"]), rng.choice(["circle", "star", "ring"])
    size = rng.choice(sizes)
    ask = {
        "prompt": f"a large {color} {thing}",
        "size": f"{size}x{size}",
        "num_inference_steps": rng.choice(steps),
        "seed": rng.randrange(1000),
        "true_cfg_scale": 1.0,
    }
    return ask | ({"negative_prompt": "blurry", "true_cfg_scale": 4.0} if rng.random() < guided else {})


def small(count: int, seed: int) -> list[Ask]:
    rng = random.Random(seed)
    return [_ask(rng, sizes=[128], steps=[10], guided=1.0) for _ in range(count)]


def mix(count: int, seed: int) -> list[Ask]:
    rng = random.Random(seed)
    return [_ask(rng, sizes=[64, 128, 128, 192, 256], steps=[4, 8, 12, 20], guided=0.5) for _ in range(count)]


# ---- how it is asked


async def one(client: httpx2.AsyncClient, ask: Ask, stream: bool = False) -> Answer:
    began = time.perf_counter()
    if stream:
        return await _streamed(client, ask, began)
    reply = await client.post("/v1/images/generations", json=ask)
    reply.raise_for_status()
    return _answer(began, reply.json()["receipt"])


def _answer(began: float, receipt: dict[str, Any], told: Sequence[tuple[float, float]] = ()) -> Answer:
    return Answer(
        seconds=time.perf_counter() - began,
        queued=receipt["queued_seconds"],
        queued_ticks=receipt.get("queued_ticks", 0),
        told=list(told),
    )


async def _streamed(client: httpx2.AsyncClient, ask: Ask, began: float) -> Answer:
    told: list[tuple[float, float]] = []
    async with client.stream("POST", "/v1/images/generations", json={**ask, "stream": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            if event.get("eta_seconds") is not None:
                told.append((time.perf_counter() - began, event["eta_seconds"]))
            if event.get("type") == "image_generation.completed":
                return _answer(began, event["receipt"], told)
    raise RuntimeError("the stream ended without a picture.")
