"""What the engine costs against plain `pipe(**kwargs)`, and what it gains where it can reuse or join.

    python -m benchmarks.overhead [--steps 10] [--rounds 5]

Same process, same threads, same model: one request; the same prompt again (encoder reuse); eight small images joined
against eight in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.common import PROMPT, interleaved, qwen_image, ratio, saved, show
from denoised import Omni, OmniDiffusionSamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    pipeline = qwen_image(layers=4, heads=8, dtype=torch.float32)
    folder = saved(pipeline)
    torch.set_num_threads(1)
    with (
        Omni(folder, num_threads=1) as joined,
        Omni(folder, num_threads=1, max_num_seqs=1, encoder_cache_mb=0) as alone,
    ):

        def plain(size: int = 256, count: int = 1) -> float:
            started = time.perf_counter()
            for seed in range(count):
                pipeline(
                    **PROMPT,
                    height=size,
                    width=size,
                    num_inference_steps=args.steps,
                    true_cfg_scale=4.0,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="latent",
                )
            return time.perf_counter() - started

        def engine(omni: Omni, size: int = 256, count: int = 1) -> float:
            params = [_params(args.steps, size, seed) for seed in range(count)]
            started = time.perf_counter()
            outputs = omni.generate([PROMPT] * count, params, use_tqdm=False)
            assert not any(o.error for o in outputs)
            return time.perf_counter() - started

        engine(joined), engine(alone), plain()  # warm up
        one = interleaved(
            {"plain": plain, "engine": lambda: engine(alone), "reuse": lambda: engine(joined)}, args.rounds
        )
        eight = interleaved(
            {
                "plain": lambda: plain(64, 8),
                "in turn": lambda: engine(alone, 64, 8),
                "joined": lambda: engine(joined, 64, 8),
            },
            args.rounds,
        )
    show(
        "overhead",
        {
            "seconds, plain pipeline": statistics.median(one["plain"]),
            "engine over plain, one request": ratio(one["engine"], one["plain"]),
            "engine over plain, prompt seen before": ratio(one["reuse"], one["plain"]),
            "eight small images: seconds, plain in turn": statistics.median(eight["plain"]),
            "speed-up, engine in turn": ratio(eight["plain"], eight["in turn"]),
            "speed-up, engine joined": ratio(eight["plain"], eight["joined"]),
        },
    )


def _params(steps: int, size: int, seed: int) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(
        height=size, width=size, num_inference_steps=steps, true_cfg_scale=4.0, seed=seed, output_type="latent"
    )


if __name__ == "__main__":
    main()
