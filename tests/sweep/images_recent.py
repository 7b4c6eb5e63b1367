"""Image pipelines with Qwen3-VL, SmolLM3 or ChatGLM as text encoders, and priors on their own."""

from __future__ import annotations

import io
import tempfile
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline

from tests.sweep import parts, stages
from tests.sweep.case import Case
from tests.tiny import ROWS, encoders, tokenizers, vaes, vision
from tests.tiny.row import NEGATIVE, PROMPTS
from tests.tiny.weights import randomize

_W = encoders.WIDTH
_SIZE = {"height": 32, "width": 32}
_GUIDED = {**_SIZE, "guidance_scale": 5.0}
_SHORT = {**_GUIDED, "max_sequence_length": 64}
_STORES = "each branch has a store of keys and values, which stays on one rank; use_kv_cache=False divides them"
_TAPPED = 36  # layers of the language model, the last of which Ideogram reads


def _bria_fibo() -> DiffusionPipeline:
    tokenizer = tokenizers.llama()
    transformer = diffusers.BriaFiboTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * _W,
        text_encoder_dim=_W,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    config = transformers.SmolLM3Config(**encoders.decoder_sizes(tokenizer))
    return diffusers.BriaFiboPipeline(
        transformer=randomize(transformer, 701),
        scheduler=parts.flow(),
        vae=randomize(vae, 702),
        text_encoder=randomize(transformers.SmolLM3ForCausalLM(config), 703),
        tokenizer=tokenizer,
    )


def _nucleus() -> DiffusionPipeline:
    tokenizer = tokenizers.qwen(system=True)
    vae = ROWS["qwen_image"].build().vae
    channels = vae.config.z_dim
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=_W,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=False,
        capacity_factors=[8.0, 8.0],
    )
    return diffusers.NucleusMoEImagePipeline(
        transformer=randomize(transformer, 704),
        scheduler=parts.flow(),
        vae=vae,
        text_encoder=parts.qwen3_vl(tokenizer, transformers.Qwen3VLForConditionalGeneration),
        processor=vision.processor(tokenizer),
    )


def _ideogram() -> DiffusionPipeline:
    tokenizer = tokenizers.qwen(system=True)
    vae = ROWS["flux2_klein"].build().vae
    taps = 13
    denoisers = [
        randomize(
            diffusers.Ideogram4Transformer2DModel(
                in_channels=4 * vae.config.latent_channels,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                intermediate_size=32,
                adaln_dim=16,
                llm_features_dim=taps * _W,
                mrope_section=(4, 2, 2),
            ),
            seed,
        )
        for seed in (705, 706)
    ]
    return diffusers.Ideogram4Pipeline(
        scheduler=parts.flow(),
        vae=vae,
        text_encoder=parts.qwen3_vl(tokenizer, transformers.Qwen3VLModel, layers=_TAPPED),
        tokenizer=tokenizer,
        transformer=denoisers[0],
        unconditional_transformer=denoisers[1],
    )


def _qwen21() -> DiffusionPipeline:
    tokenizer = tokenizers.qwen(system=True)
    channels = 8
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=_W,
        mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.QwenImage21Pipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=randomize(vae, 707),
        text_encoder=parts.qwen3_vl(tokenizer, transformers.Qwen3VLForConditionalGeneration),
        processor=vision.processor(tokenizer),
        transformer=randomize(transformer, 708),
    )


def _dreamlite(name: str) -> DiffusionPipeline:
    tokenizer = tokenizers.qwen(system=True)
    unet = diffusers.DreamLiteUNetModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(32, 64),
        cross_attention_dim=_W,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
        transformer_layers_per_block=1,
    )
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(32, 32),
        decoder_block_out_channels=(32, 32),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    return getattr(diffusers, name)(
        text_encoder=parts.qwen3_vl(tokenizer, transformers.Qwen3VLForConditionalGeneration),
        tokenizer=tokenizer,
        processor=vision.processor(tokenizer),
        vae=randomize(vae, 709),
        unet=randomize(unet, 710),
        scheduler=parts.flow(),
    )


def _kolors(name: str, **more: Any) -> DiffusionPipeline:
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*PROMPTS, NEGATIVE] * 4), model_writer=model, vocab_size=60, hard_vocab_limit=False
    )
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model.getvalue())
        file.flush()
        tokenizer = ChatGLMTokenizer(file.name)
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=80,
        hidden_size=_W,
        ffn_hidden_size=48,
        kv_channels=8,
        num_attention_heads=4,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        original_rope=True,
        rmsnorm=True,
    )
    unet = parts.unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=_W + 6 * 8,
    )
    return getattr(diffusers, name)(
        vae=vaes.kl(4, shift=None, scale=0.5),
        text_encoder=randomize(ChatGLMModel(config), 711),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
        **more,
    )


def _cascade_prior() -> DiffusionPipeline:
    whole = stages.cascade()
    return diffusers.StableCascadePriorPipeline(
        tokenizer=whole.prior_tokenizer,
        text_encoder=whole.prior_text_encoder,
        prior=whole.prior_prior,
        scheduler=whole.prior_scheduler,
    )


def _wuerstchen_prior() -> DiffusionPipeline:
    whole = stages.wuerstchen()
    return diffusers.WuerstchenPriorPipeline(
        tokenizer=whole.prior_tokenizer,
        text_encoder=whole.prior_text_encoder,
        prior=whole.prior_prior,
        scheduler=whole.prior_scheduler,
    )


def _z_image_omni() -> DiffusionPipeline:
    components = {k: v for k, v in ROWS["z_image"].build().components.items() if v is not None}
    return diffusers.ZImageOmniPipeline(**components, siglip=None, siglip_processor=None)


_PRIOR = {"height": 128, "width": 128, "guidance_scale": 4.0}

CASES = (
    Case(pipeline="BriaFiboPipeline", build=_bria_fibo, call=_SHORT),
    Case(
        pipeline="NucleusMoEImagePipeline",
        build=_nucleus,
        call={**_GUIDED, "max_sequence_length": 128, "return_index": -1},
    ),
    Case(
        pipeline="Ideogram4Pipeline",
        build=_ideogram,
        call={**_SHORT, "guidance_schedule": None},
        negative=False,
    ),
    Case(pipeline="QwenImage21Pipeline", build=_qwen21, call={**_SIZE, "true_cfg_scale": 4.0}, whole=_STORES),
    Case(pipeline="DreamLitePipeline", build=lambda: _dreamlite("DreamLitePipeline"), call=_SHORT),
    Case(
        pipeline="DreamLiteMobilePipeline",
        build=lambda: _dreamlite("DreamLiteMobilePipeline"),
        call={**_SIZE, "max_sequence_length": 64},
        branches=1,
    ),
    Case(pipeline="KolorsPipeline", build=lambda: _kolors("KolorsPipeline"), call=_GUIDED),
    Case(
        pipeline="KolorsPAGPipeline",
        build=lambda: _kolors("KolorsPAGPipeline", pag_applied_layers=["mid"]),
        call=_GUIDED,
        branches=3,
        whole=parts.PAG,
    ),
    Case(pipeline="StableCascadePriorPipeline", build=_cascade_prior, call=_PRIOR),
    Case(pipeline="WuerstchenPriorPipeline", double=True, build=_wuerstchen_prior, call=_PRIOR),
    Case(pipeline="ZImageOmniPipeline", build=_z_image_omni, call={**_SHORT, "cfg_normalization": False}),
)
