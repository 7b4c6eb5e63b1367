"""A preview is the picture of what the last step predicted, decoded by the pipeline itself; it changes nothing."""

from __future__ import annotations

import dataclasses
import queue
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from denoised.outputs import Preview
from denoised.request import Service
from denoised.runtime import load, previews
from tests.contract.support import ORDER, as_omni, folder, request_of, seed_of
from tests.replays import Bench, bench, equal
from tests.tiny import ROWS, UPSTREAM_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

PICTURED = [name for name in ORDER if ROWS[name].kind != "audio"]
STEPS = OmniDiffusionSamplingParams(seed=3, num_inference_steps=8)
PROMPT = "a red circle left of a blue square"


@pytest.mark.parametrize("name", PICTURED)
@pytest.mark.parametrize("index", [0, 1])
def test_every_row_shows_what_it_is_making(name: str, index: int) -> None:
    row = bench(name)
    request = row.request(index, Service(num_previews=1))
    alone, watched = row.run(dataclasses.replace(request, service=Service())), row.run(request)
    assert equal(alone, watched), "a preview changes nothing"
    assert watched.forwards == alone.forwards, "and needs no denoiser"
    (flight,) = watched.previews
    shown = previews.result(flight, row.info)
    assert shown is not None, watched.flight.task.notes
    assert shown.images
    assert all(isinstance(image, Image.Image) for image in shown.images)
    assert (shown.request_id, shown.index) == ("r", 0)
    assert 0 < shown.step < watched.flight.total_steps
    if row.info.kind == "video" and not name.startswith("helios"):  # which decodes whole chunks as it goes
        assert len(shown.images) == 1, "only the first frame is decoded"


def test_sound_has_no_previews() -> None:
    with Omni(folder("stable_audio"), num_threads=1) as omni:
        (output,) = omni.generate("rain", service=Service(num_previews=1), use_tqdm=False)
        assert output.error == "num_previews=1: StableAudioPipeline makes sound, which has no picture; use 0."


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_the_clean_sample_is_the_one_that_the_velocity_points_at(scheduler: str) -> None:
    """x0 = x - sigma v, with x before the step and v the denoiser's guided output, of the plain pipeline."""
    row = Bench("wan22_t2v", getattr(diffusers, scheduler))
    seen: list[torch.Tensor] = []
    original = type(row.pipeline.scheduler).step

    def step(self: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **rest: Any) -> Any:
        index = self.index_for_timestep(timestep)
        sigma = self.sigmas[index]
        is_flow = hasattr(self, "scale_noise") or self.config.prediction_type == "flow_prediction"
        seen.append(sample - sigma * model_output if is_flow else _alphas(self, index, model_output, sample))
        return original(self, model_output, timestep, sample, **rest)

    request = row.request(0, Service(num_previews=1))
    run = row.run(request)
    replay = run.previews[0].task.journal.replay  # type: ignore[union-attr]
    plain = DiffusionPipeline.from_pretrained(folder("wan22_t2v"))
    plain.scheduler = getattr(diffusers, scheduler).from_config(plain.scheduler.config)
    plain.scheduler.__class__ = type("Seen", (type(plain.scheduler),), {"step": step})
    plain(**request_of("wan22_t2v", 0), generator=torch.Generator().manual_seed(seed_of(0)), output_type="latent")
    assert replay is not None
    (clean,) = replay.past.clean.values()
    torch.testing.assert_close(clean, seen[replay.past.num_steps - 1], rtol=1e-5, atol=1e-6)


