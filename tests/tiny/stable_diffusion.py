"""Stable Diffusion 3.5 and XL. Guidance is one call with two branches in its batch; SD3 may add a third, alone."""

from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.row import NEGATIVE, Request, Row, varied
from tests.tiny.weights import randomize

_SKIP_LAYERS = {
    "skip_guidance_layers": [1, 2],
    "skip_layer_guidance_scale": 2.8,
    # A window inside the run: the first and the last step have no third branch.
    "skip_layer_guidance_start": 0.2,
    "skip_layer_guidance_stop": 0.7,
}


def _sd3() -> StableDiffusion3Pipeline:
    clip_tokenizer, t5_tokenizer = tokenizers.clip(), tokenizers.t5()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * encoders.WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * encoders.WIDTH,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=randomize(transformer, 31),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vaes.kl(4),
        text_encoder=encoders.clip_projected(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=encoders.clip_projected(clip_tokenizer, seed=2),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=encoders.t5(t5_tokenizer, width=2 * encoders.WIDTH),
        tokenizer_3=t5_tokenizer,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizer = tokenizers.clip()
    time_ids = 6  # original size, crop and target size, two numbers each
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=encoders.WIDTH + 8 * time_ids,
        cross_attention_dim=2 * encoders.WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=vaes.kl(4, shift=None, scale=0.5),
        text_encoder=encoders.clip(tokenizer),
        text_encoder_2=encoders.clip_projected(tokenizer, seed=2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=randomize(unet, 32),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",  # not the model's own "epsilon": untrained, its latents would grow
        ),
    )


def _sd3_unguided(i: int) -> Request:
    return varied(i, height=(32, 32, 48), width=(32, 32, 32)) | {"guidance_scale": 1.0, "max_sequence_length": 32}


def _sd3_request(i: int) -> Request:
    return _sd3_unguided(i) | {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}


def _sd3_skip_layer(i: int) -> Request:
    return _sd3_request(i) | {"num_inference_steps": (4, 3, 5)[i]} | _SKIP_LAYERS


def _sdxl_unguided(i: int) -> Request:
    return varied(i, height=(32, 32, 48), width=(32, 32, 32)) | {"guidance_scale": 1.0}


def _sdxl_request(i: int) -> Request:
    return _sdxl_unguided(i) | {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}


ROWS = (
    Row(name="sd3", build=_sd3, request=_sd3_request, unguided=_sd3_unguided, branches=2, batched=True),
    Row(
        name="sd3_skip_layer",
        build=_sd3,
        folder="sd3",
        request=_sd3_skip_layer,
        unguided=_sd3_unguided,
        branches=3,
        batched=True,
    ),
    Row(name="sdxl", build=_sdxl, request=_sdxl_request, unguided=_sdxl_unguided, branches=2, batched=True),
)
