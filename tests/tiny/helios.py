"""Helios: a video made in chunks, each from what the chunks before left, at several noise levels of memory.

The pyramid form makes each chunk at three sizes, one after the other.
"""

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
)

from tests.tiny import encoders, wan
from tests.tiny.row import NEGATIVE, PROMPTS, Request, Row, varied
from tests.tiny.weights import randomize

_CHUNK = 2  # latent frames of a chunk, which are five frames of video


def _transformer(seed: int) -> HeliosTransformer3DModel:
    model = HeliosTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=wan.CHANNELS,
        out_channels=wan.CHANNELS,
        text_dim=encoders.WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=4,
        cross_attn_norm=True,
        rope_dim=(8, 4, 4),
        is_amplify_history=True,
    )
    return randomize(model, seed)


def _components() -> dict[str, Any]:
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=wan.CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
    )
    return wan.components() | {"vae": randomize(vae, 153)}


def _base() -> HeliosPipeline:
    scheduler = HeliosScheduler(stages=1, use_dynamic_shifting=True)
    return HeliosPipeline(**_components() | {"scheduler": scheduler}, transformer=_transformer(151))


def _pyramid() -> HeliosPyramidPipeline:
    return HeliosPyramidPipeline(
        # Not the model's own gamma, a third: the covariance of its noise has no inverse, and rounding decides whether
        # the pipeline's factorization of it fails.
        **_components() | {"scheduler": HeliosScheduler(gamma=0.25)},
        transformer=_transformer(152),
        is_cfg_zero_star=True,
    )


def _chunks(i: int, side: int) -> Request:
    """The last request has two chunks."""
    sizes = {"height": side, "width": (side, side, side * 3 // 2)[i], "num_frames": (5, 5, 10)[i]}
    memory = {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": _CHUNK}
    return sizes | memory | {"guidance_scale": 1.0, "max_sequence_length": 32}


def _base_unguided(i: int) -> Request:
    return varied(i) | _chunks(i, side=32)


def _pyramid_unguided(i: int) -> Request:
    steps = ([1, 1, 1], [1, 1, 2], [2, 1, 2])[i]  # of the three sizes
    # The smallest of the sizes is a quarter of this, and must be two tokens high.
    return {"prompt": PROMPTS[i], "pyramid_num_inference_steps_list": steps} | _chunks(i, side=64)


def _guided(request: Request) -> Request:
    return request | {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}


def _pyramid_request(i: int) -> Request:
    # The first steps of a model with so few would all be left at zero.
    return _guided(_pyramid_unguided(i)) | {"zero_steps": 0}


ROWS = (
    Row(
        name="helios",
        build=_base,
        request=lambda i: _guided(_base_unguided(i)),
        unguided=_base_unguided,
        branches=2,
        kind="video",
    ),
    Row(
        name="helios_pyramid",
        build=_pyramid,
        request=_pyramid_request,
        unguided=_pyramid_unguided,
        branches=2,
        kind="video",
    ),
)