def _alphas(scheduler: Any, index: int, noise: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
    clean: torch.Tensor = (sample - sigma * noise) / alpha
    return clean


def test_what_cannot_be_shown_is_a_note() -> None:
    row = bench("qwen_image")
    request = row.request(0, Service(num_previews=1))
    run = row.run(request)
    (flight,) = run.previews
    flight.task.error = ValueError("no such picture")
    assert previews.result(flight, row.info) is None
    assert run.flight.task.notes == ["num_previews: this pipeline shows none here (ValueError: no such picture)."]


# ------------------------------------------------------------------ through the engine


def events(omni: Omni, service: Service, request_id: str, params: OmniDiffusionSamplingParams = STEPS) -> list[Any]:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    omni._client.submit(omni._request(request_id, PROMPT, params, service), inbox.put)
    heard = [inbox.get()]
    while not isinstance(heard[-1], OmniRequestOutput):
        heard.append(inbox.get())
    return heard


def num_forwards(output: OmniRequestOutput) -> int:
    """Of all ranks: decoding a preview on one of them moves rows to the other."""
    return sum(rank.forwards for rank in output.receipt.ranks)


def distance(a: Image.Image, b: Image.Image) -> float:
    """Mean difference of pixels, of 255."""
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


@pytest.mark.parametrize(
    "parallel", [{}, {"cfg_parallel_size": 2}, {"tensor_parallel_size": 2}], ids=["one rank", "cfg", "tensor"]
)
def test_previews_come_nearer_to_the_result_which_they_do_not_change(parallel: dict[str, Any]) -> None:
    with Omni(parallel_config=DiffusionParallelConfig(**parallel), num_threads=1) as omni:
        alone = events(omni, Service(), "alone")[-1]
        heard = events(omni, Service(num_previews=3), "watched")
    shown, output = [event for event in heard if isinstance(event, Preview)], heard[-1]
    assert output.error is None
    assert output.images[0].tobytes() == alone.images[0].tobytes()
    assert [(event.index, event.step) for event in shown] == [(0, 2), (1, 4), (2, 6)]
    distances = [distance(event.images[0], output.images[0]) for event in shown]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 5 < distances[0]
    assert num_forwards(output) == num_forwards(alone), "none was for a preview"
    assert output.receipt.notes == []


def test_every_rank_decodes_its_tiles_of_a_preview() -> None:
    """Of a picture of several tiles; previews are decoded as results are."""
    prompt, params = as_omni(request_of("sd3", 0) | {"height": 64, "width": 96}, 3, "pt")
    parallel = DiffusionParallelConfig(tensor_parallel_size=2, vae_patch_parallel_size=2)
    with Omni(folder("sd3"), parallel_config=parallel, num_threads=1) as omni:
        (alone,) = omni.generate([prompt], params, use_tqdm=False)
        (refused,) = omni.generate([prompt], params, use_tqdm=False, service=Service(num_previews=1))
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        omni._client.submit(omni._request("shown", prompt, params, Service(num_previews=1)), inbox.put)
        while not isinstance(output := inbox.get(), OmniRequestOutput):
            pass
    assert refused.error == "num_previews=1: Omni gives outputs alone; use AsyncOmni, or 0."
    assert torch.equal(alone.images[0], output.images[0])
    for rank, before in zip(output.receipt.ranks, alone.receipt.ranks, strict=True):
        assert rank.counts["previews"] == 1
        assert rank.counts["vae_tiles"] == 2 * before.counts["vae_tiles"] > 0


def test_previews_of_a_request_that_is_aborted_end_with_it() -> None:
    with Omni(num_threads=1) as omni:
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        omni._client.submit(omni._request("a", PROMPT, STEPS, Service(num_previews=7)), inbox.put)
        while not isinstance(inbox.get(), Preview):
            pass
        omni.abort("a")
        heard = [inbox.get()]
        while not isinstance(heard[-1], OmniRequestOutput):
            heard.append(inbox.get())
        assert heard[-1].error_kind == "aborted" or "aborted" in heard[-1].error
        omni.generate(PROMPT, STEPS, use_tqdm=False)
        assert inbox.empty()


def test_the_plain_pipeline_decodes_a_preview_to_the_same_picture() -> None:
    """The first step's clean sample, decoded by hand as the built-in model's pipeline does it."""
    with Omni(num_threads=1) as omni:
        (shown,) = [e for e in events(omni, Service(num_previews=1), "a") if isinstance(e, Preview)]
    pipeline = DiffusionPipeline.from_pretrained(load.BUILTIN["shapes"])
    pipeline.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    original = type(pipeline.scheduler).step

    def step(self: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **rest: Any) -> Any:
        sigma = self.sigmas[self.index_for_timestep(timestep)]
        seen.append(sample.float() - sigma * model_output.float())
        if len(seen) == shown.step + 1:
            return (seen[shown.step - 1].to(sample.dtype),)
        if len(seen) > shown.step + 1:
            return (sample,)
        return original(self, model_output, timestep, sample, **rest)

    pipeline.scheduler.__class__ = type("Seen", (type(pipeline.scheduler),), {"step": step})
    torch.set_num_threads(1)
    image = pipeline(
        prompt=PROMPT,
        negative_prompt="",
        generator=torch.Generator().manual_seed(3),
        height=128,
        width=128,
        num_inference_steps=8,
        true_cfg_scale=4.0,
    ).images[0]
    assert distance(image, shown.images[0]) == 0
