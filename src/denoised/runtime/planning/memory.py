"""Bytes that one rank of a layout needs: weights by component, and what lives beside them while it computes."""

from __future__ import annotations

from dataclasses import dataclass

from denoised.runtime.planning.facts import Component, Denoiser, ModelFacts, Work
from denoised.runtime.planning.layout import Layout

# Values of a token that live at once between a block's layers, in widths of the stream: the stream itself, what is
# added to it, the normalized copy, queries, keys, values, the answer, and one more where layouts are changed.
LIVE_WIDTHS = 8
# Blocks that HSDP holds whole at once: the one that computes and the one that is fetched meanwhile.
GATHERED_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank. weights: by component. working: the larger of what the denoiser and the VAE need."""

    weights: dict[str, float]
    working: float

    @property
    def total(self) -> float:
        return sum(self.weights.values()) + self.working


def memory(layout: Layout, model: ModelFacts) -> Memory:
    """What the fullest rank needs."""
    denoisers = {denoiser.name: denoiser for denoiser in model.denoisers}
    weights = {part.name: _weights(part, denoisers.get(part.name), layout, model) for part in model.components}
    return Memory(weights=weights, working=max(_denoising(layout, model), _decoding(layout, model)))


def _weights(part: Component, denoiser: Denoiser | None, layout: Layout, model: ModelFacts) -> float:
    sharded = layout.shards if part.role in ("denoiser", "encoder") else 1
    if denoiser is not None:
        fullest = fullest_stage(denoiser, layout, model.itemsize)
        return (held_bytes(denoiser.rest, layout, model.itemsize) + fullest) / sharded
    whole = part.num_params * model.itemsize - part.saved
    return whole / (layout.text_encoder_tp if part.role == "encoder" else 1) / sharded


def held_bytes(work: Work, layout: Layout, itemsize: int) -> float:
    """Of the weights of some layers on one rank, before HSDP."""
    return held(work, layout) * itemsize - _saved(work, layout)


def _saved(work: Work, layout: Layout) -> float:
    """Of them, what quantization takes off. Experts that are dealt are dealt as they are stored."""
    if not layout.experts:
        return work.cut_saved / layout.tensor + work.whole_saved
    dealt = work.expert_saved / (layout.tensor * layout.sequence)
    return (work.cut_saved - work.expert_saved) / layout.tensor + work.whole_saved + dealt


def held(work: Work, layout: Layout) -> float:
    """Values of the weights of some layers on one rank, before HSDP."""
    if not layout.experts:
        return work.divisible_params / layout.tensor + work.whole_params
    dealt = (work.cut_experts + work.whole_experts) / (layout.tensor * layout.sequence)
    cut = (work.divisible_params - work.cut_experts) / layout.tensor
    return cut + work.whole_params - work.whole_experts + dealt


def stages(denoiser: Denoiser, layout: Layout) -> list[tuple[Work, ...]]:
    """The blocks of each stage, as the engine deals them."""
    if layout.pipeline == 1:
        return [denoiser.blocks]
    owners = dealt(denoiser, layout)
    return [
        tuple(block for block, owner in zip(denoiser.blocks, owners, strict=True) if owner == stage)
        for stage in range(layout.pipeline)
    ]


def dealt(denoiser: Denoiser, layout: Layout) -> tuple[int, ...]:
    """The stage of each block."""
    from denoised.features.pipeline import MAX_ROUNDS, deal  # these import torch, which the command line does without

    return deal(denoiser.costs, layout.pipeline, 1 if layout.hsdp else MAX_ROUNDS)


def fullest_stage(denoiser: Denoiser, layout: Layout, itemsize: int) -> float:
    """Bytes of the stage whose weights are most."""
    cut = stages(denoiser, layout)
    return max(sum(held_bytes(block, layout, itemsize) for block in stage) for stage in cut)


def rows_of_a_rank(layout: Layout, model: ModelFacts) -> int:
    """Rows that the busiest rank of the cfg axis has."""
    return -(-model.num_rows // layout.cfg)


def _denoising(layout: Layout, model: ModelFacts) -> float:
    """The denoiser's, for all rows of a rank joined; stages of a pipeline take them one by one."""
    rows = 1 if layout.pipeline > 1 else rows_of_a_rank(layout, model)
    return max(rows * _row(layout, model, d) + _gathered(layout, model, d) for d in model.denoisers)


def _row(layout: Layout, model: ModelFacts, denoiser: Denoiser) -> float:
    if denoiser.live:
        return denoiser.live * model.itemsize
    tokens = (model.tokens.image + model.tokens.text) / layout.sequence
    widest = denoiser.work.widest / layout.tensor
    return tokens * (LIVE_WIDTHS * denoiser.width + 2 * widest) * model.itemsize


def _gathered(layout: Layout, model: ModelFacts, denoiser: Denoiser) -> float:
    if not layout.hsdp:
        return 0.0
    largest = max((held_bytes(block, layout, model.itemsize) for block in denoiser.blocks), default=0.0)
    return GATHERED_BLOCKS * largest


def _decoding(layout: Layout, model: ModelFacts) -> float:
    return (model.decode_bytes or 0.0) / layout.vae_patch
