"""A small model with everything that makes a model hard to cut into stages."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from denoised.features.pipeline import Stages
from denoised.spec.model_spec import ModelSpec

SPEC = ModelSpec(pipeline="Toy")


class Two(nn.Module):
    """Two streams in, and out in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, *, context: torch.Tensor | None) -> Any:
        x = x + self.a(x).tanh()
        return {"context": None if context is None else context + self.b(context + x.mean(1, keepdim=True)), "x": x}


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a(x).sin()


class InPlace(One):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(self.a(x))


class Toy(nn.Module):
    """Glue that uses block outputs late, twice, in place, through views, and to decide what to do.

    `late` is defined before `pairs` and runs after it; a block of it runs twice.
    """

    def __init__(self, last: type[One] = One) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)
        self.late = nn.ModuleList([One(), One(), last()])
        self.pairs = nn.ModuleList([Two(), Two(), Two()])

    def forward(self, x: torch.Tensor, context: torch.Tensor, fail: bool = False, strength: float = 1.0) -> Any:
        x, kept = self.enter(x), []
        for block in self.pairs[: 3 if strength else 2]:
            out = block(x, context=context)
            x, context = out["x"], out["context"]
            kept.append(x)
        gain = 2.0 if kept[1].max().item() > 0 else 3.0
        both = x.new_zeros(x.shape[0], x.shape[1] + context.shape[1], 8)
        both[:, : x.shape[1]], both[:, x.shape[1] :] = x, context
        if fail:
            raise ValueError("as asked")
        both = self.late[1](self.late[0](self.late[1](both)))
        both += kept.pop(0).sum(1, keepdim=True)
        return self.late[2](both * gain).transpose(1, 2), kept[-1]


def toy(seed: int = 0, last: type[One] = One) -> Toy:
    torch.manual_seed(seed)
    return Toy(last).eval().requires_grad_(False)


def toy_calls(model: nn.Module) -> list[Callable[..., Any]]:
    """Calls of four signatures."""
    torch.manual_seed(1)
    inputs = [(torch.randn(2, 3 + n, 8), torch.randn(2, 2 + n, 8)) for n in range(4)]
    return [functools.partial(model, x, context) for x, context in inputs]


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


def turns(stages: Stages) -> list[int]:
    """The rows that this stage went on with, one after the other."""
    return [row for row, _ in itertools.groupby(mark.row for mark in stages.marks if mark.what == "begin")]
