"""What a plan knows of a model: sizes and operations, for one request. Plain numbers; no torch, no modules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from denoised.spec.model_spec import Kind

Role = Literal["denoiser", "encoder", "vae", "other"]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of the pipeline. degrees: ranks that can share its matrices, of a text encoder. hsdp: why its weights
    cannot be sharded. saved: bytes that quantization takes off. came: whether its weights come quantized."""

    name: str
    class_name: str
    role: Role
    num_params: int
    degrees: tuple[int, ...] = ()
    hsdp: str | None = None
    saved: float = 0.0
    came: bool = False


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Lengths of the sequences of one row.

    image: of what is made, input pictures included. text: of the prompt. once: how often what is computed from
    the timestep is computed: 1, or for every image token. audio: of sound that is made beside a video.
    """

    image: int
    text: int
    once: int = 1
    audio: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and exchanges of some layers on one row. Sums with `+`.

    divisible_params, whole_params: weights that tensor parallelism divides, and those that it copies.
    token_flops: what sequence and tensor parallelism divide; attention_flops is the part of it inside attention.
    once_flops: what all ranks of the tensor and sequence axes compute: from the timestep, and what is not divided.
    reduced, num_reduces: values summed over tensor ranks, and in how many calls. gathered, num_gathers: likewise those
        that are put together from the ranks' parts.
    exchanged, num_attentions: queries, keys, values and answers of all self-attentions, in values: what Ulysses moves.
    cut_experts, whole_experts: of divisible_params and whole_params, those of experts. expert_reduced, expert_reduces:
        likewise of reduced and num_reduces. mixed: values that mixtures of experts give; num_mixtures: how many there
        are. routed: values that go to experts.
    cut_saved, whole_saved, expert_saved: bytes that quantization takes off divisible_params, off whole_params (below
        zero where scales are copied), and off cut_experts, which is a part of the first.
    widest: the most values of a token inside a layer.
    """

    divisible_params: int = 0
    whole_params: int = 0
    token_flops: float = 0
    attention_flops: float = 0
    once_flops: float = 0
    reduced: float = 0
    num_reduces: int = 0
    gathered: float = 0
    num_gathers: int = 0
    exchanged: float = 0
    num_attentions: int = 0
    cut_experts: int = 0
    whole_experts: int = 0
    expert_reduced: float = 0
    expert_reduces: int = 0
    mixed: float = 0
    num_mixtures: int = 0
    routed: float = 0
    cut_saved: float = 0
    whole_saved: float = 0
    expert_saved: float = 0
    widest: int = 0

    @property
    def params(self) -> int:
        return self.divisible_params + self.whole_params

    @property
    def flops(self) -> float:
        return self.token_flops + self.once_flops

    def __add__(self, other: Work) -> Work:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        return Work(**sums, widest=max(self.widest, other.widest))


_SUMMED = tuple(name for name in Work.__dataclass_fields__ if name != "widest")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the features accept of one denoiser: degrees, and refusals in their own words (None: accepted).

    tensor, tensor_beside_experts: degrees; the latter where experts are dealt whole.
    experts, spread_experts: why experts cannot be dealt to tensor ranks, and to sequence ranks.
    sequence: why its sequence cannot be spread. ulysses: degrees (times the tensor axis) that deal heads evenly.
    fixed_lengths: the sequence that is cut is the picture's alone, so that its length is known.
    hsdp: why its weights cannot be sharded.
    """

    num_blocks: int
    tensor: tuple[int, ...]
    tensor_beside_experts: tuple[int, ...]
    num_experts: int
    experts: str | None
    spread_experts: str | None
    sequence: str | None
    ulysses: tuple[int, ...]
    fixed_lengths: bool
    hsdp: str | None


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A denoiser: its blocks in order of execution, and the rest, which every rank holds and computes.

    heads: of its attentions; several numbers where they differ. width: values of one token between blocks.
    live: bytes that live at once in a row's forward, where it was traced (a UNet); 0: estimated from tokens.
    """

    name: str
    class_name: str
    blocks: tuple[Work, ...]
    rest: Work
    heads: frozenset[int]
    width: int
    limits: Limits
    live: float = 0.0

    @cached_property
    def work(self) -> Work:
        return sum(self.blocks, self.rest)

    @cached_property
    def costs(self) -> tuple[float, ...]:
        """Operations of each block on one row; weights, if some block has no layer whose operations are known."""
        operations = tuple(block.flops for block in self.blocks)
        return operations if all(operations) else tuple(float(block.params) for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model and a request for it.

    itemsize, dtype: of a weight, in bytes and by name. num_rows: guidance branches x requests in flight.
    latent_values: of one prediction.
    decode_flops, decode_bytes: of the VAE on one output; None where it could not be traced.
    vae_refusal: why tiles of the VAE cannot be dealt; None: they can.
    device: kind of device, cpu or cuda. methods: component to method of quantization.
    kernels: names of attention kernels that are asked for.
    """

    model: str
    pipeline: str
    kind: Kind
    itemsize: int
    components: tuple[Component, ...]
    denoisers: tuple[Denoiser, ...]
    tokens: Tokens
    num_rows: int
    num_steps: int
    size: tuple[int, ...]
    latent_values: int
    decode_flops: float | None
    decode_bytes: float | None
    vae_refusal: str | None
    dtype: str = "bfloat16"
    device: str = "cpu"
    methods: tuple[tuple[str, str], ...] = ()
    kernels: tuple[str, ...] = ()

    @property
    def flops_per_row(self) -> float:
        """Of one denoiser call with one row; experts take turns, so that one is enough."""
        return self.denoisers[0].work.flops

    def bytes_of(self, name: str) -> float:
        part = next(part for part in self.components if part.name == name)
        return part.num_params * self.itemsize - part.saved
