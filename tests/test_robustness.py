"""Ranks that die, ranks that fail alone, requests that fail alone, aborts: nobody hangs and nobody else suffers."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from typing import Any

import pytest

from denoised import AsyncOmni, DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from denoised.errors import InvalidConfigError, InvalidRequestError, ModelError
from denoised.outputs import Progress
from tests.contract.support import (
    REORDERED,
    as_omni,
    ask,
    difference,
    engine,
    folder,
    media,
    reference,
    request_of,
    seed_of,
)


def test_rank_killed_in_the_middle_of_twenty_requests() -> None:
    """kill -9 of a random rank: all twenty complete with the bytes of an undisturbed run."""
    rng = random.Random(20)
    name, outputs, steps = "qwen_image", {}, 0
    with engine(name, ranks=2, deterministic=True) as omni:
        before = omni.rank_pids
        done, kill_at = threading.Event(), rng.randint(8, 30)

        def hear(event: Progress | OmniRequestOutput) -> None:
            nonlocal steps
            if isinstance(event, OmniRequestOutput):
                outputs[event.request_id] = event
                if len(outputs) == 20:
                    done.set()
                return
            steps += 1
            if steps == kill_at:
                os.kill(rng.choice(before), signal.SIGKILL)

        for i in range(20):
            prompt, params = as_omni(request_of(name, i % 3), seed_of(i % 3), "latent")
            omni._client.submit(omni._request(str(i), prompt, params), hear)
        assert done.wait(timeout=120)
        assert omni.restarts == 1
        assert not set(before) & set(omni.rank_pids)
    for i in range(20):
        assert difference(reference(name, i % 3, "latent"), media(outputs[str(i)])) == 0, f"request {i}"
    rerun = [o for o in outputs.values() if o.receipt is not None and o.receipt.restarts]
    assert rerun, "the requests that were in flight say that they were run again"


def test_ranks_end_with_their_client() -> None:
    with engine("qwen_image", ranks=2) as omni:
        pids = omni.rank_pids
        assert all(_alive(pid) for pid in pids)
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("height", "place", "restarts"),
    [(16, "transformer on rank 1", 0), (32, "vae", 0), (80, "crashed each time", 3), (96, "crashed each time", 3)],
)
def test_fault_on_one_rank_only(height: int, place: str, restarts: int) -> None:
    """Rank 1 alone fails for one request: that request fails, those beside it give their bytes, nobody hangs."""
    with Omni(
        folder("qwen_image"),
        parallel_config=DiffusionParallelConfig(cfg_parallel_size=2),
        num_threads=1,
        deterministic=True,
        plugins=("tests.contract.rank_setup", "tests.contract.faults"),
    ) as omni:
        prompt, params = as_omni(request_of("qwen_image", 2), seed_of(2), "pt")
        faulty = OmniDiffusionSamplingParams(height=height, width=16, num_inference_steps=2, true_cfg_scale=4.0)
        bad, good = omni.generate([prompt, prompt], [faulty, params], use_tqdm=False)
        assert place in (bad.error or "")
        assert difference(reference("qwen_image", 2, "pt"), media(good)) == 0
        assert omni.restarts == restarts
        (after,) = ask(omni, "qwen_image", [2], "pt")
        assert difference(reference("qwen_image", 2, "pt"), media(after)) == 0


@pytest.mark.parametrize("degrees", [{"tensor_parallel_size": 2}, {"cfg_parallel_size": 2, "use_hsdp": True}])
def test_fault_on_one_rank_of_a_forward_that_ranks_share(degrees: dict[str, Any]) -> None:
    """The other rank waits inside a collective for what will never come: the engine notices, and starts again."""
    with Omni(
        folder("qwen_image"),
        parallel_config=DiffusionParallelConfig(**degrees),
        num_threads=1,
        deterministic=True,
        plugins=("tests.contract.rank_setup", "tests.contract.faults"),
    ) as omni:
        prompt, params = as_omni(request_of("qwen_image", 2), seed_of(2), "latent")
        faulty = OmniDiffusionSamplingParams(height=16, width=16, num_inference_steps=2, true_cfg_scale=4.0)
        bad, good = omni.generate([prompt, prompt], [faulty, params], use_tqdm=False)
        assert "planted fault" in (bad.error or "")
        assert difference(reference("qwen_image", 2, "latent"), media(good)) <= REORDERED
        assert omni.restarts > 0


def test_fault_in_a_forward_that_ranks_and_requests_share() -> None:
    """Two requests in one forward, one rank fails in it: it must not try again while the other waits in the first."""
    with Omni(
        folder("qwen_image"),
        parallel_config=DiffusionParallelConfig(tensor_parallel_size=2),
        num_threads=1,
        plugins=("tests.contract.rank_setup", "tests.contract.faults"),
    ) as omni:
        prompt, params = as_omni(request_of("qwen_image", 2), seed_of(2), "latent")
        faulty = OmniDiffusionSamplingParams(height=16, width=16, num_inference_steps=2, true_cfg_scale=4.0)
        *bad, good = omni.generate([prompt] * 3, [faulty, faulty, params], use_tqdm=False)
        assert all("planted fault" in (output.error or "") for output in bad)
        assert difference(reference("qwen_image", 2, "latent"), media(good)) <= REORDERED
        assert omni.restarts > 0


def test_bad_request_fails_alone() -> None:
    with engine("qwen_image") as omni:
        prompt, params = as_omni(request_of("qwen_image", 0), seed_of(0), "latent")
        odd = OmniDiffusionSamplingParams(height=37)
        outputs = omni.generate([prompt, prompt, "x"], [odd, params, odd], use_tqdm=False)
    assert "multiple of" in (outputs[0].error or "")
    assert difference(reference("qwen_image", 0, "latent"), media(outputs[1])) == 0
    assert outputs[2].error


def test_async_progress_and_cancel() -> None:
    async def run() -> tuple[list[int], OmniRequestOutput]:
        async with AsyncOmni(folder("qwen_image"), num_threads=1) as omni:
            prompt, params = as_omni(request_of("qwen_image", 0), seed_of(0), "latent")
            long = OmniDiffusionSamplingParams(num_inference_steps=1000, true_cfg_scale=2.0, height=64, width=64)
            waiting = asyncio.create_task(_drain(omni, prompt, long))
            await asyncio.sleep(0.3)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            started = time.monotonic()
            events = await _drain(omni, prompt, params)
            assert time.monotonic() - started < 60, "the cancelled request still runs"
            return [e.step for e in events if isinstance(e, Progress)], events[-1]  # type: ignore[return-value]

    steps, output = asyncio.run(run())
    assert steps == [1, 2, 3]
    assert difference(reference("qwen_image", 0, "latent"), media(output)) == 0


async def _drain(omni: AsyncOmni, prompt: object, params: OmniDiffusionSamplingParams) -> list[object]:
    return [event async for event in omni.generate(prompt, params)]  # type: ignore[arg-type]


def test_closed_engine_refuses() -> None:
    omni = engine("qwen_image")
    omni.close()
    prompt, params = as_omni(request_of("qwen_image", 0), 0, "latent")
    (output,) = omni.generate([prompt], params, use_tqdm=False)
    assert "closed" in (output.error or "")


def test_settings_that_cannot_act_are_refused_at_start() -> None:
    with pytest.raises(InvalidConfigError, match="quantization must be one of fp8, int8"):
        Omni(folder("qwen_image"), quantization="int9")
    with pytest.raises(TypeError, match="did you mean 'deterministic'"):
        Omni(folder("qwen_image"), determinstic=True)
    with pytest.raises(ModelError, match="flow_shift"):
        engine("sdxl", flow_shift=3.0)
    with pytest.raises(InvalidRequestError, match="one each"), engine("qwen_image") as omni:
        omni.generate(["a", "b"], [OmniDiffusionSamplingParams()], use_tqdm=False)
