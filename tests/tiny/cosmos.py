"""Cosmos3: text and pictures packed into one sequence of one sample; two calls a step, each with a text of its own."""

from typing import Any

from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer

from tests.tiny import tokenizers, wan
from tests.tiny.pictures import picture
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize


def _transformer(num_tokens: int) -> Cosmos3OmniTransformer:
    model = Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=64,
        intermediate_size=96,
        latent_channel=wan.CHANNELS,
        latent_patch_size=2,
        patch_latent_dim=4 * wan.CHANNELS,
        num_attention_heads=4,
        num_hidden_layers=4,
        num_key_value_heads=2,
        rope_axes_dim=[4, 2, 2],
        vocab_size=num_tokens,
    )
    return randomize(model, 171)


def _build() -> Cosmos3OmniPipeline:
    tokenizer, parts = tokenizers.qwen(system=True), wan.components()
    return Cosmos3OmniPipeline(
        transformer=_transformer(len(tokenizer)),
        text_tokenizer=tokenizer,
        vae=parts["vae"],
        scheduler=parts["scheduler"],
        enable_safety_checker=False,  # it is a model of its own, which is fetched from a hub
    )


def _image(i: int) -> Request:
    return varied(i, height=(32, 32, 48), width=(32, 32, 32), num_frames=(1, 1, 1)) | {"guidance_scale": 1.0}


def _video(i: int) -> Request:
    """The last request begins with a picture."""
    sizes = varied(i, height=(32, 32, 32), width=(32, 32, 48), num_frames=(9, 9, 5))
    return sizes | {"guidance_scale": 1.0} | ({"image": picture(48, 32)} if i == 2 else {})


def _guided(request: Request) -> Request:
    return request | {"negative_prompt": NEGATIVE, "guidance_scale": 4.0}


_SHAPE: dict[str, Any] = {"branches": 2, "kind": "video", "joins": False}

ROWS = (
    Row(name="cosmos3_image", build=_build, request=lambda i: _guided(_image(i)), unguided=_image, **_SHAPE),
    Row(
        name="cosmos3_video",
        build=_build,
        request=lambda i: _guided(_video(i)),
        unguided=_video,
        folder="cosmos3_image",
        **_SHAPE,
    ),
)
