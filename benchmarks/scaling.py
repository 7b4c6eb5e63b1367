"""Every parallel method: two ranks of one thread against one, transformers of about 100M random weights.

    python -m benchmarks.scaling [--steps 4] [--rounds 3] [--size 512] [--only ulysses tensor]

Per step: time between the ends of two steps, as a ratio of interleaved runs; an ideal method gives 2. Guidance is on:
two rows a step, which is what lets the stages of a pipeline overlap.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.common import Steps, interleaved, num_parameters, qwen_image, ratio, saved, show
from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

METHODS: dict[str, dict[str, Any]] = {
    "cfg": {"cfg_parallel_size": 2},
    "ulysses": {"ulysses_degree": 2, "ulysses_mode": "advanced_uaa"},
    "ring": {"ring_degree": 2},
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "hsdp over cfg": {"cfg_parallel_size": 2, "use_hsdp": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    pipeline = qwen_image(layers=6, heads=12, dtype=torch.bfloat16)
    results: dict[str, Any] = {"parameters": num_parameters(pipeline.transformer), "size": args.size}
    folder = saved(pipeline)
    del pipeline
    params = OmniDiffusionSamplingParams(
        height=args.size,
        width=args.size,
        num_inference_steps=args.steps,
        true_cfg_scale=4.0,
        seed=0,
        output_type="latent",
    )
    for method in args.only:
        results |= compare(folder, method, params, args.rounds)
    show("scaling", results)


def compare(folder: str, method: str, params: OmniDiffusionSamplingParams, rounds: int) -> dict[str, Any]:
    """One method against one rank, in turn."""
    steps: dict[str, list[float]] = {"one": [], "two": []}
    outputs = {}
    with _omni(folder, {}) as one, _omni(folder, METHODS[method]) as two:
        runs = {"one": Steps(one), "two": Steps(two)}

        def timed(name: str) -> float:
            outputs[name], seconds = runs[name](params)
            steps[name].append(statistics.median(seconds))
            return steps[name][-1]

        for name in runs:  # warm up
            timed(name)
            steps[name].clear()
        interleaved({name: lambda name=name: timed(name) for name in runs}, rounds)  # type: ignore[misc]
    one_latents, two_latents = outputs["one"].latents, outputs["two"].latents
    return {
        f"{method}: seconds per step, one rank": statistics.median(steps["one"]),
        f"{method}: speed-up per step": ratio(steps["one"], steps["two"]),
        f"{method}: largest difference": float((one_latents - two_latents).abs().max() / one_latents.abs().max()),
    }


def _omni(folder: str, degrees: dict[str, Any]) -> Omni:
    return Omni(folder, parallel_config=DiffusionParallelConfig(**degrees), dtype="bfloat16", num_threads=1)


if __name__ == "__main__":
    main()
