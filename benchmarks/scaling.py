"""Every parallel method: two ranks of one thread against one, on transformers of 105M to 155M weights.

    python -m benchmarks.scaling [--steps 4] [--rounds 3] [--only tensor] [--model image deep video vae]

    image   512 x 512, 4 blocks of width 1,024: nearer to the widths in use (1,536 to 3,072) than
    deep    the same picture, 16 blocks of width 512, which stages can be cut from
    video   17 frames of 384 x 384, 4 blocks of width 1,280
    vae     tiles of a picture of 512 x 1,024

Per step: time between the ends of two steps, as a ratio of interleaved runs; an ideal method on an ideal machine gives
2. The fastest steps are compared, too: what disturbs a machine can only make a step slower. What this machine gives is
measured as well: two processes that share nothing multiply matrices at once. Guidance is on: two rows a step, which is
what lets the stages of a pipeline overlap. Where ranks wait for stages, the share of their time is given: unlike
seconds, it does not depend on who else uses the machine, as long as both ranks suffer alike.

Memory: MB that a rank holds at most in a request, over what its process held before (benchmarks/resident.py).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from typing import Any

import torch
from tests.ranks import run_on_ranks

from benchmarks.common import Steps, interleaved, num_parameters, qwen_image, ratio, saved, show
from benchmarks.resident import most_held
from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

METHODS: dict[str, dict[str, Any]] = {
    "cfg": {"cfg_parallel_size": 2},
    "ulysses": {"ulysses_degree": 2, "ulysses_mode": "advanced_uaa"},
    "ring": {"ring_degree": 2},
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "hsdp over cfg": {"cfg_parallel_size": 2, "use_hsdp": True},
}
DIVIDES_WEIGHTS = ("tensor", "pipeline", "hsdp over cfg")
SUITED = {
    "image": ("cfg", "ulysses", "ring", "tensor"),
    "deep": ("ulysses", "ring", "tensor", "pipeline", "hsdp over cfg"),
    "video": ("ulysses", "ring", "tensor"),
}
MODELS = ("image", "deep", "video", "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="default: those that suit the model")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    args = parser.parse_args()
    results: dict[str, Any] = {"the machine: two processes that share nothing": machine(args.rounds)}
    for model in (name for name in args.model if name != "vae"):
        folder, results[f"{model}: parameters"] = _elsewhere(model)
        params = _params(model, args.steps)
        for method in args.only or SUITED[model]:
            found = compare(folder, method, params, args.rounds)
            print(f"{model}, {method}: {found['speed-up per step']:.2f}", file=sys.stderr, flush=True)
            results |= {f"{model}, {method}: {name}": value for name, value in found.items()}
    if "vae" in args.model:
        results |= decode(512, args.rounds)
    show("scaling", results)


def compare(folder: str, method: str, params: OmniDiffusionSamplingParams, rounds: int) -> dict[str, Any]:
    """One method against one rank, in turn."""
    medians: dict[str, list[float]] = {"one": [], "two": []}
    fastest: dict[str, list[float]] = {"one": [], "two": []}
    outputs = {}
    with _omni(folder, {}) as one, _omni(folder, METHODS[method]) as two:
        runs = {"one": Steps(one), "two": Steps(two)}

        def timed(name: str) -> float:
            outputs[name], seconds = runs[name](params)
            fastest[name].append(min(seconds))
            medians[name].append(statistics.median(seconds))
            return medians[name][-1]

        for name in runs:  # warm up
            timed(name)
            medians[name].clear()
        interleaved({name: lambda name=name: timed(name) for name in runs}, rounds)  # type: ignore[misc]
    one_latents, two_latents = outputs["one"].latents, outputs["two"].latents
    found: dict[str, Any] = {
        "seconds per step, one rank": statistics.median(medians["one"]),
        "speed-up per step": ratio(medians["one"], medians["two"]),
        "speed-up of the fastest step": min(fastest["one"]) / min(fastest["two"]),
        "largest difference": float((one_latents - two_latents).abs().max() / one_latents.abs().max()),
    }
    idle = [work.idle_seconds / work.seconds for work in outputs["two"].receipt.ranks]
    if any(idle):
        found["share of time that ranks waited for stages"] = ", ".join(f"{share:.3f}" for share in idle)
    if method in DIVIDES_WEIGHTS:
        (found["MB, one rank"],) = most_held(folder, {}, params)
        of_two = most_held(folder, METHODS[method], params)
        found["MB, each of two ranks"] = ", ".join(f"{size:.0f}" for size in of_two)
    return found


def _omni(folder: str, degrees: dict[str, Any]) -> Omni:
    return Omni(folder, parallel_config=DiffusionParallelConfig(**degrees), dtype="bfloat16", num_threads=1)


def _params(model: str, steps: int) -> OmniDiffusionSamplingParams:
    shared: dict[str, Any] = {"num_inference_steps": steps, "seed": 0, "output_type": "latent"}
    if model == "video":
        return OmniDiffusionSamplingParams(height=384, width=384, num_frames=17, guidance_scale=4.0, **shared)
    return OmniDiffusionSamplingParams(height=512, width=512, true_cfg_scale=4.0, **shared)


def _elsewhere(model: str) -> tuple[str, int]:
    """The model's folder and size, made in another process, so that this one's memory does not tell of it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_made, (model,))


