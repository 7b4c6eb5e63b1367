"""All cases, by class."""

from __future__ import annotations

from tests.sweep import (
    audio,
    audio_mel,
    images,
    images_llm,
    images_recent,
    kandinsky,
    stable_diffusion,
    stages,
    videos,
    videos_llm,
)
from tests.sweep.case import Case, of_row
from tests.tiny import ROWS

# Which checkpoint of `tests.tiny` stands for a class.
_OF_ROWS = {
    "QwenImagePipeline": "qwen_image",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLPipeline": "sdxl",
    "FluxPipeline": "flux_true_cfg",
    "FluxKontextPipeline": "flux_kontext",
    "Flux2Pipeline": "flux2_dev",
    "Flux2KleinPipeline": "flux2_klein",
    "WanPipeline": "wan22_t2v",
    "WanVACEPipeline": "wan21_vace",
    "ZImagePipeline": "z_image",
    "LongCatImagePipeline": "longcat_image",
    "OvisImagePipeline": "ovis_image",
    "ErnieImagePipeline": "ernie_image",
    "HiDreamImagePipeline": "hidream_i1",
    "GlmImagePipeline": "glm_image",
    "HunyuanVideo15Pipeline": "hunyuan_video15_t2v",
    "LTX2Pipeline": "ltx2",
    "HeliosPipeline": "helios",
    "HeliosPyramidPipeline": "helios_pyramid",
    "Cosmos3OmniPipeline": "cosmos3_image",
    "StableAudioPipeline": "stable_audio",
    "SanaPipeline": "sana",
    "LTXPipeline": "ltx",
    "PixArtSigmaPipeline": "pixart_sigma",
}
_FAMILIES = (
    stable_diffusion,
    images,
    images_llm,
    images_recent,
    videos,
    videos_llm,
    audio,
    audio_mel,
    kandinsky,
    stages,
)

CASES: dict[str, Case] = {
    case.pipeline: case
    for case in (
        *(of_row(ROWS[row], pipeline) for pipeline, row in _OF_ROWS.items()),
        *(case for family in _FAMILIES for case in family.CASES),
    )
}
