"""Requests, references and comparisons of the contract tests."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from denoised.request import PromptDict
from denoised.spec.model_spec import ModelSpec
from tests.tiny import ROWS, checkpoint
from tests.tiny.row import Request

# Which line of the support table each row stands for.
MODELS = {
    "qwen_image": "Qwen-Image",
    "qwen_image_2512": "Qwen-Image-2512",
    "qwen_image_edit": "Qwen-Image-Edit",
    "qwen_image_edit_plus": "Qwen-Image-Edit-2509",
    "qwen_image_layered": "Qwen-Image-Layered",
    "sd3": "Stable-Diffusion-3.5",
    "sd3_skip_layer": "Stable-Diffusion-3.5 (skip-layer guidance)",
    "flux_dev": "FLUX.1-dev",
    "flux_schnell": "FLUX.1-schnell",
    "flux_true_cfg": "FLUX.1-dev (true CFG)",
    "flux_kontext": "FLUX.1-Kontext-dev",
    "flux2_dev": "FLUX.2-dev",
    "flux2_klein": "FLUX.2-klein",
    "wan22_t2v": "Wan2.2-T2V-A14B",
    "wan22_ti2v": "Wan2.2-TI2V-5B",
    "wan22_i2v": "Wan2.2-I2V-A14B",
    "wan21_vace": "Wan2.1-VACE",
    "z_image": "Z-Image",
    "z_image_turbo": "Z-Image-Turbo",
    "longcat_image": "LongCat-Image",
    "longcat_image_edit": "LongCat-Image-Edit",
    "ovis_image": "Ovis-Image",
    "ernie_image": "ERNIE-Image",
    "hidream_i1": "HiDream-I1-Full",
    "glm_image": "GLM-Image",
    "hunyuan_video15_t2v": "HunyuanVideo-1.5-T2V",
    "hunyuan_video15_i2v": "HunyuanVideo-1.5-I2V",
    "ltx2": "LTX-2",
    "ltx23": "LTX-2.3",
    "helios": "Helios",
    "helios_pyramid": "Helios-Pyramid",
    "cosmos3_image": "Cosmos3 (image)",
    "cosmos3_video": "Cosmos3 (video)",
    "stable_audio": "Stable-Audio-Open",
    "sdxl": "SDXL (no spec)",
    "sana": "Sana (no spec)",
    "ltx": "LTX-Video (no spec)",
    "pixart_sigma": "PixArt-Sigma (no spec)",
}
ORDER = list(MODELS)

# Sums in another order, fp32: joined rows, or guidance branches of one batch run apart. Relative to the largest value.
REORDERED = 1e-5
EXACT = 0.0
DENOISERS = ModelSpec(pipeline="").denoisers

_ROOT = Path(tempfile.mkdtemp(prefix="denoised-contract-"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)  # ranks, which share it, end without this


def folder(name: str) -> str:
    """The checkpoint of a row, built on first use."""
    return str(checkpoint(name, _ROOT))


def engine(name: str, *, ranks: int = 1, stages: int = 1, **settings: Any) -> Omni:
    """An engine for a row's checkpoint, one thread a rank."""
    parallel = DiffusionParallelConfig(cfg_parallel_size=ranks, pipeline_parallel_size=stages)
    return Omni(
        folder(name), parallel_config=parallel, num_threads=1, plugins=("tests.contract.rank_setup",), **settings
    )


@functools.lru_cache(maxsize=2)
def _pipeline(path: str) -> Any:
    import tests.contract.rank_setup  # noqa: F401

    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain(name: str, request: Request, seed: int, output_type: str) -> list[torch.Tensor]:
    """What the unmodified pipeline gives, without the engine."""
    pipeline = _pipeline(folder(name))
    torch.set_num_threads(1)
    result = pipeline(**request, generator=torch.Generator().manual_seed(seed), output_type=output_type)
    return tensors(next(getattr(result, n) for n in ("images", "frames", "video", "audios") if hasattr(result, n)))


@functools.cache
def rows_of(name: str, index: int) -> int:
    """Rows that the plain pipeline's denoisers compute for a row's request: branches by images by steps."""
    with rows_counted(name) as rows:
        plain(name, request_of(name, index), seed_of(index), latent_type(name))
    return rows.total()


@contextlib.contextmanager
def rows_counted(name: str) -> Iterator[Counter[str]]:
    """Rows that each denoiser of the plain pipeline computes inside the block."""
    pipeline, rows = _pipeline(folder(name)), Counter[str]()

    def count(denoiser: str, args: Any, kwargs: Any) -> None:
        rows[denoiser] += len([*args, *kwargs.values()][0])

    parts = {n: part for n in DENOISERS if (part := getattr(pipeline, n, None)) is not None}
    hooks = [
        part.register_forward_pre_hook(lambda m, a, kw, n=n: count(n, a, kw), with_kwargs=True)
        for n, part in parts.items()
    ]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def tiled(name: str, asked: bool = True) -> Iterator[None]:
    """The plain pipeline's VAE with its own tiling inside the block."""
    vae = _pipeline(folder(name)).vae
    if asked:
        vae.enable_tiling()
    try:
        yield
    finally:
        if asked:
            vae.disable_tiling()


@functools.cache
def reference(name: str, index: int, output_type: str, unguided: bool = False) -> list[torch.Tensor]:
    """The plain pipeline's answer to a row's request, computed once."""
    return plain(name, request_of(name, index, unguided), seed_of(index), output_type)


def request_of(name: str, index: int, unguided: bool = False) -> Request:
    row = ROWS[name]
    make = row.unguided if unguided else row.request
    assert make is not None
    return make(index)


def seed_of(index: int) -> int:
    return 100 + index


def latent_type(name: str) -> str:
    return ROWS[name].output_type


def as_omni(request: Request, seed: int, output_type: str) -> tuple[PromptDict, OmniDiffusionSamplingParams]:
    """A pipeline's keywords as our prompt and sampling parameters."""
    rest, prompt = dict(request), PromptDict()
    for key in ("prompt", "negative_prompt"):
        if key in rest:
            prompt[key] = rest.pop(key)  # type: ignore[literal-required]
    if "image" in rest:
        prompt["multi_modal_data"] = {"image": rest.pop("image")}
    ours = {f.name for f in fields(OmniDiffusionSamplingParams)}
    known = {key: rest.pop(key) for key in list(rest) if key in ours}
    return prompt, OmniDiffusionSamplingParams(seed=seed, output_type=output_type, extra_args=rest, **known)


def ask(
    omni: Omni, name: str, indexes: list[int], output_type: str, unguided: bool = False
) -> list[OmniRequestOutput]:
    """The row's requests, all in flight together."""
    requests = [as_omni(request_of(name, i, unguided), seed_of(i), output_type) for i in indexes]
    return omni.generate([p for p, _ in requests], [s for _, s in requests], use_tqdm=False)


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a result, in order."""
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return [torch.as_tensor(value).float()]


def media(output: OmniRequestOutput) -> list[torch.Tensor]:
    """The tensors of an output; fails with the request's own error."""
    assert output.error is None, output.error
    main = output.latents if output.latents is not None else output.images or output.videos or output.audios
    return tensors(main)


def difference(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Largest difference, relative to the largest value of the reference."""
    a, b = torch.cat([t.flatten() for t in expected]), torch.cat([t.flatten() for t in got])
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
