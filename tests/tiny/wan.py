"""Wan 2.2: two experts, or one whose timesteps are per token. Guidance is two calls."""

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.tiny import encoders, tokenizers
from tests.tiny.pictures import picture
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

CHANNELS = 16
_BOUNDARY = 0.875


def _transformer(seed: int, in_channels: int = CHANNELS) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=CHANNELS,
        text_dim=encoders.WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return randomize(model, seed)


def components() -> dict[str, Any]:
    tokenizer = tokenizers.t5()
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoders.umt5(tokenizer),
        "vae": randomize(vae, 51),
        "scheduler": scheduler,
    }


def _t2v() -> WanPipeline:
    experts = {"transformer": _transformer(52), "transformer_2": _transformer(53)}
    return WanPipeline(**components(), **experts, boundary_ratio=_BOUNDARY)


def _ti2v() -> WanPipeline:
    return WanPipeline(**components(), transformer=_transformer(52), expand_timesteps=True)


def _i2v() -> WanImageToVideoPipeline:
    channels = 2 * CHANNELS + 4  # noise, encoded picture, and a mask for each of the frames that one latent holds
    experts = {"transformer": _transformer(54, channels), "transformer_2": _transformer(55, channels)}
    return WanImageToVideoPipeline(**components(), **experts, boundary_ratio=_BOUNDARY)


def _unguided(i: int) -> Request:
    # Three steps and a shift of three put one step, or two, on the first expert.
    sizes = varied(i, height=(32, 32, 32), width=(32, 32, 48), num_frames=(9, 9, 5))
    return sizes | {"guidance_scale": 1.0, "max_sequence_length": 32}


def _request(i: int) -> Request:
    return _unguided(i) | {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}


def _two_scales(i: int) -> Request:
    return _request(i) | {"guidance_scale_2": 3.0}


def _animate(i: int) -> Request:
    return _two_scales(i) | {"image": picture(64, 64, seed=i)}


def _animate_unguided(i: int) -> Request:
    return _unguided(i) | {"image": picture(64, 64, seed=i)}


ROWS = (
    Row(name="wan22_t2v", build=_t2v, request=_two_scales, unguided=_unguided, branches=2, kind="video"),
    Row(name="wan22_ti2v", build=_ti2v, request=_request, unguided=_unguided, branches=2, kind="video"),
    Row(name="wan22_i2v", build=_i2v, request=_animate, unguided=_animate_unguided, branches=2, kind="video"),
)
