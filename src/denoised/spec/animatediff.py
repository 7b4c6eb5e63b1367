"""AnimateDiff: both guidance branches in one batch, the text once for each frame of each of them."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = tuple(
    ModelSpec(pipeline=name, kind="video", row_folds=frozenset({"encoder_hidden_states"}))
    for name in ("AnimateDiffPipeline", "AnimateDiffSDXLPipeline")
)
