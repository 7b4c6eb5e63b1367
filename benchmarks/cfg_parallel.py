"""CFG parallelism: two ranks of one thread against one, a Qwen-Image transformer of about 100M random weights.

    python -m benchmarks.cfg_parallel [--steps 8] [--rounds 3] [--size 512]

Per step: time between the ends of two steps. Loop: the whole request without encoding and decoding.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.common import Steps, interleaved, num_parameters, qwen_image, ratio, saved, show
from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args()

    pipeline = qwen_image(layers=5, heads=12, dtype=torch.bfloat16)
    parameters, folder = num_parameters(pipeline.transformer), saved(pipeline)
    del pipeline
    params = OmniDiffusionSamplingParams(
        height=args.size,
        width=args.size,
        num_inference_steps=args.steps,
        true_cfg_scale=4.0,
        seed=0,
        output_type="latent",
    )
    steps: dict[str, list[float]] = {"one": [], "two": []}
    latents = {}
    with _omni(folder, 1) as one, _omni(folder, 2) as two:
        runs = {"one": Steps(one), "two": Steps(two)}

        def timed(name: str) -> float:
            output, seconds = runs[name](params)
            steps[name].append(statistics.median(seconds))
            latents[name] = output.latents
            return output.metrics["seconds"] - output.stage_durations["encode"] - output.stage_durations["decode"]

        for name in runs:  # warm up
            timed(name)
            steps[name].clear()
        loops = interleaved({name: lambda name=name: timed(name) for name in runs}, args.rounds)  # type: ignore[misc]
    show(
        "cfg_parallel",
        {
            "parameters": parameters,
            "size": args.size,
            "steps": args.steps,
            "seconds per step, one rank": statistics.median(steps["one"]),
            "seconds per step, two ranks": statistics.median(steps["two"]),
            "speed-up per step": ratio(steps["one"], steps["two"]),
            "speed-up of the loop": ratio(loops["one"], loops["two"]),
            "largest difference": float((latents["one"] - latents["two"]).abs().max()),
        },
    )


def _omni(folder: str, ranks: int) -> Omni:
    parallel = DiffusionParallelConfig(cfg_parallel_size=ranks)
    return Omni(folder, parallel_config=parallel, dtype="bfloat16", num_threads=1)


if __name__ == "__main__":
    main()
