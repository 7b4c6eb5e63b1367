"""How ranks are laid out, and which layouts a model admits. What they cost is `prediction.py`'s business."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import InvalidConfigError
from denoised.rules import validate
from denoised.runtime.came_quantized import cut_problem
from denoised.runtime.planning.facts import Component, Denoiser, ModelFacts

# Axis of the mesh to the field of the configuration, outermost first.
FIELDS = {
    "cfg": "cfg_parallel_size",
    "pipeline": "pipeline_parallel_size",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
    "tensor": "tensor_parallel_size",
}
FLAGS = {"cfg": "--cfg-parallel-size", "pipeline": "--pipeline-parallel-size", "ring": "--ring", "ulysses": "--usp"}
FLAGS |= {"tensor": "--tensor-parallel-size"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh's axes, and what is laid over them.

    hsdp: weights are sharded over the ranks that would hold equal ones, which keep `copies` of them.
    experts: experts are dealt whole to the ranks of the tensor and sequence axes.
    uneven: head counts and lengths that do not divide are allowed (ulysses_mode="advanced_uaa").
    """

    cfg: int = 1
    pipeline: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    hsdp: bool = False
    copies: int = 1
    experts: bool = False
    vae_patch: int = 1
    text_encoder_tp: int = 1
    uneven: bool = False

    @property
    def num_ranks(self) -> int:
        return self.cfg * self.pipeline * self.sequence * self.tensor

    @property
    def sequence(self) -> int:
        return self.ring * self.ulysses

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the weights of a stage."""
        return self.cfg * self.sequence // self.copies if self.hsdp else 1

    def span(self, axis: str) -> int:
        """Neighbouring ranks that a group of this axis reaches over."""
        inner = list(FIELDS)[list(FIELDS).index(axis) :]
        span = 1
        for name in inner:
            span *= getattr(self, name)
        return span

    def config(self) -> DiffusionParallelConfig:
        """The configuration that asks for this layout."""
        sizes = {field: getattr(self, axis) for axis, field in FIELDS.items()}
        mode = "advanced_uaa" if self.uneven else "strict"
        return DiffusionParallelConfig(
            **sizes,
            use_hsdp=self.hsdp,
            hsdp_replicate_size=self.copies,
            enable_expert_parallel=self.experts,
            vae_patch_parallel_size=self.vae_patch,
            text_encoder_tp_size=self.text_encoder_tp,
            ulysses_mode=mode,
        )

    def name(self) -> str:
        """In words, short: cfg 2 x ulysses 4, hsdp."""
        axes = [f"{axis} {getattr(self, axis)}" for axis in FIELDS if getattr(self, axis) > 1]
        words = [" x ".join(axes) or "one rank"] + ["hsdp"] * self.hsdp
        words += ["experts dealt"] * self.experts
        words += [f"vae patches {self.vae_patch}"] * (self.vae_patch > 1)
        words += [f"text encoders {self.text_encoder_tp}"] * (self.text_encoder_tp > 1)
        return ", ".join(words)

    def flags(self) -> str:
        """The same on the command line."""
        words = [f"{flag} {getattr(self, axis)}" for axis, flag in FLAGS.items() if getattr(self, axis) > 1]
        words += ["--ulysses-mode advanced_uaa"] if self.uneven else []
        words += ["--enable-expert-parallel"] if self.experts else []
        words += ["--use-hsdp"] if self.hsdp else []
        words += [f"--hsdp-replicate-size {self.copies}"] if self.copies > 1 else []
        words += [f"--vae-patch-parallel-size {self.vae_patch}"] if self.vae_patch > 1 else []
        words += [f"--text-encoder-tp-size {self.text_encoder_tp}"] if self.text_encoder_tp > 1 else []
        return " ".join(words) or "(no flags)"


def of_config(config: DiffusionParallelConfig) -> Layout:
    """The layout of one replica of a configuration."""
    return Layout(
        **{axis: getattr(config, field) for axis, field in FIELDS.items()},
        hsdp=config.use_hsdp,
        copies=_copies(config),
        experts=config.enable_expert_parallel,
        vae_patch=config.vae_patch_parallel_size,
        text_encoder_tp=config.text_encoder_tp_size,
        uneven=config.ulysses_mode == "advanced_uaa",
    )


def _copies(config: DiffusionParallelConfig) -> int:
    """As many as are asked for, by number or by the size of one."""
    shards = config.hsdp_shard_size
    return config.hsdp_replicate_size if shards == -1 else config.num_weight_copies // shards


def admissible(model: ModelFacts, num_ranks: int) -> Iterator[Layout]:
    """All layouts of this many ranks that the engine would start."""
    for cfg, pipeline, ring, ulysses, tensor in _products(num_ranks, len(FIELDS)):
        base = Layout(cfg=cfg, pipeline=pipeline, ring=ring, ulysses=ulysses, tensor=tensor)
        base = replace(base, uneven=base.sequence > 1 and not _is_even(base, model))
        yield from (layout for layout in _overlays(base, model) if problem(layout, model) is None)


def _is_even(layout: Layout, model: ModelFacts) -> bool:
    """Whether lengths and heads divide, whatever the prompt."""
    known = all(denoiser.limits.fixed_lengths for denoiser in model.denoisers)
    heads = all(layout.ulysses * layout.tensor in denoiser.limits.ulysses for denoiser in model.denoisers)
    return known and heads and model.tokens.image % layout.sequence == 0


def _overlays(base: Layout, model: ModelFacts) -> Iterator[Layout]:
    """A layout with and without what may lie over it; what acts on a whole request is taken where it can act."""
    vae = base.num_ranks if model.vae_refusal is None else 1
    text = sorted({1, *_encoder_degrees(base, model)})
    experts = {False, any(denoiser.limits.num_experts for denoiser in model.denoisers)}
    for hsdp, dealt, patches, degree in itertools.product((False, True), sorted(experts), sorted({1, vae}), text):
        yield replace(base, hsdp=hsdp, experts=dealt, vae_patch=patches, text_encoder_tp=degree)


def _encoder_degrees(base: Layout, model: ModelFacts) -> list[int]:
    """The largest degree that the ranks and all text encoders admit."""
    encoders = [part for part in model.components if part.role == "encoder"]
    degrees = [d for d in range(2, base.num_ranks + 1) if base.num_ranks % d == 0]
    good = [d for d in degrees if encoders and all(d in part.degrees for part in encoders)]
    return good[-1:]


def _products(total: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    if num_factors == 1:
        yield (total,)
        return
    for first in (d for d in range(1, total + 1) if total % d == 0):
        yield from ((first, *rest) for rest in _products(total // first, num_factors - 1))


def problem(layout: Layout, model: ModelFacts) -> str | None:
    """Why the engine would refuse this layout: one sentence, or None."""
    if layout.num_ranks == 1 and layout == Layout():
        return None
    problems = (_problem_of(layout, denoiser) for denoiser in model.denoisers)
    return (
        _refused_by_table(layout, model)
        or _came_problem(layout, model)
        or next(filter(None, problems), None)
        or _kernel_problem(layout, model)
        or _other_problem(layout, model)
    )


def idle(layout: Layout, model: ModelFacts) -> bool:
    """Whether some ranks have no row of these requests."""
    return layout.cfg > model.num_rows


def _refused_by_table(layout: Layout, model: ModelFacts) -> str | None:
    try:
        validate(EngineConfig(parallel_config=layout.config(), quantization=dict(model.methods) or None))
    except InvalidConfigError as error:
        return str(error)
    return None


def _came_problem(layout: Layout, model: ModelFacts) -> str | None:
    """Of weights that come quantized."""
    came, parallel = [part for part in model.components if part.came], layout.config()
    problems = (
        cut_problem(part.name, parallel, is_denoiser=part.role == "denoiser", is_encoder=part.role == "encoder")
        for part in came
    )
    return next(filter(None, problems), None)


def _kernel_problem(layout: Layout, model: ModelFacts) -> str | None:
    if layout.ring == 1 or not model.kernels:
        return None
    from denoised.features.attention_backend import ring_problem  # imports torch: not before it is needed

    problems = (ring_problem(name, model.device, layout.ring) for name in model.kernels)
    return next(filter(None, problems), None)


def _problem_of(layout: Layout, denoiser: Denoiser) -> str | None:
    limits = denoiser.limits
    return (
        (_expert_problem(layout, denoiser) if layout.experts else None)
        or (_tensor_problem(layout, denoiser) if layout.tensor > 1 else None)
        or (_stage_problem(layout, denoiser) if layout.pipeline > 1 else None)
        or (limits.hsdp if layout.hsdp else None)
        or (_sequence_problem(layout, denoiser) if layout.sequence > 1 else None)
    )


def _expert_problem(layout: Layout, denoiser: Denoiser) -> str | None:
    limits, ranks = denoiser.limits, layout.tensor * layout.sequence
    refusal = limits.spread_experts if layout.sequence > 1 else limits.experts
    if refusal is None and ranks > limits.num_experts:
        return (
            f"enable_expert_parallel=True: {denoiser.class_name} has {limits.num_experts} experts a block for {ranks} "
            f"ranks; make tensor_parallel_size x ulysses_degree x ring_degree at most {limits.num_experts}."
        )
    return refusal


def _tensor_problem(layout: Layout, denoiser: Denoiser) -> str | None:
    limits = denoiser.limits
    degrees = limits.tensor_beside_experts if layout.experts else limits.tensor
    if layout.tensor in degrees:
        return None
    return (
        f"tensor_parallel_size={layout.tensor} does not divide {denoiser.class_name}; use one of {_listed(degrees)}."
    )


def _stage_problem(layout: Layout, denoiser: Denoiser) -> str | None:
    name, most = denoiser.class_name, denoiser.limits.num_blocks
    if layout.pipeline <= most:
        return None
    if not most:
        return f"pipeline_parallel_size={layout.pipeline}: {name} has no list of blocks to cut; leave it at 1."
    return f"pipeline_parallel_size={layout.pipeline} is more than the {most} blocks of {name}; use at most {most}."


def _sequence_problem(layout: Layout, denoiser: Denoiser) -> str | None:
    limits, name = denoiser.limits, denoiser.class_name
    if limits.sequence is not None:
        return limits.sequence
    if layout.uneven or layout.ulysses * layout.tensor in limits.ulysses:
        return None
    good = tuple(n // layout.tensor for n in limits.ulysses if n % layout.tensor == 0)
    return (
        f"ulysses_degree={layout.ulysses} does not divide the heads that a rank has of {name}; use one of "
        f"{_listed(good)}, or ulysses_mode=advanced_uaa."
    )


def _listed(degrees: Iterable[int]) -> str:
    return ", ".join(map(str, degrees))


def _other_problem(layout: Layout, model: ModelFacts) -> str | None:
    encoders = [part for part in model.components if part.role == "encoder"]
    if layout.text_encoder_tp > 1 and not encoders:
        return f"text_encoder_tp_size={layout.text_encoder_tp}: {model.pipeline} has no text encoder; leave it at 1."
    if layout.vae_patch > 1 and model.vae_refusal is not None:
        return f"vae_patch_parallel_size={layout.vae_patch} cannot be: {model.vae_refusal}"
    return next(filter(None, (_encoder_problem(layout, part) for part in encoders)), None)


def _encoder_problem(layout: Layout, part: Component) -> str | None:
    if layout.hsdp and part.hsdp is not None:
        return part.hsdp
    if layout.text_encoder_tp == 1 or layout.text_encoder_tp in part.degrees:
        return None
    return (
        f"text_encoder_tp_size={layout.text_encoder_tp} does not divide {part.name} ({part.class_name}); use one of "
        f"{_listed(part.degrees)}."
    )


assert {*FIELDS.values()} <= {f.name for f in fields(DiffusionParallelConfig)}
