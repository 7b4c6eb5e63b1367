"""LTX-2 and LTX-2.3: video and sound in one model. Guidance is a call with two rows and two calls with one each:
without the text, with some blocks skipped, and with the modalities apart.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

from tests.tiny import encoders, tokenizers
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

_CHANNELS = 4
_MEL_BINS = 8
_SOUND_CHANNELS = 2
_VIDEO_WIDTH, _AUDIO_WIDTH = 64, 32  # of the two streams, four heads each
_TEXT_STATES = 4  # of the text encoder: its embeddings and three layers

# What LTX-2.3 has over LTX-2: gates on attention, text modulated by the noise level, projections of the text in the
# connectors instead of the transformer, and skipped blocks that keep their values.
_NEWER = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
_NEWER_CONNECTORS = {
    "video_gated_attn": True,
    "audio_gated_attn": True,
    "per_modality_projections": True,
    "video_hidden_dim": _VIDEO_WIDTH,
    "audio_hidden_dim": _AUDIO_WIDTH,
    "proj_bias": True,
}


def _transformer(**newer: bool) -> LTX2VideoTransformer3DModel:
    model = LTX2VideoTransformer3DModel(
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=_VIDEO_WIDTH // 4,
        cross_attention_dim=_VIDEO_WIDTH,
        audio_in_channels=_SOUND_CHANNELS * _MEL_BINS // 4,
        audio_out_channels=_SOUND_CHANNELS * _MEL_BINS // 4,
        audio_num_attention_heads=4,
        audio_attention_head_dim=_AUDIO_WIDTH // 4,
        audio_cross_attention_dim=_AUDIO_WIDTH,
        vae_scale_factors=(2, 4, 4),
        num_layers=4,
        caption_channels=encoders.WIDTH,
        rope_type="split",
        **newer,
    )
    return randomize(model, 141)


def _connectors(newer: bool) -> LTX2TextConnectors:
    video_width = _VIDEO_WIDTH if newer else encoders.WIDTH
    audio_width = _AUDIO_WIDTH if newer else encoders.WIDTH
    model = LTX2TextConnectors(
        caption_channels=encoders.WIDTH,
        text_proj_in_factor=_TEXT_STATES,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=video_width // 4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=audio_width // 4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        connector_rope_base_seq_len=64,
        rope_type="split",
        **(_NEWER_CONNECTORS if newer else {}),
    )
    return randomize(model, 142)


def _vae() -> AutoencoderKLLTX2Video:
    model = AutoencoderKLLTX2Video(
        latent_channels=_CHANNELS,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=2,
        decoder_causal=False,
    )
    # Statistics are buffers, not weights; at zero and one a wrong normalisation would not show.
    model.latents_mean.copy_(torch.linspace(-0.3, 0.3, _CHANNELS))
    model.latents_std.copy_(torch.linspace(0.7, 1.4, _CHANNELS))
    return randomize(model, 143)


def _audio_vae() -> AutoencoderKLLTX2Audio:
    model = AutoencoderKLLTX2Audio(
        base_channels=_SOUND_CHANNELS * _MEL_BINS // 4,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        resolution=32,
        latent_channels=_SOUND_CHANNELS,
        mel_bins=_MEL_BINS,
    )
    model.latents_std.copy_(torch.linspace(0.7, 1.4, len(model.latents_std)))
    return randomize(model, 144)


def _stage(upsampling: tuple[int, int], prefix: str = "") -> dict[str, Any]:
    sizes = {
        "in_channels": 2 * _MEL_BINS,
        "hidden_channels": 16,
        "upsample_kernel_sizes": [4, 4],
        "upsample_factors": list(upsampling),
        "resnet_kernel_sizes": [3],
        "resnet_dilations": [[1, 3]],
    }
    return {prefix + key: value for key, value in sizes.items()}


def _vocoder(newer: bool) -> LTX2Vocoder | LTX2VocoderWithBWE:
    if not newer:
        return randomize(LTX2Vocoder(**_stage((2, 2)), output_sampling_rate=16000), 145)
    model = LTX2VocoderWithBWE(
        **_stage((2, 2)),
        **_stage((2, 4), prefix="bwe_"),
        filter_length=16,
        hop_length=4,
        window_length=16,
        num_mel_channels=_MEL_BINS,
        input_sampling_rate=16000,
        output_sampling_rate=32000,
    )
    spectra = torch.Generator().manual_seed(146)
    for basis in (model.mel_stft.stft_fn.forward_basis, model.mel_stft.mel_basis):
        basis.copy_(torch.rand(basis.shape, generator=spectra) / basis.shape[-1])
    return randomize(model, 145)


def _build(newer: bool) -> LTX2Pipeline:
    tokenizer = tokenizers.gemma()
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(),
        audio_vae=_audio_vae(),
        text_encoder=encoders.gemma3(tokenizer),
        tokenizer=tokenizer,
        connectors=_connectors(newer),
        transformer=_transformer(**(_NEWER if newer else {})),
        vocoder=_vocoder(newer),
    )


_OFF = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}


def _unguided(i: int) -> Request:
    sizes = varied(i, height=(32, 32, 32), width=(32, 32, 64), num_frames=(5, 5, 9))
    return sizes | _OFF | {f"audio_{key}": value for key, value in _OFF.items()} | {"max_sequence_length": 40}


def _request(i: int) -> Request:
    scales = {
        "guidance_scale": 3.0,
        "stg_scale": 1.0,
        "modality_scale": 3.0,
        "guidance_rescale": 0.7,
        "audio_guidance_scale": 5.0,
        "audio_stg_scale": 1.0,
        "audio_modality_scale": 3.0,
        "audio_guidance_rescale": 0.7,
    }
    return _unguided(i) | scales | {"negative_prompt": NEGATIVE, "spatio_temporal_guidance_blocks": [2]}


_SHAPE: dict[str, Any] = {"unguided": _unguided, "branches": 4, "batched": True, "kind": "video"}

ROWS = (
    Row(name="ltx2", build=lambda: _build(False), request=_request, **_SHAPE),
    Row(name="ltx23", build=lambda: _build(True), request=_request, **_SHAPE),
)
