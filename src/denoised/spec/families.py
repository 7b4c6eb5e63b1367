"""All declared specs. A new family is a file in this folder and a line here."""

from __future__ import annotations

from denoised.spec import flux, longcat, ovis, qwen_image, stable_audio, stable_diffusion_3, wan, z_image
from denoised.spec.model_spec import ModelSpec

ALL: tuple[ModelSpec, ...] = (
    *flux.SPECS,
    *longcat.SPECS,
    *ovis.SPECS,
    *qwen_image.SPECS,
    *stable_audio.SPECS,
    *stable_diffusion_3.SPECS,
    *wan.SPECS,
    *z_image.SPECS,
)
