"""LongCat-Image, LongCat-Image-Edit and Ovis-Image: relatives of FLUX.1 with two calls for guidance."""

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)

from tests.tiny import encoders, tokenizers, vaes, vision
from tests.tiny.pictures import picture
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

_CHANNELS = 16  # a literal in the LongCat pipelines

_SIZES: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4 * _CHANNELS,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": encoders.WIDTH,
    "axes_dims_rope": [4, 4, 8],
}


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def _longcat_components() -> dict[str, Any]:
    plain = tokenizers.qwen()
    transformer = LongCatImageTransformer2DModel(**_SIZES, pooled_projection_dim=encoders.WIDTH)
    return {
        "scheduler": _scheduler(),
        "vae": vaes.kl(_CHANNELS, stages=3),
        "text_encoder": encoders.qwen2_5_vl(plain),
        "tokenizer": tokenizers.qwen(tokenizers.ShortQwenTokenizer),
        "text_processor": vision.processor(plain),
        "transformer": randomize(transformer, 81, gain=1.5),
    }


def _longcat() -> LongCatImagePipeline:
    return LongCatImagePipeline(**_longcat_components())


def _longcat_edit() -> LongCatImageEditPipeline:
    return LongCatImageEditPipeline(**_longcat_components())


def _ovis() -> OvisImagePipeline:
    tokenizer = tokenizers.qwen()
    return OvisImagePipeline(
        scheduler=_scheduler(),
        vae=vaes.kl(_CHANNELS),
        text_encoder=encoders.qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=randomize(OvisImageTransformer2DModel(**_SIZES, out_channels=4 * _CHANNELS), 82, gain=1.5),
    )


def _guided(request: Request) -> Request:
    return request | {"negative_prompt": NEGATIVE, "guidance_scale": 4.5}


def _longcat_unguided(i: int) -> Request:
    sizes = varied(i, height=(64, 64, 48), width=(64, 64, 64))
    # The rewrite, on by default, has the language model write up to 512 tokens.
    return sizes | {"guidance_scale": 1.0, "enable_prompt_rewrite": False}


def _edit_unguided(i: int) -> Request:
    """The size follows from the picture."""
    image = picture(64, 64 if i < 2 else 32, seed=i)
    return varied(i) | {"image": image, "guidance_scale": 1.0}


def _ovis_unguided(i: int) -> Request:
    sizes = varied(i, height=(32, 32, 48), width=(32, 32, 32))
    return sizes | {"guidance_scale": 1.0, "max_sequence_length": 32}


ROWS = (
    Row(
        name="longcat_image",
        build=_longcat,
        request=lambda i: _guided(_longcat_unguided(i)),
        unguided=_longcat_unguided,
        branches=2,
    ),
    Row(
        name="longcat_image_edit",
        build=_longcat_edit,
        request=lambda i: _guided(_edit_unguided(i)),
        unguided=_edit_unguided,
        branches=2,
    ),
    Row(
        name="ovis_image",
        build=_ovis,
        request=lambda i: _guided(_ovis_unguided(i)),
        unguided=_ovis_unguided,
        branches=2,
    ),
)
