"""Time and bytes of a layout, predicted: operations over speed, bytes over bandwidth, calls times latency.

What overlaps counts once: keys of a ring travel while attention computes, weights of HSDP while a block does. All
else is added. Not modelled: kernel launches, text encoders, uneven lengths, and ranks that wait for slower ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from denoised.runtime.planning.facts import Denoiser, ModelFacts, Work
from denoised.runtime.planning.hardware import Hardware
from denoised.runtime.planning.layout import Layout
from denoised.runtime.planning.memory import Memory, dealt, fullest_stage, held_bytes, memory, rows_of_a_rank, stages

# Every tensor rank sends and receives all but its own part of a sum twice: reduce-scatter, then all-gather.
ALL_REDUCE_TRIPS = 2
# A ring passes keys and values, of the four that Ulysses exchanges, and merges what it finds into the answer.
RING_SHARE, ANSWER_SHARE = 0.5, 0.25
# Queries, keys and values go in one exchange, the answer in another.
ULYSSES_CALLS = 2
# Counts, tokens, answers.
EXPERT_CALLS = 3
# Bytes read and written for each value that is merged, in float32 and without fused kernels.
MERGE_BYTES = 6 * 4
# Tiles overlap by a quarter along both sides, so that they decode more than the picture.
TILE_OVERLAP = (1 / 0.75) ** 2


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank sends over one axis in one step: bytes, calls, and the seconds that nothing hides."""

    bytes: float = 0.0
    calls: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a layout needs and does.

    step: seconds of one step of all rows in flight; total: of the whole request, without its text encoders.
    compute: seconds of a step in which the busiest rank computes. bubble: share of a step in which pipeline stages
    wait. traffic: by axis, and "hsdp". fits: the memory is there.
    """

    layout: Layout
    step: float
    total: float
    compute: float
    bubble: float
    traffic: dict[str, Traffic]
    memory: Memory
    room: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in one step."""
        return sum(part.bytes for part in self.traffic.values())

    @property
    def communication(self) -> float:
        """Seconds of a step that nothing hides."""
        return sum(part.seconds for part in self.traffic.values())


def predict(layout: Layout, model: ModelFacts, hardware: Hardware) -> Prediction:
    """What `layout` does with these requests on this hardware."""
    denoiser = model.denoisers[0]
    rows = rows_of_a_rank(layout, model)
    row = _stage_seconds(denoiser, layout, model, hardware)
    traffic = _traffic(layout, model, hardware, denoiser, rows=rows, compute=rows * row)
    compute = max(rows * row, _weights_seconds(denoiser, layout, model, hardware))
    bubble = waiting(rows, layout.pipeline, num_rounds(denoiser, layout))
    step = compute / (1 - bubble) + sum(part.seconds for part in traffic.values())
    return Prediction(
        layout=layout,
        step=step,
        total=step * model.num_steps + _decode_seconds(layout, model, hardware),
        compute=compute,
        bubble=bubble,
        traffic=traffic,
        memory=memory(layout, model),
        room=hardware.room(layout.num_ranks),
    )


def waiting(rows: int, num_stages: int, rounds: int = 1) -> float:
    """The share of a step in which a stage waits, if so many rows go so many rounds through stages of equal cost."""
    return 1 - rounds * rows / (rounds * max(rows, num_stages) + min(rows, num_stages) - 1)


def num_rounds(denoiser: Denoiser, layout: Layout) -> int:
    """Ranges of blocks that each stage has."""
    from denoised.features.pipeline.order import parts  # imports torch, which the command line does without

    if layout.pipeline == 1 or layout.hsdp:
        return 1
    return round(len(parts(dealt(denoiser, layout), denoiser.costs)) / layout.pipeline)


def _stage_seconds(denoiser: Denoiser, layout: Layout, model: ModelFacts, hardware: Hardware) -> float:
    """One row on the busiest stage; what is outside the blocks is computed on all."""
    heads = max(denoiser.heads, default=0)
    weight = hardware.attention_weight(layout.ring)
    slowest = max(_operations(stage, layout, heads, weight) for stage in stages(denoiser, layout))
    return (slowest + denoiser.rest.flops) / _speed(layout, model, hardware)


