"""A server under random requests for a long time, with clients that go away and ranks that are killed.

    python -m benchmarks.soak [--requests 2000] [--kill-every 100] [--clients 6]
    python -m benchmarks.soak --output docs/soak.json --page docs/server.md

A `denoised serve` of the built-in model on two ranks with `--deterministic`. Of the requests, 20% are cancelled by
hanging up, 5% are wrong; after every `--kill-every` a random rank is killed (kill -9) in the middle of the work. Every
valid request must give the pixels that it gives alone; memory must stay flat; in the end no thread, process, file
descriptor or temporary file may be left over. Exit code 1 if one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import logging
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.processes import Holdings, Served
from benchmarks.soak_report import (
    FLAT,
    HOLDINGS,
    SPARE,
    WARM_RANK,
    Result,
    Sample,
    ends,
    put,
    ranks_slope,
    rows,
    server_slope,
)
from benchmarks.soak_requests import KEYS, MAX_PRIORITY, Body, Sender, catalogue, solo

_log = logging.getLogger("soak")
CANCELLED, WRONG = 0.20, 0.05
# After a soak of so many requests so many more, without a kill: ranks that live long enough to show what they keep.
FULL, CALM = 1000, 800
# Share of requests of a higher priority; priorities are strict, so that many of them would keep the others waiting.
URGENT = 0.1


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One request of the soak. `number`: of the catalogue; `way`: how it is sent."""

    kind: str
    number: int
    way: str
    key: str
    priority: int


def turns(count: int, rng: random.Random, ways: Sequence[str], size: int) -> list[Turn]:
    """Kinds in exact shares, in random order."""
    num_cancelled, num_wrong = round(CANCELLED * count), round(WRONG * count)
    kinds = ["cancelled"] * num_cancelled + ["wrong"] * num_wrong
    kinds += ["valid"] * (count - len(kinds))
    rng.shuffle(kinds)
    return [
        Turn(
            kind=kind,
            number=rng.randrange(size),
            way=rng.choice(ways),
            key=rng.choice(KEYS),
            priority=rng.randint(1, MAX_PRIORITY) if rng.random() < URGENT else 0,
        )
        for kind in kinds
    ]


