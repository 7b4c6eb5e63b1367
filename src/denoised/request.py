"""What goes in and what comes out: prompts, sampling parameters, outputs, receipts.

Nothing here knows how a request is run, and nothing imports torch: the server and the command line read this file.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypedDict, cast

from denoised.checks import bounded, check_fields, unknown_names
from denoised.errors import InvalidRequestError
from denoised.lora_request import MAX_SCALE, Lora, as_lora_requests


class MultiModalData(TypedDict, total=False):
    """Inputs beside the text: PIL images (one or a list), a mask, frames, samples."""

    image: Any
    mask_image: Any
    video: Any
    audio: Any


class PromptDict(TypedDict, total=False):
    prompt: str
    negative_prompt: str
    multi_modal_data: MultiModalData
    prompt_embeds: Any
    negative_prompt_embeds: Any


Prompt = str | PromptDict
"""One prompt. A string is `{"prompt": string}`."""


def _remembers_what_was_given(cls: Any) -> Any:
    """A value that equals its field's default is the request's word all the same, so the given names are kept.
    `dataclasses.replace` gives every name, which tells nothing: there, only values unlike the defaults count."""
    init = cls.__init__

    @functools.wraps(init)
    def initialize(self: Any, **given: Any) -> None:
        object.__setattr__(self, "_given", frozenset(given) if len(given) < len(fields(cls)) else frozenset())
        init(self, **given)

    cls.__init__ = initialize
    return cls


@_remembers_what_was_given
@dataclass(frozen=True, kw_only=True)
class OmniDiffusionSamplingParams:
    """How one request is sampled. None means: the pipeline's own default.

    Sizes are in pixels, `fps` in frames a second. `extra_args` holds any further keyword of the pipeline's `__call__`.
    """

    height: int | None = bounded(None, minimum=1, help="pixels")
    width: int | None = bounded(None, minimum=1, help="pixels")
    num_frames: int | None = bounded(None, minimum=1, maximum=10_000, help="frames of a video")
    fps: float | None = bounded(None, minimum=1e-3, maximum=1000, help="frames a second")
    num_inference_steps: int | None = bounded(None, minimum=1, maximum=10_000, help="denoising steps")
    sigmas: list[float] | None = bounded(None, help="own noise levels, instead of num_inference_steps")
    timesteps: list[float] | None = bounded(None, help="own timesteps, instead of num_inference_steps")
    seed: int | None = bounded(None, minimum=0, maximum=2**63 - 1, help="seed; default: drawn, and in the receipt")
    generator: Any = bounded(None, help="a torch.Generator instead of a seed; its state is copied, not advanced")
    num_outputs_per_prompt: int = bounded(1, minimum=1, maximum=64, help="images or videos of one prompt")
    guidance_scale: float | None = bounded(None, minimum=0, maximum=1000, help="guidance of the model's own kind")
    guidance_scale_2: float | None = bounded(
        None, minimum=0, maximum=1000, help="guidance of the second, low-noise expert"
    )
    true_cfg_scale: float | None = bounded(
        None, minimum=0, maximum=1000, help="classifier-free guidance with a negative prompt"
    )
    guidance_rescale: float | None = bounded(None, minimum=0, maximum=1, help="rescale after guidance")
    cfg_normalize: bool | None = bounded(None, help="give the guided prediction the norm of the conditional one")
    strength: float | None = bounded(None, minimum=0, maximum=1, help="how far to move from the input image")
    boundary_ratio: float | None = bounded(None, minimum=0, maximum=1, help="where two-expert models switch")
    flow_shift: float | None = bounded(
        None, minimum=1e-3, maximum=1000, help="timestep shift of flow-matching schedulers"
    )
    max_sequence_length: int | None = bounded(None, minimum=1, help="prompt tokens")
    resolution: int | None = bounded(None, minimum=1, help="resolution bucket of layered models")
    layers: int | None = bounded(None, minimum=1, maximum=64, help="layers of layered models")
    output_type: str = bounded("pil", choices=("pil", "pt", "np", "latent"), help="form of the output")
    latents: Any = bounded(None, help="own start noise")
    pil_image: Any = bounded(None, help="input image; the same as multi_modal_data.image of the prompt")
    return_trajectory_latents: bool = bounded(False, help="also return the latents after every step")
    lora_request: Any = bounded(None, help="adapter of this request, or several: LoRARequest, name, path or dict")
    lora_scale: float | None = bounded(
        None, minimum=-MAX_SCALE, maximum=MAX_SCALE, help="strength of lora_request's adapters; default 1"
    )
    enable_frame_interpolation: bool = bounded(False, help="insert frames after decoding")
    frame_interpolation_exp: int | None = bounded(None, minimum=1, help="2**exp times as many frames")
    frame_interpolation_scale: float | None = bounded(None, minimum=0, help="scale of the flow estimate")
    frame_interpolation_model_path: str | None = bounded(None, help="safetensors of the interpolation model")
    extra_args: dict[str, Any] = bounded({}, help="further keywords of the pipeline's __call__")
    _given: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_fields(self, InvalidRequestError)
        if self.seed is not None and self.generator is not None:
            raise InvalidRequestError(f"seed={self.seed} and generator are both given; give one of them.")
        self._refuse_two_schedules()
        self._refuse_absent_features()
        as_lora_requests(self.lora_request)
        own = {f.name: self.extra_args[f.name] for f in fields(self) if f.name in self.extra_args}
        if own:
            type(self)(**own)  # the same bounds hold, wherever a parameter is written

    def _refuse_absent_features(self) -> None:
        names = (f.name for f in fields(self) if f.name.startswith("frame_interpolation_"))
        for name in ("enable_frame_interpolation", *names):
            if getattr(self, name) not in (None, False):
                raise InvalidRequestError(f"{name} is not available in this version; leave it out.")

    def _refuse_two_schedules(self) -> None:
        if self.sigmas is not None and self.timesteps is not None:
            raise InvalidRequestError("sigmas and timesteps are both given; give one of them.")
        for name in ("sigmas", "timesteps"):
            steps = getattr(self, name)
            if steps is not None and self.num_inference_steps not in (None, len(steps)):
                raise InvalidRequestError(
                    f"num_inference_steps={self.num_inference_steps} and {name} with {len(steps)} entries are both "
                    "given; leave num_inference_steps out."
                )

    def without_generator(self) -> OmniDiffusionSamplingParams:
        """The same parameters for another process, where the generator's state travels beside them."""
        return replace(self, generator=None)

    def with_defaults(self, defaults: dict[str, Any]) -> OmniDiffusionSamplingParams:
        """These parameters, with `defaults` where they were left out; `extra_args` counts as given."""
        names = {f.name for f in fields(self)}
        moved = {k: v for k, v in self.extra_args.items() if k in names}
        if moved:
            twice = [k for k, v in moved.items() if self._says(k) and getattr(self, k) not in (None, v)]
            if twice:
                raise InvalidRequestError(f"{twice[0]} is given twice, also in extra_args; give it once.")
            rest = {k: v for k, v in self.extra_args.items() if k not in names}
            merged = replace(self, **moved, extra_args=rest)
            object.__setattr__(merged, "_given", self._given | moved.keys())  # which `replace` forgot
            return merged.with_defaults(defaults)
        problem = unknown_names(defaults, (f.name for f in fields(self)), "default_sampling_params")
        if problem:
            raise InvalidRequestError(problem)
        missing = {k: v for k, v in defaults.items() if k != "extra_args" and not self._says(k)}
        for given, instead in (("generator", "seed"), *((s, o) for s in _SCHEDULES for o in _SCHEDULES)):
            if getattr(self, given) is not None:
                missing.pop(instead, None)
        if self.seed is not None:
            missing.pop("generator", None)
        return replace(self, **missing, extra_args={**defaults.get("extra_args", {}), **self.extra_args})

    def _says(self, name: str) -> bool:
        """Whether the request has its own word on a parameter. None says nothing: it leaves it to the pipeline."""
        value = getattr(self, name)
        return not _same(value, getattr(type(self), name)) or (value is not None and name in self._given)


