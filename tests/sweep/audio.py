"""Audio pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from tokenizers import pre_tokenizers

from tests.sweep import parts
from tests.sweep.case import Case
from tests.tiny import encoders, tokenizers
from tests.tiny.weights import randomize

_W = encoders.WIDTH
_MELS = 8


def _mel_vae() -> Any:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=1,
        out_channels=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.5,
    )
    return randomize(vae, 501)


def _vocoder() -> Any:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=_MELS,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    return randomize(transformers.SpeechT5HifiGan(config), 502)


def _clap_text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "max_position_embeddings": 100,
        "projection_dim": 16,
    }


def _clap(tokenizer: Any) -> Any:
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "intermediate_size": 32,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "projection_dim": 16,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    config = transformers.ClapConfig(text_config=_clap_text(tokenizer), audio_config=audio, projection_dim=16)
    return randomize(transformers.ClapModel(config), 503)


def _roberta() -> Any:
    """The characters of the CLIP tokenizer under the class that the pipelines ask for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _audioldm2() -> DiffusionPipeline:
    tokenizer, second = _roberta(), tokenizers.t5(77)
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
    )
    language = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=100, n_positions=99, max_new_tokens=8)
    )
    projection = diffusers.AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=_W, langauge_model_dim=16)
    return diffusers.AudioLDM2Pipeline(
        unet=randomize(unet, 504),
        scheduler=parts.ddim(),
        vae=_mel_vae(),
        text_encoder=_clap(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=encoders.t5(second),
        tokenizer_2=second,
        feature_extractor=transformers.ClapFeatureExtractor(feature_size=8, sampling_rate=16000),
        language_model=randomize(language, 505),
        projection_model=randomize(projection, 506),
        vocoder=_vocoder(),
    )


def _film_unet() -> Any:
    """The text is one vector, given as a class."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
    )
    return randomize(unet, 507)


def _audioldm() -> DiffusionPipeline:
    tokenizer = _roberta()
    config = transformers.ClapTextConfig(**_clap_text(tokenizer))
    return diffusers.AudioLDMPipeline(
        unet=_film_unet(),
        scheduler=parts.ddim(),
        vae=_mel_vae(),
        text_encoder=randomize(transformers.ClapTextModelWithProjection(config), 508),
        tokenizer=tokenizer,
        vocoder=_vocoder(),
    )


def _musicldm() -> DiffusionPipeline:
    tokenizer = _roberta()
    return diffusers.MusicLDMPipeline(
        unet=_film_unet(),
        scheduler=parts.ddim(),
        vae=_mel_vae(),
        text_encoder=_clap(tokenizer),
        tokenizer=tokenizer,
        feature_extractor=transformers.ClapFeatureExtractor(feature_size=8, sampling_rate=16000),
        vocoder=_vocoder(),
    )


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


_MEL_CALL = {"audio_length_in_s": 0.02, "guidance_scale": 4.0}

CASES = tuple(
    Case(kind="audio", **case)
    for case in (
        {"pipeline": "AudioLDM2Pipeline", "build": _audioldm2, "call": {**_MEL_CALL, "max_new_tokens": 4}},
        {"pipeline": "AudioLDMPipeline", "build": _audioldm, "call": _MEL_CALL},
        {"pipeline": "MusicLDMPipeline", "build": _musicldm, "call": _MEL_CALL},
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
