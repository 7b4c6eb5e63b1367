"""ERNIE-Image: both guidance branches in one batch, their texts padded to the longer one."""

from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.tiny import encoders, flux2, tokenizers
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize


def _transformer() -> ErnieImageTransformer2DModel:
    model = ErnieImageTransformer2DModel(
        hidden_size=64,
        num_attention_heads=4,
        num_layers=4,
        ffn_hidden_size=96,
        in_channels=4 * flux2.CHANNELS,
        out_channels=4 * flux2.CHANNELS,
        text_in_dim=encoders.WIDTH,
        rope_axes_dim=(8, 4, 4),
    )
    return randomize(model, 111, gain=1.5)


def _build() -> ErnieImagePipeline:
    tokenizer = tokenizers.qwen()
    return ErnieImagePipeline(
        transformer=_transformer(),
        vae=flux2.vae(),
        text_encoder=encoders.mistral3_model(tokenizer),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _unguided(i: int) -> Request:
    return varied(i, height=(64, 64, 48), width=(64, 64, 80)) | {"guidance_scale": 1.0}


def _request(i: int) -> Request:
    return _unguided(i) | {"negative_prompt": NEGATIVE, "guidance_scale": 4.0}


ROWS = (Row(name="ernie_image", build=_build, request=_request, unguided=_unguided, branches=2, batched=True),)
