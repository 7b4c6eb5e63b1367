"""All declared specs. A new family is a file in this folder and a line here."""

from __future__ import annotations

from denoised.spec import (
    allegro,
    animatediff,
    attention_maps,
    cosmos,
    ernie,
    flux,
    glm,
    helios,
    hidream,
    hunyuan_video,
    longcat,
    ltx2,
    ovis,
    qwen_image,
    stable_audio,
    stable_diffusion_3,
    wan,
    z_image,
)
from denoised.spec.model_spec import ModelSpec

ALL: tuple[ModelSpec, ...] = (
    *allegro.SPECS,
    *animatediff.SPECS,
    *attention_maps.SPECS,
    *cosmos.SPECS,
    *ernie.SPECS,
    *flux.SPECS,
    *glm.SPECS,
    *helios.SPECS,
    *hidream.SPECS,
    *hunyuan_video.SPECS,
    *longcat.SPECS,
    *ltx2.SPECS,
    *ovis.SPECS,
    *qwen_image.SPECS,
    *stable_audio.SPECS,
    *stable_diffusion_3.SPECS,
    *wan.SPECS,
    *z_image.SPECS,
)
