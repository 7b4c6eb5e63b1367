"""What a loaded pipeline accepts, as plain data: made where it is loaded, read where requests are checked.

The client checks requests against this without importing torch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from typing import Any

from denoised.checks import unknown_names
from denoised.config import EngineConfig
from denoised.errors import InvalidRequestError
from denoised.request import OmniDiffusionSamplingParams, PromptDict
from denoised.spec.model_spec import Branch, Kind, ModelSpec

# Fields that the engine itself acts on, or that reach the pipeline under another name.
ENGINE_FIELDS = frozenset(
    "seed generator num_outputs_per_prompt output_type boundary_ratio flow_shift return_trajectory_latents pil_image "
    "fps lora_request lora_scale extra_args enable_frame_interpolation frame_interpolation_exp "
    "frame_interpolation_scale frame_interpolation_model_path".split()
)
COUNT_NAMES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "num_outputs_per_prompt")
# Keywords that the engine sets itself or that cannot reach another process.
RESERVED = frozenset({"self", "generator", "output_type", "return_dict", "callback", "callback_on_step_end"})
# Pixels of the side that a request leaves to the pipeline, for the bound on both.
_USUAL_SIDE = 1024


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A loaded model. `parameters` are the keywords of its `__call__`; `size_multiple` what sizes must
    divide by, `frame_multiple` what the number of frames less one must. `footprint`: runtime/room.py's, if there is a
    limit. `branch_defaults`: what its own `__call__` has for parameters of `branches`."""

    model: str
    pipeline: str
    kind: Kind
    parameters: frozenset[str]
    size_multiple: int
    frame_multiple: int
    branching_config: frozenset[str]
    device: str
    dtype: str
    needs_image: bool = False
    declared: bool = True
    exclusive: bool = False
    sample_rate: int | None = None
    image_mode: str = "RGB"
    footprint: Any = None
    branches: tuple[Branch, ...] = ()
    branch_defaults: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def complete(
        self, prompt: PromptDict, params: OmniDiffusionSamplingParams
    ) -> tuple[PromptDict, OmniDiffusionSamplingParams]:
        """A request with the model's defaults in it.

        Guidance that was asked for, by the request or by the defaults, must act: without a negative prompt it acts
        against the empty one. (A pipeline's own default scale is left to the pipeline.)
        """
        params = params.with_defaults(self.defaults)
        negative = {"negative_prompt", "negative_prompt_embeds"} & (prompt.keys() | params.extra_args.keys())
        if (
            not negative
            and (params.true_cfg_scale or 0) > 1
            and {"true_cfg_scale", "negative_prompt"} <= self.parameters
        ):
            prompt = {**prompt, "negative_prompt": ""}
        return prompt, params


def describe(
    pipeline: Any, spec: ModelSpec, *, model: str, device: str, dtype: str, defaults: dict[str, Any]
) -> ModelInfo:
    """The ModelInfo of a loaded pipeline."""
    own = inspect.signature(type(pipeline).__call__).parameters
    return ModelInfo(
        model=model,
        pipeline=type(pipeline).__name__,
        kind=spec.kind,
        parameters=frozenset(own),
        size_multiple=_size_multiple(pipeline, spec.packing),
        frame_multiple=1 if spec.chunked else _frame_multiple(pipeline),
        branching_config=branching_config(pipeline),
        branches=spec.branches,
        branch_defaults={name: own[name].default for one in spec.branches for name in one.parameters if name in own},
        needs_image=spec.needs_image,
        declared=spec.declared,
        exclusive=spec.exclusive,
        device=device,
        dtype=dtype,
        sample_rate=_sample_rate(pipeline),
        image_mode="RGBA" if _image_channels(pipeline) == 4 else "RGB",
        defaults={**spec.defaults, **defaults},
    )


def _image_channels(pipeline: Any) -> int | None:
    """Channels of an image that its VAE reads, where its configuration says so: layered models have four."""
    return getattr(getattr(getattr(pipeline, "vae", None), "config", None), "input_channels", None)


def branching_config(pipeline: Any) -> frozenset[str]:
    """Which settings that pipelines read from configurations would act here."""
    acts = {"flow_shift"} if shift_name(getattr(getattr(pipeline, "scheduler", None), "config", {})) else set()
    if "boundary_ratio" in pipeline.config and getattr(pipeline, "transformer_2", None) is not None:
        acts |= {"boundary_ratio"}
    return frozenset(acts)


def shift_name(scheduler_config: Any) -> str | None:
    """What a scheduler calls its timestep shift; None where it has none, or takes it from the picture's size."""
    if scheduler_config.get("use_dynamic_shifting") or not scheduler_config.get("use_flow_sigmas", True):
        return None
    return next((name for name in ("flow_shift", "shift") if name in scheduler_config), None)


def _sample_rate(pipeline: Any) -> int | None:
    """Samples a second of the sound that it makes, if any."""
    for part, name in (("vocoder", "output_sampling_rate"), ("vae", "sampling_rate")):
        rate = getattr(getattr(getattr(pipeline, part, None), "config", None), name, None)
        if rate is not None:
            return int(rate)
    return None


