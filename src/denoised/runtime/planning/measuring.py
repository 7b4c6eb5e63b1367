"""What this machine does: its `Hardware`, from small measurements that know of no model.

All ranks measure at once, as they will compute: cores share memory and clock. Peaks are the best of a few runs; what
blocks reach of them is the median, by the clock on the wall, of one rank alone and of all, who wait for the slowest.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from denoised.errors import EngineError, one_line
from denoised.runtime.planning.hardware import HARDWARE, LINK_EFFICIENCY, Hardware
from denoised.steps import collectives

ROUNDS, BLOCK_ROUNDS = 10, 5
# Transformer blocks of usual shape: tokens of two rows, width, and heads of 64. Two, so that weights come from memory.
ROWS, TOKENS, WIDTH, HEADS, BLOCKS = 2, 1024, 1024, 16, 2
MATRIX = (2048, 1024, 4096)
CHANNELS, SIDE = 128, 64  # of a convolution
COPIED = 64 * 2**20  # bytes
SMALL, LARGE = 2**10, 2**22  # values of a message


def measure(most_ranks: int = 8) -> Hardware:
    """This machine's accelerators, or its cores with one thread a rank; takes half a minute.

    Raises:
        EngineError: ranks cannot be started or cannot talk to each other.
    """
    num_ranks = min(torch.cuda.device_count() or _cores(), most_ranks)
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_rank, args=(num_ranks, folder), nprocs=num_ranks)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise EngineError(f"this machine cannot be measured: {one_line(error)}") from error
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return hardware_of({name: statistics.mean(part[name] for part in found) for name in found[0]}, num_ranks)


def hardware_of(found: dict[str, float], num_ranks: int) -> Hardware:
    """From what ranks measured, on average: operations and bytes a second, seconds."""
    cpu = not torch.cuda.is_available()
    share = num_ranks if cpu else 1  # cores are one device
    return replace(
        HARDWARE["cpu"] if cpu else HARDWARE["h100"],
        name="this machine's CPU" if cpu else torch.cuda.get_device_name(),
        half_flops=found["half"] * share,
        full_flops=found["full"] * share,
        memory=_memory(),
        memory_bandwidth=found["copy"],
        link=found["link"] / LINK_EFFICIENCY if num_ranks > 1 else HARDWARE["cpu"].link,
        latency=found["latency"],
        efficiency=found["layers"] / found["half"],
        attention_efficiency=found["attention"] / found["half"],
        ring_attention=found["ring"],
        crowding=found["crowding"],
        conv_efficiency=found["conv"] / found["half"],
        per_node=num_ranks,
        cores=num_ranks if cpu else 0,
        threads=1 if cpu else None,
        fp8=cpu or torch.cuda.get_device_capability() >= (8, 9),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _rank(rank: int, num_ranks: int, folder: str) -> None:
    """One process: joins the others, measures, and writes what it found."""
    cuda = torch.cuda.is_available()
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=num_ranks)
    with torch.no_grad(), torch.device("cuda" if cuda else "cpu"):
        found = measured(dist.group.WORLD)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(group: Any) -> dict[str, float]:
    """Of one of the ranks of a group, which all measure together."""
    return {
        "half": _matrices(torch.bfloat16, group),
        "full": _matrices(torch.float32, group),
        **_blocks(group),
        "conv": _convolution(group),
        "copy": _copy(group),
        **_messages(group),
    }


def _best(run: Callable[[], object], group: Any, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of some runs that all ranks begin together."""
    run()
    times = []
    for _ in range(ROUNDS):
        dist.barrier(group)
        times.append(_seconds(run, clock))
    return min(times)


def _computed(run: Callable[[], object], group: Any) -> float:
    """The same for what needs nobody else: on a CPU, what other programs take does not count."""
    return _best(run, group, clock=time.perf_counter if torch.cuda.is_available() else time.thread_time)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _matrices(dtype: torch.dtype, group: Any) -> float:
    """Operations a second."""
    rows, inner, columns = MATRIX
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    return 2 * rows * inner * columns / _computed(lambda: functional.linear(a, b), group)


