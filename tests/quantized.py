"""Quantized tiny models for tests: built as a rank builds them, asked for a picture, and saved by the libraries."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel, TorchAoConfig
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig

from denoised import Omni, OmniDiffusionSamplingParams
from denoised.config import EngineConfig
from denoised.rules import validate
from denoised.runtime import denoiser, load
from denoised.spec.registry import resolve
from tests.tiny import checkpoint

_ROOT = Path(tempfile.mkdtemp(prefix="denoised-quantize-"))
ASK: dict[str, Any] = {"prompt": "a cat sits on the table", "num_inference_steps": 2, "height": 64, "width": 64}


def folder(name: str = "qwen_image") -> Path:
    return checkpoint(name, _ROOT)


def built(**settings: Any) -> Any:
    """A pipeline as a rank makes it, and its weights read."""
    config = EngineConfig(**{"model": str(folder())} | settings)
    validate(config)
    pipeline = load.load(config, device="cpu", unread=load.reads_late(config, "cpu"))
    denoiser.build(pipeline, resolve(pipeline), config, None)
    return pipeline


def image(model: Path | str, **settings: Any) -> Tensor:
    """Of the engine."""
    params = OmniDiffusionSamplingParams(seed=7, output_type="pt", num_inference_steps=2, height=64, width=64)
    with Omni(str(model), num_threads=1, **settings) as omni:
        (output,) = omni.generate(ASK["prompt"], params, use_tqdm=False)
    assert output.error is None, output.error
    return torch.as_tensor(output.images[0]).float()


def plain_image(model: Path | str) -> Tensor:
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    found: Tensor = pipeline(**ASK, generator=torch.Generator().manual_seed(7), output_type="pt").images[0]
    return found


def prepared(root: Path) -> Path:
    """A checkpoint whose denoiser diffusers has saved in int8, and its text encoder transformers."""
    shutil.copytree(folder(), root)
    made = QwenImageTransformer2DModel.from_pretrained(
        root, subfolder="transformer", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    shutil.rmtree(root / "transformer")
    made.save_pretrained(root / "transformer")
    encoder = type(DiffusionPipeline.from_pretrained(folder()).text_encoder).from_pretrained(
        root / "text_encoder",
        quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()),
        dtype=torch.float32,
    )
    shutil.rmtree(root / "text_encoder")
    encoder.save_pretrained(root / "text_encoder")
    return root
