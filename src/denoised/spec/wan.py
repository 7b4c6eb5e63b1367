"""Wan: one or two experts, one call a guidance branch. VACE makes hints of a control video before the main blocks."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(pipeline="WanPipeline", models=("Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B"), kind="video"),
    ModelSpec(pipeline="WanImageToVideoPipeline", models=("Wan2.2-I2V-A14B",), kind="video", needs_image=True),
    ModelSpec(
        pipeline="WanVACEPipeline",
        models=("Wan2.1-VACE",),
        kind="video",
        shared=frozenset({"control_hidden_states_scale"}),  # one factor a hint, not a row
        stacks=("vace_blocks", "blocks"),
        uncached=("vace_blocks",),  # each gives a hint for a main block
    ),
)
