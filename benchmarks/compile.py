"""What compiling blocks gains, and what it costs before the first request.

    python -m benchmarks.compile [--steps 4] [--rounds 3] [--dtype bfloat16]

Two engines in one process, one that runs blocks as they are written and one that compiles them, requests in turn: the
built-in model, and a Qwen-Image transformer of about 100M random weights at 512 x 512. Then a size that neither the
settings nor an earlier request named, and rows joined, to count what has to be compiled again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.common import PROMPT, Steps, interleaved, num_parameters, qwen_image, ratio, saved, show
from denoised import Omni, OmniDiffusionSamplingParams, OmniRequestOutput

SETTINGS: dict[str, Any] = {"num_threads": 1, "encoder_cache_mb": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    show("compile: shapes", _compare("shapes", 128, args))
    pipeline = qwen_image(layers=6, heads=12, dtype=getattr(torch, args.dtype))
    size = {"parameters": num_parameters(pipeline.transformer), "dtype": args.dtype}
    show("compile: a Qwen-Image transformer", size | _compare(saved(pipeline), 512, args, dtype=args.dtype))


def _compare(model: str, side: int, args: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    started = time.perf_counter()
    with Omni(model, enforce_eager=True, **SETTINGS, **settings) as eager:
        eager_start, started = time.perf_counter() - started, time.perf_counter()
        with Omni(model, compile_shapes=(f"{side}x{side}",), **SETTINGS, **settings) as compiled:
            compile_start = time.perf_counter() - started
            seconds = _interleaved(eager, compiled, _params(side, args.steps), args.rounds)
            other = compiled.generate([PROMPT], _params(side // 2, args.steps), use_tqdm=False)
            joined = compiled.generate([PROMPT] * 3, _params(side, args.steps), use_tqdm=False)
    return {
        "seconds a step, as written": statistics.median(seconds["eager"]),
        "seconds a step, compiled": statistics.median(seconds["compiled"]),
        "speed-up": ratio(seconds["eager"], seconds["compiled"]),
        "seconds to start, as written": eager_start,
        "seconds to start, compiled": compile_start,
        "recompiles at another size": _recompiles(other),
        "recompiles with rows joined": _recompiles(joined),
    }


def _interleaved(
    eager: Omni, compiled: Omni, params: OmniDiffusionSamplingParams, rounds: int
) -> dict[str, list[float]]:
    """Median seconds of a step of each request, in turn."""
    variants = {
        "eager": lambda: statistics.median(Steps(eager)(params)[1]),
        "compiled": lambda: statistics.median(Steps(compiled)(params)[1]),
    }
    interleaved(variants, 1)  # warm up
    return interleaved(variants, rounds)


def _params(side: int, steps: int) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(
        height=side, width=side, num_inference_steps=steps, true_cfg_scale=4.0, seed=0, output_type="latent"
    )


def _recompiles(outputs: list[OmniRequestOutput]) -> int:
    assert all(output.error is None for output in outputs), [output.error for output in outputs]
    receipts = [output.receipt for output in outputs if output.receipt is not None]
    return sum(rank.counts.get("recompiles", 0) for receipt in receipts for rank in receipt.ranks)


if __name__ == "__main__":
    main()
