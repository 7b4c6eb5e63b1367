"""What the engine costs against plain `pipe(**kwargs)`, and what it gains where it can reuse or join.

    python -m benchmarks.overhead [--steps 10] [--rounds 5]

Same process, same threads, same model. One request of a model of about 40M random weights at 256x256; the encoding of
prompts seen before, with a text encoder of about 200M weights; eight small pictures of the built-in model, joined
against eight in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmarks.common import PROMPT, interleaved, num_parameters, qwen_image, ratio, saved, show
from denoised import Omni, OmniDiffusionSamplingParams
from denoised.runtime.load import BUILTIN

SHAPES = [
    {"prompt": f"a large {color} circle above a small square", "negative_prompt": "blurry"}
    for color in ("red", "blue", "green", "yellow", "purple", "orange", "pink", "cyan")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    one, eight = _one_request(args.steps, args.rounds), _eight_requests(args.steps, args.rounds)
    show("overhead", one | _reuse(args.rounds) | eight)


def _one_request(steps: int, rounds: int) -> dict[str, Any]:
    pipeline = qwen_image(layers=4, heads=8, dtype=torch.float32)
    folder = saved(pipeline)
    with Omni(folder, num_threads=1, encoder_cache_mb=0) as engine:
        variants = {
            "plain": lambda: _plain(pipeline, [PROMPT], 256, steps),
            "engine": lambda: _engine(engine, [PROMPT], 256, steps),
        }
        interleaved(variants, 1)  # warm up
        seconds = interleaved(variants, rounds)
    return {
        "parameters": num_parameters(pipeline.transformer),
        "one request, plain pipeline: seconds": statistics.median(seconds["plain"]),
        "one request, engine over plain": ratio(seconds["engine"], seconds["plain"]),
    }


def _reuse(rounds: int) -> dict[str, Any]:
    """Seconds of the encoding stage, from the receipts."""
    folder = saved(qwen_image(layers=1, heads=2, dtype=torch.float32, text_width=1024))
    with Omni(folder, num_threads=1) as reuse, Omni(folder, num_threads=1, encoder_cache_mb=0) as anew:
        variants = {"reuse": lambda: _encoding(reuse), "anew": lambda: _encoding(anew)}
        interleaved(variants, 1)  # warm up, and the prompt is seen
        seconds = interleaved(variants, rounds)
    return {
        "encoding a prompt and a negative prompt: seconds": statistics.median(seconds["anew"]),
        "the same, prompts seen before: seconds": statistics.median(seconds["reuse"]),
    }


def _encoding(omni: Omni) -> float:
    params = OmniDiffusionSamplingParams(
        height=64, width=64, num_inference_steps=1, true_cfg_scale=4.0, seed=0, output_type="latent"
    )
    (output,) = omni.generate([PROMPT], params, use_tqdm=False)
    assert output.error is None, output.error
    return output.stage_durations["encode"]


def _eight_requests(steps: int, rounds: int) -> dict[str, Any]:
    pipeline = DiffusionPipeline.from_pretrained(BUILTIN["shapes"], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with Omni(num_threads=1) as joined, Omni(num_threads=1, max_num_seqs=1) as in_turn:
        variants = {
            "plain": lambda: _plain(pipeline, SHAPES, 128, steps),
            "in turn": lambda: _engine(in_turn, SHAPES, 128, steps),
            "joined": lambda: _engine(joined, SHAPES, 128, steps),
        }
        interleaved(variants, 1)  # warm up
        seconds = interleaved(variants, rounds)
    return {
        "eight small pictures, plain in turn: seconds": statistics.median(seconds["plain"]),
        "eight small pictures, speed-up of the engine in turn": ratio(seconds["plain"], seconds["in turn"]),
        "eight small pictures, speed-up of the engine joined": ratio(seconds["plain"], seconds["joined"]),
    }


def _plain(pipeline: Any, prompts: list[dict[str, str]], size: int, steps: int) -> float:
    started = time.perf_counter()
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": steps, "true_cfg_scale": 4.0, "output_type": "latent"}
        pipeline(**prompt, height=size, width=size, generator=generator, **settings)
    return time.perf_counter() - started


def _engine(omni: Omni, prompts: list[dict[str, str]], size: int, steps: int) -> float:
    settings: dict[str, Any] = {"num_inference_steps": steps, "true_cfg_scale": 4.0, "output_type": "latent"}
    params = [OmniDiffusionSamplingParams(height=size, width=size, seed=i, **settings) for i in range(len(prompts))]
    started = time.perf_counter()
    outputs = omni.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    assert not any(output.error for output in outputs)
    return seconds


if __name__ == "__main__":
    main()
