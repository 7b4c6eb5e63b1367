"""Pipelines for which the engine has no spec: it must serve them from what their classes declare."""

from diffusers import (
    AutoencoderDC,
    AutoencoderKLLTXVideo,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

_CHANNELS = 4
_LTX_CHANNELS = 8


def _sana() -> SanaPipeline:
    tokenizer = tokenizers.gemma()
    transformer = SanaTransformer2DModel(
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=encoders.WIDTH,
        sample_size=16,
    )
    vae = AutoencoderDC(
        latent_channels=_CHANNELS,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        scaling_factor=0.5,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.gemma2(tokenizer),
        vae=randomize(vae, 101),
        transformer=randomize(transformer, 102),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )


def _ltx() -> LTXPipeline:
    tokenizer = tokenizers.t5(max_length=128)
    transformer = LTXVideoTransformer3DModel(
        in_channels=_LTX_CHANNELS,
        out_channels=_LTX_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=4,
        caption_channels=encoders.WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=_LTX_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        patch_size=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=randomize(vae, 103),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
        transformer=randomize(transformer, 104),
    )


def _pixart() -> PixArtSigmaPipeline:
    tokenizer = tokenizers.t5()
    transformer = PixArtTransformer2DModel(
        in_channels=_CHANNELS,
        out_channels=2 * _CHANNELS,  # noise and its variance; the pipeline drops the second half
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=encoders.WIDTH,
        sample_size=16,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.t5(tokenizer),
        vae=vaes.kl(_CHANNELS, shift=None, scale=0.5),
        transformer=randomize(transformer, 105),
        # Not the model's own "epsilon": the latents of an untrained one would grow by the hundred.
        scheduler=DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    )


def _sized(i: int) -> Request:
    return varied(i, height=(32, 32, 64), width=(32, 32, 32)) | {"guidance_scale": 1.0, "max_sequence_length": 32}


def _guided(request: Request) -> Request:
    return request | {"negative_prompt": NEGATIVE, "guidance_scale": 4.5}


def _sana_unguided(i: int) -> Request:
    # The instruction, some two hundred words by default, would crowd the prompt out of the tiny context.
    return _sized(i) | {"complex_human_instruction": None, "use_resolution_binning": False}


def _pixart_unguided(i: int) -> Request:
    return _sized(i) | {"clean_caption": False, "use_resolution_binning": False}


def _ltx_unguided(i: int) -> Request:
    return _sized(i) | {"num_frames": (9, 9, 5)[i]}


ROWS = (
    Row(
        name="sana",
        build=_sana,
        request=lambda i: _guided(_sana_unguided(i)),
        unguided=_sana_unguided,
        branches=2,
        batched=True,
    ),
    Row(
        name="ltx",
        build=_ltx,
        request=lambda i: _guided(_ltx_unguided(i)),
        unguided=_ltx_unguided,
        branches=2,
        batched=True,
        kind="video",
    ),
    Row(
        name="pixart_sigma",
        build=_pixart,
        request=lambda i: _guided(_pixart_unguided(i)),
        unguided=_pixart_unguided,
        branches=2,
        batched=True,
    ),
)
