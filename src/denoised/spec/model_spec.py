"""What a model says about itself: data only.

A family is one file of `ModelSpec`s; most of a spec is inferred from the pipeline by `resolve()` in `registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["image", "video", "audio"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One pipeline class of diffusers.

    pipeline: the class's name.
    models: the support table's rows that are this class.
    kind: what it makes.
    denoisers: components whose calls are dealt as rows.
    shared: denoiser arguments that are the same for all rows, whatever their shape.
    row_lists: denoiser arguments that are lists with one entry a row.
    padded: text arguments of the denoiser that may be padded, with the name of their mask.
    whole_calls: a denoiser call cannot be split into rows.
    defer: False if the pipeline changes tensors in place between a denoiser call and its use.
    exclusive: the pipeline changes shared modules, so a request runs alone.
    packing: latents that the pipeline packs into one token, along each side; 1: the denoiser's own patch says it.
    defaults: sampling parameters that the class's own defaults leave open.
    """

    pipeline: str
    models: tuple[str, ...] = ()
    kind: Kind = "image"
    denoisers: tuple[str, ...] = ("transformer", "transformer_2", "unet", "prior")
    shared: frozenset[str] = frozenset()
    row_lists: frozenset[str] = frozenset()
    padded: dict[str, str] = field(default_factory=dict)
    whole_calls: bool = False
    defer: bool = True
    exclusive: bool = False
    packing: int = 1
    needs_image: bool = False
    declared: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)
