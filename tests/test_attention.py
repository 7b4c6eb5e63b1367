"""The attention function against plain attention on one rank: random lengths, heads, masks and degrees."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed import init_device_mesh

from denoised.attention import ring
from denoised.attention.kernels import attend, explicit, merge
from denoised.attention.layout import Heads, Layout, length, start
from denoised.attention.sharded import Axes, sequence_attention
from denoised.steps.tally import counted
from tests.ranks import run_on_ranks

BOUND = 1e-5  # sums in another order, fp32, relative to the largest value
CASES = 16  # random cases for each pair of degrees


def axes(ring: int, ulysses: int) -> Axes:
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    return Axes(ring=mesh.get_group("ring"), ulysses=mesh.get_group("ulysses"))


def mine(x: Tensor, layout: Layout, rank: int, dim: int) -> Tensor:
    """A rank's tokens, by the definition: a piece of every stream."""
    first = sum(layout.lengths[:rank])
    return x.index_select(dim, torch.tensor(layout.positions[first : first + layout.lengths[rank]], dtype=torch.long))


def random_mask(draw: random.Random, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    shape = draw.choice([(batch, 1, 1, keys), (1, 1, queries, keys), (batch, heads, queries, keys), (queries, keys)])
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True  # a row that sees nothing has no defined answer
    if draw.random() < 0.5:
        return mask
    return torch.randn(shape).masked_fill(~mask, float("-inf"))


def one_case(seed: int, on: Axes) -> tuple[float, dict[str, int]]:
    """The largest difference of one random case, and what was counted."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    streams = tuple(draw.randint(1, 9) for _ in range(draw.randint(0, 1))) + (draw.randint(on.size, 21),)
    layout = on.layout(*streams)
    key_heads, group, batch, channels = draw.randint(1, 5), draw.choice([1, 1, 2, 3]), draw.randint(1, 2), 8
    heads = key_heads * group
    other = on.layout(draw.randint(on.size, 13)) if draw.random() < 0.25 else layout
    query = torch.randn(batch, heads, layout.total, channels)
    key, value = (torch.randn(batch, key_heads, other.total, channels) for _ in range(2))
    causal = draw.random() < 0.3
    mask = random_mask(draw, batch, heads, layout.total, other.total) if not causal and draw.random() < 0.6 else None
    scale = draw.choice([None, 0.3])
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    given = mask
    if mask is not None and draw.random() < 0.5:  # as a model gives it that was split before it made its mask
        given = mine(mask, other, on.rank, mask.dim() - 1)
    with counted() as counts:
        got = sequence_attention(
            mine(query, layout, on.rank, 2),
            mine(key, other, on.rank, 2),
            mine(value, other, on.rank, 2),
            axes=on,
            queries=layout,
            keys=other,
            mask=given,
            causal=causal,
            scale=scale,
        )
    return _far(got, mine(expected, layout, on.rank, 2)), dict(counts)


def _far(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max()) if got.numel() else 0.0


def random_cases(rank: int, world_size: int, ring: int) -> list[tuple[float, dict[str, int]]]:
    on = axes(ring, world_size // ring)
    return [one_case(seed, on) for seed in range(CASES)]


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1), (1, 3), (3, 1), (2, 2)])
def test_it_is_plain_attention(ring: int, ulysses: int) -> None:
    for results in run_on_ranks(random_cases, ring * ulysses, ring):
        for seed, (difference, counts) in enumerate(results):
            assert difference < BOUND, f"case {seed}"
            assert counts["sequence_attention"] == 1
            assert counts.get("all_to_all", 0) == (2 if ulysses > 1 else 0)
    assert any(counts.get("ring_shift") == 2 * (ring - 1) for _, counts in results) == (ring > 1)


def order_of_events(rank: int, world_size: int) -> list[str]:
    """What one attention over a ring does, in order."""
    events: list[str] = []

    class Watched(ring.Shift):
        def __init__(self, *args: Any) -> None:
            events.append("sent")
            super().__init__(*args)

        def wait(self) -> list[Tensor]:
            events.append("waited")
            return super().wait()

    compute = ring._block

    def watched(*args: Any) -> Any:
        events.append("computed")
        return compute(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "Shift", Watched)
        patch.setattr(ring, "_block", watched)
        one_case(1, axes(world_size, 1))
    return events


def test_a_block_is_computed_while_the_next_one_travels() -> None:
    for events in run_on_ranks(order_of_events, 3):
        assert events == ["sent", "computed", "waited"] * 2 + ["computed"]


@pytest.mark.parametrize("total", [1, 2, 7, 8, 23])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_layouts_cover_every_token_once(total: int, size: int) -> None:
    parts = [(start(total, size, r), length(total, size, r)) for r in range(size)]
    assert [i for first, n in parts for i in range(first, first + n)] == list(range(total))
    layout = Layout(streams=(total, 5), ring=size, ulysses=2)
    assert sorted(layout.positions) == list(range(total + 5))
    assert sum(layout.rows) == sum(layout.lengths) == total + 5


def test_key_heads_follow_query_heads() -> None:
    heads = Heads(queries=6, keys=2, size=4)
    assert [heads.keys_of(r) for r in range(4)] == [slice(0, 1), slice(0, 2), slice(1, 2), slice(1, 2)]
    assert [heads.key_of_each(r) for r in range(4)] == [[0, 0], [0, 1], [0], [0]]


def test_blocks_merge_also_where_a_query_sees_nothing() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[:, :, 0] = False
    mask[:, :, 1, :4] = False  # nothing in the first block, something in the second
    mask[:, :, 1, 5] = True
    parts = [
        attend(query, key[:, :, s], value[:, :, s], mask=mask[..., s], scale=None)
        for s in (slice(0, 4), slice(4, 7), slice(7, 7))
    ]
    merged = merge(merge(parts[2], parts[0]), parts[1])
    plain = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.isfinite(merged.out).all()
    assert _far(merged.out[:, :, 1:], plain[:, :, 1:]) < BOUND
    assert merged.out[:, :, 0].eq(0).all()
    formula = explicit(query, key, value, torch.zeros(mask.shape).masked_fill(~mask, float("-inf")), None)
    assert _far(merged.out, formula[0]) < BOUND
    assert torch.allclose(merged.lse, formula[1], atol=BOUND)