# Three ways to say the same; a default of one gives way to a request's own word in another.
_SCHEDULES = ("num_inference_steps", "sigmas", "timesteps")


def _same(value: Any, unset: Any) -> bool:
    """Tensors and arrays do not compare with ==."""
    return value is unset or (isinstance(value, bool | int | float | str) and value == unset)


@dataclass(frozen=True, kw_only=True)
class Service:
    """How a request is served. Nothing of it changes the result.

    priority: the higher goes first. tenant, weight: who shares fairly with whom, and in what proportion.
    timeout: seconds from its submission after which it fails. num_previews: pictures of what the model makes of it on
    the way. checkpoint_every: after so many steps its state is given out, to go on from (`Request.resume`); 0: never.
    """

    priority: int = bounded(0, minimum=-1000, maximum=1000)
    tenant: str = bounded("")
    weight: float = bounded(1.0, minimum=1e-3, maximum=1e3)
    timeout: float | None = bounded(None, minimum=1e-3, maximum=1e7)
    num_previews: int = bounded(0, minimum=0, maximum=1000)
    checkpoint_every: int = bounded(0, minimum=0)

    def __post_init__(self) -> None:
        check_fields(self, InvalidRequestError)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt with its parameters, as it travels to the ranks.

    `resume` is a checkpoint of the same request; `came` is when it was submitted, in Unix seconds;
    `loras` are the adapters that `params.lora_request` asks for, with their files.
    """

    request_id: str
    prompt: PromptDict
    params: OmniDiffusionSamplingParams
    seed: int
    generator_state: Any = None
    service: Service = Service()
    resume: Any = None
    came: float = 0.0
    loras: tuple[Lora, ...] = ()


def as_prompt(prompt: Any) -> PromptDict:
    """A prompt in dict form.

    Raises:
        InvalidRequestError: not a string or dict, or unknown keys.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, dict):
        raise InvalidRequestError(f"prompt must be a string or a dict, not {type(prompt).__name__}.")
    problem = unknown_names(prompt, PromptDict.__annotations__, "prompt key") or unknown_names(
        prompt.get("multi_modal_data") or {}, MultiModalData.__annotations__, "multi_modal_data key"
    )
    if problem:
        raise InvalidRequestError(problem)
    for key in ("prompt", "negative_prompt"):
        if not isinstance(prompt.get(key), str | None):
            raise InvalidRequestError(f"{key} must be a string, not {type(prompt[key]).__name__}.")
        if not _is_text(prompt.get(key) or ""):
            raise InvalidRequestError(f"{key} holds bytes that are no text; give it in UTF-8.")
    return cast(PromptDict, dict(prompt))  # the caller may go on to change its own


def _is_text(value: str) -> bool:
    """False for the lone surrogates that stand for undecodable bytes of a command line."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
