"""A stated load for a running server, and what its clients met: how much, how long, how true the forecasts were.

`load(url, mix)` may be called by other programs. Images are asked for as streams and videos as jobs whose events are
listened to, so that waiting and forecasts are seen; sound has no events. No torch.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from denoised.checks import bounded, check_fields
from denoised.cli.load_http import Address, Answer, address, ask
from denoised.errors import EngineError, InvalidConfigError, one_line

PROMPT = "a large red circle above a small blue square"
_ROUTES = {"image": "/v1/images/generations", "video": "/v1/videos", "audio": "/v1/audio/generate"}
_DONE = ("image_generation.completed", "video.completed")


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What is sent. `bodies` are requests as the route takes them; `weight` in one says how often it is chosen.

    Without `request_rate` every client sends its next request when it has the answer to the last; with one, requests
    come by chance (Poisson), and their time counts from when they came, also if no client was free.
    """

    num_requests: int = bounded(32, minimum=1, maximum=1_000_000, help="requests in all")
    concurrency: int = bounded(8, minimum=1, maximum=10_000, help="requests in flight at most")
    request_rate: float | None = bounded(
        None, minimum=1e-6, help="requests a second, by chance (Poisson); default: as clients get free"
    )
    seed: int = bounded(0, minimum=0, help="of what is chosen and when; each request gets a seed of its own")
    bodies: tuple[dict[str, Any], ...] = field(
        default=({},), metadata={"help": "kinds of requests", "minimum": None, "maximum": None, "choices": None}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        weights = [body.get("weight", 1.0) for body in self.bodies]
        if not weights or not all(isinstance(w, int | float) and w > 0 for w in weights):
            raise InvalidConfigError("mix: must hold at least one request, each of a weight above 0.")


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One request: seconds from when it was due until its answer was there, and until its first step was done.

    etas: pairs of what was told to be left, and what was, in seconds: when first told, and when half was done.
    error: None, or what kind it was: the server's code, or `connection`.
    """

    number: int
    kind: int
    seconds: float
    first_step: float | None = None
    etas: tuple[tuple[float, float], ...] = ()
    error: str | None = None
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a load met. Seconds; `eta_error` relative to what was really left (median): first told, and half-way.

    admission_wait: the server's mean of requests that it admitted meanwhile, from submission to their start.
    """

    model: str
    requests: int
    completed: int
    seconds: float
    throughput: float
    latency_p50: float | None
    latency_p95: float | None
    first_step_p50: float | None
    first_step_p95: float | None
    admission_wait: float | None
    eta_error_first: float | None
    eta_error_half: float | None
    errors: dict[str, int]


async def load(url: str, mix: Mix, *, key: str | None = None, heard: Callable[[Sent], None] | None = None) -> Found:
    """Put `mix` on the server at `url`; `heard` gets each request as it ends.

    Raises:
        InvalidConfigError: `url` is none.
        EngineError: nothing answers there.
    """
    place = address(url, key)
    model = await _model(place)
    before = await _admissions(place)
    sent, began = [], time.monotonic()
    gate = asyncio.Semaphore(mix.concurrency)

    async def one(number: int, kind: int, due: float | None) -> None:
        async with gate:
            came = time.monotonic() if due is None else due
            sent.append(await _send(place, model["kind"], _body(mix, number, kind), number, kind, came))
        if heard is not None:
            heard(sent[-1])

    async with asyncio.TaskGroup() as group:
        for number, (kind, after) in enumerate(plan(mix)):
            due = None if mix.request_rate is None else began + after
            await asyncio.sleep(0 if due is None else max(0.0, due - time.monotonic()))
            group.create_task(one(number, kind, due))
    return summary(model["id"], sent, time.monotonic() - began, _mean(before, await _admissions(place)))


def plan(mix: Mix) -> list[tuple[int, float]]:
    """Of each request its kind, and when it comes, in seconds; 0 without a rate. The same for the same mix."""
    rng = random.Random(mix.seed)
    weights = [body.get("weight", 1.0) for body in mix.bodies]
    at, planned = 0.0, []
    for kind in rng.choices(range(len(mix.bodies)), weights, k=mix.num_requests):
        planned.append((kind, at))
        at += rng.expovariate(mix.request_rate) if mix.request_rate is not None else 0.0
    return planned


def _body(mix: Mix, number: int, kind: int) -> dict[str, Any]:
    own = {name: value for name, value in mix.bodies[kind].items() if name != "weight"}
    return {"prompt": PROMPT, "seed": mix.seed + number, **own}


# ------------------------------------------------------------------ one request


class _Watch:
    """The events of one request, as its client hears them. Times are of the monotonic clock."""

    def __init__(self, came: float) -> None:
        self._came, self._told = came, list[tuple[float, float, bool]]()
        self.first_step: float | None = None
        self.end = came

    def hear(self, event: dict[str, Any]) -> None:
        self.end = now = time.monotonic()
        if event.get("type", "").endswith(".progress"):
            if self.first_step is None and event["step"] > 0:
                self.first_step = now - self._came
            if event["eta_seconds"] is not None:
                self._told.append((now, event["eta_seconds"], 2 * event["step"] >= event["total_steps"] > 0))

    def etas(self) -> tuple[tuple[float, float], ...]:
        half = [told for told in self._told if told[2]]
        return tuple((eta, self.end - at) for at, eta, _ in (*self._told[:1], *half[:1])) if half else ()


async def _send(place: Address, kind: str, body: dict[str, Any], number: int, which: int, came: float) -> Sent:
    watch = _Watch(came)
    try:
        error = await _run(place, kind, body, watch)
    except (OSError, EOFError, ValueError) as problem:
        error = ("connection", one_line(problem))
    return Sent(
        number=number,
        kind=which,
        seconds=time.monotonic() - came,
        first_step=watch.first_step,
        etas=() if error else watch.etas(),
        error=error[0] if error else None,
        message=error[1] if error else "",
    )


async def _run(place: Address, kind: str, body: dict[str, Any], watch: _Watch) -> tuple[str, str] | None:
    """What kind of error it met, and its message; None if it met none."""
    if kind == "audio":
        body = {"input": body["prompt"], **{k: v for k, v in body.items() if k != "prompt"}}
    stream = {"stream": True} if kind == "image" else {}
    async with ask(place, "POST", _ROUTES[kind], body | stream) as answer:
        if answer.status != 200:
            return await _refused(answer)
        if kind == "image":
            return await _listen(answer, watch)
        job = await answer.json() if kind == "video" else await answer.read()
    return await _job(place, job["id"], watch) if isinstance(job, dict) else None


async def _job(place: Address, job_id: str, watch: _Watch) -> tuple[str, str] | None:
    """A video's, which is forgotten when it is done."""
    async with ask(place, "GET", f"/v1/videos/{job_id}/events") as answer:
        error = await (_listen(answer, watch) if answer.status == 200 else _refused(answer))
    async with ask(place, "DELETE", f"/v1/videos/{job_id}") as answer:
        await answer.read()
    return error


async def _listen(answer: Answer, watch: _Watch) -> tuple[str, str] | None:
    done = False
    async for event in answer.events():
        watch.hear(event)
        done = done or event.get("type") in _DONE
        if event.get("error"):
            return _named(event["error"])
    return None if done else ("connection", "the stream ended before its result")


async def _refused(answer: Answer) -> tuple[str, str]:
    error = (await answer.json()).get("error")
    return _named(error) if isinstance(error, dict) else (f"status {answer.status}", "")


def _named(error: dict[str, Any]) -> tuple[str, str]:
    return str(error.get("code") or error.get("type")), str(error.get("message", ""))


# ------------------------------------------------------------------ the server's own words


async def _model(place: Address) -> dict[str, Any]:
    try:
        async with ask(place, "GET", "/v1/models") as answer:
            found = await answer.json()
        model: dict[str, Any] = found["data"][0]
        return {"id": model["id"], "kind": model["kind"]}
    except (OSError, EOFError, ValueError) as error:
        raise EngineError(f"nothing answers at {place.host}:{place.port} ({one_line(error)}).") from error
    except (LookupError, TypeError) as error:
        said = json.dumps(found)[:200]
        raise EngineError(f"{place.host}:{place.port} does not say what it serves: {said}") from error


async def _admissions(place: Address) -> tuple[float, float]:
    """Requests that were admitted so far, and the seconds that they waited; none of a server that tells no metrics."""
    async with ask(place, "GET", "/metrics") as answer:
        text = (await answer.read()).decode()
    found = [
        re.search(rf"^denoised_admission_wait_seconds_{name} (\S+)$", text, re.MULTILINE) for name in ("count", "sum")
    ]
    count, total = (float(match[1]) if match else 0.0 for match in found)
    return count, total


def _mean(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    count = after[0] - before[0]
    return (after[1] - before[1]) / count if count else None


# ------------------------------------------------------------------ together


def summary(model: str, sent: Sequence[Sent], seconds: float, admission_wait: float | None) -> Found:
    """Latencies are those of requests that were completed."""
    good = [one for one in sent if one.error is None]
    latencies = sorted(one.seconds for one in good)
    firsts = sorted(one.first_step for one in good if one.first_step is not None)
    return Found(
        model=model,
        requests=len(sent),
        completed=len(good),
        seconds=seconds,
        throughput=len(good) / seconds,
        latency_p50=_quantile(latencies, 0.5),
        latency_p95=_quantile(latencies, 0.95),
        first_step_p50=_quantile(firsts, 0.5),
        first_step_p95=_quantile(firsts, 0.95),
        admission_wait=admission_wait,
        eta_error_first=_eta_error([one.etas[0] for one in good if one.etas]),
        eta_error_half=_eta_error([one.etas[-1] for one in good if one.etas]),
        errors=dict(collections.Counter(one.error for one in sent if one.error is not None)),
    )


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share do not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else None


def _eta_error(pairs: Sequence[tuple[float, float]]) -> float | None:
    errors = [abs(told - real) / real for told, real in pairs if real > 0]
    return statistics.median(errors) if errors else None