def _blocks(group: Any) -> dict[str, float]:
    """Operations a second of blocks' attention, and of all else in them, on one rank while the others wait; what is
    left of the former for half of the queries on half of the keys, and of both when all compute, until the last is
    done."""
    blocks = [_Block() for _ in range(BLOCKS)]
    x = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.bfloat16)

    def run() -> None:
        functools.reduce(lambda x, block: block(x), blocks, x)

    attention, part = _attention(TOKENS, group), _attention(TOKENS // 2, group)
    alone, together = _in_turn(run, group), _together(run, group)
    layers = 2 * ROWS * TOKENS * sum(a * b for a, b in _LAYERS.values())
    return {
        "layers": layers / (alone / BLOCKS - attention),
        "attention": 4 * ROWS * TOKENS**2 * WIDTH / attention,
        "ring": attention / (4 * part),
        "crowding": alone / together,
    }


def _attention(tokens: int, group: Any) -> float:
    """Seconds of one call."""
    q, k, v = torch.randn(3, ROWS, HEADS, tokens, WIDTH // HEADS, dtype=torch.bfloat16)
    return _in_turn(lambda: functional.scaled_dot_product_attention(q, k, v), group)


def _in_turn(run: Callable[[], object], group: Any) -> float:
    """Seconds of this rank's run, usually, beside others that wait."""
    seconds = 0.0
    for rank in range(group.size()):
        if rank == group.rank():
            seconds = statistics.median(_seconds(run) for _ in range(BLOCK_ROUNDS))
        dist.barrier(group)
    return seconds


def _together(run: Callable[[], object], group: Any) -> float:
    """Seconds until all ranks have done their run, usually."""

    def all_run() -> None:
        run()
        dist.barrier(group)

    dist.barrier(group)
    return statistics.median(_seconds(all_run) for _ in range(BLOCK_ROUNDS))


def _seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    _finish()
    start = clock()
    run()
    _finish()
    return clock() - start


_LAYERS = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}


class _Block(nn.Module):
    """As denoisers of today have it: attention with norms and a rotation of queries and keys, and gates."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in _LAYERS.items()}).bfloat16()
        self.rotation = torch.polar(torch.ones(TOKENS, WIDTH // HEADS // 2), torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layers["qkv"](_normed(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        answer = functional.scaled_dot_product_attention(self._rotated(q), self._rotated(k), v)
        x = x + _GATE * self.layers["out"](answer.transpose(1, 2).flatten(2))
        hidden = functional.gelu(self.layers["up"](_normed(x)), approximate="tanh")
        return torch.addcmul(x, self.layers["down"](hidden), torch.full_like(x[:, :1], _GATE))

    def _rotated(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x, x.shape[-1:]).float()
        pairs = torch.view_as_complex(normed.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.rotation).flatten(-2).to(x.dtype)


_GATE = 0.5


def _normed(x: Tensor) -> Tensor:
    """As blocks of denoisers do it: a norm, a scale and a shift by the timestep."""
    return functional.layer_norm(x, x.shape[-1:]) * (1 + x[:, :1]) + x[:, :1]


def _convolution(group: Any) -> float:
    conv, norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1).bfloat16(), nn.GroupNorm(32, CHANNELS).bfloat16()
    x = torch.randn(1, CHANNELS, SIDE, SIDE, dtype=torch.bfloat16)
    flops = 2 * conv.weight.numel() * SIDE**2
    return flops / _computed(lambda: conv(functional.silu(norm(x))), group)


def _copy(group: Any) -> float:
    """Bytes a second that are read and written."""
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / _computed(lambda: target.copy_(source), group)


def _messages(group: Any) -> dict[str, float]:
    """Seconds that a collective takes at least, and bytes a second that a rank sends beyond that."""
    size = group.size()
    if size == 1:
        return {"latency": 0.0, "link": 0.0}
    small, large = (_exchanges(values // size * size, group) for values in (SMALL, LARGE))
    shares = 1 + size + 2  # of an exchange, a gather and a sum, each without the rank's own part
    sent = shares * (LARGE - SMALL) * torch.bfloat16.itemsize * (size - 1) / size
    return {"latency": small / _KINDS, "link": sent / (large - small)}


_KINDS = 3


def _exchanges(values: int, group: Any) -> float:
    """Seconds of an exchange, a gather and a sum, one after the other, of a message of so many values."""
    x, size = torch.zeros(values, dtype=torch.bfloat16), group.size()
    parts, shapes = x.chunk(size), [torch.Size([values // size])] * size
    return (
        _best(lambda: collectives.all_to_all(parts, shapes, group), group)
        + _best(lambda: collectives.gather_list(x, group), group)
        + _best(lambda: collectives.all_reduce(x, group), group)
    )