def _operations(stage: tuple[Work, ...], layout: Layout, heads: int, weight: float) -> float:
    """Of the busiest rank: of heads that do not divide, some ranks have one more than others. weight: of attention."""
    own = -(-heads // layout.tensor)
    excess = -(-own // layout.ulysses) * layout.ulysses / own if own else 1.0
    divided = layout.sequence * layout.tensor
    extra = excess * weight - 1
    return sum((block.token_flops + extra * block.attention_flops) / divided + block.once_flops for block in stage)


def _speed(layout: Layout, model: ModelFacts, hardware: Hardware) -> float:
    return hardware.speed(model.itemsize, layout.num_ranks, hardware.efficiency)


def _weights_seconds(denoiser: Denoiser, layout: Layout, model: ModelFacts, hardware: Hardware) -> float:
    """However few the tokens, a forward reads all weights of its rank once."""
    own = fullest_stage(denoiser, layout, model.itemsize)
    return (own + held_bytes(denoiser.rest, layout, model.itemsize)) / hardware.memory_bandwidth


def _decode_seconds(layout: Layout, model: ModelFacts, hardware: Hardware) -> float:
    speed = hardware.speed(model.itemsize, layout.num_ranks, hardware.conv_efficiency)
    overlap = TILE_OVERLAP if layout.vae_patch > 1 else 1.0
    return (model.decode_flops or 0.0) * overlap / layout.vae_patch / speed


def _traffic(
    layout: Layout, model: ModelFacts, hardware: Hardware, denoiser: Denoiser, *, rows: int, compute: float
) -> dict[str, Traffic]:
    """By axis. `compute`: seconds that a rank computes in the step, under which some of it hides."""
    work = sum(denoiser.blocks, Work())
    own = _Own(layout=layout, model=model, work=work, rest=denoiser.rest, width=denoiser.width, rows=rows)
    attention = work.attention_flops / max(work.flops + denoiser.rest.flops, 1.0) * compute
    hidden = {"ring": attention, "hsdp": compute} if hardware.overlaps else {}
    merged = {"ring": own.merged() / hardware.memory_bandwidth}
    unpacked = {"hsdp": own.unpacked() / hardware.memory_bandwidth}
    sent = {"ulysses": own.ulysses(), "ring": own.ring(), "tensor": own.tensor(), "hsdp": own.hsdp()}
    sent |= {"experts": own.experts(), "pipeline": own.pipeline(), "cfg": own.cfg()}
    return {
        axis: Traffic(
            bytes=size,
            calls=calls,
            seconds=merged.get(axis, 0.0)
            + max(
                0.0, _seconds(axis, size, calls, layout, hardware) + unpacked.get(axis, 0.0) - hidden.get(axis, 0.0)
            ),
        )
        for axis, (size, calls) in sent.items()
        if calls
    }


def _seconds(axis: str, size: float, calls: float, layout: Layout, hardware: Hardware) -> float:
    span = {"hsdp": layout.num_ranks, "experts": layout.span("ring")}.get(axis) or layout.span(axis)
    return size / hardware.bandwidth(span) + calls * hardware.latency


@dataclass(frozen=True, kw_only=True)
class _Own:
    """What one rank sends over each axis in one step: bytes and calls. work: of all blocks on one row."""

    layout: Layout
    model: ModelFacts
    work: Work
    rest: Work
    width: int
    rows: int

    @property
    def _forwards(self) -> int:
        """Rows are joined into one forward, unless stages of a pipeline take turns with them."""
        return self.rows if self.layout.pipeline > 1 else 1

    def _per_rank(self, values: float) -> float:
        """Bytes of a stage's share of values that the sequence divides."""
        return values / self.layout.pipeline / self.layout.sequence * self.model.itemsize * self.rows

    def _calls(self, per_forward: float) -> float:
        return per_forward / self.layout.pipeline * self._forwards

    def ulysses(self) -> tuple[float, float]:
        size = self.layout.ulysses
        if size == 1:
            return 0.0, 0.0
        moved = self._per_rank(self.work.exchanged / self.layout.tensor) * (size - 1) / size
        return moved + self._gather(), self._calls(ULYSSES_CALLS * self.work.num_attentions) + self._forwards

    def ring(self) -> tuple[float, float]:
        size = self.layout.ring
        if size == 1:
            return 0.0, 0.0
        moved = self._per_rank(self.work.exchanged * RING_SHARE / self.layout.tensor) * (size - 1)
        calls = self._calls((size - 1) * self.work.num_attentions) + self._forwards
        return moved + (self._gather() if self.layout.ulysses == 1 else 0.0), calls

    def merged(self) -> float:
        """Bytes that a ring's merging of partial answers moves in the rank's own memory."""
        values = self._per_rank(self.work.exchanged * ANSWER_SHARE / self.layout.tensor) / self.model.itemsize
        return (self.layout.ring - 1) * values * MERGE_BYTES

    def unpacked(self) -> float:
        """Bytes that are read and written in the rank's own memory to put each block's weights in place."""
        return 2 * self._gathered_weights() if self.layout.shards > 1 else 0.0

    def _gather(self) -> float:
        """The prediction's parts, gathered by every rank of the sequence."""
        return self.model.latent_values / self.layout.sequence * self.model.itemsize * self.rows

    def tensor(self) -> tuple[float, float]:
        size, work = self.layout.tensor, self.work
        if size == 1:
            return 0.0, 0.0
        sums, num_sums = work.reduced, work.num_reduces
        if self.layout.experts:  # one sum of each mixture's answers, instead of one for each expert
            sums += work.mixed - work.expert_reduced
            num_sums += work.num_mixtures - work.expert_reduces
        reduced = self._per_rank(sums) * ALL_REDUCE_TRIPS * (size - 1)
        values = work.gathered / self.layout.pipeline + self.rest.gathered
        gathered = values * self.model.itemsize * self.rows * (size - 1)
        calls = self._calls(num_sums + work.num_gathers) + self.rest.num_gathers * self._forwards
        return (reduced + gathered) / size, calls

    def experts(self) -> tuple[float, float]:
        """Tokens to the ranks of their experts and back; before, how many there are. Each sequence rank keeps its
        share, and of several tensor ranks each asks its own experts."""
        size = self.layout.sequence
        if size == 1 or not self.layout.experts:
            return 0.0, 0.0
        moved = 2 * self._per_rank(self.work.routed / self.layout.tensor) * (size - 1) / size
        return moved, self._calls(EXPERT_CALLS * self.work.num_mixtures)

    def pipeline(self) -> tuple[float, float]:
        """Hidden states at the end of each range of blocks, and the prediction to all stages."""
        if self.layout.pipeline == 1:
            return 0.0, 0.0
        rounds = num_rounds(self.model.denoisers[0], self.layout)
        tokens = (self.model.tokens.image + self.model.tokens.text) / self.layout.sequence
        values = rounds * tokens * self.width + self.model.latent_values
        return values * self.model.itemsize * self.rows, (rounds + 1.0) * self.rows

    def cfg(self) -> tuple[float, float]:
        if self.layout.cfg == 1:
            return 0.0, 0.0
        return float(self.model.latent_values * self.model.itemsize * self.rows), 1.0

    def hsdp(self) -> tuple[float, float]:
        """Every rank sends its part of each block's weights to all others, in each forward."""
        size = self.layout.shards
        if size == 1:
            return 0.0, 0.0
        calls = self._calls(len(self.model.denoisers[0].blocks)) + self._forwards
        return self._gathered_weights() * (size - 1) / size, calls

    def _gathered_weights(self) -> float:
        """Bytes of the blocks' weights, whole, in all forwards of a step."""
        blocks, rest = (held_bytes(work, self.layout, self.model.itemsize) for work in (self.work, self.rest))
        return (blocks / self.layout.pipeline + rest) * self._forwards
