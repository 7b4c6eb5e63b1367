"""Scheduling with real engines on the tiny Qwen-Image: order, deadlines, bounds, turns, memory, ranks that hang.

Whatever the load does, a result is that of the plain pipeline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from denoised import AsyncOmni, DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from denoised.errors import InvalidConfigError, InvalidRequestError, QueueFullError
from denoised.outputs import OmniRequestOutput, Progress
from denoised.request import Service
from tests.contract.support import as_omni, difference, folder, media, plain, request_of, seed_of
from tests.test_replicas import Asked

NAME = "qwen_image"
FOREVER = 5000
# A plugin of ranks: for pictures of certain heights, rank 1's denoiser asks for more memory than there is (32 pixels:
# a real error of the real allocator), or rank 1 hangs, once (48 pixels).
FAULTS = """
import os, pathlib, time
import torch, torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
original = QwenImageTransformer2DModel.forward
once = pathlib.Path({path!r})

def forward(self, *args, **kwargs):
    height = kwargs["img_shapes"][0][0][1] * 8
    if dist.is_initialized() and dist.get_rank() == 1:
        if height == 32:
            torch.empty(2**60, dtype=torch.uint8)
        if height == 48 and not once.exists():
            once.write_text("")
            time.sleep(3600)
    return original(self, *args, **kwargs)

