"""The predictions of `denoised plan` against runs on this machine: every parallel method on two ranks, and one rank.

    python -m benchmarks.plan_check [--steps 4] [--rounds 3] [--only one cfg]
    python -m benchmarks.plan_check --predict        # again from what was measured before, after a change of the model

The machine is measured first (`planning/measuring.py`), by small products, copies and messages; nothing is fitted to
the runs. The result is docs/plan_check.json, from which `scripts/plan_table.py` makes the table in docs/plan.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Steps, qwen_image, saved, show
from benchmarks.scaling import METHODS
from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from denoised.runtime.plan import Ask, Hardware, ModelFacts, facts_of, measure, of_config, predict

RESULT = Path(__file__).parent.parent / "docs" / "plan_check.json"
LAYOUTS: dict[str, dict[str, Any]] = {"one": {}, **METHODS}
SIZE, TEXT_TOKENS = 512, 8  # pixels; of the short prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="keep the others")
    parser.add_argument("--predict", action="store_true", help="keep what was measured")
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {"seconds": {}}
    if not args.predict:
        found |= {"note": "", "machine": _machine(), "hardware": dataclasses.asdict(measure())}
        found["seconds"] |= measured(args.only, args.steps, args.rounds)
    found |= compared(found["seconds"], Hardware(**found["hardware"]))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    show("plan_check", {key: found[key] for key in ("rank_correlation", "median_error", "largest_error")})


def measured(names: list[str], steps: int, rounds: int) -> dict[str, float]:
    """The fastest step of each layout, in seconds; in turn: a slow minute of the machine hits one round."""
    pipeline = qwen_image(layers=6, heads=12, dtype=torch.bfloat16)
    folder = saved(pipeline)
    del pipeline
    found = dict.fromkeys(names, float("inf"))
    for _ in range(rounds):
        found = {name: min(seconds, fastest_step(folder, LAYOUTS[name], steps)) for name, seconds in found.items()}
    return found


def fastest_step(folder: str, degrees: dict[str, Any], steps: int) -> float:
    """Seconds between the ends of two steps: what disturbs a run only makes it slower."""
    params = OmniDiffusionSamplingParams(
        height=SIZE, width=SIZE, num_inference_steps=steps, true_cfg_scale=4.0, seed=0, output_type="latent"
    )
    parallel = DiffusionParallelConfig(**degrees)
    with Omni(folder, parallel_config=parallel, dtype="bfloat16", num_threads=1) as omni:
        run = Steps(omni)
        return min(second for _ in range(2) for second in run(params)[1])  # the first one warms up


def facts() -> ModelFacts:
    """What the plan knows of the benchmark's model."""
    ask = Ask(height=SIZE, width=SIZE, text_tokens=TEXT_TOKENS, branches=2)
    pipeline = qwen_image(layers=6, heads=12, dtype=torch.bfloat16)
    return facts_of(pipeline.to("meta"), ask, model="benchmark", dtype="bfloat16")


def compared(seconds: dict[str, float], hardware: Hardware) -> dict[str, Any]:
    """Predictions for what was measured, and how far off they are."""
    model = facts()
    predicted = {name: predict(_layout(name), model, hardware).step for name in seconds}
    errors = [abs(predicted[name] / seconds[name] - 1) for name in seconds]
    return {
        "predicted": predicted,
        "rank_correlation": rank_correlation(list(predicted.values()), list(seconds.values())),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
    }


def _layout(name: str) -> Any:
    return of_config(DiffusionParallelConfig(**LAYOUTS[name]))


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's: 1 if both have the same order."""
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    return statistics.correlation(*ranks)


def _machine() -> str:
    name = next((line.split(": ")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "")
    return f"{name or platform.machine()}, torch {torch.__version__.split('+')[0]}"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
