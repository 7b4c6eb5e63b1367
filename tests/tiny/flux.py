"""FLUX.1: guidance is an input of the model (dev, Kontext), absent (schnell), or two calls (true guidance)."""

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.pictures import picture
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

_CHANNELS = 4


def _transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * _CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=encoders.WIDTH,
        pooled_projection_dim=encoders.WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return randomize(model, 41)


def _build(pipeline: type[FluxPipeline] | type[FluxKontextPipeline], dev: bool) -> FluxPipeline | FluxKontextPipeline:
    clip_tokenizer, t5_tokenizer = tokenizers.clip(), tokenizers.t5()
    return pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev, shift=3.0 if dev else 1.0),
        vae=vaes.kl(_CHANNELS),
        text_encoder=encoders.clip(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=encoders.t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=_transformer(guidance_embeds=dev),
    )


def _base(i: int) -> Request:
    return varied(i, height=(32, 32, 48), width=(32, 32, 32)) | {"max_sequence_length": 32}


def _dev(i: int) -> Request:
    return _base(i) | {"guidance_scale": 3.5}


def _schnell(i: int) -> Request:
    return _base(i) | {"guidance_scale": 0.0}


def _true_guidance(i: int) -> Request:
    return _dev(i) | {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0}


def _kontext(i: int) -> Request:
    """Without `_auto_resize` the picture keeps its size instead of going to the nearest of about one megapixel."""
    image: Image.Image = picture(32, 32)
    return _dev(i) | {"image": image, "_auto_resize": False, "max_area": (32 * 32, 32 * 32, 48 * 32)[i]}


ROWS = (
    Row(name="flux_dev", build=lambda: _build(FluxPipeline, dev=True), request=_dev, branches=1),
    Row(name="flux_schnell", build=lambda: _build(FluxPipeline, dev=False), request=_schnell, branches=1),
    Row(
        name="flux_true_cfg",
        build=lambda: _build(FluxPipeline, dev=True),
        folder="flux_dev",
        request=_true_guidance,
        unguided=_dev,
        branches=2,
    ),
    Row(name="flux_kontext", build=lambda: _build(FluxKontextPipeline, dev=True), request=_kontext, branches=1),
)
