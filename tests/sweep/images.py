"""Image pipelines on transformers, text encoded by T5, CLIP or a language model."""

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


def _aura_flow() -> DiffusionPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=_W,
        out_channels=4,
        pos_embed_max_size=256,
    )
    tokenizer = tokenizers.t5(64)
    text = {"text_encoder": encoders.umt5(tokenizer), "tokenizer": tokenizer}
    return parts.pipe("AuraFlowPipeline", transformer, vae=vaes.kl(4, shift=None), **text)


def _bria() -> DiffusionPipeline:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=_W,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    return parts.pipe("BriaPipeline", transformer, vae=vaes.kl(4), **parts.t5())


def _chroma() -> DiffusionPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_W,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return parts.pipe("ChromaPipeline", transformer, vae=vaes.kl(4), **parts.t5())


def _cogview3() -> DiffusionPipeline:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=_W,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
        sample_size=16,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return parts.pipe(
        "CogView3PlusPipeline", transformer, scheduler=scheduler, vae=vaes.kl(4, shift=None), **parts.t5()
    )


def _bert() -> dict[str, Any]:
    tokenizer = tokenizers.clip()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=_W,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=80,
    )
    t5 = tokenizers.t5(256)
    return {
        "text_encoder": randomize(transformers.BertModel(config), 303),
        "tokenizer": tokenizer,
        "text_encoder_2": encoders.t5(t5),
        "tokenizer_2": t5,
    }


def _hunyuan_dit(name: str, **more: Any) -> DiffusionPipeline:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        cross_attention_dim=_W,
        cross_attention_dim_t5=_W,
        pooled_projection_dim=16,
        hidden_size=32,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    checkers = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    vae = vaes.kl(4, shift=None, stages=4)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    return parts.pipe(name, transformer, scheduler=scheduler, vae=vae, **_bert(), **checkers, **more)


def _pixart(name: str, **more: Any) -> DiffusionPipeline:
    components = {k: v for k, v in ROWS["pixart_sigma"].build().components.items() if v is not None}
    return getattr(diffusers, name)(**components | more)


def _cosmos2() -> DiffusionPipeline:
    scheduler = parts.flow(use_karras_sigmas=True)
    checker = parts.SilentChecker()
    return parts.pipe(
        "Cosmos2TextToImagePipeline",
        parts.cosmos_transformer(),
        scheduler=scheduler,
        vae=parts.wan_vae(),
        safety_checker=checker,
        **parts.t5(),
    )


def _amused() -> DiffusionPipeline:
    tokenizer = tokenizers.clip()
    transformer = diffusers.UVit2DModel(
        hidden_size=16,
        use_bias=False,
        hidden_dropout=0.0,
        cond_embed_dim=_W,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=_W,
        vocab_size=32,
        codebook_size=8,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=4,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_dropout=0.0,
        intermediate_size=32,
        layer_norm_eps=1e-6,
        ln_elementwise_affine=True,
    )
    vqvae = diffusers.VQModel(
        act_fn="silu",
        block_out_channels=[8],
        down_block_types=["DownEncoderBlock2D"],
        in_channels=3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        num_vq_embeddings=8,
        out_channels=3,
        sample_size=8,
        up_block_types=["UpDecoderBlock2D"],
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    return parts.pipe(
        "AmusedPipeline",
        transformer,
        scheduler=diffusers.AmusedScheduler(mask_token_id=31),
        vqvae=randomize(vqvae, 308),
        text_encoder=encoders.clip_projected(tokenizer),
        tokenizer=tokenizer,
    )


CASES = (
    Case(pipeline="AuraFlowPipeline", build=_aura_flow, call=_SHORT),
    Case(pipeline="BriaPipeline", build=_bria, call=_SHORT),
    Case(pipeline="ChromaPipeline", build=_chroma, call=_SHORT),
    Case(pipeline="CogView3PlusPipeline", build=_cogview3, call=_SHORT),
    Case(pipeline="HunyuanDiTPipeline", double=True, build=lambda: _hunyuan_dit("HunyuanDiTPipeline"), call=_EXACT),
    Case(
        pipeline="HunyuanDiTPAGPipeline",
        build=lambda: _hunyuan_dit("HunyuanDiTPAGPipeline", pag_applied_layers=["blocks.1"]),
        call=_EXACT,
        branches=3,
        whole=parts.PAG,
    ),
    Case(
        pipeline="PixArtAlphaPipeline",
        build=lambda: _pixart("PixArtAlphaPipeline"),
        call={**_EXACT, "max_sequence_length": 32, "clean_caption": False},
    ),
    Case(
        pipeline="PixArtSigmaPAGPipeline",
        build=lambda: _pixart("PixArtSigmaPAGPipeline", pag_applied_layers=["blocks.1"]),
        call={**_EXACT, "max_sequence_length": 32, "clean_caption": False},
        branches=3,
        whole=parts.PAG,
    ),
    Case(pipeline="Cosmos2TextToImagePipeline", build=_cosmos2, call=_SHORT),
    Case(pipeline="AmusedPipeline", build=_amused, call=_GUIDED),
)
