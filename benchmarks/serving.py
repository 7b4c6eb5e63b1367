"""`denoised serve` against a diffusers pipeline behind a lock in FastAPI, over HTTP, with the built-in model.

    python -m benchmarks.serving [--requests 64] [--rounds 3] [--only small mix poisson fairness busy]
        [--clients 8] [--ranks --cfg-parallel-size 2]

As many threads for both: ours are two ranks of one, by default two replicas; the other shares each operation. Answers
are PNG files. Cases:

    small     eight clients, each with one request at a time: pictures of 128 x 128, 10 steps, guidance
    mix       the same with pictures of 64 to 256 pixels, 4 to 20 steps, with and without guidance
    poisson   the mix, coming in at random at 1.25 times the rate that the plain server can do; progress is streamed
    fairness  seven clients of one key send the mix without a pause, one of another key sends a small picture at a time
    busy      the engine alone, under --clients (eight, sixteen and so on, in turn) that send the mix without a pause:
              how much each rank worked of --seconds in the middle of it, by `rank_busy_seconds`

The admission wait is from submission until the ranks began. It was under a tick if no tick began in it, so that the
request waited for what was left of the one that ran when it came, or if it was shorter than a mean tick.

The ETA's error is taken from every progress event between a tenth and nine tenths of a request.
"""

from __future__ import annotations

import argparse
import asyncio
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
from benchmarks.traffic import Answer, Ask, Server, mix, one, small

CLIENTS = 8


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

    def short_waits(self) -> list[bool]:
        """Of each answer, whether it waited for less than the tick that ran when it came, or than a mean one: ticks of
        a text encoder are so short that a request may see two of them."""
        return [answer.queued_ticks == 0 or answer.queued < self.tick for answer in self.answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--ranks", nargs=argparse.REMAINDER, default=["--data-parallel-size", "2"], help="flags of our two ranks"
    )
    parser.add_argument("--only", nargs="+", default=[*CASES, "busy"], choices=[*CASES, "busy"])
    parser.add_argument("--clients", nargs="+", type=int, default=[CLIENTS], help="of the case busy")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the case busy")
    args = parser.parse_args()
    keys = ("first", "second")
    ours = ["denoised.cli", "serve", "shapes", "--port", "0", "--num-threads", "1", *args.ranks]
    with ExitStack() as stack:
        engine = stack.enter_context(running(*ours, *(f"--api-key={key}" for key in keys)))
        plain = stack.enter_context(running("benchmarks.plain_server", "--threads", "2"))
        servers = {"engine": Server(url=engine, keys=keys, has_metrics=True), "plain": Server(url=plain)}
        asyncio.run(_compare(servers, [case for case in args.only if case in CASES], args.requests, args.rounds))
        if "busy" in args.only:
            results = asyncio.run(_busy(servers["engine"], args.clients, args.seconds, args.rounds))
            show(f"serving: busy, {' '.join(args.ranks)}", results)


async def _compare(servers: dict[str, Server], cases: list[str], count: int, rounds: int) -> None:
    for server in servers.values():
        await _closed(server, small(CLIENTS, 0), {})
        await _closed(server, mix(2 * CLIENTS, 0), {})
    rates: dict[str, float] = {}
    for case in cases:
        runs: dict[str, list[Run]] = {name: [] for name in servers}
        for number in range(rounds):
            for name in ("plain", "engine"):
                runs[name].append(await CASES[case](servers[name], count, number, rates))
        show(f"serving: {case}", _row(runs["engine"], runs["plain"]))


# ---- how it is asked


async def _closed(server: Server, asks: list[Ask], _: dict[str, float]) -> Run:
    """Eight clients, each of which sends its next request when it has its answer."""
    waiting, answers = list(asks), []

    async def client() -> None:
        async with server.client(0) as http:
            while waiting:
                answers.append(await one(http, waiting.pop()))

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


async def _busy(server: Server, crowds: list[int], seconds: float, rounds: int) -> dict[str, Any]:
    """The share of the time that each rank worked, by the number of clients; the median of all rounds."""
    found: dict[int, list[list[float]]] = {clients: [] for clients in crowds}
    for number in range(rounds):
        for clients in crowds:
            found[clients].append(await _in_the_middle(server, clients, seconds, number))
    return {
        f"{clients} clients: busy, of each rank's time": [
            round(statistics.median(rank), 3) for rank in zip(*shares, strict=True)
        ]
        for clients, shares in found.items()
    }


async def _in_the_middle(server: Server, clients: int, seconds: float, seed: int) -> list[float]:
    """How busy ranks are while nobody starts or stops: clients send until they are told to end.

    Ranks tell their numbers at the end of a tick, so that the shares are right to a tick's part of the time.
    """
    crowd, done = mix(int(100 * seconds), seed), asyncio.Event()

    async def client() -> None:
        async with server.client(0) as http:
            while not done.is_set():
                await one(http, crowd.pop())

    asking = asyncio.gather(*(client() for _ in range(clients)))
    await asyncio.sleep(seconds / 6)
    before, began = await _counters(server), time.perf_counter()
    await asyncio.sleep(seconds)
    after, ended = await _counters(server), time.perf_counter()
    done.set()
    await asking
    return [(after[name] - before[name]) / (ended - began) for name in sorted(after) if "rank_busy" in name]


async def _poisson(server: Server, count: int, seed: int, rates: dict[str, float]) -> Run:
    if "plain" not in rates:  # the plain server is asked first
        rates["plain"] = (await _closed(server, mix(count // 2, seed), {})).rate
    rng, answers = random.Random(seed), []

    async def later(http: httpx2.AsyncClient, ask: Ask, at: float) -> None:
        await asyncio.sleep(at)
        answers.append(await one(http, ask, stream=server.has_metrics))

    at, coming = 0.0, []
    async with server.client(0) as http:
        for ask in mix(count, seed):
            at += rng.expovariate(1.25 * rates["plain"])
            coming.append(later(http, ask, at))
        return await _measured(server, answers, asyncio.gather(*coming))


async def _fairness(server: Server, count: int, seed: int, rates: dict[str, float]) -> Run:
    """The answers are those of the one client that is alone on its key."""
    done, answers, crowd = asyncio.Event(), [], mix(4 * count, seed)

    async def greedy() -> None:
        async with server.client(0) as http:
            while not done.is_set():
                await one(http, crowd.pop())

    async def modest() -> None:
        async with server.client(1) as http:
            for ask in small(count // 8, seed):
                answers.append(await one(http, ask))
        done.set()

    return await _measured(server, answers, asyncio.gather(modest(), *(greedy() for _ in range(CLIENTS - 1))))


def _of(make: Callable[[int, int], list[Ask]]) -> Callable[..., Coroutine[Any, Any, Run]]:
    async def case(server: Server, count: int, seed: int, rates: dict[str, float]) -> Run:
        return await _closed(server, make(count, seed), rates)

    return case


CASES = {"small": _of(small), "mix": _of(mix), "poisson": _poisson, "fairness": _fairness}


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
        "of all requests, that waited less than a tick": statistics.mean(
            share for run in engine for share in run.short_waits()
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
