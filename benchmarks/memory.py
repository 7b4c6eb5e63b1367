"""How much memory a request needs with each way to offload, and what that costs in time. On the CPU.

    python -m benchmarks.memory [--rounds 3] [--layers 16]

Peak: resident memory of a process of its own, mapped files included, above what it was before the model was loaded.
Weights on the CPU are mapped files, which the system may take back: what is counted is what was there at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import PROMPT, qwen_image, ratio, saved, show
from denoised import Omni, OmniDiffusionSamplingParams
from denoised.runtime.memory import in_use

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole components": {"enable_cpu_offload": True},
    "4 blocks": {"enable_layerwise_offload": True, "layerwise_num_gpu_layers": 4},
    "1 block": {"enable_layerwise_offload": True},
}
STEPS, SIDE = 4, 256


def run(folder: str, mode: str) -> dict[str, float]:
    """One request in this process: MB that it grew by at most, seconds of a step, MB at most of each stage."""
    before = in_use("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    params = OmniDiffusionSamplingParams(
        num_inference_steps=STEPS, height=SIDE, width=SIDE, seed=0, true_cfg_scale=1.0, output_type="np"
    )
    with Omni(folder, num_threads=1, **MODES[mode]) as omni:
        [output] = omni.generate({"prompt": PROMPT["prompt"]}, params, use_tqdm=False)
    assert output.receipt is not None, output.error
    stages = {f"{stage} peak": mb - before / 2**20 for stage, mb in output.receipt.stage_peak_memory_mb.items()}
    peak = output.receipt.peak_memory_mb - before / 2**20
    return {"peak": peak, "step": output.receipt.stage_seconds["denoise"] / STEPS, **stages}


def in_a_process(folder: str, mode: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", "--mode", mode, "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--folder")
    asked = parser.parse_args()
    if asked.mode is not None:
        print(json.dumps(run(asked.folder, asked.mode)))
        return
    folder = saved(qwen_image(layers=asked.layers, heads=6, dtype=torch.float32, text_width=384))
    try:
        _compare(folder, asked.rounds)
    finally:
        shutil.rmtree(folder)


def _compare(folder: str, rounds: int) -> None:
    megabytes = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 2**20
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            found[mode].append(in_a_process(folder, mode))
    rows: dict[str, float] = {"weights, MB": megabytes}
    for mode, runs in found.items():
        rows |= {f"{mode}: {key}": statistics.median(run[key] for run in runs) for key in runs[0]}
    for mode, runs in found.items():
        plain = found["plain"]
        rows[f"{mode}: peak over plain"] = ratio([r["peak"] for r in runs], [r["peak"] for r in plain])
        rows[f"{mode}: step over plain"] = ratio([r["step"] for r in runs], [r["step"] for r in plain])
    show("memory", rows)


if __name__ == "__main__":
    main()