QwenImageTransformer2DModel.forward = forward
"""


class Queue(Asked):
    """Requests with their service, and all that was told of them, in order."""

    def __init__(self, omni: Omni) -> None:
        super().__init__(omni)
        self.told: list[Any] = []

    def __call__(self, event: Any) -> None:
        if isinstance(event, Progress) and event.position:
            self.told.append(event)  # it waits: `steps` are of what runs
            return
        self.told.append(event)
        super().__call__(event)

    def put(self, request_id: str, service: Service | None = None, **more: Any) -> None:
        prompt, params = as_omni(request_of(NAME, 0) | more, seed_of(0), "latent")
        self.omni._client.submit(self.omni._request(request_id, prompt, params, service or Service()), self)

    def order(self) -> list[str]:
        """Requests in the order in which they made their first step."""
        return list(dict.fromkeys(e.request_id for e in self.told if isinstance(e, Progress) and not e.position))

    def is_plain(self, request_id: str, **more: Any) -> None:
        alone = plain(NAME, request_of(NAME, 0) | more, seed_of(0), "latent")
        assert difference(alone, media(self.outputs[request_id])) == 0, request_id


def omni(ranks: int = 1, **settings: Any) -> Omni:
    plugins = ("tests.contract.rank_setup", *settings.pop("plugins", ()))
    parallel = DiffusionParallelConfig(cfg_parallel_size=ranks)
    return Omni(folder(NAME), parallel_config=parallel, num_threads=1, plugins=plugins, **settings)


@pytest.fixture(scope="module")
def single() -> Iterator[Omni]:
    with omni(max_num_seqs=1, deterministic=True) as made:
        yield made


def test_order_places_and_times_of_the_queue(single: Omni) -> None:
    """Priority, then tenants in turn, then deadlines, then arrival; each that waits is told its place and its end."""
    asked = Queue(single)
    asked.put("first", num_inference_steps=FOREVER)
    asked.until(lambda: "first" in asked.steps)
    asked.put("a1", Service(tenant="a"))
    asked.put("a2", Service(tenant="a"))
    asked.put("a3", Service(tenant="a", timeout=1000))
    asked.put("b1", Service(tenant="b"))
    asked.put("high", Service(tenant="a", priority=5))
    asked.until(lambda: any(e.request_id == "high" and e.position == 1 for e in asked.told if isinstance(e, Progress)))
    assert single.stats().queued == 5
    single.abort("first")
    asked.until_ended("first", "a1", "a2", "a3", "b1", "high")
    assert asked.order() == ["first", "high", "b1", "a3", "a1", "a2"]
    for name in ("a1", "a2", "a3", "b1", "high"):
        asked.is_plain(name)
    places = [e.position for e in asked.told if isinstance(e, Progress) and e.request_id == "a2" and e.position]
    assert 1 <= places[0] < max(places), "others went before it, and it was told"
    etas = [e.eta_seconds for e in asked.told if isinstance(e, Progress) and e.request_id == "a2"]
    assert etas[-1] is not None
    assert asked.outputs["first"].error_kind == "aborted"


def test_receipts_count_the_ticks_that_a_request_waited_for(single: Omni) -> None:
    asked = Queue(single)
    asked.put("first", num_inference_steps=20)
    asked.put("second")
    asked.until_ended("first", "second")
    first, second = (asked.outputs[name].receipt for name in ("first", "second"))
    assert first.queued_ticks == 0
    assert 20 <= second.queued_ticks <= 25, "the steps of the first, its other calls, and no more"
    assert second.queued_seconds > first.queued_seconds > 0


def test_deadlines_stop_what_waits_and_what_runs(single: Omni) -> None:
    asked, before = Queue(single), single.stats()
    started = time.monotonic()
    asked.put("runs", Service(timeout=1.0), num_inference_steps=FOREVER)
    asked.put("waits", Service(timeout=0.5))
    asked.until_ended("waits")
    assert 0.5 <= time.monotonic() - started < 1.0 + 5
    asked.until_ended("runs")
    for name in ("runs", "waits"):
        assert asked.outputs[name].error_kind == "timeout"
        assert "timeout=" in asked.outputs[name].error
    assert asked.steps["runs"] > 0
    asked.put("after")
    asked.until_ended("after")
    asked.is_plain("after")
    after = single.stats()
    assert after.errors_total["timeout"] == before.errors_total.get("timeout", 0) + 2
    assert after.time_to_free.count == before.time_to_free.count + 2
    assert after.running == after.queued == 0
    work = after.replicas[0].work
    assert work.steps_total > asked.steps["runs"]
    assert work.ticks_total >= work.steps_total
    assert 0 < work.busy_seconds_total[0] <= work.tick_seconds_total
    assert set(work.stage_seconds_total) == {"encode", "denoise"}, "latents were asked for"


def test_queue_is_bounded_and_says_when_to_come_back() -> None:
    async def main() -> None:
        prompt, params = as_omni(request_of(NAME, 0) | {"num_inference_steps": FOREVER}, 1, "latent")
        settings: dict[str, Any] = {"num_threads": 1, "max_num_seqs": 1, "max_queue_len": 2}
        async with AsyncOmni(folder(NAME), plugins=("tests.contract.rank_setup",), **settings) as engine:

            async def run(name: str, **service: Any) -> OmniRequestOutput:
                service_of = Service(**service)
                async for event in engine.generate(prompt, params, request_id=name, service=service_of):
                    last = event
                assert isinstance(last, OmniRequestOutput)
                return last

            tasks = [asyncio.create_task(run(str(n))) for n in range(3)]
            await asyncio.sleep(0.5)
            with pytest.raises(QueueFullError, match="max_queue_len=2") as refused:
                await run("fourth")
            assert refused.value.retry_after >= 1
            assert engine.stats().errors_total == {"queue_full": 1}
            with pytest.raises(InvalidRequestError, match="weight=0"):
                await run("fifth", weight=0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            deadline = time.monotonic() + 20
            while engine.stats().running or engine.stats().queued:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            assert engine.stats().errors_total == {"queue_full": 1, "aborted": 3}
            assert (await run("late", timeout=0.3)).error_kind == "timeout"

    asyncio.run(main())


def test_offline_requests_are_never_refused_for_their_number() -> None:
    params = OmniDiffusionSamplingParams(height=32, width=32, num_inference_steps=2, output_type="latent")
    with omni(max_num_seqs=2, max_queue_len=1, max_queue_seconds=0.001) as engine:
        outputs = engine.generate(["a cat"] * 6, params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * 6


def test_turns_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that share no forward, with guidance and without, twice as many as ranks: right to the byte; both ranks
    work; an out-of-memory error is one request's own; a rank that hangs is replaced, and its requests run again."""
    (tmp_path / "serving_faults.py").write_text(FAULTS.format(path=str(tmp_path / "hung")))
    monkeypatch.syspath_prepend(tmp_path)
    sizes = [{"height": 64, "width": 64}, {"height": 96, "width": 64}, {"height": 64, "width": 96}]
    with omni(2, plugins=("serving_faults",), hang_timeout=1.0, deterministic=True) as engine:
        asked = Queue(engine)
        for number, size in enumerate(sizes * 2):
            asked.put(str(number), num_inference_steps=10, **size)
        asked.put("big", height=32, width=64)
        names = [str(number) for number in range(6)]
        asked.until_ended("big", *names)
        assert asked.outputs["big"].error_kind == "out_of_memory", asked.outputs["big"].error
        told = str(asked.outputs["big"].error)
        assert "by the plan's arithmetic a rank needs" in told
        ways = [way.split(" (")[0] for way in told.split("what would fit: ")[1].split("), ")]
        assert ways == ["dtype='bfloat16'", "enable_cpu_offload=True", "enable_layerwise_offload=True"]
        for number, size in enumerate(sizes * 2):
            asked.is_plain(str(number), num_inference_steps=10, **size)
            receipt = asked.outputs[str(number)].receipt
            assert sum(rank.forwards for rank in receipt.ranks) == 20
            assert receipt.rows_joined == 0
        work = engine.stats().replicas[0].work
        assert work.waits_total > 50, "six requests of three sizes are not run in one tick"
        assert len(work.busy_seconds_total) == 2
        assert min(work.busy_seconds_total) > 0.5 * max(work.busy_seconds_total)
        before = engine.rank_pids
        asked.put("hangs", height=48, width=64)
        asked.put("beside", num_inference_steps=10)
        asked.until_ended("hangs", "beside")
        asked.is_plain("hangs", height=48, width=64)
        asked.is_plain("beside", num_inference_steps=10)
        assert engine.restarts == 1
        assert not set(engine.rank_pids) & set(before)
        stats = engine.stats()
        assert stats.restarts_total == 1
        assert stats.errors_total == {"out_of_memory": 1}
        assert stats.work.steps_total >= 6 * 10, "counts go on over a restart"


