"""HiDream-I1: both guidance branches in one batch; hidden states of all Llama layers are stacked before the rows."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(
        pipeline="HiDreamImagePipeline",
        models=("HiDream-I1-Full",),
        row_dims={"encoder_hidden_states_llama3": 1},
        stacks=("double_stream_blocks", "single_stream_blocks"),  # the list of text projections is none
    ),
)
