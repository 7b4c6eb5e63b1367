"""How ranks are laid out, and which layouts a model admits. What they cost is `prediction.py`'s business."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from denoised.config import DiffusionParallelConfig
from denoised.runtime.planning.facts import Denoiser, ModelFacts

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
    uneven: head counts and lengths that do not divide are allowed (ulysses_mode="advanced_uaa").
    """

    cfg: int = 1
    pipeline: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    hsdp: bool = False
    copies: int = 1
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
            vae_patch_parallel_size=self.vae_patch,
            text_encoder_tp_size=self.text_encoder_tp,
            ulysses_mode=mode,
        )

    def name(self) -> str:
        """In words, short: cfg 2 x ulysses 4, hsdp."""
        axes = [f"{axis} {getattr(self, axis)}" for axis in FIELDS if getattr(self, axis) > 1]
        words = [" x ".join(axes) or "one rank"] + ["hsdp"] * self.hsdp
        words += [f"vae patches {self.vae_patch}"] * (self.vae_patch > 1)
        words += [f"text encoders {self.text_encoder_tp}"] * (self.text_encoder_tp > 1)
        return ", ".join(words)

    def flags(self) -> str:
        """The same on the command line."""
        words = [f"{flag} {getattr(self, axis)}" for axis, flag in FLAGS.items() if getattr(self, axis) > 1]
        words += ["--ulysses-mode advanced_uaa"] if self.uneven else []
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
        copies=config.hsdp_replicate_size,
        vae_patch=config.vae_patch_parallel_size,
        text_encoder_tp=config.text_encoder_tp_size,
        uneven=config.ulysses_mode == "advanced_uaa",
    )


def admissible(model: ModelFacts, num_ranks: int) -> Iterator[Layout]:
    """All layouts of this many ranks that the model's sizes allow and that leave no rank idle."""
    for cfg, pipeline, ring, ulysses, tensor in _products(num_ranks, len(FIELDS)):
        base = Layout(cfg=cfg, pipeline=pipeline, ring=ring, ulysses=ulysses, tensor=tensor)
        if problem(base, model) is None:
            yield from (layout for layout in _overlays(base, model) if problem(layout, model) is None)


def _overlays(base: Layout, model: ModelFacts) -> Iterator[Layout]:
    ranks = base.num_ranks
    for hsdp, vae, text in itertools.product((False, True), {1, ranks}, sorted({1, *_encoder_degrees(base, model)})):
        yield replace(base, hsdp=hsdp, vae_patch=vae, text_encoder_tp=text)


def _encoder_degrees(base: Layout, model: ModelFacts) -> list[int]:
    """The largest degree that the ranks and the heads of all text encoders admit."""
    heads = [part.heads for part in model.components if part.role == "encoder"]
    degrees = [d for d in range(2, base.num_ranks + 1) if base.num_ranks % d == 0]
    good = [d for d in degrees if heads and all(h and h % d == 0 for h in heads)]
    return good[-1:]


def _products(total: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    if num_factors == 1:
        yield (total,)
        return
    for first in (d for d in range(1, total + 1) if total % d == 0):
        yield from ((first, *rest) for rest in _products(total // first, num_factors - 1))


def problem(layout: Layout, model: ModelFacts) -> str | None:
    """Why the model does not admit this layout: one sentence, or None."""
    problems = (_problem_of(layout, denoiser) for denoiser in model.denoisers)
    return _idle(layout, model) or next(filter(None, problems), None) or _overlay_problem(layout, model)


def _idle(layout: Layout, model: ModelFacts) -> str | None:
    if layout.cfg > model.num_rows:
        return (
            f"cfg_parallel_size={layout.cfg} is more than the {model.num_rows} rows in flight (guidance branches x "
            f"requests), so ranks would be idle; use at most {model.num_rows} or ask with a larger --requests."
        )
    return None


def _problem_of(layout: Layout, denoiser: Denoiser) -> str | None:
    if not denoiser.divisible:
        inside = {axis: getattr(layout, axis) for axis in FIELDS if axis != "cfg" and getattr(layout, axis) > 1}
        axis = next(iter(inside), None)
        return axis and f"{FIELDS[axis]}={inside[axis]}: {denoiser.class_name} has no stack of blocks; deal its rows "
        "with cfg_parallel_size."
    if layout.pipeline > len(denoiser.blocks):
        return (
            f"pipeline_parallel_size={layout.pipeline} is more than the {len(denoiser.blocks)} blocks of "
            f"{denoiser.class_name}; use at most {len(denoiser.blocks)}."
        )
    return _head_problem(layout, denoiser)


def _head_problem(layout: Layout, denoiser: Denoiser) -> str | None:
    uneven = layout.uneven and layout.ulysses > 1
    for field, degree in (("tensor_parallel_size", layout.tensor), ("ulysses_degree", layout.tensor * layout.ulysses)):
        bad = sorted(heads for heads in denoiser.heads if heads % degree)
        if bad and not (field == "ulysses_degree" and uneven):
            good = [str(d) for d in range(1, bad[0] + 1) if all(heads % d == 0 for heads in denoiser.heads)]
            product = "" if field == "tensor_parallel_size" or layout.tensor == 1 else f" x {layout.tensor} (tensor)"
            shown = degree if not product else layout.ulysses
            return (
                f"{field}={shown}{product} does not divide the {bad[0]} heads of {denoiser.class_name}; "
                f"use a product of {', '.join(good)}."
            )
    return None


def _overlay_problem(layout: Layout, model: ModelFacts) -> str | None:
    if layout.hsdp and layout.shards == 1:
        return "use_hsdp=True: every rank would keep all of its weights, so nothing is sharded; leave it off."
    if layout.hsdp and layout.text_encoder_tp > 1:
        return (
            f"text_encoder_tp_size={layout.text_encoder_tp}: use_hsdp=True shards the text encoders already; "
            "use one of them."
        )
    if layout.vae_patch > 1 and not model.vae_tiles:
        return f"vae_patch_parallel_size={layout.vae_patch}: the VAE cannot decode in tiles; leave it at 1."
    for name, size in (("vae_patch", layout.vae_patch), ("text_encoder_tp", layout.text_encoder_tp)):
        if size > layout.num_ranks or layout.num_ranks % size:
            field = {"vae_patch": "vae_patch_parallel_size", "text_encoder_tp": "text_encoder_tp_size"}[name]
            return f"{field}={size} does not divide the {layout.num_ranks} ranks; use a divisor of it."
    return _encoder_problem(layout, model)


def _encoder_problem(layout: Layout, model: ModelFacts) -> str | None:
    for part in model.components:
        if part.role == "encoder" and part.heads and part.heads % layout.text_encoder_tp:
            return (
                f"text_encoder_tp_size={layout.text_encoder_tp} does not divide the {part.heads} heads of "
                f"{part.name}; use a divisor of it."
            )
    return None


assert {*FIELDS.values()} <= {f.name for f in fields(DiffusionParallelConfig)}