class Soak:
    """One soak of a server that is ready."""

    def __init__(self, served: Served, bodies: Sequence[Body], right: Sequence[list[str]], *, seed: int) -> None:
        self._served, self._bodies, self._right = served, bodies, right
        self._rng = random.Random(seed)
        self._counts: collections.Counter[str] = collections.Counter()
        self._ways: collections.Counter[str] = collections.Counter()
        self._problems: list[str] = []
        self._samples: list[Sample] = []
        self._killed, self._killed_at = 0, 0

    @property
    def _answers(self) -> int:
        return self._counts["sent"]

    async def run(self, count: int, *, kill_every: int, clients: int) -> Result:
        """Warm up, with a rank killed, so that all there is has run once; then the soak."""
        await self._load(2 * clients, kill_every=clients, clients=clients)
        await self._crowd()
        await self._idle()
        before, again = self._served.holdings(), self._restarts()
        for seen in (self._counts, self._ways, self._samples):
            seen.clear()
        self._killed = self._killed_at = 0
        began = time.monotonic()
        await self._load(count, kill_every=kill_every, clients=clients)
        await self._load(CALM if count >= FULL else 0, kill_every=10 * CALM, clients=clients)
        await self._idle()
        seconds = time.monotonic() - began
        return self._result(before, await self._holdings(before), seconds, self._restarts() - again)

    async def _holdings(self, before: Holdings) -> Holdings:
        """When what just ends has ended; what is left over stays."""
        for _ in range(20):
            found = self._served.holdings()
            if all(getattr(found, name) <= getattr(before, name) for name in HOLDINGS):
                break
            await asyncio.sleep(0.5)
        return found

    def _restarts(self) -> int:
        return round(self._served.metric("restarts_total"))

    async def _crowd(self) -> None:
        """So many questions at once that the server has all the threads that it will ever have for them."""
        await asyncio.gather(*(asyncio.to_thread(self._served.is_ready) for _ in range(30)))

    async def _load(self, count: int, *, kill_every: int, clients: int) -> None:
        async with Sender(self._served.url) as sender:
            waiting = turns(count, self._rng, list(sender.ways), len(self._bodies))
            beside = [asyncio.create_task(work) for work in (self._watch(), self._kill(kill_every, count))]
            await asyncio.gather(*(self._client(sender, waiting) for _ in range(clients)))
            await beside[1]
            beside[0].cancel()
            await asyncio.wait(beside)
            self._counts["run again"] += sender.run_again

    async def _client(self, sender: Sender, waiting: list[Turn]) -> None:
        while waiting:
            turn = waiting.pop()
            try:
                await self._send(sender, turn)
            except Exception as error:
                self._problems.append(f"{turn}: {type(error).__name__}: {error!s:.300}")
                _log.error(self._problems[-1])
            self._counts["sent"] += 1

    async def _send(self, sender: Sender, turn: Turn) -> None:
        body = self._bodies[turn.number] | {"priority": turn.priority}
        if turn.kind == "wrong":
            problem = await sender.wrong(self._rng)
            self._problems += [f"not refused: {problem}"] if problem else []
            self._counts["refused"] += not problem
        elif turn.kind == "cancelled":
            early = await sender.hang_up(body, turn.key, self._rng)
            self._counts["early" if early else "cancelled"] += 1
        else:
            found = await sender.ways[turn.way](body, turn.key)
            if found != self._right[turn.number]:
                self._problems.append(f"{turn}: {len(found)} pictures, which are not those of the request alone")
            self._counts["right"] += found == self._right[turn.number]
            self._ways[turn.way] += 1

    async def _kill(self, every: int, count: int) -> None:
        """A random rank after every so many answers, while others are in the works; and wait until ranks are back."""
        for at in range(every // 2, count - 1, every):
            while self._answers < at:
                await asyncio.sleep(0.02)
            await asyncio.sleep(self._rng.uniform(0, 0.3))
            self._rng.choice(self._served.ranks).kill()
            self._killed, self._killed_at = self._killed + 1, self._answers
            _log.info("rank %d of those killed, after %d answers", self._killed, self._answers)
            await asyncio.sleep(0.5)
            await self._until_ready()

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not await asyncio.to_thread(self._served.is_ready):
            if time.monotonic() > deadline:
                raise TimeoutError("ranks that were killed were not back after 60 s")
            await asyncio.sleep(0.1)

    async def _idle(self) -> None:
        """Until nothing runs or waits, and connections are closed."""
        deadline = time.monotonic() + 60
        while self._served.metric("running") + self._served.metric("queued") + self._open():
            if time.monotonic() > deadline:
                self._problems.append("requests still ran a minute after the last was sent")
                return
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)

    def _open(self) -> float:
        return self._served.metric("http_in_progress") - 1  # the one that asks

    async def _watch(self) -> None:
        while True:
            server, below = self._served.megabytes()
            since = self._answers - self._killed_at
            if len(below) == 3:  # the process that forks ranks, and all ranks
                self._samples.append(Sample(answers=self._answers, since=since, server=server, ranks=sum(below[1:])))
            await asyncio.sleep(0.5)

    # ---- what was found

    def _result(self, before: Holdings, after: Holdings, seconds: float, restarts: int) -> Result:
        counts = self._counts
        if restarts != self._killed:
            self._problems.append(f"{self._killed} ranks were killed, and {restarts} times ranks were started anew")
        slopes = {"server": server_slope(self._samples), "ranks": ranks_slope(self._samples)}
        for name, slope in slopes.items():
            if slope is not None and slope > FLAT[name]:
                self._problems.append(f"memory of {name}: {slope:.1f} MB more for 1,000 requests")
        self._problems += [
            f"{name}: {getattr(before, name)} before, {getattr(after, name)} after"
            for name in HOLDINGS
            if getattr(after, name) > getattr(before, name) + SPARE.get(name, 0)
        ]
        return Result(
            requests=counts["sent"],
            answered=counts["right"],
            cancelled=counts["cancelled"],
            answered_before_they_were_cancelled=counts["early"],
            refused=counts["refused"],
            ranks_killed=self._killed,
            ranks_started_anew=restarts,
            run_again=self._counts["run again"],
            ways=dict(self._ways),
            seconds=round(seconds, 1),
            server_mb=ends([s.server for s in self._samples]),
            ranks_mb=ends([s.ranks for s in self._samples if s.since >= WARM_RANK]),
            server_slope=slopes["server"],
            ranks_slope=slopes["ranks"],
            time_to_free=self._time_to_free(),
            before=before,
            after=after,
            problems=self._problems,
        )

    def _time_to_free(self) -> float:
        count = self._served.metric("time_to_free_seconds_count")
        return round(self._served.metric("time_to_free_seconds_sum") / max(count, 1), 3)


def soak(
    count: int, *, kill_every: int, clients: int, size: int = 24, seed: int = 4, log: Path | None = None
) -> Result:
    """Right answers first, of `size` different requests; then the server, then the load; then its end, which must
    leave nothing."""
    bodies = catalogue(size)
    right = solo(bodies)
    keys = [part for key in KEYS for part in ("--api-key", key)]
    ranks = ("--cfg-parallel-size", "2", "--deterministic", "--max-priority", str(MAX_PRIORITY))
    with tempfile.TemporaryDirectory(prefix="denoised-soak-") as folder:
        errors = log or Path(folder) / "stderr"
        served = Served("shapes", *ranks, *keys, key=KEYS[0], errors=errors)
        try:
            found = Soak(served, bodies, right, seed=seed).run(count, kill_every=kill_every, clients=clients)
            result = asyncio.run(found)
            code, left = served.end()
        finally:
            served.kill()
        said = [line for line in errors.read_text().splitlines() if "hangs" in line or "Error" in line]
    ended = [f"it ended with code {code}"] if code else []
    problems = [*result.problems, *ended, *(f"left over: {name}" for name in left), *said]
    return dataclasses.replace(result, problems=problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--kill-every", type=int, default=100)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--output", type=Path, help="write the JSON here, too")
    parser.add_argument("--page", type=Path, help="put the table into this page, between its marks")
    parser.add_argument("--log", type=Path, help="what the server writes to stderr")
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    _log.setLevel(logging.INFO)
    result = soak(args.requests, kill_every=args.kill_every, clients=args.clients, log=args.log)
    found = dataclasses.asdict(result)
    text = json.dumps(found, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")
    if args.page is not None:
        put(args.page, json.loads(text))
    table = Table(title="soak", show_header=False)
    for name, value in rows(json.loads(text)).items():
        table.add_row(name, value)
    Console().print(table)
    return 1 if result.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
