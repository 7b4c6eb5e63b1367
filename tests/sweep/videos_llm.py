"""Video pipelines whose text goes through a language model, and those of LTX."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline

from tests.sweep import parts
from tests.sweep.case import Case
from tests.tiny import ROWS, encoders, tokenizers
from tests.tiny.weights import randomize

_W = encoders.WIDTH


_SIZE = {"height": 32, "width": 32}


_SHORT = {**_SIZE, "guidance_scale": 5.0, "max_sequence_length": 32, "num_frames": 9}


_pipe = functools.partial(parts.pipe, seed=401)


def _cosmos25() -> DiffusionPipeline:
    tokenizer = tokenizers.qwen(system=True)
    return _pipe(
        "Cosmos2_5_PredictBasePipeline",
        parts.cosmos_transformer(
            in_channels=17,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=3 * _W,
            encoder_hidden_states_channels=_W,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        vae=parts.wan_vae(),
        text_encoder=encoders.qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
        safety_checker=parts.SilentChecker(),
    )


def _easyanimate() -> DiffusionPipeline:
    tokenizer = tokenizers.qwen()
    config = transformers.Qwen2VLConfig(
        text_config=encoders.decoder_sizes(tokenizer)
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": _W, "num_heads": 2},
    )
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=_W,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    vae = diffusers.AutoencoderKLMagvit(
        in_channels=3,
        out_channels=3,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return _pipe(
        "EasyAnimatePipeline",
        transformer,
        vae=randomize(vae, 405),
        text_encoder=randomize(transformers.Qwen2VLForConditionalGeneration(config), 406),
        tokenizer=tokenizer,
    )


def _hunyuan_vae(channels: int) -> Any:
    return randomize(
        diffusers.AutoencoderKLHunyuanVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=channels,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.5,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
            mid_block_add_attention=True,
        ),
        407,
    )


def _hunyuan_video() -> DiffusionPipeline:
    tokenizer, second = tokenizers.llama(), tokenizers.clip()
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=_W,
        pooled_projection_dim=_W,
        rope_axes_dim=(2, 4, 4),
    )
    config = transformers.LlamaConfig(**encoders.decoder_sizes(tokenizer))
    return _pipe(
        "HunyuanVideoPipeline",
        transformer,
        scheduler=parts.flow(shift=7.0),
        vae=_hunyuan_vae(4),
        text_encoder=randomize(transformers.LlamaModel(config), 408),
        tokenizer=tokenizer,
        text_encoder_2=encoders.clip(second),
        tokenizer_2=second,
    )


def _kandinsky5() -> DiffusionPipeline:
    return _pipe(
        "Kandinsky5T2VPipeline",
        parts.kandinsky5_transformer(),
        scheduler=parts.flow(shift=7.0),
        vae=_hunyuan_vae(16),
        **parts.kandinsky5_text(),
    )


def _ltx_condition() -> DiffusionPipeline:
    components = {k: v for k, v in ROWS["ltx"].build().components.items() if v is not None}
    return diffusers.LTXConditionPipeline(**components | {"scheduler": parts.flow()})


def _ltx2(name: str) -> DiffusionPipeline:
    components = {k: v for k, v in ROWS["ltx2"].build().components.items() if v is not None}
    return getattr(diffusers, name)(**components)


def _ltx_of(row: str, **more: Any) -> dict[str, Any]:
    request = ROWS[row].request(0)
    return {k: v for k, v in request.items() if k not in ("prompt", "num_inference_steps")} | more


def _motif() -> DiffusionPipeline:
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2EncoderConfig
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

    tokenizer = tokenizers.t5(64)
    sizes = encoders.decoder_sizes(tokenizer) | {"head_dim": 8, "num_hidden_layers": 1, "dropout_rate": 0.0}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = T5Gemma2EncoderConfig(text_config=sizes, vision_config=vision)
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        patch_size_t=1,
        qk_norm="rms_norm",
        text_embed_dim=_W,
        rope_axes_dim=(4, 4, 4),
    )
    return _pipe(
        "MotifVideoPipeline",
        transformer,
        scheduler=parts.flow(shift=7.0),
        vae=parts.wan_vae(),
        text_encoder=randomize(T5Gemma2Encoder(config), 410),
        tokenizer=tokenizer,
        feature_extractor=None,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )


def _sana_video() -> DiffusionPipeline:
    tokenizer = tokenizers.gemma()
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=_W,
        sample_size=8,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return _pipe(
        "SanaVideoPipeline",
        transformer,
        scheduler=scheduler,
        vae=parts.wan_vae(),
        text_encoder=encoders.gemma2(tokenizer),
        tokenizer=tokenizer,
    )


_LTX2_HDR = {**_SIZE, "num_frames": 9, "max_sequence_length": 32}


_TEMPLATE = {"template": "{}", "crop_start": 0}


CASES = tuple(
    Case(kind="video", **case)
    for case in (
        {"pipeline": "Cosmos2_5_PredictBasePipeline", "build": _cosmos25, "call": _SHORT},
        {
            "pipeline": "EasyAnimatePipeline",
            "build": _easyanimate,
            "call": {**_SIZE, "guidance_scale": 5.0, "num_frames": 5},
        },
        {
            "pipeline": "HunyuanVideoPipeline",
            "build": _hunyuan_video,
            "call": {**_SHORT, "prompt_template": _TEMPLATE, "true_cfg_scale": 4.0},
        },
        {"pipeline": "Kandinsky5T2VPipeline", "build": _kandinsky5, "call": {**_SHORT, "num_frames": 5}},
        {"pipeline": "LTXConditionPipeline", "build": _ltx_condition, "call": _ltx_of("ltx")},
        {
            "pipeline": "LTX2ConditionPipeline",
            "build": lambda: _ltx2("LTX2ConditionPipeline"),
            "call": _ltx_of("ltx2"),
        },
        {
            "pipeline": "LTX2InContextPipeline",
            "build": lambda: _ltx2("LTX2InContextPipeline"),
            "call": _ltx_of("ltx2"),
        },
        {"pipeline": "LTX2HDRPipeline", "build": lambda: _ltx2("LTX2HDRPipeline"), "call": _LTX2_HDR, "branches": 1},
        {
            "pipeline": "MotifVideoPipeline",
            "build": _motif,
            "call": {**_SIZE, "num_frames": 9, "max_sequence_length": 32},
        },
        {
            "pipeline": "SanaVideoPipeline",
            "build": _sana_video,
            "call": {
                **_SIZE,
                "guidance_scale": 5.0,
                "frames": 9,
                "max_sequence_length": 32,
                "complex_human_instruction": [],
                "use_resolution_binning": False,
            },
        },
    )
)
