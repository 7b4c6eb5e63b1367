"""Shapes of latents, and parts that run on the meta device: the VAE's decoder and UNets are traced, not estimated."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from denoised.runtime.model_info import ModelInfo
from denoised.runtime.planning.facts import Denoiser, Tokens, Work
from denoised.runtime.planning.limits import limits, without_values
from denoised.runtime.planning.work import ROWWISE
from denoised.spec.blocks import stacks
from denoised.spec.model_spec import ModelSpec

# Tensors of the largest size that live at once inside a decoder: a layer's input, its output, and the shortcut.
LIVE_TENSORS = 3
# Of videos with sound (LTX-2): 16 kHz, hops of 160 samples, four of them a latent.
FRAMES_A_SECOND, SOUND_TOKENS_A_SECOND = 24, 25


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Operations, and bytes of what lives at once beside the weights."""

    flops: float
    peak: float


def spatial_scale(pipeline: Any) -> int:
    """Pixels of one latent, along a side."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    return int(next((getattr(pipeline, name) for name in names if getattr(pipeline, name, None)), 8))


def latent_shape(pipeline: Any, asked: dict[str, Any], info: ModelInfo) -> tuple[int, ...]:
    """Channels, frames (of videos), and height and width, or length (of sound), of one output's latents."""
    if info.kind == "audio":
        return (_channels(pipeline), _audio_length(pipeline))
    scale = spatial_scale(pipeline)
    spatial = (asked["height"] // scale, asked["width"] // scale)
    return (_channels(pipeline), *_frames(asked, info), *spatial)


def _frames(asked: dict[str, Any], info: ModelInfo) -> tuple[int, ...]:
    return ((asked["num_frames"] - 1) // info.frame_multiple + 1,) if info.kind == "video" else ()


def _channels(pipeline: Any) -> int:
    config = getattr(getattr(pipeline, "vae", None), "config", {})
    names = ("latent_channels", "z_dim", "decoder_input_channels")
    return int(next((config[name] for name in names if config.get(name)), 4))


def _audio_length(pipeline: Any) -> int:
    return int(getattr(pipeline.transformer.config, "sample_size", 1024))


def image_tokens(pipeline: Any, asked: dict[str, Any], info: ModelInfo, packing: int) -> int:
    """Tokens of what one request makes. Sound has one more, for what holds all through it."""
    if info.kind == "audio":
        return _audio_length(pipeline) + 1
    side = _token_side(pipeline, packing)
    patch = _patch_size(pipeline)
    frames = -(-(_frames(asked, info) or (1,))[0] // patch)
    return int(frames * (asked["height"] // side) * (asked["width"] // side))


def _token_side(pipeline: Any, packing: int) -> int:
    """Pixels of a token along a side: the denoiser's patch, or else what the pipeline packs, which some pipelines
    count as a level of their VAE already."""
    scale = spatial_scale(pipeline)
    patch = getattr(getattr(pipeline, "transformer", None), "config", {}).get("patch_size") or 1
    patch = int(patch[-1] if isinstance(patch, list | tuple) else patch)
    levels = getattr(getattr(pipeline, "vae", None), "config", {}).get("block_out_channels")
    packed = isinstance(levels, list | tuple) and scale == 2 ** len(levels)
    return scale * (patch if patch > 1 else 1 if packed else packing)


def audio_tokens(pipeline: Any, asked: dict[str, Any]) -> int:
    """Tokens of the sound beside a video; 0 where the denoiser makes none."""
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    seconds = asked["num_frames"] / FRAMES_A_SECOND
    return round(seconds * SOUND_TOKENS_A_SECOND) if config.get("audio_in_channels") else 0


def _patch_size(pipeline: Any) -> int:
    """Frames of latents that one token holds."""
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    patch = config.get("patch_size")
    if isinstance(patch, list | tuple) and len(patch) == 3:
        return int(patch[0])
    return int(config.get("patch_size_t") or 1)


def decode(pipeline: Any, latent: tuple[int, ...], itemsize: int) -> Traced | None:
    """One decoding by the VAE; None where it does not run on the meta device."""
    vae = getattr(pipeline, "vae", None)
    if vae is None or not hasattr(vae, "decode"):
        return None
    vae = _on_paper(vae)
    frames = (1,) if len(latent) == 3 and any(isinstance(m, nn.Conv3d) for m in vae.modules()) else ()
    shape = (1, latent[0], *frames, *latent[1:])
    with contextlib.suppress(RuntimeError, NotImplementedError, ValueError, TypeError):
        return _traced(vae, itemsize, lambda: vae.decode(torch.empty(shape, device="meta")))
    return None


def _on_paper(model: Any) -> Any:
    """The model, or what of a loaded one can run without its weights, in the one dtype that inputs have here."""
    return model if all(parameter.is_meta for parameter in model.parameters()) else without_values(model).float()


def _traced(module: Any, itemsize: int, run: Any) -> Traced:
    largest = [0]

    def note(_: Any, __: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            largest[0] = max(largest[0], output.numel())

    with _hooked(module, note), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return Traced(flops=counter.get_total_flops(), peak=LIVE_TENSORS * largest[0] * itemsize)


@contextlib.contextmanager
def _hooked(module: Any, hook: Any) -> Iterator[None]:
    leaves = [part for part in module.modules() if not any(part.children())]
    handles = [leaf.register_forward_hook(hook) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_unet(model: Any) -> bool:
    """It has levels of different resolution, so that no length of a sequence describes its layers."""
    return hasattr(model, "down_blocks") and hasattr(model, "up_blocks")


def unet(name: str, model: Any, tokens: Tokens, latent: tuple[int, ...], spec: ModelSpec) -> Denoiser:
    """A UNet's facts: one row of it, run on the meta device, and what each of its layers did."""
    model = _on_paper(model)
    seen = _seen(model, lambda: model(**_unet_inputs(model, tokens, latent)))
    blocks = tuple(_unet_block(block, seen) for stack in stacks(model, spec.stacks) for block in stack.blocks)
    params = sum(parameter.numel() for parameter in model.parameters())
    rest = Work(
        whole_params=params - sum(block.params for block in blocks),
        once_flops=seen[model].flops - sum(block.flops for block in blocks),
    )
    crossing = max(seen[block].values for stack in stacks(model, spec.stacks) for block in stack.blocks)
    return Denoiser(
        name=name,
        class_name=type(model).__name__,
        blocks=blocks,
        rest=rest,
        heads=frozenset(),
        width=crossing // (tokens.image + tokens.text),
        limits=limits(model, spec),
        live=LIVE_TENSORS * max(found.values for found in seen.values()),
    )


@dataclass(kw_only=True)
class _Seen:
    """Operations of a module, and values of its largest output."""

    start: float = 0.0
    flops: float = 0.0
    values: int = 0


def _seen(model: Any, run: Any) -> dict[Any, _Seen]:
    """What each module did in a run."""
    seen = {module: _Seen() for module in model.modules()}

    def before(module: Any, _: Any) -> None:
        seen[module].start = counter.get_total_flops()

    def after(module: Any, _: Any, output: Any) -> None:
        found, outputs = seen[module], output if isinstance(output, tuple) else (output,)
        found.flops += counter.get_total_flops() - found.start
        found.values = max(found.values, *(x.numel() for x in outputs if isinstance(x, torch.Tensor)), 0)

    handles = [module.register_forward_pre_hook(before) for module in seen]
    handles += [module.register_forward_hook(after) for module in seen]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    for handle in handles:
        handle.remove()
    return seen


def _unet_block(block: Any, seen: dict[Any, _Seen]) -> Work:
    """Tensor parallelism divides the linear layers of attentions and feed-forwards, and attention itself."""
    layers = {path: part for path, part in block.named_modules() if not any(part.children())}
    cut = {path: part for path, part in layers.items() if isinstance(part, nn.Linear) and _DIVIDED.search(path)}
    whole = sum(seen[part].flops for path, part in layers.items() if path not in cut)
    sums = [seen[part].values for path, part in cut.items() if path.endswith(ROWWISE)]
    divisible = sum(parameter.numel() for part in cut.values() for parameter in part.parameters())
    return Work(
        divisible_params=divisible,
        whole_params=sum(parameter.numel() for parameter in block.parameters()) - divisible,
        token_flops=seen[block].flops - whole,
        once_flops=whole,
        reduced=sum(sums),
        num_reduces=len(sums),
    )


_DIVIDED = re.compile(r"\.(attn\d?|ff)\.")


def _unet_inputs(model: Any, tokens: Tokens, latent: tuple[int, ...]) -> dict[str, Any]:
    config = model.config
    cross = config.get("cross_attention_dim") or 1
    cross = cross[0] if isinstance(cross, list | tuple) else cross
    with torch.device("meta"):
        inputs: dict[str, Any] = {
            "sample": torch.empty(1, config.in_channels, *latent[1:]),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, tokens.text, cross),
        }
        if config.get("addition_embed_type") == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    return inputs
