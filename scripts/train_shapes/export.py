"""Stage `export`: puts the parts together as a diffusers folder and swaps it in whole."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLForConditionalGeneration

from .config import Config
from .denoiser import Master, new_denoiser
from .tokenizer import NUM_PREFIX, PREFIX, load_tokenizer


def averaged_denoiser(config: Config) -> QwenImageTransformer2DModel:
    """The running mean of the weights, from the latest checkpoint."""
    model = new_denoiser(config.denoiser, latent_channels=config.vae.z_dim, text_size=config.text.hidden_size)
    master = Master(model, config.denoiser.ema_decay)
    saved = torch.load(config.out / "denoiser.pt", weights_only=True, mmap=True)
    master.load_state_dict(saved["master"])
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), master.mean, strict=True):
            parameter.copy_(mean)
    print("denoiser of step", saved["step"])
    return model.to(torch.bfloat16)


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of Qwen-Image, unchanged."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def build_pipeline(config: Config) -> QwenImagePipeline:
    vae_folder = config.out / "vae"
    if not vae_folder.exists():  # its decoder is still in training
        vae_folder = config.out / "vae_encoder"
    return QwenImagePipeline(
        scheduler=new_scheduler(),
        vae=AutoencoderKLQwenImage.from_pretrained(vae_folder, torch_dtype=torch.bfloat16),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(
            config.out / "text_encoder", dtype=torch.bfloat16
        ),
        tokenizer=load_tokenizer(config),
        transformer=averaged_denoiser(config),
    )


def export(config: Config, destination: Path) -> None:
    """Nobody who loads the folder meanwhile sees half of it: it is written aside, then renamed."""
    fresh, old = destination.with_name(f".{destination.name}.new"), destination.with_name(f".{destination.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    build_pipeline(config).save_pretrained(fresh)
    _tidy(fresh)
    _check(fresh)
    if destination.exists():
        destination.rename(old)
    fresh.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """No paths of this machine in the configurations; one type for all parts; files readable by all.

    Unasked, diffusers loads its parts as float32 and transformers loads what the configuration names: name the same.
    """
    for path in folder.rglob("config.json"):
        content = json.loads(path.read_text())
        content.pop("_name_or_path", None)
        for part in (content, content.get("text_config", {}), content.get("vision_config", {})):
            if "dtype" in part:
                part["dtype"] = "float32"
        path.write_text(json.dumps(content, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def _check(folder: Path) -> None:
    pipeline = QwenImagePipeline.from_pretrained(folder)
    assert len(pipeline.tokenizer(PREFIX).input_ids) == NUM_PREFIX == pipeline.prompt_template_encode_start_idx
    assert pipeline.vae_scale_factor == 8
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 60e6, size
    print(f"{folder}: {size / 1e6:.1f} MB")
