"""Qwen-Image, the text-to-image rows. Guidance is two calls; it needs a negative prompt to be on."""

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tests.tiny import encoders, tokenizers
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

CHANNELS = 8  # of a latent; the layered pipeline takes an image of four channels for one that is encoded already


def transformer(seed: int = 21, **config: bool) -> QwenImageTransformer2DModel:
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=encoders.WIDTH,
        axes_dims_rope=(8, 4, 4),
        **config,
    )
    return randomize(model, seed, gain=1.5)


def vae(image_channels: int = 3) -> AutoencoderKLQwenImage:
    model = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        input_channels=image_channels,
        latents_mean=[0.1 * (i - 3) for i in range(CHANNELS)],
        latents_std=[1 + 0.1 * i for i in range(CHANNELS)],
    )
    return randomize(model, 22)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def _build(seed: int) -> QwenImagePipeline:
    tokenizer = tokenizers.qwen()
    return QwenImagePipeline(
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=encoders.qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer(seed),
    )


def _unguided(i: int) -> Request:
    return varied(i, height=(64, 64, 48), width=(64, 64, 80))


def _request(i: int) -> Request:
    return _unguided(i) | {"negative_prompt": NEGATIVE, "true_cfg_scale": 4.0}


def _request_2512(i: int) -> Request:
    return _unguided(i) | {"negative_prompt": "", "true_cfg_scale": 2.5 + i}


ROWS = (
    Row(name="qwen_image", build=lambda: _build(21), request=_request, unguided=_unguided, branches=2),
    Row(name="qwen_image_2512", build=lambda: _build(23), request=_request_2512, unguided=_unguided, branches=2),
)
