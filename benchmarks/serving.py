"""`denoised serve` against a diffusers pipeline behind a lock in FastAPI, over HTTP, with the built-in model.

    python -m benchmarks.serving [--requests 64] [--rounds 3] [--only small mix poisson fairness]
        [--ranks --cfg-parallel-size 2]

As many threads for both: ours are two ranks of one, by default two replicas; the other shares each operation. Answers
are PNG files. Cases:

    small     eight clients, each with one request at a time: pictures of 128 x 128, 10 steps, guidance
    mix       the same with pictures of 64 to 256 pixels, 4 to 20 steps, with and without guidance
    poisson   the mix, coming in at random at 1.25 times the rate that the plain server can do; progress is streamed
    fairness  seven clients of one key send the mix without a pause, one of another key sends a small picture at a time

The ETA's error is taken from every progress event between a tenth and nine tenths of a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx2

from benchmarks.common import show
from benchmarks.servers import running

CLIENTS = 8
Ask = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Of one request: seconds until it was there, seconds until its work began, (seconds since it came, ETA) told."""

    seconds: float
    queued: float
    told: list[tuple[float, float]] = field(default_factory=list)

    def eta_errors(self) -> list[float]:
        left = [(eta, self.seconds - at) for at, eta in self.told if 0.1 < at / self.seconds < 0.9]
        return [abs(eta - real) / real for eta, real in left]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a server did in one case. `busy`: of each rank's time; seconds of a tick, and of the longest so far."""

    answers: list[Answer]
    seconds: float
    busy: list[float] = field(default_factory=list)
    tick: float = 0.0
    longest_tick: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.answers) / self.seconds


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a server is, and the keys of its tenants."""

    url: str
    keys: tuple[str, str] = ("none", "none")
    has_metrics: bool = False

    def client(self, tenant: int) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--ranks", nargs=argparse.REMAINDER, default=["--data-parallel-size", "2"], help="flags of our two ranks"
    )
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    keys = ("first", "second")
    ours = ["denoised.cli", "serve", "shapes", "--port", "0", "--num-threads", "1", *args.ranks]
    with ExitStack() as stack:
        engine = stack.enter_context(running(*ours, *(f"--api-key={key}" for key in keys)))
        plain = stack.enter_context(running("benchmarks.plain_server", "--threads", "2"))
        servers = {"engine": Server(url=engine, keys=keys, has_metrics=True), "plain": Server(url=plain)}
        asyncio.run(_compare(servers, args.only, args.requests, args.rounds))


async def _compare(servers: dict[str, Server], cases: list[str], count: int, rounds: int) -> None:
    for server in servers.values():
        await _closed(server, _small(CLIENTS, 0), {})
        await _closed(server, _mix(2 * CLIENTS, 0), {})
    rates: dict[str, float] = {}
    for case in cases:
        runs: dict[str, list[Run]] = {name: [] for name in servers}
        for number in range(rounds):
            for name in ("plain", "engine"):
                runs[name].append(await CASES[case](servers[name], count, number, rates))
        show(f"serving: {case}", _row(runs["engine"], runs["plain"]))


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


def _small(count: int, seed: int) -> list[Ask]:
    rng = random.Random(seed)
    return [_ask(rng, sizes=[128], steps=[10], guided=1.0) for _ in range(count)]


def _mix(count: int, seed: int) -> list[Ask]:
    rng = random.Random(seed)
    return [_ask(rng, sizes=[64, 128, 128, 192, 256], steps=[4, 8, 12, 20], guided=0.5) for _ in range(count)]


# ---- how it is asked


async def _one(client: httpx2.AsyncClient, ask: Ask, stream: bool = False) -> Answer:
    began = time.perf_counter()
    if stream:
        return await _streamed(client, ask, began)
    reply = await client.post("/v1/images/generations", json=ask)
    reply.raise_for_status()
    queued = reply.json()["receipt"]["queued_seconds"]
    return Answer(seconds=time.perf_counter() - began, queued=queued)


async def _streamed(client: httpx2.AsyncClient, ask: Ask, began: float) -> Answer:
    told: list[tuple[float, float]] = []
    async with client.stream("POST", "/v1/images/generations", json={**ask, "stream": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            if event.get("eta_seconds") is not None:
                told.append((time.perf_counter() - began, event["eta_seconds"]))
            if event.get("type") == "image_generation.completed":
                queued = event["receipt"]["queued_seconds"]
                return Answer(seconds=time.perf_counter() - began, queued=queued, told=told)
    raise RuntimeError("the stream ended without a picture.")


async def _closed(server: Server, asks: list[Ask], _: dict[str, float]) -> Run:
    """Eight clients, each of which sends its next request when it has its answer."""
    waiting, answers = list(asks), []

    async def client() -> None:
        async with server.client(0) as http:
            while waiting:
                answers.append(await _one(http, waiting.pop()))

    return await _measured(server, answers, asyncio.gather(*(client() for _ in range(CLIENTS))))


async def _measured(server: Server, answers: list[Answer], work: Any) -> Run:
    before, began = await _counters(server), time.perf_counter()
    await work
    seconds = time.perf_counter() - began
    after = await _counters(server)
    delta = {name: after[name] - before.get(name, 0.0) for name in after}
    busy = [value / seconds for name, value in sorted(delta.items()) if "rank_busy" in name]
    ticks = sum(v for k, v in delta.items() if k.startswith("denoised_ticks_total"))
    total = sum(v for k, v in delta.items() if k.startswith("denoised_tick_seconds_total"))
    longest = max((v for k, v in after.items() if "longest_tick" in k), default=0.0)
    return Run(answers=answers, seconds=seconds, busy=busy, tick=total / max(1, ticks), longest_tick=longest)


async def _counters(server: Server) -> dict[str, float]:
    if not server.has_metrics:
        return {}
    async with server.client(0) as http:
        await asyncio.sleep(0.5)  # ranks tell their numbers a few times a second
        text = (await http.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^(denoised_\S+) (\S+)$", text, re.MULTILINE)}


async def _poisson(server: Server, count: int, seed: int, rates: dict[str, float]) -> Run:
    if "plain" not in rates:  # the plain server is asked first
        rates["plain"] = (await _closed(server, _mix(count // 2, seed), {})).rate
    rng, answers = random.Random(seed), []

    async def later(http: httpx2.AsyncClient, ask: Ask, at: float) -> None:
        await asyncio.sleep(at)
        answers.append(await _one(http, ask, stream=server.has_metrics))

    at, coming = 0.0, []
    async with server.client(0) as http:
        for ask in _mix(count, seed):
            at += rng.expovariate(1.25 * rates["plain"])
            coming.append(later(http, ask, at))
        return await _measured(server, answers, asyncio.gather(*coming))


async def _fairness(server: Server, count: int, seed: int, rates: dict[str, float]) -> Run:
    """The answers are those of the one client that is alone on its key."""
    done, answers, crowd = asyncio.Event(), [], _mix(4 * count, seed)

    async def greedy() -> None:
        async with server.client(0) as http:
            while not done.is_set():
                await _one(http, crowd.pop())

    async def modest() -> None:
        async with server.client(1) as http:
            for ask in _small(count // 8, seed):
                answers.append(await _one(http, ask))
        done.set()

    return await _measured(server, answers, asyncio.gather(modest(), *(greedy() for _ in range(CLIENTS - 1))))


def _of(make: Callable[[int, int], list[Ask]]) -> Callable[..., Coroutine[Any, Any, Run]]:
    async def case(server: Server, count: int, seed: int, rates: dict[str, float]) -> Run:
        return await _closed(server, make(count, seed), rates)

    return case


CASES = {"small": _of(_small), "mix": _of(_mix), "poisson": _poisson, "fairness": _fairness}


# ---- what is said


def _quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def _row(engine: list[Run], plain: list[Run]) -> dict[str, Any]:
    ours, theirs = ([a for run in runs for a in run.answers] for runs in (engine, plain))
    seconds, others = [a.seconds for a in ours], [a.seconds for a in theirs]
    waits, errors = [a.queued for a in ours], [e for a in ours for e in a.eta_errors()]
    row: dict[str, Any] = {
        "requests a second": statistics.median(run.rate for run in engine),
        "speed-up of throughput": statistics.median(a.rate / b.rate for a, b in zip(engine, plain, strict=True)),
        "p50 latency: seconds (plain)": f"{_quantile(seconds, 0.5):.3f} ({_quantile(others, 0.5):.3f})",
        "p95 latency: seconds (plain)": f"{_quantile(seconds, 0.95):.3f} ({_quantile(others, 0.95):.3f})",
        "p95 admission wait: seconds (plain)": (
            f"{_quantile(waits, 0.95):.4f} ({_quantile([a.queued for a in theirs], 0.95):.3f})"
        ),
        "mean tick, longest tick: seconds": (
            f"{statistics.mean(run.tick for run in engine):.4f}, {max(run.longest_tick for run in engine):.4f}"
        ),
        "busy, of each rank's time": [
            round(statistics.median(b), 3) for b in zip(*(r.busy for r in engine), strict=True)
        ],
    }
    return row | ({"median error of the ETA": statistics.median(errors)} if errors else {})


if __name__ == "__main__":
    main()
