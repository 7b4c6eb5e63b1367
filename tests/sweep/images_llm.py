"""Image pipelines whose text goes through a language model, or through Qwen2.5-VL."""

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


_GUIDED = {**_SIZE, "guidance_scale": 5.0}


_SHORT = {**_GUIDED, "max_sequence_length": 32}


_EXACT = {**_GUIDED, "use_resolution_binning": False}


def _glm_text() -> dict[str, Any]:
    tokenizer = tokenizers.glm()
    config = transformers.GlmConfig(head_dim=8, **encoders.decoder_sizes(tokenizer))
    return {"tokenizer": tokenizer, "text_encoder": randomize(transformers.GlmModel(config), 302)}


def _cogview4() -> DiffusionPipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=_W,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = parts.flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return parts.pipe("CogView4Pipeline", transformer, scheduler=scheduler, vae=vaes.kl(4, shift=None), **_glm_text())


def _gemma() -> dict[str, Any]:
    tokenizer = tokenizers.gemma()
    return {"tokenizer": tokenizer, "text_encoder": encoders.gemma2(tokenizer)}


def _lumina() -> DiffusionPipeline:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=_W,
    )
    return parts.pipe("LuminaPipeline", transformer, vae=vaes.kl(4, shift=None), **_gemma())


def _lumina2() -> DiffusionPipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[512, 64, 64],
        cap_feat_dim=_W,
    )
    return parts.pipe("Lumina2Pipeline", transformer, vae=vaes.kl(4), **_gemma())


def _sana(name: str, **more: Any) -> DiffusionPipeline:
    components = {k: v for k, v in ROWS["sana"].build().components.items() if v is not None}
    return getattr(diffusers, name)(**components | more)


def _sana_sprint() -> DiffusionPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=_W,
        sample_size=16,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    return _sana("SanaSprintPipeline", transformer=randomize(transformer, 304), scheduler=diffusers.SCMScheduler())


def _prx() -> DiffusionPipeline:
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    tokenizer = tokenizers.gemma()
    tokenizer.model_max_length = 64
    config = T5GemmaModuleConfig(head_dim=8, **encoders.decoder_sizes(tokenizer))
    config.dropout_rate = 0.0
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=_W,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    encoder = randomize(T5GemmaEncoder(config), 305)
    return parts.pipe("PRXPipeline", transformer, vae=vaes.kl(4), text_encoder=encoder, tokenizer=tokenizer)


def _prx_pixel() -> DiffusionPipeline:
    tokenizer = tokenizers.qwen()
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=8,
        in_channels=3,
        context_in_dim=_W,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
        bottleneck_size=8,
        resolution_embeds=True,
    )
    return parts.pipe(
        "PRXPixelPipeline",
        transformer,
        text_encoder=encoders.qwen3(tokenizer),
        tokenizer=tokenizer,
        prompt_max_tokens=32,
    )


def _flux2_kv() -> DiffusionPipeline:
    components = {k: v for k, v in ROWS["flux2_klein"].build().components.items() if v is not None}
    return diffusers.Flux2KleinKVPipeline(**components)


def _hunyuan_image() -> DiffusionPipeline:
    tokenizer = tokenizers.qwen(system=True)
    byte_tokenizer = transformers.ByT5Tokenizer()
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=False,
        text_embed_dim=_W,
        text_embed_2_dim=_W,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        scaling_factor=0.5,
        spatial_compression_ratio=8,
        sample_size=32,
    )
    return parts.pipe(
        "HunyuanImagePipeline",
        transformer,
        vae=randomize(vae, 306),
        text_encoder=encoders.qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=encoders.t5(byte_tokenizer),
        tokenizer_2=byte_tokenizer,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        ocr_guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )


def _kandinsky5() -> DiffusionPipeline:
    return parts.pipe(
        "Kandinsky5T2IPipeline", parts.kandinsky5_transformer(), vae=vaes.kl(16), **parts.kandinsky5_text()
    )


def _qwen_vae() -> Any:
    return ROWS["qwen_image"].build().vae


def _krea2() -> DiffusionPipeline:
    tokenizer = tokenizers.qwen(system=True)
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=_W,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    scheduler = parts.flow(use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=6400)
    return parts.pipe(
        "Krea2Pipeline",
        transformer,
        scheduler=scheduler,
        vae=_qwen_vae(),
        text_encoder=parts.qwen3_vl(tokenizer, transformers.Qwen3VLModel),
        tokenizer=tokenizer,
        text_encoder_select_layers=(0, 1, 2),
    )


CASES = (
    Case(pipeline="CogView4Pipeline", build=_cogview4, call=_SHORT),
    Case(pipeline="LuminaPipeline", build=_lumina, call={**_SHORT, "clean_caption": False}),
    Case(pipeline="Lumina2Pipeline", build=_lumina2, call=_SHORT),
    Case(
        pipeline="SanaPAGPipeline",
        build=lambda: _sana("SanaPAGPipeline", pag_applied_layers=["blocks.1"]),
        call={**_EXACT, "max_sequence_length": 32, "complex_human_instruction": None},
        branches=3,
        whole=parts.PAG,
    ),
    Case(
        pipeline="SanaSprintPipeline",
        build=_sana_sprint,
        call={
            **_EXACT,
            "max_sequence_length": 32,
            "complex_human_instruction": None,
            "intermediate_timesteps": None,
        },
        branches=1,
    ),
    Case(pipeline="PRXPipeline", build=_prx, call=_EXACT),
    Case(pipeline="PRXPixelPipeline", build=_prx_pixel, call=_EXACT),
    Case(
        pipeline="Flux2KleinKVPipeline",
        build=_flux2_kv,
        call={**_SIZE, "max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)},
        branches=1,
    ),
    Case(pipeline="HunyuanImagePipeline", build=_hunyuan_image, call=_SIZE),
    Case(pipeline="Kandinsky5T2IPipeline", build=_kandinsky5, call={**_SHORT, "height": 32}),
    Case(pipeline="Krea2Pipeline", build=_krea2, call=_SHORT),
)
