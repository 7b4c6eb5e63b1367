"""Meshes whose groups send nothing (torch's "fake" backend): real axes, one process, which is the first rank."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from denoised import DiffusionParallelConfig
from denoised.runtime.mesh import Mesh

PATIENCE = datetime.timedelta(seconds=5)


@contextlib.contextmanager
def first_of(parallel: DiffusionParallelConfig) -> Iterator[Mesh]:
    """The mesh of a configuration, as its first rank sees it."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=parallel.world_size)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "new_group", _silent(dist.new_group))
            yield Mesh(parallel, device="cpu", timeout=PATIENCE)
    finally:
        dist.destroy_process_group()


def _silent(real: Any) -> Any:
    """Groups that nobody answers in: gloo would wait for the ranks that are not there."""

    def new_group(*args: Any, **options: Any) -> Any:
        options.pop("use_local_synchronization", None)
        return real(*args, **options | {"backend": "fake"})

    return new_group
