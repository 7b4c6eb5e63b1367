"""Z-Image: one call a step, lists of tensors in and out. With guidance the lists hold both branches."""

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

_CHANNELS = 4

# What a guided request may do besides: the norm of the combination clipped, guidance dropped for the late steps.
_VARIANTS: tuple[Request, ...] = ({}, {"cfg_normalization": True}, {"cfg_truncation": 0.5})


def _build() -> ZImagePipeline:
    tokenizer = tokenizers.qwen()
    transformer = ZImageTransformer2DModel(
        in_channels=_CHANNELS,
        dim=64,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=encoders.WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vaes.kl(_CHANNELS),
        text_encoder=encoders.qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=randomize(transformer, 71, gain=1.5),
    )


def _unguided(i: int) -> Request:
    sizes = varied(i, height=(32, 32, 48), width=(32, 32, 32))
    return sizes | {"guidance_scale": 0.0, "max_sequence_length": 32}


def _request(i: int) -> Request:
    return _unguided(i) | {"negative_prompt": NEGATIVE, "guidance_scale": 4.0} | _VARIANTS[i]


ROWS = (
    Row(name="z_image", build=_build, request=_request, unguided=_unguided, branches=2, batched=True),
    Row(name="z_image_turbo", build=_build, folder="z_image", request=_unguided, branches=1),
)
