"""What a model says about itself: data only.

A family is one file of `ModelSpec`s; most of a spec is inferred from the pipeline by `resolve()` in `registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from denoised.spec.sequence import SequencePlan

Kind = Literal["image", "video", "audio"]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A guidance branch beside the usual two.

    parameters: it is computed where one of these is above `above`, or is given at all if that is None.
    """

    parameters: tuple[str, ...]
    above: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One pipeline class of diffusers.

    pipeline: the class's name.
    models: the support table's rows that are this class.
    kind: what it makes.
    denoisers: components whose calls are dealt as rows.
    shared: denoiser arguments that are the same for all rows, whatever their shape.
    row_lists: denoiser arguments that are lists with one entry a row.
    row_dims: denoiser arguments whose rows are along another dim than 0, and which.
    row_folds: denoiser arguments with several entries a row along dim 0, those of a row side by side.
    rows_in: the denoiser's argument that has an entry a row, where that is not its first.
    stores: denoiser arguments that are objects, and out of use until the pipeline gives them a mode.
    padded: text arguments of the denoiser that may be padded, with the name of their mask; "": it knows the lengths.
    whole_calls: a denoiser call cannot be split into rows.
    defer: False if the pipeline changes tensors in place between a denoiser call and its use.
    exclusive: the pipeline changes shared modules, so a request runs alone.
    reads_modules: the pipeline reads off modules what a forward left there, so it runs on one rank.
    chunked: the pipeline makes whole chunks of frames, whatever number is asked for.
    packing: latents that the pipeline packs into one token, along each side; 1: the denoiser's own patch says it.
    branches: guidance branches beside the usual two.
    defaults: sampling parameters that the class's own defaults leave open.
    stacks: the denoiser's block lists in order of execution, where that is not the order of definition.
    uncached: stacks that caches always compute: not only the next block uses what their blocks give.
    unquantized: layers of blocks that quantization leaves alone, beside the usual ones (`spec/quantization.py`).
    tensor_names: the denoiser's own names of layers, and the usual ones of such layers (`spec/tensor.py`): what tensor
        parallelism cuts how, where neither the class says that nor the usual names do.
    sequence_plan: how the denoiser's sequence is spread over ranks, where neither its class nor `sequence.py` says.
    """

    pipeline: str
    models: tuple[str, ...] = ()
    kind: Kind = "image"
    denoisers: tuple[str, ...] = ("transformer", "transformer_2", "unet", "prior")
    shared: frozenset[str] = frozenset()
    row_lists: frozenset[str] = frozenset()
    row_dims: dict[str, int] = field(default_factory=dict)
    row_folds: frozenset[str] = frozenset()
    rows_in: str = ""
    stores: frozenset[str] = frozenset()
    padded: dict[str, str] = field(default_factory=dict)
    whole_calls: bool = False
    defer: bool = True
    exclusive: bool = False
    reads_modules: bool = False
    chunked: bool = False
    packing: int = 1
    needs_image: bool = False
    declared: bool = True
    branches: tuple[Branch, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()
    uncached: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()
    tensor_names: dict[str, str] = field(default_factory=dict)
    sequence_plan: SequencePlan | None = None