def _size_multiple(pipeline: Any, packing: int) -> int:
    """Pixels of one latent, times the denoiser's patch where its configuration names one."""
    scale = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", None)
    scale = scale or getattr(pipeline, "vae_spatial_compression_ratio", None) or 8
    denoiser = getattr(pipeline, "transformer", None)
    patch = getattr(getattr(denoiser, "config", None), "patch_size", 1) if denoiser is not None else 1
    patch = int(patch[-1] if isinstance(patch, list | tuple) else patch or 1)
    return int(scale) * max(patch, packing)


def _frame_multiple(pipeline: Any) -> int:
    """Frames of one latent of a video VAE; the first frame has a latent of its own."""
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    return int(next((getattr(pipeline, name) for name in names if getattr(pipeline, name, None)), 1))


def check(prompt: PromptDict, params: OmniDiffusionSamplingParams, info: ModelInfo, config: EngineConfig) -> None:
    """Refuse a request that this model cannot run, before it is queued.

    Raises:
        InvalidRequestError: one sentence with the field, the value and what is allowed.
    """
    _check_taken(params, info)
    _check_size(params, info, config)
    _check_prompt(prompt, params, info, config)


def _check_taken(params: OmniDiffusionSamplingParams, info: ModelInfo) -> None:
    for f in fields(params):
        value = getattr(params, f.name)
        if value is not None and f.name not in ENGINE_FIELDS and f.name not in info.parameters:
            raise InvalidRequestError(f"{f.name}={value!r:.40}: {info.pipeline} does not take it; leave it out.")
    for name in ("boundary_ratio", "flow_shift"):
        if getattr(params, name) is not None and name not in info.branching_config | info.parameters:
            raise InvalidRequestError(
                f"{name}={getattr(params, name)}: {info.pipeline} has no such setting; leave it out."
            )
    if params.fps is not None and info.kind != "video":
        raise InvalidRequestError(f"fps={params.fps}: {info.pipeline} makes no video; leave it out.")
    problem = unknown_names(params.extra_args, info.parameters - RESERVED, f"{info.pipeline} keyword in extra_args")
    if problem:
        raise InvalidRequestError(problem)
    if params.output_type != "pil" and "output_type" not in info.parameters:
        raise InvalidRequestError(
            f"output_type={params.output_type!r}: {info.pipeline} gives its output in one form; leave it out."
        )
    if params.num_outputs_per_prompt > 1 and not info.parameters & set(COUNT_NAMES):
        raise InvalidRequestError(
            f"num_outputs_per_prompt={params.num_outputs_per_prompt}: {info.pipeline} makes one output a request; "
            "send the prompt several times with different seeds."
        )


def _check_size(params: OmniDiffusionSamplingParams, info: ModelInfo, config: EngineConfig) -> None:
    multiple = info.size_multiple
    for name in ("height", "width"):
        value = getattr(params, name)
        if value is not None and value % multiple:
            below, above = value // multiple * multiple, (value // multiple + 1) * multiple
            nearest = f"{below} or {above}" if below else f"{above}"
            raise InvalidRequestError(
                f"{name}={value}: {info.pipeline} needs a multiple of {multiple}; use {nearest}."
            )
    if params.num_frames is not None and (params.num_frames - 1) % info.frame_multiple:
        below = (params.num_frames - 1) // info.frame_multiple * info.frame_multiple + 1
        raise InvalidRequestError(
            f"num_frames={params.num_frames}: {info.pipeline} needs a multiple of {info.frame_multiple} plus one; "
            f"use {below} or {below + info.frame_multiple}."
        )
    pixels = (params.height or _USUAL_SIDE) * (params.width or _USUAL_SIDE) if params.height or params.width else 0
    if pixels > config.max_pixels:
        raise InvalidRequestError(
            f"height x width = {params.height or 'default'} x {params.width or 'default'} is more than "
            f"max_pixels={config.max_pixels}; ask for less or start with a larger max_pixels."
        )


def _check_prompt(
    prompt: PromptDict, params: OmniDiffusionSamplingParams, info: ModelInfo, config: EngineConfig
) -> None:
    for key in ("prompt", "negative_prompt"):
        text = prompt.get(key)
        if isinstance(text, str) and len(text) > config.max_prompt_chars:
            raise InvalidRequestError(
                f"{key} has {len(text)} characters; at most {config.max_prompt_chars} are allowed, so shorten it."
            )
        if text is not None and key not in info.parameters:
            raise InvalidRequestError(f"{key}: {info.pipeline} does not take it; leave it out.")
    embedded = "prompt_embeds" in prompt or "prompt_embeds" in params.extra_args
    if prompt.get("prompt") is None and not embedded and "prompt" in info.parameters:
        raise InvalidRequestError("prompt is missing; give a prompt or prompt_embeds.")
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        if prompt.get(key) is not None and key not in info.parameters:
            raise InvalidRequestError(f"{key}: {info.pipeline} does not take it; leave it out.")
    data = dict(prompt.get("multi_modal_data") or {})
    if params.pil_image is not None and data.get("image") is not None:
        raise InvalidRequestError("pil_image and multi_modal_data.image are both given; give one of them.")
    unknown = [name for name in data if name not in info.parameters]
    if unknown or (params.pil_image is not None and "image" not in info.parameters):
        raise InvalidRequestError(f"multi_modal_data.{(unknown or ['image'])[0]}: {info.pipeline} does not take it.")
    if info.needs_image and "image" not in data and params.pil_image is None and "image" not in params.extra_args:
        raise InvalidRequestError(f"multi_modal_data.image is missing; {info.pipeline} starts from an image.")
