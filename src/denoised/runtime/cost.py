"""What a request will probably cost, before it runs: tokens x branches for a step, and its number of steps.

Only compared with the cost of other requests of the same model, to deal them to replicas; no result depends on it.
Steps that a request leaves to its pipeline are guessed here and corrected by the first word from the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from denoised.request import OmniDiffusionSamplingParams, PromptDict, Request
from denoised.runtime.model_info import ModelInfo
from denoised.spec.model_spec import Branch

# What most pipelines take where a request says nothing.
USUAL_SIDE = 1024  # pixels
USUAL_FRAMES = 81
USUAL_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Tokens of one step, over all guidance branches and outputs, and the number of steps."""

    per_step: float = 1.0
    steps: int = 1

    @property
    def total(self) -> float:
        return self.per_step * self.steps


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a step of a request computes: tokens of one output (patches of its area, times its latent frames), guidance
    branches, and outputs."""

    tokens: int
    branches: int = 1
    outputs: int = 1
    frames: int = 1

    @property
    def per_step(self) -> float:
        return float(self.tokens * self.branches * self.outputs)


def tokens_of(height: int | None, width: int | None, frames: int, info: ModelInfo, side: int = USUAL_SIDE) -> int:
    """Tokens of one output of so many latent frames."""
    area = (height or side) * (width or side)
    return max(1, area // info.size_multiple**2) * frames


def shape_of(prompt: PromptDict, params: OmniDiffusionSamplingParams, info: ModelInfo) -> Shape:
    """The shape of a request that has been checked against `info`."""
    asked = (params.num_frames or USUAL_FRAMES) if info.kind == "video" else 1
    frames = (asked - 1) // info.frame_multiple + 1
    return Shape(
        tokens=tokens_of(params.height, params.width, frames, info, params.resolution or USUAL_SIDE),
        branches=_branches(prompt, params, info),
        outputs=params.num_outputs_per_prompt * (params.layers or 1),
        frames=frames,
    )


def predict(request: Request, info: ModelInfo) -> Cost:
    """The cost of a request that has been checked against `info`."""
    shape = shape_of(request.prompt, request.params, info)
    return Cost(per_step=shape.per_step, steps=_steps(request.params))


def _steps(params: OmniDiffusionSamplingParams) -> int:
    schedule = params.sigmas or params.timesteps
    return len(schedule) if schedule else params.num_inference_steps or USUAL_STEPS


def _branches(prompt: PromptDict, params: OmniDiffusionSamplingParams, info: ModelInfo) -> int:
    """The two of guidance or the one without, and those that the model has beside them."""
    return _guided(prompt, params, info) + sum(_runs(branch, params, info) for branch in info.branches)


def _runs(branch: Branch, params: OmniDiffusionSamplingParams, info: ModelInfo) -> bool:
    given = info.branch_defaults | params.extra_args
    values = [given.get(name) for name in branch.parameters]
    return any(value is not None and (branch.above is None or value > branch.above) for value in values)


def _guided(prompt: PromptDict, params: OmniDiffusionSamplingParams, info: ModelInfo) -> int:
    """2 where guidance seems to act. Beside a scale of true guidance, the other one is an input of the model."""
    if "true_cfg_scale" in info.parameters:
        scale: float | None = params.true_cfg_scale
        possible = any(prompt.get(key) is not None for key in ("negative_prompt", "negative_prompt_embeds"))
    else:
        scale, possible = params.guidance_scale, "negative_prompt" in info.parameters
    return 2 if possible and (scale is None or scale > 1) else 1
