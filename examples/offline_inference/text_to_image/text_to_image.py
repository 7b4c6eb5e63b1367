"""Text to image with the Python API.

    python text_to_image.py --model Qwen/Qwen-Image --prompt "a cup of coffee on a table" --negative_prompt "blurry" \
        --cfg_scale 4.0 --num_inference_steps 50 --cfg_parallel_size 2 --output coffee.png

Without --model it draws with the small built-in one. Flags may be written with `-` or with `_`; what is left out stays
at the model's own default. Several images are saved as output, output_1, ...
"""

import argparse
import sys
from pathlib import Path

from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from denoised.errors import DenoisedError

PARALLEL = ("cfg_parallel_size", "ulysses_degree", "ring_degree", "tensor_parallel_size", "pipeline_parallel_size")
SWITCHES = (
    *("vae_use_slicing", "vae_use_tiling", "enforce_eager"),
    *("enable_cpu_offload", "enable_layerwise_offload"),
)


def main() -> None:
    args = parse_args()
    try:
        images, receipt = generate(args)
    except DenoisedError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for i, image in enumerate(images):
        path = args.output if i == 0 else args.output.with_stem(f"{args.output.stem}_{i}")
        image.save(path)
        print(f"Saved {path}")
    print(receipt)


def generate(args: argparse.Namespace) -> tuple[list, str]:
    if not args.output.parent.is_dir():
        raise DenoisedError(f"output={str(args.output)!r}: {args.output.parent} is no folder; make it first.")
    parallel = DiffusionParallelConfig(**{name: getattr(args, name) for name in PARALLEL})
    switches = {name: getattr(args, name) for name in SWITCHES}
    with Omni(args.model, parallel_config=parallel, cache_backend=args.cache_backend, **switches) as omni:
        params = sampling_params(args, omni.info.parameters)
        prompt = {"prompt": args.prompt}
        if args.negative_prompt is not None:
            prompt["negative_prompt"] = args.negative_prompt
        [output] = omni.generate(prompt, params)
    if output.error is not None:
        raise DenoisedError(output.error)
    return output.images, output.receipt.line()


def sampling_params(args: argparse.Namespace, parameters: frozenset[str]) -> OmniDiffusionSamplingParams:
    names = ("seed", "height", "width", "num_inference_steps", "guidance_scale")
    given = {name: getattr(args, name) for name in names}
    if args.cfg_scale is not None:
        # Models without true CFG of their own have the same scale under the name guidance_scale.
        given["true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"] = args.cfg_scale
    return OmniDiffusionSamplingParams(num_outputs_per_prompt=args.num_images_per_prompt, **given)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="shapes", help="hub id, folder in diffusers layout, or built-in model")
    add("--prompt", default="a large red circle above a small blue square", help="text description")
    add("--negative-prompt", default=None, help="what to keep out; true CFG needs one, and it may be empty")
    add("--seed", type=int, default=42, help="seed of the noise")
    add("--cfg-scale", type=float, default=None, help="classifier-free guidance; acts above 1")
    add("--guidance-scale", type=float, default=None, help="scale that guidance-distilled models take as an input")
    add("--num-images-per-prompt", type=int, default=1, help="images of the prompt")
    add("--num-inference-steps", type=int, default=None, help="denoising steps")
    add("--height", type=int, default=None, help="pixels")
    add("--width", type=int, default=None, help="pixels")
    add("--output", type=Path, default=Path("output.png"), help="file to save the image to")
    add("--cache-backend", default=None, help="cache_dit or tea_cache")
    for name in PARALLEL:
        add("--" + name.replace("_", "-"), type=int, default=1, help="ranks on this axis")
    for name in SWITCHES:
        add("--" + name.replace("_", "-"), action="store_true", help="as in Omni(...)")
    return parser.parse_args([with_dashes(argument) for argument in sys.argv[1:]])


def with_dashes(argument: str) -> str:
    """`--cfg_scale=4` as `--cfg-scale=4`; values stay as they are."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


if __name__ == "__main__":
    main()
