"""Stable Diffusion 3.5: both guidance branches in one batch, and a third call where layers are skipped."""

from __future__ import annotations

from denoised.spec.model_spec import Branch, ModelSpec

SPECS = (
    ModelSpec(
        pipeline="StableDiffusion3Pipeline",
        models=("Stable-Diffusion-3.5",),
        branches=(Branch(parameters=("skip_guidance_layers",)),),
        shared=frozenset({"skip_layers"}),
    ),
)
