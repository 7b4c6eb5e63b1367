"""How long a model takes to load: against `from_pretrained` of diffusers, and against reading its files and no more.

    python -m benchmarks.loading [--rounds 3] [--layers 16]

Cold: the system has forgotten the files (posix_fadvise). Whoever maps files has them read in this too: every page of
every weight is looked at. Variants take turns; ratios are of neighbouring runs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from benchmarks.common import interleaved, qwen_image, ratio, saved, show
from denoised.config import EngineConfig
from denoised.runtime import load, weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PIECE = 2**24


def files(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("*.safetensors"))


def forget(folder: str) -> None:
    """The next one who reads these files reads the disk."""
    for file in files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_raw(folder: str) -> None:
    """All bytes once, into one buffer."""
    buffer = bytearray(PIECE)
    for file in files(folder):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def modules(pipeline: Any) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def load_plain(folder: str, dtype: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=DTYPES[dtype])
    for part in modules(pipeline):
        for tensor in (*part.parameters(), *part.buffers()):
            weights.touch(tensor)


def load_ours(folder: str, dtype: str, threads: int) -> None:
    pipeline = load.load(EngineConfig(model=folder, dtype=dtype), device="cpu", unread=True)
    weights.fill_all(modules(pipeline), threads=threads)


def timed(run: Callable[[], None], folder: str, *, cold: bool) -> float:
    gc.collect()
    if cold:
        forget(folder)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(folder: str, rounds: int, *, cold: bool) -> dict[str, list[float]]:
    variants: dict[str, Callable[[], None]] = {"raw": functools.partial(read_raw, folder)}
    for dtype in DTYPES:
        variants[f"diffusers {dtype}"] = functools.partial(load_plain, folder, dtype)
        for threads in (1, 4):
            variants[f"ours {dtype} {threads} threads"] = functools.partial(load_ours, folder, dtype, threads)
    runs: dict[str, Callable[[], float]] = {}
    for name, run in variants.items():
        runs[name] = functools.partial(timed, run, folder, cold=cold)
    return interleaved(runs, rounds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = saved(qwen_image(layers=asked.layers, heads=6, dtype=torch.float32, text_width=384))
    megabytes = sum(file.stat().st_size for file in files(folder)) / 2**20
    try:
        load_ours(folder, "float32", 1)  # what is imported on the way is not counted
        for temperature in ("cold", "warm"):
            seconds = measure(folder, asked.rounds, cold=temperature == "cold")
            show(f"loading {megabytes:.0f} MB, {temperature}", _rows(seconds, megabytes))
    finally:
        shutil.rmtree(folder)


def _rows(seconds: dict[str, list[float]], megabytes: float) -> dict[str, float]:
    rows = {"raw, MB/s": megabytes / min(seconds["raw"])}
    rows |= {f"{name}, seconds (least)": min(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        if name.startswith("ours"):
            dtype = name.split()[1]
            rows[f"{name}: times as fast as diffusers"] = ratio(seconds[f"diffusers {dtype}"], times)
            rows[f"{name}: share of the raw read speed"] = ratio(seconds["raw"], times)
    return rows


if __name__ == "__main__":
    main()
