"""HunyuanVideo 1.5: guidance is a component, which makes one call a branch. Words in quotes go to a second encoder."""

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import ByT5Tokenizer, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.tiny import encoders, tokenizers
from tests.tiny.pictures import picture
from tests.tiny.row import NEGATIVE, PROMPTS, Request, Row, varied
from tests.tiny.weights import randomize

_CHANNELS = 4
_VISION_WIDTH = 16
_TARGET_SIDE = 32  # pixels; the area to which the size of an input picture is brought


def _transformer(task: str, seed: int) -> HunyuanVideo15Transformer3DModel:
    model = HunyuanVideo15Transformer3DModel(
        in_channels=2 * _CHANNELS + 1,  # noise, condition and its mask
        out_channels=_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=encoders.WIDTH,
        text_embed_2_dim=encoders.WIDTH,
        image_embed_dim=_VISION_WIDTH,
        rope_axes_dim=(4, 6, 6),
        target_size=_TARGET_SIDE,
        task_type=task,
    )
    return randomize(model, seed)


def _vae() -> AutoencoderKLHunyuanVideo15:
    model = AutoencoderKLHunyuanVideo15(
        latent_channels=_CHANNELS,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return randomize(model, 131)


def _components(task: str, seed: int) -> dict[str, Any]:
    tokenizer, glyphs = tokenizers.qwen(system=True), ByT5Tokenizer(extra_ids=0)
    return {
        "text_encoder": encoders.qwen2_5_vl_text(tokenizer),
        "tokenizer": tokenizer,
        "transformer": _transformer(task, seed),
        "vae": _vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": encoders.t5(glyphs),
        "tokenizer_2": glyphs,
        "guider": ClassifierFreeGuidance(guidance_scale=4.0),
    }


def _t2v() -> HunyuanVideo15Pipeline:
    return HunyuanVideo15Pipeline(**_components("t2v", 132))


def _i2v() -> HunyuanVideo15ImageToVideoPipeline:
    config = SiglipVisionConfig(
        hidden_size=_VISION_WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return HunyuanVideo15ImageToVideoPipeline(
        **_components("i2v", 133),
        image_encoder=randomize(SiglipVisionModel(config), 134),
        feature_extractor=SiglipImageProcessorPil(size={"height": 28, "width": 28}),
    )


def _request(i: int) -> Request:
    sizes = varied(i, height=(32, 32, 32), width=(32, 32, 48), num_frames=(5, 5, 9))
    return sizes | {"prompt": _with_glyphs(i), "negative_prompt": NEGATIVE}


def _with_glyphs(i: int) -> str:
    return f'{PROMPTS[i]} under a sign "{PROMPTS[i][:5]}"' if i == 0 else PROMPTS[i]


def _animate(i: int) -> Request:
    sizes = varied(i, num_frames=(5, 5, 9), image=(picture(64, 64), picture(64, 64, seed=1), picture(96, 48, seed=2)))
    return sizes | {"prompt": _with_glyphs(i), "negative_prompt": NEGATIVE}


# The scale is the guider's own and no request can change it, so there is nothing to leave out.
ROWS = (
    Row(name="hunyuan_video15_t2v", build=_t2v, request=_request, branches=2, kind="video"),
    Row(name="hunyuan_video15_i2v", build=_i2v, request=_animate, branches=2, kind="video"),
)
