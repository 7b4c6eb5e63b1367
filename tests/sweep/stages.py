"""Pipelines with several denoisers in turn: a prior and a decoder, or a picture that is made larger; and pixels."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from tests.sweep import parts
from tests.sweep.case import Case
from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.weights import randomize

_W = encoders.WIDTH


def _cascade_prior() -> Any:
    prior = diffusers.StableCascadeUNet(
        conditioning_dim=32,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_image_in_channels=_W,
        switch_level=(False,),
        clip_text_in_channels=_W,
        clip_text_pooled_in_channels=_W,
        dropout=(0.0, 0.0),
    )
    return randomize(prior, 607)


def _paella() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    return randomize(PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2), 608)


def cascade() -> DiffusionPipeline:
    tokenizer = tokenizers.clip()
    encoder = encoders.clip_projected(tokenizer)
    res, time, attention = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"
    decoder = diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=32,
        block_out_channels=(16, 32),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=((res, time), (res, time, attention)),
        switch_level=None,
        clip_text_pooled_in_channels=_W,
        effnet_in_channels=16,
        dropout=(0.0, 0.0),
    )
    return diffusers.StableCascadeCombinedPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        decoder=randomize(decoder, 609),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=_paella(),
        prior_prior=_cascade_prior(),
        prior_text_encoder=encoder,
        prior_tokenizer=tokenizer,
        prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
        prior_feature_extractor=None,
        prior_image_encoder=None,
    )


def wuerstchen() -> DiffusionPipeline:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt, WuerstchenPrior

    tokenizer = tokenizers.clip()
    encoder = encoders.clip(tokenizer)
    prior = WuerstchenPrior(c_in=4, c=32, depth=2, c_cond=_W, c_r=16, nhead=2, dropout=0.0)
    decoder = WuerstchenDiffNeXt(
        c_cond=_W,
        c_hidden=[16, 32],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=4,
        clip_embd=_W,
        dropout=[0.0, 0.0],
    )
    return diffusers.WuerstchenCombinedPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        decoder=randomize(decoder, 610),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=_paella(),
        prior_tokenizer=tokenizer,
        prior_text_encoder=encoder,
        prior_prior=randomize(prior, 611),
        prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )


def _unclip() -> DiffusionPipeline:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    tokenizer = tokenizers.clip()
    text_proj = UnCLIPTextProjModel(
        clip_embeddings_dim=_W, time_embed_dim=64, cross_attention_dim=_W, clip_extra_context_tokens=4
    )
    large = {
        "sample_size": 32,
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "in_channels": 6,
        "out_channels": 3,
    }
    return diffusers.UnCLIPPipeline(
        prior=parts.prior(),
        decoder=parts.added_kv_unet(
            in_channels=3,
            out_channels=6,
            class_embed_type="identity",
            encoder_hid_dim=None,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        ),
        text_encoder=encoders.clip_projected(tokenizer),
        tokenizer=tokenizer,
        text_proj=randomize(text_proj, 612),
        super_res_first=randomize(diffusers.UNet2DModel(**large), 613),
        super_res_last=randomize(diffusers.UNet2DModel(**large), 614),
        prior_scheduler=parts.prior_scheduler(num_train_timesteps=1000),
        decoder_scheduler=diffusers.UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        super_res_scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    )


def _stable_unclip() -> DiffusionPipeline:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    tokenizer = tokenizers.clip()
    unet = parts.unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * _W)
    return diffusers.StableUnCLIPPipeline(
        prior_tokenizer=tokenizer,
        prior_text_encoder=encoders.clip_projected(tokenizer),
        prior=parts.prior(),
        prior_scheduler=diffusers.DDPMScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=_W).eval(),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer,
        text_encoder=encoders.clip(tokenizer),
        unet=unet,
        scheduler=parts.ddim(),
        vae=vaes.kl(4, shift=None, scale=0.5),
    )


def _deepfloyd() -> DiffusionPipeline:
    tokenizer = tokenizers.t5(77)
    unet = parts.added_kv_unet(
        in_channels=3,
        out_channels=6,
        encoder_hid_dim=_W,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        act_fn="gelu",
    )
    return diffusers.IFPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.t5(tokenizer),
        unet=unet,
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def _shap_e() -> DiffusionPipeline:
    from diffusers.pipelines.shap_e import ShapERenderer

    tokenizer = tokenizers.clip()
    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=16,
        num_embeddings=32,
        embedding_proj_dim=_W,
        time_embed_dim=64,
        num_layers=1,
        clip_embed_dim=32,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=16,
        d_hidden=8,
        n_output=12,
        background=(0.1, 0.1, 0.1),
    )
    return diffusers.ShapEPipeline(
        prior=randomize(prior, 615),
        text_encoder=encoders.clip_projected(tokenizer),
        tokenizer=tokenizer,
        scheduler=diffusers.HeunDiscreteScheduler(
            beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True
        ),
        shap_e_renderer=randomize(renderer, 616),
    )


def _ldm() -> DiffusionPipeline:
    tokenizer = tokenizers.clip()
    return diffusers.LDMTextToImagePipeline(
        vqvae=vaes.kl(4, shift=None, scale=0.5),
        bert=encoders.clip(tokenizer),
        tokenizer=tokenizer,
        unet=parts.unet(),
        scheduler=parts.ddim(),
    )


_SIZE = {"height": 32, "width": 32, "guidance_scale": 4.0}


CASES = (
    Case(
        pipeline="StableCascadeCombinedPipeline",
        double=True,
        build=cascade,
        call={
            "height": 128,
            "width": 128,
            "prior_guidance_scale": 4.0,
            "decoder_guidance_scale": 4.0,
            "prior_num_inference_steps": 2,
        },
    ),
    Case(
        pipeline="WuerstchenCombinedPipeline",
        double=True,
        build=wuerstchen,
        call={
            "height": 128,
            "width": 128,
            "prior_guidance_scale": 4.0,
            "decoder_guidance_scale": 4.0,
            "prior_num_inference_steps": 2,
        },
    ),
    Case(
        pipeline="UnCLIPPipeline",
        build=_unclip,
        call={"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2},
        steps="",
        negative=False,
    ),
    Case(
        pipeline="StableUnCLIPPipeline",
        build=_stable_unclip,
        call={**_SIZE, "prior_num_inference_steps": 2},
    ),
    Case(
        pipeline="IFPipeline",
        double=True,
        build=_deepfloyd,
        call={"height": 16, "width": 16, "guidance_scale": 4.0, "clean_caption": False},
    ),
    Case(
        pipeline="ShapEPipeline",
        double=True,
        build=_shap_e,
        call={"guidance_scale": 4.0},
        negative=False,
        output_type="latent",
    ),
    Case(pipeline="LDMTextToImagePipeline", build=_ldm, call=_SIZE, negative=False),
)
