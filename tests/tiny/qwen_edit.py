"""Qwen-Image with pictures as input: edit, edit with several pictures, decomposition into layers."""

from typing import Any

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageLayeredPipeline

from tests.tiny import encoders, qwen, tokenizers, vision
from tests.tiny.pictures import picture
from tests.tiny.row import NEGATIVE, Request, Row, varied

_GUIDANCE = {"negative_prompt": NEGATIVE, "true_cfg_scale": 4.0}


def _components(image_channels: int = 3, **transformer: bool) -> dict[str, Any]:
    tokenizer = tokenizers.qwen()
    return {
        "scheduler": qwen.scheduler(),
        "vae": qwen.vae(image_channels),
        "text_encoder": encoders.qwen2_5_vl(tokenizer),
        "tokenizer": tokenizer,
        "processor": vision.processor(tokenizer),
        "transformer": qwen.transformer(24, **transformer),
    }


def _edit() -> QwenImageEditPipeline:
    return QwenImageEditPipeline(**_components())


def _edit_plus() -> QwenImageEditPlusPipeline:
    return QwenImageEditPlusPipeline(**_components())


def _layered() -> QwenImageLayeredPipeline:
    return QwenImageLayeredPipeline(**_components(4, use_additional_t_cond=True, use_layer3d_rope=True))


def _edit_unguided(i: int) -> Request:
    sizes = varied(i, height=(32, 32, 48), width=(32, 32, 32))
    return sizes | {"image": picture(64, 64, seed=i)}


def _plus_unguided(i: int) -> Request:
    """One picture, and two in the last request."""
    pictures = [picture(64, 64, seed=i), picture(96, 48, seed=9)]
    return _edit_unguided(i) | {"image": pictures[: 1 + i // 2]}


def _layered_unguided(i: int) -> Request:
    """The size follows from the picture; the number of layers is what differs."""
    return varied(i, layers=(2, 2, 3)) | {"image": picture(64, 64, seed=i, mode="RGBA")}


ROWS = (
    Row(
        name="qwen_image_edit",
        build=_edit,
        request=lambda i: _edit_unguided(i) | _GUIDANCE,
        unguided=_edit_unguided,
        branches=2,
    ),
    Row(
        name="qwen_image_edit_plus",
        build=_edit_plus,
        request=lambda i: _plus_unguided(i) | _GUIDANCE,
        unguided=_plus_unguided,
        branches=2,
    ),
    Row(
        name="qwen_image_layered",
        build=_layered,
        request=lambda i: _layered_unguided(i) | _GUIDANCE,
        unguided=_layered_unguided,
        branches=2,
        output_type="pt",  # asked for latents, the pipeline returns a name that it has not set
    ),
)
