"""Audio pipelines that draw a mel spectrogram with a UNet, for a vocoder."""

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


_MEL_CALL = {"audio_length_in_s": 0.02, "guidance_scale": 4.0}


CASES = tuple(
    Case(kind="audio", **case)
    for case in (
        {"pipeline": "AudioLDM2Pipeline", "build": _audioldm2, "call": {**_MEL_CALL, "max_new_tokens": 4}},
        {"pipeline": "AudioLDMPipeline", "build": _audioldm, "call": _MEL_CALL},
        {"pipeline": "MusicLDMPipeline", "build": _musicldm, "call": _MEL_CALL},
    )
)
