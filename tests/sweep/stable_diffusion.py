"""Stable Diffusion 1 and 2, XL and 3, and the many classes on their components."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline, LCMScheduler, MotionAdapter

from tests.sweep import parts
from tests.sweep.case import Case
from tests.tiny import ROWS, encoders, tokenizers, vaes
from tests.tiny.weights import randomize

_SIZE = {"height": 32, "width": 32}
_GUIDED = {**_SIZE, "guidance_scale": 5.0}
_CHECKERS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _sd_parts(**unet: Any) -> dict[str, Any]:
    tokenizer = tokenizers.clip()
    return {
        "vae": vaes.kl(4, shift=None, scale=0.5),
        "text_encoder": encoders.clip(tokenizer),
        "tokenizer": tokenizer,
        "unet": parts.unet(**unet),
        "scheduler": parts.ddim(),
    }


def _sd(name: str, **more: Any) -> DiffusionPipeline:
    return getattr(diffusers, name)(**_sd_parts() | _CHECKERS | more)


def _sag() -> DiffusionPipeline:
    """It takes the number of heads from a configuration that has one for all stages."""
    return _sd("StableDiffusionSAGPipeline", unet=parts.unet(attention_head_dim=4))


def _paradigms() -> DiffusionPipeline:
    scheduler = diffusers.DDIMParallelScheduler(prediction_type="v_prediction", clip_sample=False)
    return _sd("StableDiffusionParadigmsPipeline", scheduler=scheduler)


def _lcm() -> DiffusionPipeline:
    components = _sd_parts(time_cond_proj_dim=16) | _CHECKERS
    return diffusers.LatentConsistencyModelPipeline(
        **components | {"scheduler": LCMScheduler(prediction_type="v_prediction")}
    )


def _ldm3d() -> DiffusionPipeline:
    vae = diffusers.AutoencoderKL(
        in_channels=6,
        out_channels=6,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    return _sd("StableDiffusionLDM3DPipeline", vae=randomize(vae, 203), image_encoder=None)


def _sdxl(name: str, **more: Any) -> DiffusionPipeline:
    components = ROWS["sdxl"].build().components
    return getattr(diffusers, name)(**{k: v for k, v in components.items() if v is not None} | more)


def _adapter() -> MotionAdapter:
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        use_motion_mid_block=True,
    )
    return randomize(adapter, 204)


def _animate(name: str, **more: Any) -> DiffusionPipeline:
    return getattr(diffusers, name)(**_sd_parts(), motion_adapter=_adapter(), **more)


def _animate_xl() -> DiffusionPipeline:
    adapter = MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    return _sdxl("AnimateDiffSDXLPipeline", motion_adapter=randomize(adapter, 205))


def _sd3_pag() -> DiffusionPipeline:
    components = {k: v for k, v in ROWS["sd3"].build().components.items() if v is not None}
    return diffusers.StableDiffusion3PAGPipeline(**components, pag_applied_layers=["blocks.2"])


def _gligen() -> DiffusionPipeline:
    gated = _sd_parts(attention_type="gated")
    return diffusers.StableDiffusionGLIGENPipeline(**gated | _CHECKERS)


_CLIP = {**_GUIDED, "num_frames": 4}

CASES = (
    Case(pipeline="StableDiffusionPipeline", build=lambda: _sd("StableDiffusionPipeline"), call=_GUIDED),
    Case(
        pipeline="StableDiffusionPAGPipeline",
        build=lambda: _sd("StableDiffusionPAGPipeline", pag_applied_layers=["mid"]),
        call=_GUIDED,
        branches=3,
        whole=parts.PAG,
    ),
    Case(pipeline="StableDiffusionSAGPipeline", build=_sag, call=_GUIDED),
    Case(
        pipeline="StableDiffusionPanoramaPipeline", build=lambda: _sd("StableDiffusionPanoramaPipeline"), call=_GUIDED
    ),
    Case(
        pipeline="StableDiffusionAttendAndExcitePipeline",
        build=lambda: _sd("StableDiffusionAttendAndExcitePipeline"),
        call={**_GUIDED, "token_indices": [2], "attn_res": (8, 8), "max_iter_to_alter": 1, "thresholds": {0: 0.1}},
    ),
    Case(
        pipeline="SemanticStableDiffusionPipeline", build=lambda: _sd("SemanticStableDiffusionPipeline"), call=_GUIDED
    ),
    Case(
        pipeline="StableDiffusionModelEditingPipeline",
        build=lambda: _sd("StableDiffusionModelEditingPipeline"),
        call=_GUIDED,
    ),
    Case(pipeline="StableDiffusionParadigmsPipeline", build=_paradigms, call=_GUIDED),
    Case(pipeline="StableDiffusionLDM3DPipeline", build=_ldm3d, call=_GUIDED),
    Case(
        pipeline="StableDiffusionGLIGENPipeline",
        build=_gligen,
        call={**_GUIDED, "gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
    ),
    Case(pipeline="LatentConsistencyModelPipeline", build=_lcm, call={**_SIZE, "guidance_scale": 4.0}, branches=1),
    Case(
        pipeline="StableDiffusionXLPAGPipeline",
        build=lambda: _sdxl("StableDiffusionXLPAGPipeline", pag_applied_layers=["mid"]),
        call=_GUIDED,
        branches=3,
        whole=parts.PAG,
    ),
    Case(
        pipeline="StableDiffusion3PAGPipeline",
        build=_sd3_pag,
        call={**_GUIDED, "max_sequence_length": 32},
        branches=3,
        whole=parts.PAG,
    ),
    Case(pipeline="AnimateDiffPipeline", build=lambda: _animate("AnimateDiffPipeline"), call=_CLIP, kind="video"),
    Case(
        pipeline="AnimateDiffPAGPipeline",
        build=lambda: _animate("AnimateDiffPAGPipeline", pag_applied_layers=["mid.*"]),
        call=_CLIP,
        branches=3,
        whole=parts.PAG,
        kind="video",
    ),
    Case(pipeline="AnimateDiffSDXLPipeline", build=_animate_xl, call=_CLIP, kind="video"),
    Case(
        pipeline="TextToVideoZeroPipeline",
        build=lambda: _sd("TextToVideoZeroPipeline"),
        call={**_GUIDED, "video_length": 3, "t0": 0, "t1": 1},
        kind="video",
    ),
    Case(
        pipeline="TextToVideoZeroSDXLPipeline",
        build=lambda: _sdxl("TextToVideoZeroSDXLPipeline", scheduler=parts.ddim()),
        call={**_GUIDED, "video_length": 3, "t0": 0, "t1": 1},
        kind="video",
    ),
)
