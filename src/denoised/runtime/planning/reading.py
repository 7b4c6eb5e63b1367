"""From configuration files to ModelFacts: what is made, of how many tokens, and what one step of it costs."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from typing import Any, cast

from torch import nn

from denoised import hf
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, one_line
from denoised.request import OmniDiffusionSamplingParams, PromptDict
from denoised.runtime.load import BUILTIN_DEFAULTS
from denoised.runtime.model_info import ModelInfo, check, describe
from denoised.runtime.planning import limits, trace, work
from denoised.runtime.planning.ask import Ask
from denoised.runtime.planning.facts import Component, Denoiser, ModelFacts, Role, Tokens
from denoised.runtime.planning.settings import with_settings
from denoised.runtime.planning.skeleton import skeleton
from denoised.spec.model_spec import ModelSpec
from denoised.spec.registry import resolve

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# What requests are assumed to have where neither they nor the pipeline says it.
USUAL_SIDE, USUAL_FRAMES, USUAL_STEPS, USUAL_TEXT = 1024, 81, 50, 512
UNET_TEXT = 77  # CLIP's
_log = logging.getLogger(__name__)
# What describes the size of an output of each kind.
SIZES = {"image": ("width", "height"), "video": ("width", "height", "num_frames"), "audio": ()}
_GUIDANCE = ("true_cfg_scale", "guidance_scale")


def read(
    model: str, ask: Ask, *, dtype: str = "bfloat16", config: EngineConfig | None = None, device: str = "cpu"
) -> ModelFacts:
    """The facts of a model for these requests. No weights are read.

    Args:
        config: of it, quantization and attention_backend count.
        device: kind of device to plan for, cpu or cuda, which need not be here.

    Raises:
        ModelError: no such model, or it cannot be built.
        InvalidRequestError: it does not take such a request.
        InvalidConfigError: it does not take these settings.
    """
    pipeline = skeleton(model)
    facts = facts_of(pipeline, ask, model=model, dtype=dtype)
    return with_settings(facts, pipeline, dataclasses.replace(config or EngineConfig(), model=model), device=device)


def facts_of(pipeline: Any, ask: Ask, *, model: str, dtype: str = "bfloat16") -> ModelFacts:
    """The facts of a pipeline, with weights or without."""
    spec = resolve(pipeline)
    if not spec.denoisers:
        raise InvalidConfigError(
            f"model={model!r}: {spec.pipeline} has no component named transformer or unet to plan for."
        )
    info = describe(pipeline, spec, model=model, device="meta", dtype=dtype, defaults=BUILTIN_DEFAULTS.get(model, {}))
    asked = _asked(pipeline, ask, info)
    latent = trace.latent_shape(pipeline, asked, info)
    tokens = _tokens(pipeline, spec, asked, info)
    itemsize = ITEMSIZE[dtype]
    denoisers = tuple(_denoiser(name, pipeline, spec, tokens, latent) for name in spec.denoisers)
    decoded = trace.decode(pipeline, latent, itemsize)
    return ModelFacts(
        model=model,
        pipeline=info.pipeline,
        kind=info.kind,
        itemsize=itemsize,
        dtype=dtype,
        components=tuple(_components(pipeline, spec)),
        denoisers=denoisers,
        tokens=tokens,
        num_rows=_branches(pipeline, ask, info) * ask.requests,
        num_steps=asked["num_inference_steps"],
        size=tuple(asked[name] for name in SIZES[info.kind]),
        latent_values=_product(latent),
        decode_flops=None if decoded is None else decoded.flops,
        decode_bytes=None if decoded is None else decoded.peak,
        vae_refusal=limits.vae_refusal(pipeline),
    )


def block_costs(pipeline: Any, spec: ModelSpec) -> dict[str, tuple[float, ...]]:
    """Operations of each denoiser's blocks, in order of execution, on one row of what the pipeline makes by default.

    Nothing of a pipeline or a denoiser that cannot be read without a request: whoever asks has to do without.
    """
    found: dict[str, tuple[float, ...]] = {}
    try:
        info = describe(pipeline, spec, model="", device="meta", dtype="bfloat16", defaults={})
        asked = _asked(pipeline, Ask(), info)
        latent, tokens = trace.latent_shape(pipeline, asked, info), _tokens(pipeline, spec, asked, info)
        for name in spec.denoisers:
            found[name] = _denoiser(name, pipeline, spec, tokens, latent).costs
    except Exception as error:  # pipelines of all kinds come here, and all of them can be cut without this
        _log.info("operations of %s's blocks cannot be read: %s", spec.pipeline, one_line(error))
    return found


def _asked(pipeline: Any, ask: Ask, info: ModelInfo) -> dict[str, Any]:
    """Sizes and steps: asked for, the engine's defaults, the pipeline's own, or the usual."""
    own = {name: p.default for name, p in inspect.signature(type(pipeline).__call__).parameters.items()}
    wanted = {f.name: getattr(ask, f.name) for f in dataclasses.fields(ask)}
    _check(wanted, info)
    usual = {"layers": 0, **_usual(pipeline, info, own)}
    names = dict.fromkeys([*wanted, *usual])
    return {k: _first(wanted.get(k), info.defaults.get(k), own.get(k), usual.get(k)) for k in names}


def _check(wanted: dict[str, Any], info: ModelInfo) -> None:
    """As the engine would check such a request.

    Raises:
        InvalidRequestError: the model does not take it.
    """
    known = OmniDiffusionSamplingParams.__dataclass_fields__
    params = OmniDiffusionSamplingParams(**{k: v for k, v in wanted.items() if v is not None and k in known})
    check(_any_prompt(info), params, info, EngineConfig(max_pixels=2**40))


def _any_prompt(info: ModelInfo) -> PromptDict:
    prompt: dict[str, Any] = {"prompt": ""} if "prompt" in info.parameters else {}
    if info.needs_image:
        prompt["multi_modal_data"] = {"image": True}
    return cast(PromptDict, prompt)


def _usual(pipeline: Any, info: ModelInfo, own: dict[str, Any]) -> dict[str, int]:
    """What requests leave open. Pipelines name their side in pixels, or as a number of latents, or not at all."""
    scale = trace.spatial_scale(pipeline)
    latents = getattr(pipeline, "default_sample_size", None) or USUAL_SIDE // scale
    side = own["resolution"] if isinstance(own.get("resolution"), int) else int(latents) * scale
    pixels = side // info.size_multiple * info.size_multiple
    frames = (USUAL_FRAMES - 1) // info.frame_multiple * info.frame_multiple + 1
    return {"height": pixels, "width": pixels, "num_frames": frames, "num_inference_steps": USUAL_STEPS}


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None and v is not inspect.Parameter.empty), None)


def _tokens(pipeline: Any, spec: ModelSpec, asked: dict[str, Any], info: ModelInfo) -> Tokens:
    image = trace.image_tokens(pipeline, asked, info, spec.packing)
    pictures = _first(asked.get("pictures"), int(spec.needs_image)) if info.kind == "image" else 0
    layers = asked["layers"] + 1  # of a layered picture, and the whole one
    once = image if getattr(pipeline.config, "expand_timesteps", False) else 1
    return Tokens(
        image=image * (layers + pictures),
        text=_text_tokens(pipeline, asked, info),
        once=once,
        audio=trace.audio_tokens(pipeline, asked),
    )


def _text_tokens(pipeline: Any, asked: dict[str, Any], info: ModelInfo) -> int:
    own = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    usual = UNET_TEXT if any(trace.is_unet(part) for part in hf.components(pipeline).values()) else USUAL_TEXT
    return int(_first(asked["text_tokens"], own and own.default, usual))


def _branches(pipeline: Any, ask: Ask, info: ModelInfo) -> int:
    """Two where guidance is on by default and not an input of the model."""
    if ask.branches is not None:
        return ask.branches
    configs = [pipeline.config, *(getattr(getattr(pipeline, n, None), "config", {}) for n in ("transformer", "unet"))]
    if any(config.get("guidance_embeds") or config.get("is_distilled") for config in configs):
        return 1
    if getattr(pipeline, "guider", None) is not None:
        return 2
    own = inspect.signature(type(pipeline).__call__).parameters
    scale = next((own[name].default for name in _GUIDANCE if name in own), None)
    scale = info.defaults.get("true_cfg_scale", scale)
    return 2 if isinstance(scale, int | float) and scale > 1 else 1


def _denoiser(name: str, pipeline: Any, spec: ModelSpec, tokens: Tokens, latent: tuple[int, ...]) -> Denoiser:
    model = getattr(pipeline, name)
    if trace.is_unet(model):
        return trace.unet(name, model, tokens, latent, spec)
    return work.denoiser(name, model, tokens, spec)


def _components(pipeline: Any, spec: ModelSpec) -> list[Component]:
    parts = {name: part for name, part in hf.components(pipeline).items() if isinstance(part, nn.Module)}
    return [_component(name, part, _role(name, part, spec)) for name, part in parts.items()]


def _component(name: str, part: nn.Module, role: Role) -> Component:
    encodes = role == "encoder"
    return Component(
        name=name,
        class_name=type(part).__name__,
        role=role,
        num_params=sum(parameter.numel() for parameter in part.parameters()),
        degrees=limits.encoder_degrees(part) if encodes else (),
        hsdp=limits.hsdp_refusal(part) if encodes else None,
    )


def _role(name: str, part: nn.Module, spec: ModelSpec) -> Role:
    """Encoders are those of text, which alone are divided."""
    if name in spec.denoisers:
        return "denoiser"
    if hf.reads_text(name, part):
        return "encoder"
    return "vae" if "vae" in name else "other"


def _product(values: tuple[int, ...]) -> int:
    result = 1
    for value in values:
        result *= value
    return result
