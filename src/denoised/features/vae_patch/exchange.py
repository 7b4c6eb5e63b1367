"""Listed tiles computed by all ranks of a group, each its share, and exchanged. Knows nothing of VAEs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from denoised.features.vae_patch.listing import Tile, TileCall
from denoised.steps import collectives
from denoised.steps.collectives import Group
from denoised.steps.tally import count

# Most dims of an output. A row of what ranks tell each other has their number, the shape, the dims from the outermost
# in memory to the innermost (convolutions give channels last, and the next one rounds by what it gets), and the dtype.
MAX_DIMS = 6
ROW = 2 + 2 * MAX_DIMS
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAILED = -1


def compute(calls: Sequence[TileCall], tiles: Sequence[Tile], group: Group, method: str) -> list[Tensor]:
    """Every call's output, in order of calls, for the VAE's `method`. A rank without a tile waits for those of others.

    Raises:
        RuntimeError: a tile failed on another rank; on that rank, its own error.
    """
    shares = _deal(calls, tiles, group.size())
    mine, error = _run(calls, shares[group.rank()], method)
    order = [[number for tile in share for number in tile] for share in shares]
    nums = [len(of_rank) for of_rank in order]
    device = calls[0].args[0].device
    table = _table(mine, error, max(nums)).to(device)
    layouts = _layouts(collectives.gather_list(table, group), error, nums)
    outputs = zip((n for of_rank in order for n in of_rank), _exchange(mine, layouts, group, device), strict=True)
    return [output for _, output in sorted(outputs, key=lambda pair: pair[0])]


def _deal(calls: Sequence[TileCall], tiles: Sequence[Tile], num_ranks: int) -> list[list[Tile]]:
    """The tiles of each rank: largest first, in turn, so that the small ones at the edges are spread too."""
    ordered = sorted(tiles, key=lambda tile: -sum(calls[number].size() for number in tile))
    return [ordered[rank::num_ranks] for rank in range(num_ranks)]


def _run(calls: Sequence[TileCall], share: Sequence[Tile], method: str) -> tuple[list[Tensor], Exception | None]:
    """This rank's outputs. An error is kept until the others know of it, because they wait for these tiles."""
    outputs: list[Tensor] = []
    try:
        for tile in share:
            outputs += _run_tile([calls[number] for number in tile])
            count("vae_tiles")
            count(f"vae_{method}_tiles")
    except Exception as error:
        return [], error
    return outputs, None


def _run_tile(calls: Sequence[TileCall]) -> list[Tensor]:
    part, handed = calls[0].part, dict[int, Any]()
    before = _kept(part)
    try:
        outputs = [call.run(handed) for call in calls]
    finally:
        if calls[0].forget:
            calls[0].forget()
    if _kept(part) != before:
        raise RuntimeError(
            f"vae_patch_parallel_size: {type(part).__name__} keeps features of a tile on its modules, so that tiles "
            "depend on each other; use vae_patch_parallel_size=1"
        )
    return outputs


def _kept(part: nn.Module) -> set[tuple[int, str]]:
    """Where modules hold tensors that are neither weights nor buffers."""
    return {(id(m), name) for m in part.modules() for name, value in vars(m).items() if isinstance(value, Tensor)}


def _exchange(
    mine: Sequence[Tensor], layouts: Sequence[Sequence[Layout]], group: Group, device: torch.device
) -> list[Tensor]:
    """All ranks' outputs, in order of rank. Each in memory of its own: kernels round by how that is aligned, too."""
    sizes = [sum(layout.numel() for layout in of_rank) for of_rank in layouts]
    in_order = [layout for of_rank in layouts for layout in of_rank]
    nothing = torch.empty(0, dtype=in_order[0].dtype, device=device)
    own = layouts[group.rank()]
    flat = torch.cat([nothing, *(x.permute(layout.order).reshape(-1) for x, layout in zip(mine, own, strict=True))])
    pieces = torch.split(collectives.all_gather(flat, group, dim=0, sizes=sizes), [x.numel() for x in in_order])
    return [layout.laid_out(piece) for piece, layout in zip(pieces, in_order, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an output lies in memory: `order` has its dims from the outermost to the innermost."""

    shape: list[int]
    order: list[int]
    dtype: torch.dtype

    def numel(self) -> int:
        return math.prod(self.shape)

    def laid_out(self, flat: Tensor) -> Tensor:
        back = sorted(range(len(self.order)), key=lambda dim: self.order[dim])
        return flat.view([self.shape[dim] for dim in self.order]).clone().permute(back)

    def row(self) -> list[int]:
        missing = [0] * (MAX_DIMS - len(self.shape))
        return [len(self.shape), *self.shape, *missing, *self.order, *missing, DTYPES.index(self.dtype)]

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        strides = x.stride()
        order = sorted(range(x.ndim), key=lambda dim: -strides[dim])
        return cls(shape=list(x.shape), order=order, dtype=x.dtype)

    @classmethod
    def from_row(cls, row: list[int]) -> Layout:
        num_dims, shape, order = row[0], row[1 : 1 + MAX_DIMS], row[1 + MAX_DIMS :]
        return cls(shape=shape[:num_dims], order=order[:num_dims], dtype=DTYPES[row[-1]])


def _table(outputs: Sequence[Tensor], error: Exception | None, num_rows: int) -> Tensor:
    if error is not None:
        return torch.full((num_rows, ROW), FAILED)
    rows = [Layout.of(x).row() for x in outputs]
    return torch.tensor(rows + [[0] * ROW] * (num_rows - len(rows)))


def _layouts(tables: Sequence[Tensor], error: Exception | None, nums: Sequence[int]) -> list[list[Layout]]:
    """Those of each rank's outputs."""
    if error is not None:
        raise error
    rows = [table.tolist() for table in tables]
    for rank, of_rank in enumerate(rows):
        if of_rank[0][0] == FAILED:
            raise RuntimeError(f"a VAE tile failed on rank {rank} of {len(rows)}")
    return [[Layout.from_row(row) for row in of_rank[:num]] for of_rank, num in zip(rows, nums, strict=True)]
