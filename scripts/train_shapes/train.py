"""Runs the stages in order; each goes on from its checkpoint, and a finished one is skipped."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .config import Config
from .data import encode_captions, encode_latents
from .denoiser import train_denoiser
from .export import export
from .text_encoder import train_text_encoder
from .tokenizer import train_tokenizer
from .vae import train_vae

DESTINATION = Path(__file__).parents[2] / "src" / "denoised" / "models" / "shapes"
STAGES: dict[str, Callable[[Config], None]] = {
    "tokenizer": train_tokenizer,
    "text": train_text_encoder,
    "vae": train_vae,
    "latents": encode_latents,
    "captions": encode_captions,
    "denoiser": train_denoiser,
    "export": lambda config: export(config, DESTINATION),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.train_shapes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of logs, checkpoints and intermediate data")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    config = Config(out=options.out, seed=options.seed)
    for stage in options.stages:
        print("stage", stage, flush=True)
        STAGES[stage](config)


if __name__ == "__main__":
    main()
