"""Tiny components that several families of the sweep share."""

from __future__ import annotations

import importlib
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import nn

from tests.tiny import encoders, tokenizers, vision
from tests.tiny.weights import randomize

PAG = "perturbed attention cuts the batch of a call in three parts, so the call stays whole and one rank runs it"


def unet(**settings: Any) -> UNet2DConditionModel:
    """A UNet with text of width `encoders.WIDTH`, unless told otherwise."""
    sizes: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": encoders.WIDTH,
    }
    return randomize(UNet2DConditionModel(**sizes | settings), 201)


def t5(max_length: int = 64) -> dict[str, Any]:
    tokenizer = tokenizers.t5(max_length)
    return {"text_encoder": encoders.t5(tokenizer), "tokenizer": tokenizer}


def umt5() -> dict[str, Any]:
    tokenizer = tokenizers.t5()
    return {"text_encoder": encoders.umt5(tokenizer), "tokenizer": tokenizer}


def pipe(name: str, transformer: Any, *, seed: int = 301, **components: Any) -> DiffusionPipeline:
    """A pipeline of a transformer, by default with a flow-matching scheduler."""
    given = {"scheduler": flow(), "transformer": randomize(transformer, seed)} | components
    return getattr(diffusers, name)(**given)


def ddim(**settings: Any) -> DDIMScheduler:
    """Predicts velocity, whatever the real models do: the latents of an untrained "epsilon" would grow."""
    return DDIMScheduler(
        **{"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "clip_sample": False, **settings}
    )


def flow(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def wan_vae(channels: int = 16) -> AutoencoderKLWan:
    """8 pixels and 4 frames a latent."""
    return randomize(
        AutoencoderKLWan(
            base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        ),
        202,
    )


def kandinsky5_transformer(**more: Any) -> Any:
    sizes: dict[str, Any] = {
        "in_visual_dim": 16,
        "in_text_dim": encoders.WIDTH,
        "in_text_dim2": encoders.WIDTH,
        "time_dim": 16,
        "out_visual_dim": 16,
        "patch_size": (1, 2, 2),
        "model_dim": 16,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "visual_cond": False,
        "attention_type": "regular",
    }
    return diffusers.Kandinsky5Transformer3DModel(**sizes | more)


def kandinsky5_text() -> dict[str, Any]:
    """Qwen 2.5-VL and CLIP; the pipelines call the tokenizer as a processor."""
    tokenizer, second = tokenizers.qwen(system=True), tokenizers.clip()
    return {
        "text_encoder": encoders.qwen2_5_vl(tokenizer),
        "tokenizer": vision.processor(tokenizer),
        "text_encoder_2": encoders.clip(second),
        "tokenizer_2": second,
    }


class SilentChecker(nn.Module):
    """Stands in for Cosmos' guardrail, a package of its own with several language models: it lets all pass."""

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


def cosmos_transformer(**more: Any) -> Any:
    """Its forward resizes a mask by torchvision, which has no build for a CPU torch; `functional.resize` stands in."""
    module = importlib.import_module("diffusers.models.transformers.transformer_cosmos")
    if not hasattr(module, "transforms"):
        module.transforms = _Transforms  # type: ignore[attr-defined]
    sizes: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": encoders.WIDTH,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": True,
    }
    return diffusers.CosmosTransformer3DModel(**sizes | more)


class _Transforms:
    """The two names of torchvision.transforms that Cosmos needs: nearest neighbour, nothing else."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:  # noqa: N801
        @staticmethod
        def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
            return nn.functional.interpolate(image, size, mode=interpolation)


def qwen3_vl(tokenizer: Any, cls: Any, layers: int = 3) -> Any:
    """A Qwen3-VL of the class `cls`."""
    sizes = encoders.decoder_sizes(tokenizer) | {"num_hidden_layers": layers, "head_dim": 8}
    sizes["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": encoders.WIDTH,
        "deepstack_visual_indexes": [0],
    }
    return randomize(cls(transformers.Qwen3VLConfig(text_config=sizes, vision_config=vision)), 204)


def prior() -> Any:
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, embedding_dim=encoders.WIDTH, num_layers=2, num_embeddings=77
    )
    return randomize(prior, 601)


def prior_scheduler(**more: Any) -> Any:
    return diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0, **more
    )


def added_kv_unet(**more: Any) -> Any:
    sizes: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "encoder_hid_dim": encoders.WIDTH,
        "cross_attention_dim": encoders.WIDTH,
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
    }
    return randomize(diffusers.UNet2DConditionModel(**sizes | more), 604)
