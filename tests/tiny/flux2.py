"""FLUX.2: dev takes guidance as an input of the model; klein, in its base form, makes two calls."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)

from tests.tiny import encoders, tokenizers
from tests.tiny.pictures import picture
from tests.tiny.row import Request, Row, varied
from tests.tiny.weights import randomize

CHANNELS = 4
_TEXT_LAYERS = (1, 2, 3)  # of the tiny encoder; their hidden states are joined


def _transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=len(_TEXT_LAYERS) * encoders.WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return randomize(model, 61, gain=1.5)


def vae() -> AutoencoderKLFlux2:
    stages = 3
    model = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(8,) * stages,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=64,
    )
    # The statistics are buffers, not weights; at zero and one a wrong normalisation would not show.
    model.bn.running_mean.copy_(torch.linspace(-0.3, 0.3, 4 * CHANNELS))
    model.bn.running_var.copy_(torch.linspace(0.7, 1.4, 4 * CHANNELS))
    return randomize(model, 62)


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def _dev() -> Flux2Pipeline:
    tokenizer = tokenizers.qwen()  # in place of the Mistral processor: the pipeline only applies its chat template
    return Flux2Pipeline(
        scheduler=_scheduler(),
        vae=vae(),
        text_encoder=encoders.mistral3(tokenizer),
        tokenizer=tokenizer,
        transformer=_transformer(guidance_embeds=True),
    )


def _klein() -> Flux2KleinPipeline:
    tokenizer = tokenizers.qwen()
    return Flux2KleinPipeline(
        scheduler=_scheduler(),
        vae=vae(),
        text_encoder=encoders.qwen3_causal(tokenizer),
        tokenizer=tokenizer,
        transformer=_transformer(guidance_embeds=False),
        is_distilled=False,
    )


def _base(i: int) -> Request:
    text = {"max_sequence_length": 32, "text_encoder_out_layers": _TEXT_LAYERS}
    return varied(i, height=(64, 64, 48), width=(64, 64, 64)) | text


def _dev_request(i: int) -> Request:
    """The last request edits a picture, whose tokens follow those of the latents."""
    image = {"image": [picture(64, 64)]} if i == 2 else {}
    return _base(i) | {"guidance_scale": 4.0} | image


def _klein_request(i: int) -> Request:
    return _base(i) | {"guidance_scale": 4.0}


def _klein_unguided(i: int) -> Request:
    return _base(i) | {"guidance_scale": 1.0}


ROWS = (
    Row(name="flux2_dev", build=_dev, request=_dev_request, branches=1),
    Row(name="flux2_klein", build=_klein, request=_klein_request, unguided=_klein_unguided, branches=2),
)
