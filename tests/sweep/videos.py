"""Video pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline

from tests.sweep import parts
from tests.sweep.case import Case
from tests.tiny import ROWS, encoders, tokenizers, vaes
from tests.tiny.weights import randomize

_W = encoders.WIDTH
_SIZE = {"height": 32, "width": 32}
_SHORT = {**_SIZE, "guidance_scale": 5.0, "max_sequence_length": 32, "num_frames": 9}


def _t5(max_length: int = 64) -> dict[str, Any]:
    tokenizer = tokenizers.t5(max_length)
    return {"text_encoder": encoders.t5(tokenizer), "tokenizer": tokenizer}


def _umt5() -> dict[str, Any]:
    tokenizer = tokenizers.t5()
    return {"text_encoder": encoders.umt5(tokenizer), "tokenizer": tokenizer}


def _pipe(name: str, transformer: Any, **components: Any) -> DiffusionPipeline:
    given = {"scheduler": parts.flow(), "transformer": randomize(transformer, 401)} | components
    return getattr(diffusers, name)(**given)


def _allegro() -> DiffusionPipeline:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=_W,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.5,
    )
    vae.enable_tiling()
    return _pipe("AllegroPipeline", transformer, scheduler=parts.ddim(), vae=randomize(vae, 402), **_t5())


_WAN_LIKE: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": _W,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def _anyflow(far: bool) -> DiffusionPipeline:
    gates = {"gate_value": 0.25, "deltatime_type": "r"}
    chunks = {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "chunk_partition": (1, 1, 1)} if far else {}
    kind = diffusers.AnyFlowFARTransformer3DModel if far else diffusers.AnyFlowTransformer3DModel
    return _pipe(
        "AnyFlowFARPipeline" if far else "AnyFlowPipeline",
        kind(**_WAN_LIKE | gates | chunks),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
        vae=parts.wan_vae(),
        **_umt5(),
    )


def _cogvideox() -> DiffusionPipeline:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=_W,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=32,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.5,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return _pipe("CogVideoXPipeline", transformer, scheduler=scheduler, vae=randomize(vae, 403), **_t5())


def _cosmos() -> DiffusionPipeline:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        patch_type="haar",
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return _pipe(
        "CosmosTextToWorldPipeline",
        parts.cosmos_transformer(),
        scheduler=diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, num_train_timesteps=1000, final_sigmas_type="sigma_min"
        ),
        vae=randomize(vae, 404),
        safety_checker=parts.SilentChecker(),
        **_t5(),
    )


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


def _latte() -> DiffusionPipeline:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=_W,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=4,
    )
    return _pipe(
        "LattePipeline", transformer, scheduler=parts.ddim(), vae=vaes.kl(4, shift=None, scale=0.5), **_t5(120)
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


def _mochi() -> DiffusionPipeline:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=_W,
        time_embed_dim=8,
        activation_fn="swiglu",
        max_sequence_length=32,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return _pipe("MochiPipeline", transformer, vae=randomize(vae, 409), **_t5())


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


def _skyreels(name: str) -> DiffusionPipeline:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**_WAN_LIKE, qk_norm="rms_norm_across_heads")
    scheduler = diffusers.UniPCMultistepScheduler(
        flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    return _pipe(name, transformer, scheduler=scheduler, vae=parts.wan_vae(), **_umt5())


def _text_to_video_sd() -> DiffusionPipeline:
    tokenizer = tokenizers.clip()
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=_W,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return diffusers.TextToVideoSDPipeline(
        unet=randomize(unet, 411),
        scheduler=parts.ddim(),
        vae=vaes.kl(4, shift=None, scale=0.5),
        text_encoder=encoders.clip(tokenizer),
        tokenizer=tokenizer,
    )


_LTX2_HDR = {**_SIZE, "num_frames": 9, "max_sequence_length": 32}
_TEMPLATE = {"template": "{}", "crop_start": 0}

CASES = tuple(
    Case(kind="video", **case)
    for case in (
        {
            "pipeline": "AllegroPipeline",
            "build": _allegro,
            "call": {**_SHORT, "num_frames": 8, "clean_caption": False},
            "output_type": "latent",
        },
        {"pipeline": "AnyFlowPipeline", "double": True, "build": lambda: _anyflow(False), "call": _SHORT},
        {"pipeline": "AnyFlowFARPipeline", "build": lambda: _anyflow(True), "call": _SHORT},
        {"pipeline": "CogVideoXPipeline", "double": True, "build": _cogvideox, "call": _SHORT},
        {"pipeline": "CosmosTextToWorldPipeline", "build": _cosmos, "call": _SHORT},
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
        {
            "pipeline": "LattePipeline",
            "build": _latte,
            "call": {**_SIZE, "guidance_scale": 5.0, "video_length": 4, "clean_caption": False},
        },
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
        {"pipeline": "MochiPipeline", "build": _mochi, "call": {**_SHORT, "num_frames": 7}},
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
        {"pipeline": "SkyReelsV2Pipeline", "build": lambda: _skyreels("SkyReelsV2Pipeline"), "call": _SHORT},
        {
            "pipeline": "SkyReelsV2DiffusionForcingPipeline",
            "build": lambda: _skyreels("SkyReelsV2DiffusionForcingPipeline"),
            "call": {**_SHORT, "num_frames": 9, "base_num_frames": 9, "addnoise_condition": 20},
        },
        {
            "pipeline": "TextToVideoSDPipeline",
            "build": _text_to_video_sd,
            "call": {**_SIZE, "guidance_scale": 5.0, "num_frames": 4},
        },
    )
)