def _made(model: str) -> tuple[str, int]:
    layers, heads = {"image": (4, 16), "deep": (16, 8), "video": (4, 20)}[model]
    made = _wan if model == "video" else qwen_image
    pipeline = made(layers=layers, heads=heads, dtype=torch.bfloat16)
    return saved(pipeline), num_parameters(pipeline.transformer)


def _wan(*, layers: int, heads: int, dtype: torch.dtype) -> Any:
    """A Wan pipeline for videos of 4 x 8 x 8 pixels a latent."""
    from diffusers import WanPipeline, WanTransformer3DModel
    from tests.tiny import encoders, wan

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=wan.CHANNELS,
        out_channels=wan.CHANNELS,
        text_dim=encoders.WIDTH,
        ffn_dim=4 * 64 * heads,
        num_layers=layers,
        rope_max_seq_len=64,
    ).eval()
    return WanPipeline(**wan.components(), transformer=transformer).to(dtype)


# The machine itself


def machine(rounds: int) -> float:
    """What two ranks could give at best: seconds of a product on one, over half of those when both do it at once."""
    ratios = []
    for _ in range(rounds):
        one = run_on_ranks(multiplied, 1, timeout=300)
        two = run_on_ranks(multiplied, 2, timeout=300)
        ratios.append(2 * one[0] / max(two))
    return statistics.median(ratios)


def multiplied(rank: int, num_ranks: int) -> float:
    """Seconds of products as those of the image model, in every rank at once."""
    import torch.distributed as dist

    x, weight = torch.randn(1024, 1024).bfloat16(), torch.randn(4096, 1024).bfloat16()
    for _ in range(20):
        torch.nn.functional.linear(x, weight)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(100):
        torch.nn.functional.linear(x, weight)
    return time.perf_counter() - started


# Tiles of a VAE


def decode(size: int, rounds: int) -> dict[str, Any]:
    """The same tiles on one rank and on two."""
    seconds: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(rounds):
        one, two = (run_on_ranks(decoded, ranks, size, timeout=300) for ranks in (1, 2))
        seconds["one"].append(one[0][0])
        seconds["two"].append(max(found[0] for found in two))
    return {
        "vae: seconds of a decode, one rank": statistics.median(seconds["one"]),
        "vae: speed-up": ratio(seconds["one"], seconds["two"]),
        "vae: largest difference": float((one[0][1] - two[1][1]).abs().max() / one[0][1].abs().max()),
    }


def decoded(rank: int, num_ranks: int, size: int) -> tuple[float, torch.Tensor]:
    """Seconds, and the picture: tiles of a quarter of its area and more, which overlap."""
    import torch.distributed as dist

    from denoised.features import vae_patch

    vae = _vae()
    vae.enable_tiling()
    assert dist.group.WORLD is not None
    if num_ranks > 1:
        vae_patch.apply(vae, dist.group.WORLD)
    latents = torch.randn(1, 4, size // 8, size * 2 // 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dist.barrier()
        started = time.perf_counter()
        picture = vae.decode(latents).sample
    return time.perf_counter() - started, picture


def _vae() -> Any:
    """Of the usual four levels, with a quarter of the usual channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        latent_channels=4,
        layers_per_block=2,
        sample_size=256,
    ).eval()


if __name__ == "__main__":
    main()
