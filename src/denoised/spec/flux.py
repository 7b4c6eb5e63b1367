"""FLUX.1 and FLUX.2. FLUX.1 position ids have no batch dimension; FLUX.2's have one."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

_IDS = frozenset({"img_ids", "txt_ids"})

SPECS = (
    ModelSpec(pipeline="FluxPipeline", packing=2, models=("FLUX.1-dev", "FLUX.1-schnell"), shared=_IDS),
    ModelSpec(pipeline="FluxKontextPipeline", packing=2, models=("FLUX.1-Kontext-dev",), shared=_IDS),
    ModelSpec(pipeline="Flux2Pipeline", packing=2, models=("FLUX.2-dev",)),
    ModelSpec(pipeline="Flux2KleinPipeline", packing=2, models=("FLUX.2-klein",)),
)