def test_small_requests_are_not_held_up_by_a_large_one(single: Omni) -> None:
    """Each has its share of the time: small ones end long before the large one, which goes on all the while."""
    del single
    with omni(max_num_seqs=4) as engine:
        asked = Queue(engine)
        asked.put("large", num_inference_steps=FOREVER, height=192, width=192)
        asked.until(lambda: "large" in asked.steps)
        started = time.monotonic()
        for number in range(6):
            asked.put(f"small-{number}", num_inference_steps=10)
        asked.until_ended(*(f"small-{number}" for number in range(6)))
        first, seconds = asked.steps["large"], time.monotonic() - started
        assert first > 1, "it went on"
        engine.abort("large")
        asked.until_ended("large")
        stats = engine.stats()
        assert stats.time_to_free.latest < max(1.0, seconds), stats.time_to_free
        assert stats.work.rows_joined_total > 0, "small ones shared forwards"


def test_memory_that_is_not_there() -> None:
    """What can never fit is refused with the largest size that would; that size runs. What does not fit now waits."""
    with omni(max_num_seqs=4, memory_limit_mb=40) as engine:
        footprint = engine.info.footprint
        with pytest.raises(InvalidRequestError, match=r"MB beside the weights; ask for at most (\d+) x \1") as refused:
            engine._request("a", "a cat", OmniDiffusionSamplingParams(height=4096, width=4096))
        side = int(str(refused.value).rsplit(" ", 1)[-1].rstrip("."))
        assert 0 < side < 4096
        engine._request("a", "a cat", OmniDiffusionSamplingParams(height=side, width=side))
        larger = side + engine.info.size_multiple
        with pytest.raises(InvalidRequestError, match="beside the weights"):
            engine._request("a", "a cat", OmniDiffusionSamplingParams(height=larger, width=larger))
        outputs = engine.generate(
            ["a cat", "a dog"],
            [OmniDiffusionSamplingParams(height=n, width=n, num_inference_steps=2) for n in (4096, 64)],
            use_tqdm=False,
        )
        assert [output.error_kind for output in outputs] == ["invalid_request", None]
        assert footprint.weights > 0
    with pytest.raises(InvalidConfigError, match="memory_limit_mb=1: the weights of a rank alone take about"):
        omni(memory_limit_mb=1)
