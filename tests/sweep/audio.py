"""Audio pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from tests.sweep import parts
from tests.sweep.case import Case
from tests.tiny import encoders, tokenizers
from tests.tiny.weights import randomize

_W = encoders.WIDTH


_ATTENTION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "sliding_window": 16,
}


def _ace_step() -> DiffusionPipeline:
    from diffusers.pipelines.ace_step.modeling_ace_step import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
    )

    tokenizer = tokenizers.qwen()
    transformer = diffusers.AceStepTransformer1DModel(
        **_ATTENTION, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2
    )
    pool = {"audio_acoustic_hidden_dim": 8, "pool_window_size": 2, "num_attention_pooler_hidden_layers": 1}
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=8,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return diffusers.AceStepPipeline(
        transformer=randomize(transformer, 509),
        condition_encoder=randomize(
            AceStepConditionEncoder(
                **_ATTENTION,
                text_hidden_dim=_W,
                timbre_hidden_dim=8,
                num_lyric_encoder_hidden_layers=1,
                num_timbre_encoder_hidden_layers=1,
            ),
            510,
        ),
        vae=randomize(vae, 511, gain=0.6),
        text_encoder=encoders.qwen3(tokenizer),
        tokenizer=tokenizer,
        scheduler=parts.flow(num_train_timesteps=1, shift=1.0),
        audio_tokenizer=randomize(
            AceStepAudioTokenizer(
                **_ATTENTION, **pool, fsq_dim=32, fsq_input_levels=[4, 4, 4], fsq_input_num_quantizers=1
            ),
            512,
        ),
        audio_token_detokenizer=randomize(AceStepAudioTokenDetokenizer(**_ATTENTION, **pool), 513),
    )


def _longcat_audio() -> DiffusionPipeline:
    tokenizer = tokenizers.t5()
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=64, dit_depth=2, dit_heads=4, dit_text_dim=_W, latent_dim=8, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        in_channels=1,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=24000,
    )
    return diffusers.LongCatAudioDiTPipeline(
        vae=randomize(vae, 514),
        text_encoder=encoders.umt5(tokenizer),
        tokenizer=tokenizer,
        transformer=randomize(transformer, 515),
        scheduler=parts.flow(shift=1.0, invert_sigmas=True),
    )


def _stable_audio3() -> DiffusionPipeline:
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoderModel

    tokenizer = tokenizers.gemma()
    sizes = encoders.decoder_sizes(tokenizer) | {"head_dim": 8, "dropout_rate": 0.0}
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=8,
        patch_size=1,
        embed_dim=32,
        depth=2,
        num_heads=4,
        cond_token_dim=_W,
        global_cond_dim=_W,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
        use_differential_attention=False,
    )
    vae = diffusers.AutoencoderSAME(
        audio_channels=2,
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )
    duration = diffusers.StableAudio3DurationEmbedder(output_dim=_W, fourier_dim=16)
    return diffusers.StableAudio3Pipeline(
        transformer=randomize(transformer, 516),
        scheduler=parts.flow(num_train_timesteps=1, shift=1.0, stochastic_sampling=False),
        vae=randomize(vae, 517),
        text_encoder=randomize(
            T5GemmaEncoderModel(T5GemmaConfig(encoder=sizes, decoder=sizes, is_encoder_decoder=False)), 518
        ),
        tokenizer=tokenizer,
        duration_embedder=randomize(duration, 519),
    )


CASES = tuple(
    Case(kind="audio", **case)
    for case in (
        {
            "pipeline": "AceStepPipeline",
            "build": _ace_step,
            "call": {"lyrics": "[verse] two red birds", "audio_duration": 4.0, "guidance_scale": 4.0},
            "negative": False,
        },
        {
            "pipeline": "LongCatAudioDiTPipeline",
            "build": _longcat_audio,
            "call": {"audio_duration_s": 0.01, "guidance_scale": 4.0},
        },
        {
            "pipeline": "StableAudio3Pipeline",
            "build": _stable_audio3,
            "call": {"duration": 2.0, "guidance_scale": 4.0},
        },
    )
)
