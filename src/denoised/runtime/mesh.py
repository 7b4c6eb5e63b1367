"""The ranks of one engine as a mesh of named axes, and the process groups that features work in.

Knows the axes' sizes and order, not what anybody does with them.
"""

from __future__ import annotations

import datetime
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from denoised.config import DiffusionParallelConfig

# Ranks at the same place on the other axes hold equal weights along these.
EQUAL_WEIGHTS = ("cfg", "ring", "ulysses")


class Mesh:
    """Groups of this rank. Every rank must ask for the same groups in the same order.

    The process group must be initialized, with as many ranks as the axes without `data` ask for.
    """

    def __init__(self, parallel: DiffusionParallelConfig, *, device: str, timeout: datetime.timedelta) -> None:
        self.axes = {name: size for name, size in parallel.axes.items() if name != "data"}
        self.rank, self.size = dist.get_rank(), prod(self.axes.values())
        self._device, self._timeout = device, timeout
        real = {name: size for name, size in self.axes.items() if size > 1}
        self._mesh = init_device_mesh(device, tuple(real.values()), mesh_dim_names=tuple(real)) if real else None
        self.control = dist.new_group(backend="gloo", timeout=timeout)
        self._blocks: dict[int, dist.ProcessGroup] = {}
        self._spans: dict[tuple[str, ...], dist.ProcessGroup] = {}
        self._sharded: dict[int, DeviceMesh] = {}
        self._alone: dist.ProcessGroup = dist.new_group([self.rank], timeout=timeout, use_local_synchronization=True)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along `axis` alone."""
        if self.axes[axis] == 1 or self._mesh is None:
            return self._alone
        group: dist.ProcessGroup = self._mesh.get_group(axis)
        return group

    def span(self, *axes: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along these axes alone, in the mesh's order of ranks."""
        real = [axis for axis in axes if self.axes[axis] > 1]
        if len(real) < 2:
            return self.group((real or axes)[0])
        if axes not in self._spans:
            self._spans[axes] = self._span(real)
        return self._spans[axes]

    def _span(self, axes: list[str]) -> dist.ProcessGroup:
        names, sizes = list(self.axes), list(self.axes.values())
        inner = [names.index(axis) for axis in axes]
        outer = [place for place in range(len(names)) if place not in inner]
        ranks = torch.arange(self.size).view(sizes).permute(*outer, *inner)
        table = ranks.reshape(-1, prod(sizes[place] for place in inner))
        return DeviceMesh(self._device, table, mesh_dim_names=("other", "span")).get_group("span")

    def coordinate(self, axis: str) -> int:
        """This rank's place along `axis`."""
        return int(self.group(axis).rank())

    def neighbours(self, size: int) -> dist.ProcessGroup:
        """Blocks of `size` consecutive ranks: this rank's one."""
        if size not in self._blocks:
            table = torch.arange(self.size).view(-1, size)
            self._blocks[size] = DeviceMesh(self._device, table, mesh_dim_names=("block", "part")).get_group("part")
        return self._blocks[size]

    def equal_weights(self, *, num_copies: int) -> DeviceMesh:
        """The ranks whose denoiser weights are equal, as a mesh (replicate, shard); the shards are neighbours."""
        if num_copies not in self._sharded:
            self._sharded[num_copies] = self._equal_weights(num_copies)
        return self._sharded[num_copies]

    def _equal_weights(self, num_copies: int) -> DeviceMesh:
        names, sizes = list(self.axes), list(self.axes.values())
        equal = [names.index(axis) for axis in EQUAL_WEIGHTS]
        other = [place for place in range(len(names)) if place not in equal]
        ranks = torch.arange(self.size).view(sizes).permute(*other, *equal)
        shards = prod(sizes[place] for place in equal) // num_copies
        table = ranks.reshape(-1, num_copies, shards)
        return DeviceMesh(self._device, table, mesh_dim_names=("other", "replicate", "shard"))["replicate", "shard"]
