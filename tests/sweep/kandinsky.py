"""Kandinsky 2.1, 2.2 and 3: a prior, and a decoder with a code book."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline

from tests.sweep import parts
from tests.sweep.case import Case
from tests.tiny import encoders, tokenizers
from tests.tiny.weights import randomize

_W = encoders.WIDTH


def _image_encoder() -> dict[str, Any]:
    config = transformers.CLIPVisionConfig(
        hidden_size=_W,
        image_size=32,
        projection_dim=_W,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        patch_size=16,
    )
    return {
        "image_encoder": randomize(transformers.CLIPVisionModelWithProjection(config), 602),
        "image_processor": transformers.CLIPImageProcessor(crop_size=32, size=32),
    }


def _kandinsky_prior() -> dict[str, Any]:
    tokenizer = tokenizers.clip()
    return {
        "prior": parts.prior(),
        "text_encoder": encoders.clip_projected(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": parts.prior_scheduler(),
        **_image_encoder(),
    }


def _movq() -> Any:
    vq = diffusers.VQModel(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        in_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        out_channels=3,
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        vq_embed_dim=4,
    )
    return randomize(vq, 603)


def _kandinsky22(name: str) -> DiffusionPipeline:
    prior = {f"prior_{k}": v for k, v in _kandinsky_prior().items()}
    return getattr(diffusers, name)(
        unet=parts.added_kv_unet(addition_embed_type="image", encoder_hid_dim_type="image_proj"),
        scheduler=parts.ddim(),
        movq=_movq(),
        **prior,
    )


def _kandinsky21() -> DiffusionPipeline:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    tokenizer = tokenizers.clip()
    config = MCLIPConfig(
        numDims=_W,
        transformerDimensions=_W,
        hidden_size=_W,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=120,
    )
    prior = {f"prior_{k}": v for k, v in _kandinsky_prior().items()}
    return diffusers.KandinskyCombinedPipeline(
        text_encoder=randomize(MultilingualCLIP(config), 605),
        tokenizer=tokenizer,
        unet=parts.added_kv_unet(addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj"),
        scheduler=parts.ddim(),
        movq=_movq(),
        **prior,
    )


def _kandinsky3() -> DiffusionPipeline:
    tokenizer = tokenizers.t5(128)
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=_W,
    )
    return diffusers.Kandinsky3Pipeline(
        unet=randomize(unet, 606),
        scheduler=parts.ddim(),
        movq=_movq(),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
    )


_SIZE = {"height": 32, "width": 32, "guidance_scale": 4.0}


CASES = (
    Case(
        pipeline="KandinskyCombinedPipeline",
        double=True,
        build=_kandinsky21,
        call={**_SIZE, "prior_num_inference_steps": 2},
    ),
    Case(
        pipeline="KandinskyV22CombinedPipeline",
        double=True,
        build=lambda: _kandinsky22("KandinskyV22CombinedPipeline"),
        call={**_SIZE, "prior_num_inference_steps": 2},
    ),
    Case(
        pipeline="KandinskyPriorPipeline",
        build=lambda: diffusers.KandinskyPriorPipeline(**_kandinsky_prior()),
        call={"guidance_scale": 4.0},
    ),
    Case(
        pipeline="KandinskyV22PriorPipeline",
        build=lambda: diffusers.KandinskyV22PriorPipeline(**_kandinsky_prior()),
        call={"guidance_scale": 4.0},
    ),
    Case(pipeline="Kandinsky3Pipeline", double=True, build=_kandinsky3, call=_SIZE),
)
