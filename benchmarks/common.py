"""Models, timing and printing that benchmarks share."""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from rich.console import Console
from rich.table import Table
from tests.tiny import ROWS

from denoised import Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from denoised.outputs import Progress

PROMPT = {"prompt": "a cat sits on the table", "negative_prompt": "two red birds over a lake"}


def qwen_image(*, layers: int, heads: int, dtype: torch.dtype, text_width: int | None = None) -> Any:
    """A Qwen-Image pipeline: a random transformer of `layers` blocks with `heads` heads of 64; the rest small, but for
    a text encoder of 12 layers of `text_width` if that is given."""
    pipeline = ROWS["qwen_image"].build()
    text_encoder = pipeline.text_encoder if text_width is None else _text_encoder(pipeline.text_encoder, text_width)
    old = pipeline.transformer.config
    torch.manual_seed(0)
    pipeline.transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=old.in_channels,
        out_channels=old.out_channels,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=text_width or old.joint_attention_dim,
        axes_dims_rope=(16, 24, 24),
    ).eval()
    channels = old.out_channels
    # Eight pixels a latent, as the published VAE has: 512 x 512 is 1,024 tokens.
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    ).eval()
    pipeline = type(pipeline)(**{**pipeline.components, "vae": vae, "text_encoder": text_encoder})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(dtype)


def _text_encoder(small: Any, width: int) -> Any:
    """One of the same class, tokens and heads' size, with random weights."""
    config = copy.deepcopy(small.config)
    heads = width * config.text_config.num_attention_heads // config.text_config.hidden_size
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 12}
    config.text_config.update(sizes | {"num_attention_heads": heads, "num_key_value_heads": heads})
    config.text_config.layer_types = ["full_attention"] * 12
    config.vision_config.out_hidden_size = width
    return type(small)(config).eval()


def saved(pipeline: Any) -> str:
    """The pipeline as a folder, for ranks in other processes."""
    folder = Path(tempfile.mkdtemp(prefix="denoised-bench-"))
    pipeline.save_pretrained(folder)
    return str(folder)


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Steps:
    """Runs one request and notes when each step ended."""

    def __init__(self, omni: Omni) -> None:
        self._omni = omni

    def __call__(self, params: OmniDiffusionSamplingParams) -> tuple[OmniRequestOutput, list[float]]:
        import queue

        inbox: queue.SimpleQueue[Progress | OmniRequestOutput] = queue.SimpleQueue()
        self._omni._client.submit(self._omni._request(self._omni._next_id(), PROMPT, params), inbox.put)
        times = []
        while not isinstance(event := inbox.get(), OmniRequestOutput):
            times.append(time.perf_counter())
        if event.error:
            raise RuntimeError(event.error)
        return event, [b - a for a, b in zip(times, times[1:], strict=False)]


def interleaved(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, `rounds` times, in turn: a slow minute of the machine hits all of them."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            results[name].append(run())
    return results


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def show(title: str, rows: dict[str, Any]) -> None:
    """JSON on standard output, then the same as a table."""
    print(json.dumps({"benchmark": title, **rows}))
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
