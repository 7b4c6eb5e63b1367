"""A request that goes on from a checkpoint gives the bytes of the undisturbed one and runs only what is left; where it
cannot, it says so and is computed from its start."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import queue
import signal
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

from denoised import AsyncOmni, DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from denoised.errors import InvalidRequestError
from denoised.outputs import Saved
from denoised.request import Service
from denoised.runtime import checkpoints
from denoised.runtime.checkpoints import Checkpoint
from denoised.steps.unknown import MissingValueError
from tests.contract.support import ORDER, as_omni, folder, request_of
from tests.replays import Bench, Run, bench, equal
from tests.tiny import UPSTREAM_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

EVERY = Service(checkpoint_every=1)
# Rows whose pipeline decides by a prediction's value in some requests, and in which: there a checkpoint is not enough.
DECIDES = {"z_image": 1}  # cfg_normalization: `if new_norm > limit`


def resumed(row: Bench, request: Any, saved: Saved) -> Run:
    """The request from the bytes of its checkpoint, without more of them."""
    checkpoint = Checkpoint.from_bytes(saved.checkpoint.to_bytes())
    return row.run(dataclasses.replace(request, resume=checkpoint, service=Service()))


# ------------------------------------------------------------------ every row


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("name", ORDER)
def test_a_request_goes_on_from_its_first_and_its_last_checkpoint(name: str, index: int) -> None:
    row = bench(name)
    request = row.request(index, EVERY)
    whole, watched = row.run(dataclasses.replace(request, service=Service())), row.run(request)
    assert equal(whole, watched), "keeping checkpoints changes nothing"
    assert [saved.step for saved in watched.saved] == list(range(1, len(watched.saved) + 1))
    for saved in (watched.saved[0], watched.saved[-1]):
        again = resumed(row, request, saved)
        assert equal(whole, again), f"other bytes from step {saved.step}"
        assert again.flight.resumed_from == saved.step
        # One iteration is left of the last checkpoint; a store of keys and values is filled again.
        assert again.forwards < whole.forwards
    iterations = len(watched.saved) + 1
    assert again.forwards <= whole.forwards // iterations + whole.forwards % iterations


def test_a_resumed_request_makes_checkpoints_that_it_goes_on_from_again() -> None:
    row = bench("helios")  # several chunks: what earlier loops gave is needed, too
    request = row.request(2, EVERY)
    whole = row.run(request)
    first = dataclasses.replace(request, resume=whole.saved[1].checkpoint)
    second = row.run(first)
    assert [saved.step for saved in second.saved] == [saved.step for saved in whole.saved[2:]]
    assert equal(whole, resumed(row, request, second.saved[-1]))


SCHEDULERS = [
    "HeunDiscreteScheduler",  # two steps an iteration
    "DPMSolverSDEScheduler",  # a tree of Brownian motion
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",  # noise of the generator in every step
    "DDPMScheduler",
    "SASolverScheduler",
]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_whatever_a_scheduler_remembers_is_brought_back(name: str) -> None:
    row = Bench("sdxl", getattr(diffusers, name))
    request = row.request(2, EVERY)
    whole = row.run(request)
    for saved in whole.saved[:-1:2]:
        again = resumed(row, request, saved)
        assert equal(whole, again), f"other bytes from step {saved.step}"
        assert again.forwards == whole.forwards - saved.step


@pytest.mark.parametrize(("name", "index"), DECIDES.items())
def test_a_program_that_decides_by_a_value_that_is_not_there_is_told_so(name: str, index: int) -> None:
    row = bench(name)
    request = row.request(index, EVERY)
    again = resumed(row, request, row.run(request).saved[0])
    assert isinstance(again.flight.task.error, MissingValueError)
    assert again.flight.needs_its_start
    fresh = row.runway.again(again.flight)
    fresh.task.cancel()
    assert "computed from the start" in fresh.task.notes[0]


def test_the_trajectory_of_a_resumed_request_is_whole() -> None:
    row = bench("qwen_image")
    request = row.request(2, EVERY, return_trajectory_latents=True)
    whole = row.run(request)
    again = resumed(row, request, whole.saved[-1])
    seen, expected = again.flight.observer, whole.flight.observer
    assert seen is not None
    assert expected is not None
    assert len(expected.latents) == 4
    assert all(map(torch.equal, seen.latents, expected.latents))


# ------------------------------------------------------------------ what is refused


def test_a_checkpoint_of_something_else_is_refused() -> None:
    row = bench("qwen_image")
    request = row.request(0, EVERY)
    checkpoint = row.run(request).saved[0].checkpoint

    def refusal(**changes: Any) -> str:
        with pytest.raises(InvalidRequestError) as caught:
            row.runway.request(dataclasses.replace(request, **{"resume": checkpoint, **changes}))
        return str(caught.value)

    assert "of another request" in refusal(seed=5)
    assert "of another request" in refusal(prompt={"prompt": "else"})
    assert "of another request" in refusal(params=dataclasses.replace(request.params, guidance_scale=9.0))
    assert "no checkpoint" in refusal(resume={"step": 1})
    other = dataclasses.replace(checkpoint, meta={**checkpoint.meta, "model": "x"})
    assert "of another model" in refusal(resume=other)
    old = dataclasses.replace(checkpoint, meta={**checkpoint.meta, "version": 0})
    assert "version 0" in refusal(resume=old)
    for raw in (b"", b"\0" * 64, checkpoint.to_bytes()[:-9]):
        with pytest.raises(InvalidRequestError, match="no bytes of a checkpoint"):
            Checkpoint.from_bytes(raw)


def test_models_with_other_weights_have_another_fingerprint() -> None:
    row = Bench("qwen_image")
    before = checkpoints.fingerprint(row.pipeline)
    assert before == checkpoints.fingerprint(bench("qwen_image").pipeline)
    with torch.no_grad():
        for weight in row.pipeline.transformer.parameters():
            weight.add_(0.1)
    assert before != checkpoints.fingerprint(row.pipeline)


def test_a_request_without_a_form_to_keep_it_in_has_no_checkpoints_and_says_so() -> None:
    row = bench("qwen_image")
    request = row.request(0, EVERY)
    odd = dataclasses.replace(request.params, extra_args={"attention_kwargs": {"what": object()}})
    run = row.run(dataclasses.replace(request, params=odd))
    assert run.tensors
    assert not run.saved
    assert run.flight.task.journal is not None
    assert "object cannot be kept" in run.flight.task.journal.problem


# ------------------------------------------------------------------ through the engine

STEPS = OmniDiffusionSamplingParams(seed=3, num_inference_steps=6)
PROMPT = "a red circle left of a blue square"


def events(omni: Omni, request: Any) -> list[Any]:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    omni._client.submit(request, inbox.put)
    heard = [inbox.get()]
    while not isinstance(heard[-1], OmniRequestOutput):
        heard.append(inbox.get())
    return heard


@pytest.fixture(scope="module")
def omni() -> Iterator[Omni]:
    with Omni(num_threads=1) as omni:
        yield omni


@pytest.fixture(scope="module")
def heard(omni: Omni) -> list[Any]:
    return events(omni, omni._request("watched", PROMPT, STEPS, Service(checkpoint_every=2)))


def picture(output: OmniRequestOutput) -> bytes:
    assert output.error is None, output.error
    return bytes(output.images[0].tobytes())


def forwards(output: OmniRequestOutput) -> list[int]:
    assert output.receipt is not None
    return [rank.forwards for rank in output.receipt.ranks]


def test_another_engine_goes_on_with_a_checkpoint(omni: Omni, heard: list[Any]) -> None:
    saved = [event for event in heard if isinstance(event, Saved)]
    assert [event.step for event in saved] == [2, 4]
    assert picture(heard[-1]) == picture(omni.generate(PROMPT, STEPS, use_tqdm=False)[0])
    with Omni(num_threads=1, deterministic=True) as other:  # rows are not joined: forwards can be told apart
        outputs = other.resume([event.checkpoint for event in saved], use_tqdm=False)
    for output, event in zip(outputs, saved, strict=True):
        assert picture(output) == picture(heard[-1])
        assert forwards(output) == [2 * (6 - event.step)]
        assert output.receipt is not None
        assert output.receipt.resumed_from_step == event.step
        assert f"resumed from step {event.step}" in output.receipt.line()


def test_one_of_several_that_were_begun_is_continued(heard: list[Any]) -> None:
    """Fork and pick: short runs, aborted after their first checkpoint; the chosen one goes on."""

    async def main() -> OmniRequestOutput:
        async with AsyncOmni(num_threads=1) as omni:
            first = None
            async for event in omni.generate(PROMPT, STEPS, service=Service(checkpoint_every=2)):
                if isinstance(event, Saved):
                    first = event.checkpoint
                    break
            *_, output = [event async for event in omni.resume(first)]
            assert isinstance(output, OmniRequestOutput)
            return output

    output = asyncio.run(main())
    assert picture(output) == picture(heard[-1])
    assert forwards(output) == [8]


def test_a_request_goes_on_where_it_was_when_a_rank_dies(heard: list[Any]) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with Omni(parallel_config=DiffusionParallelConfig(cfg_parallel_size=2), num_threads=1) as omni:
        alone = omni.generate(PROMPT, STEPS, use_tqdm=False)[0]
        omni._client.submit(omni._request("dies", PROMPT, STEPS, Service(checkpoint_every=2)), inbox.put)
        while not isinstance(inbox.get(), Saved):
            pass
        os.kill(omni.rank_pids[1], signal.SIGKILL)
        output = inbox.get()
        while not isinstance(output, OmniRequestOutput):
            output = inbox.get()
    assert picture(output) == picture(alone)
    assert output.receipt is not None
    assert output.receipt.restarts == 1
    assert output.receipt.resumed_from_step in (2, 4)
    assert forwards(output) == [6 - output.receipt.resumed_from_step] * 2, "each rank ran only what was left"


def test_what_cannot_go_on_is_computed_from_its_start_and_says_so() -> None:
    name, index = next(iter(DECIDES.items()))
    prompt, params = as_omni(request_of(name, index), 7, "latent")
    with Omni(folder(name), num_threads=1, plugins=("tests.contract.rank_setup",)) as omni:
        heard = events(omni, omni._request("a", prompt, params, EVERY))
        saved, whole = next(event for event in heard if isinstance(event, Saved)), heard[-1]
        again = omni.resume(saved.checkpoint, use_tqdm=False)[0]
    assert again.error is None
    assert torch.equal(again.latents, whole.latents)
    assert again.receipt is not None
    assert again.receipt.resumed_from_step == 0
    assert forwards(again) == forwards(whole)
    assert "computed from the start" in again.receipt.notes[0]
