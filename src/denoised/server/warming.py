"""The first request of a server's life, which is the server's own: kernels are chosen and memory is taken before
anyone waits for it. At the model's own size, in as few steps and frames as there can be.
"""

from __future__ import annotations

from typing import Any

from denoised.request import OmniDiffusionSamplingParams, PromptDict, Service
from denoised.runtime.model_info import ModelInfo
from denoised.server.asks import Ask

_STEPS = 2
# Pixels a side of the picture that models start from; they scale it to what they need.
_SIDE = 256


def first_ask(info: ModelInfo) -> Ask:
    """A request that the model can run, as far as can be told from what it takes."""
    given: dict[str, Any] = {}
    if "num_inference_steps" in info.parameters and not {"sigmas", "timesteps"} & info.defaults.keys():
        given["num_inference_steps"] = _STEPS
    if "num_frames" in info.parameters:
        given["num_frames"] = info.frame_multiple + 1
    params = OmniDiffusionSamplingParams(seed=0, output_type="pil", **given)
    return Ask(request_id="warm-up", prompt=_prompt(info), params=params, service=Service())


def _prompt(info: ModelInfo) -> PromptDict:
    prompt: PromptDict = {"prompt": "a grey square"} if "prompt" in info.parameters else {}
    if info.needs_image:
        from PIL import Image

        prompt["multi_modal_data"] = {"image": Image.new(info.image_mode, (_SIDE, _SIDE), "grey")}
    return prompt
