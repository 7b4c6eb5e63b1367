"""A model whose layers are called otherwise than usual is divided once its spec says what they are."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from denoised.errors import InvalidConfigError
from denoised.features import tensor
from denoised.spec.model_spec import ModelSpec
from denoised.spec.tensor import vocabulary
from denoised.steps.tally import counted
from tests.ranks import run_on_ranks

WIDTH, HEADS = 32, 4
NAMES = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out", "grow": "fc1", "shrink": "fc2"}
PLAIN, NAMED = ModelSpec(pipeline="Own"), ModelSpec(pipeline="Own", tensor_names=NAMES)


class Mixing(nn.Module):
    """Attention with grouped keys."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wk, self.wv = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.grow, self.shrink = Mixing(), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.shrink(self.grow(x).relu())  # type: ignore[no-any-return]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    whole = nn.Sequential()
    whole.blocks = nn.ModuleList([Block(), Block()])
    whole.forward = lambda x: whole.blocks[1](whole.blocks[0](x))  # type: ignore[method-assign, assignment]
    return whole.eval().requires_grad_(False)


def divided(rank: int, ranks: int) -> tuple[float, int, int, str]:
    """Difference from the whole, sums, rows of the first matrix, and what a spec without names is told."""
    assert dist.group.WORLD is not None
    with pytest.raises(InvalidConfigError) as refused:
        tensor.apply(model(), PLAIN, dist.group.WORLD)
    x, parted = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)), model()
    tensor.apply(parted, NAMED, dist.group.WORLD)
    with counted() as counts:
        difference = float((parted(x) - model()(x)).abs().max())
    return difference, counts["tensor_sums"], len(parted.blocks[0].mix.wq.weight), str(refused.value)


def test_a_spec_names_layers() -> None:
    for difference, sums, rows, refused in run_on_ranks(divided, 2):
        assert difference < 1e-5
        assert (sums, rows) == (4, WIDTH // 2), "one sum after each attention and feed-forward"
        assert "would divide only 0% of the blocks" in refused
    assert tensor.allowed_degrees(model(), NAMED) == (1, 2, 4), "key heads may be copied"
    assert tensor.allowed_degrees(model(), PLAIN) == (1,)


def test_names_of_no_use_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer is usually called to_p"):
        vocabulary({"wq": "to_p"})
