"""Each sampling parameter reaches the pipeline or is refused; defaults give way to what a request says."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from denoised import OmniDiffusionSamplingParams as Params
from denoised.config import EngineConfig
from denoised.errors import InvalidRequestError
from denoised.request import Request, as_prompt
from denoised.runtime import program
from denoised.runtime.model_info import ModelInfo, check, shift_name

COUNT = "num_images_per_prompt"


def info(*parameters: str, **more: Any) -> ModelInfo:
    known = {"self", "prompt", "generator", "output_type", *parameters}
    given = {"kind": "image", "size_multiple": 8, "frame_multiple": 4, "branching_config": frozenset()}
    names = {"model": "m", "pipeline": "SomePipeline", "device": "cpu", "dtype": "float32"}
    return ModelInfo(parameters=frozenset(known), **{**names, **given, **more})


def keywords(params: Params, of: ModelInfo, **prompt: Any) -> dict[str, Any]:
    """What the pipeline is called with, after the checks of a request."""
    params = params.with_defaults({})
    asked = as_prompt({"prompt": "x", **prompt})
    check(asked, params, of, EngineConfig())
    request = Request(request_id="r", prompt=asked, params=params, seed=1)
    return program.keywords(request, of, device="cpu")


VALUES: dict[str, Any] = {
    "height": 64, "width": 64, "num_frames": 5, "fps": 8.0, "num_inference_steps": 3, "sigmas": [1.0, 0.5],
    "timesteps": [9.0, 1.0], "num_outputs_per_prompt": 2, "guidance_scale": 2.0, "guidance_scale_2": 2.0,
    "true_cfg_scale": 2.0, "guidance_rescale": 0.5, "cfg_normalize": True, "strength": 0.5, "boundary_ratio": 0.5,
    "flow_shift": 2.0, "max_sequence_length": 9, "resolution": 640, "layers": 2, "output_type": "pt",
    "latents": torch.ones(1), "pil_image": Image.new("RGB", (8, 8)), 
    "enable_frame_interpolation": True, "frame_interpolation_exp": 1, "frame_interpolation_scale": 1.0,
    "frame_interpolation_model_path": "p",
}  # fmt: skip
# These mean the same for every pipeline.
ALWAYS = {"seed", "generator", "extra_args", "return_trajectory_latents", "lora_request", "lora_scale"}


@pytest.mark.parametrize("name", [f.name for f in fields(Params) if f.name not in ALWAYS])
def test_a_pipeline_that_does_not_take_a_parameter_refuses_it(name: str) -> None:
    nothing = dataclasses.replace(info(), parameters=frozenset({"self", "prompt"}))
    with pytest.raises(InvalidRequestError, match=f"{name}|image") as caught:
        keywords(Params(**{name: VALUES[name]}), nothing)
    assert str(caught.value).count(".") >= 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "keyword"),
    [
        *(
            (n, n)
            for n in ("height", "sigmas", "timesteps", "guidance_scale_2", "cfg_normalize", "strength", "latents")
        ),
        *((n, n) for n in ("resolution", "layers", "guidance_rescale", "strength", "output_type")),
        ("fps", "fps"),
        ("fps", "frame_rate"),
        ("num_outputs_per_prompt", COUNT),
        ("pil_image", "image"),
    ],
)
def test_a_pipeline_that_takes_a_parameter_gets_it(name: str, keyword: str) -> None:
    got = keywords(Params(**{name: VALUES[name]}), info(keyword, kind="video"))
    assert got[keyword] is VALUES[name] or got[keyword] == VALUES[name]


def test_a_value_is_given_once() -> None:
    with pytest.raises(InvalidRequestError, match="num_inference_steps=20 and sigmas with 2 entries"):
        Params(num_inference_steps=20, sigmas=[1.0, 0.5])
    with pytest.raises(InvalidRequestError, match="sigmas and timesteps"):
        Params(timesteps=[9.0], sigmas=[1.0])
    with pytest.raises(InvalidRequestError, match="seed=3 and generator"):
        Params(seed=3, generator=torch.Generator())
    with pytest.raises(InvalidRequestError, match="height is given twice"):
        Params(height=64, extra_args={"height": 128}).with_defaults({})
    image = Image.new("RGB", (8, 8))
    with pytest.raises(InvalidRequestError, match="pil_image and multi_modal_data"):
        keywords(Params(pil_image=image), info("image"), multi_modal_data={"image": image})


def test_extra_args_do_not_pass_by_the_checks() -> None:
    with pytest.raises(InvalidRequestError, match="multiple of 8"):
        keywords(Params(extra_args={"height": 63}), info("height", "width"))
    with pytest.raises(InvalidRequestError, match="max_pixels"):
        keywords(Params(extra_args={"height": 8 * 10**6}), info("height", "width"))
    assert keywords(Params(extra_args={"height": 64}), info("height", "width"))["height"] == 64


def test_one_huge_side_alone_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_pixels"):
        keywords(Params(height=8 * 2**20), info("height", "width"))


def test_defaults_give_way() -> None:
    defaults = {"num_inference_steps": 20, "seed": 3, "height": 64, "extra_args": {"a": 1, "b": 1}}
    assert Params().with_defaults(defaults).num_inference_steps == 20
    assert Params(sigmas=[1.0, 0.5]).with_defaults(defaults).num_inference_steps is None
    assert Params(num_inference_steps=7).with_defaults({"timesteps": [9.0]}).timesteps is None
    own = Params(generator=torch.Generator(), extra_args={"b": 2}).with_defaults(defaults)
    assert own.seed is None
    assert own.height == 64
    assert own.extra_args == {"a": 1, "b": 2}
    tensor, array = torch.zeros(2, 2), np.zeros((2, 2))
    assert Params(latents=tensor).with_defaults({"latents": array}).latents is tensor
    assert Params(latents=array).with_defaults({"latents": tensor}).latents is array


def test_a_pipeline_gets_copies_that_it_may_change() -> None:
    """A request may run again after a crash, and prompts of one call share their parameters."""
    latents, sigmas, image, kwargs = torch.ones(2), [1.0, 0.5], Image.new("RGB", (8, 8)), {"scale": [1.0]}
    seen: list[dict[str, Any]] = []

    class Pipeline:
        components: dict[str, Any] = {}
        _execution_device = "cpu"

        def __call__(self, **given: Any) -> None:
            seen.append({"latents": given["latents"].clone(), "sigmas": [*given["sigmas"]]})
            given["latents"].zero_()
            given["sigmas"].pop()
            given["image"][0].putpixel((0, 0), (255, 0, 0))
            given["joint_attention_kwargs"]["scale"].clear()

    params = Params(latents=latents, sigmas=sigmas, extra_args={"joint_attention_kwargs": kwargs})
    prompt = as_prompt({"prompt": "x", "multi_modal_data": {"image": [image]}})
    request = Request(request_id="r", prompt=prompt, params=params, seed=1)
    of = info("latents", "sigmas", "image", "joint_attention_kwargs")
    for _ in range(2):
        program.build(Pipeline(), request, of, report=lambda step, total: None, observer=None)()
    assert latents.tolist() == [1.0, 1.0]
    assert sigmas == [1.0, 0.5]
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert kwargs == {"scale": [1.0]}
    assert seen[0]["sigmas"] == seen[1]["sigmas"]


def test_the_callers_dict_may_change_after_the_call() -> None:
    mine = {"prompt": "a"}
    prompt = as_prompt(mine)
    mine["prompt"] = "b"
    assert prompt["prompt"] == "a"


def test_flow_shift_is_refused_where_the_size_decides() -> None:
    """FlowMatchEuler with dynamic shifting reads no shift: the setting would do nothing."""
    assert shift_name(FlowMatchEulerDiscreteScheduler(shift=3.0).config) == "shift"
    assert shift_name(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config) is None
    assert (
        shift_name(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").config)
        == "flow_shift"
    )
    assert shift_name(UniPCMultistepScheduler().config) is None


@pytest.mark.parametrize("make", [lambda: FlowMatchEulerDiscreteScheduler(shift=1.0)])
def test_flow_shift_acts_on_the_copy_alone(make: Any) -> None:
    mine, own = make(), make()
    program.set_flow_shift(own, 5.0)
    for scheduler in (mine, own):
        scheduler.set_timesteps(4)
    assert not torch.equal(mine.sigmas, own.sigmas)


# Parameters whose own default is a value, and what an engine may have as its default instead.
OWN = {"output_type": "pil", "num_outputs_per_prompt": 1, "return_trajectory_latents": False}
ENGINES = {"output_type": "np", "num_outputs_per_prompt": 4, "return_trajectory_latents": True}


@pytest.mark.parametrize("name", OWN)
def test_a_value_that_equals_our_default_is_the_requests_word_all_the_same(name: str) -> None:
    said = {name: OWN[name]}
    given = Params(**said)
    assert given == Params()
    for params in (given, pickle.loads(pickle.dumps(given)), copy.deepcopy(given), Params(extra_args=said)):
        filled = params.with_defaults(ENGINES)
        assert {other: getattr(filled, other) for other in OWN} == ENGINES | said
    assert getattr(Params().with_defaults(ENGINES), name) == ENGINES[name]


def test_none_leaves_a_parameter_open_and_a_copy_knows_only_what_differs() -> None:
    assert Params(height=None).with_defaults({"height": 64}).height == 64
    changed = dataclasses.replace(Params(), output_type="pt").with_defaults(ENGINES)
    assert (changed.output_type, changed.num_outputs_per_prompt) == ("pt", 4)
