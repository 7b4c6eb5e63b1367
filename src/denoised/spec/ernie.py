"""ERNIE-Image: both guidance branches in one batch, texts padded to the longer one with their lengths beside them."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (ModelSpec(pipeline="ErnieImagePipeline", models=("ERNIE-Image",), padded={"text_bth": ""}),)
