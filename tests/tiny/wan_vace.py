"""Wan 2.1 VACE: a second stack of blocks turns a control video, a mask and pictures into hints for the first."""

from diffusers import WanVACEPipeline, WanVACETransformer3DModel

from tests.tiny import encoders, wan
from tests.tiny.pictures import picture
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

_MASK_CHANNELS = 8 * 8  # pixels of one latent, as the VAE of the family has three halvings of each side


def _transformer() -> WanVACETransformer3DModel:
    model = WanVACETransformer3DModel(
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
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=2 * wan.CHANNELS + _MASK_CHANNELS,  # unchanged and changed parts of the video, and the mask
    )
    return randomize(model, 56)


def _build() -> WanVACEPipeline:
    return WanVACEPipeline(**wan.components(), transformer=_transformer())


def _controls(i: int) -> Request:
    """Reference pictures for the first two requests; a video whose right half is to be made anew for the last."""
    if i < 2:
        return {"reference_images": [picture(32, 32, seed=i)]}
    frames = [picture(48, 32, seed=frame) for frame in range(5)]
    mask = picture(48, 32).convert("L").point(lambda _: 0)
    mask.paste(255, (24, 0, 48, 32))
    return {"video": frames, "mask": [mask] * 5}


def _unguided(i: int) -> Request:
    sizes = varied(i, height=(32, 32, 32), width=(32, 32, 48), num_frames=(9, 9, 5))
    return sizes | _controls(i) | {"guidance_scale": 1.0, "max_sequence_length": 32}


def _request(i: int) -> Request:
    return _unguided(i) | {"negative_prompt": NEGATIVE, "guidance_scale": 5.0, "conditioning_scale": 0.8}


ROWS = (Row(name="wan21_vace", build=_build, request=_request, unguided=_unguided, branches=2, kind="video"),)
