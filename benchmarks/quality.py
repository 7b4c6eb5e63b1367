"""What lossy settings cost in quality and gain in time, on real pictures of the built-in model.

    python -m benchmarks.quality [--steps 50] [--pictures 24] [--rounds 4] [--settings FILE.json] [--output DIR]

Every setting is compared with the same engine without it. Time: one request at a time, all settings in turn, so that a
slow minute of the machine hits all of them; ratios are medians of neighbouring runs. CPU seconds are those of this
process, where the one rank is a thread. Quality: pictures of captions that the model never saw; SSIM and PSNR to the
picture of the plain engine with the same seed, and the share of the pictures in which the judge of
`scripts/train_shapes` finds everything that the caption says (needs the extra `train`). LPIPS is not among them: its
weights are not in any package.

FILE.json: {"name": {keywords of Omni}, ...} in place of the settings below. DIR gets quality.json, quality.svg and
beside each setting's worst picture the one that it should be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from scripts.train_shapes.captions import Caption, claim_holds
from scripts.train_shapes.evaluate import held_out_captions
from scripts.train_shapes.judge import read_scene

from benchmarks.quality_plot import plot
from denoised import Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from denoised.errors import DenoisedError
from denoised.runtime.likeness import pictures, psnr, ssim

PLAIN = "plain"
_WARM = {"warmup_ratio": 0.16}
SETTINGS: dict[str, dict[str, Any]] = {
    "TeaCache 0.2": {"cache_backend": "tea_cache", "cache_config": _WARM | {"rel_l1_thresh": 0.2}},
    "TeaCache 0.4": {"cache_backend": "tea_cache", "cache_config": _WARM | {"rel_l1_thresh": 0.4}},
    "DBCache 0.35, 4 in a row": {
        "cache_backend": "cache_dit",
        "cache_config": _WARM | {"residual_diff_threshold": 0.35, "max_continuous_cached_steps": 4},
    },
    "MagCache 1.0": {"cache_backend": "mag_cache", "cache_config": {"threshold": 1.0, "max_skip_steps": 8}},
    'quality="high"': {"quality": "high"},
    'quality={"ssim": 0.95}': {"quality": {"ssim": 0.95}},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 weights": {"quantization": "int8_weight_only"},
}
SEED = 7_000


@dataclass(kw_only=True)
class Result:
    """One setting. Ratios are plain over this; times in seconds; a forward's in microseconds, None if there was none.

    loss: captions that come out right with the plain engine and wrong here, less those the other way round.
    """

    settings: dict[str, Any]
    speedup: float = 1.0
    denoise_speedup: float = 1.0
    cpu_speedup: float = 1.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    computed_us: float | None = None
    skipped_us: float | None = None
    skipped: float = 0.0
    ssim: float = 1.0
    worst_ssim: float = 1.0
    psnr: float | None = None
    right: float = 0.0
    loss: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One timed request."""

    seconds: float
    cpu_seconds: float
    denoise: float
    output: OmniRequestOutput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    asked = json.loads(args.settings.read_text()) if args.settings else SETTINGS
    folder = args.output or Path(tempfile.mkdtemp(prefix="denoised-quality-"))
    folder.mkdir(parents=True, exist_ok=True)
    engines, refused = _engines({PLAIN: {}} | asked)
    try:
        results = {name: Result(settings=({PLAIN: {}} | asked)[name]) for name in engines}
        _time(engines, results, args.steps, args.rounds)
        _judge(engines, results, args.steps, held_out_captions(1, args.pictures), folder)
    finally:
        for engine in engines.values():
            engine.close()
    _tell(results, refused, folder)


def _engines(asked: dict[str, dict[str, Any]]) -> tuple[dict[str, Omni], dict[str, str]]:
    """The engines, and why others cannot be."""
    engines: dict[str, Omni] = {}
    refused: dict[str, str] = {}
    for name, settings in asked.items():
        try:
            engines[name] = Omni(**({"model": "shapes", "num_threads": 1} | settings))
        except DenoisedError as error:
            refused[name] = str(error)
    return engines, refused


def _params(steps: int, seed: int) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(
        height=128, width=128, num_inference_steps=steps, true_cfg_scale=4.0, seed=seed, output_type="pil"
    )


def _ask(engine: Omni, texts: list[str], steps: int, seed: int) -> list[OmniRequestOutput]:
    params = [_params(steps, seed + number) for number in range(len(texts))]
    prompts = [{"prompt": text, "negative_prompt": ""} for text in texts]
    outputs: list[OmniRequestOutput] = engine.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        assert output.error is None, output.error
    return outputs


# ---- time


def _time(engines: dict[str, Omni], results: dict[str, Result], steps: int, rounds: int) -> None:
    text = held_out_captions(2, 1)[0].text
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            run = _run(engine, text, steps, number)
            runs[name] += [run] if number else []  # the first warms up
    for name, result in results.items():
        _rate(result, runs[name], runs[PLAIN])


def _run(engine: Omni, text: str, steps: int, seed: int) -> Run:
    began, cpu = time.perf_counter(), time.process_time()
    (output,) = _ask(engine, [text], steps, seed)
    return Run(
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu,
        denoise=output.stage_durations["denoise"],
        output=output,
    )


def _rate(result: Result, runs: list[Run], plain: list[Run]) -> None:
    def ratio(name: str) -> float:
        pairs = zip(plain, runs, strict=True)
        return statistics.median(getattr(a, name) / getattr(b, name) for a, b in pairs)

    result.speedup, result.denoise_speedup, result.cpu_speedup = map(ratio, ("seconds", "denoise", "cpu_seconds"))
    result.seconds = statistics.median(run.seconds for run in runs)
    result.cpu_seconds = statistics.median(run.cpu_seconds for run in runs)
    result.computed_us, result.skipped_us = _forwards(runs, plain)


def _forwards(runs: list[Run], plain: list[Run]) -> tuple[float | None, float | None]:
    """Microseconds of a computed forward of the plain engine, and of a skipped one here: what is left of the seconds
    of all forwards when the computed ones are taken off."""
    computed, left = [], []
    for run, other in zip(runs, plain, strict=True):
        one = _work(other)[0] / _work(other)[1]
        seconds, forwards, skipped = _work(run)
        computed.append(one)
        left += [(seconds - one * (forwards - skipped)) / skipped] if skipped else []
    return statistics.median(computed) * 1e6, statistics.median(left) * 1e6 if left else None


def _work(run: Run) -> tuple[float, int, int]:
    """Seconds of forwards, their number, and the number of those that were skipped."""
    assert run.output.receipt is not None
    (rank,) = run.output.receipt.ranks
    return rank.seconds, rank.forwards, rank.counts.get("cache_forwards_skipped", 0)


# ---- quality


def _judge(
    engines: dict[str, Omni], results: dict[str, Result], steps: int, captions: list[Caption], folder: Path
) -> None:
    texts = [caption.text for caption in captions]
    made = {name: _ask(engine, texts, steps, SEED) for name, engine in engines.items()}
    plain = [pictures(output) for output in made[PLAIN]]
    truth = [_right(caption, picture) for caption, picture in zip(captions, plain, strict=True)]
    for name, result in results.items():
        ours = [pictures(output) for output in made[name]]
        alike = [ssim(a, b)[0] for a, b in zip(ours, plain, strict=True)]
        right = [_right(caption, picture) for caption, picture in zip(captions, ours, strict=True)]
        noise = [psnr(a, b)[0] for a, b in zip(ours, plain, strict=True)]
        result.ssim, result.worst_ssim = statistics.mean(alike), min(alike)
        result.psnr = None if name == PLAIN else statistics.median(noise)
        result.right, result.loss = sum(right) / len(right), sum(truth) - sum(right)
        result.skipped = statistics.mean(_skipped(output) for output in made[name])
        result.notes = sorted({note for output in made[name] for note in _notes(output)})
        if name != PLAIN:
            worst = alike.index(min(alike))
            _beside(made[PLAIN][worst].images[0], made[name][worst].images[0], folder / f"{_plain_name(name)}.png")


def _right(caption: Caption, picture: torch.Tensor) -> bool:
    scene = read_scene(picture[0].float())
    return scene is not None and claim_holds(caption.claim, scene)


def _skipped(output: OmniRequestOutput) -> float:
    cache = output.receipt.cache if output.receipt is not None else None
    return cache["skipped"] / (cache["skipped"] + cache["computed"]) if cache else 0.0


def _notes(output: OmniRequestOutput) -> list[str]:
    return output.receipt.notes if output.receipt is not None else []


def _beside(plain: Image.Image, ours: Image.Image, path: Path) -> None:
    """What it should be, what it is."""
    both = Image.new("RGB", (2 * plain.width, plain.height))
    both.paste(plain, (0, 0))
    both.paste(ours, (plain.width, 0))
    both.save(path)


def _plain_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_").lower()


# ---- what was found


def _tell(results: dict[str, Result], refused: dict[str, str], folder: Path) -> None:
    told = {"benchmark": "quality", "results": {name: asdict(result) for name, result in results.items()}}
    told |= {"refused": refused}
    (folder / "quality.json").write_text(json.dumps(told, indent=1) + "\n")
    points = {name: (result.speedup, result.worst_ssim) for name, result in results.items()}
    (folder / "quality.svg").write_text(plot(points))
    print(json.dumps(told))
    Console(width=170).print(_table(results))
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    for name, result in results.items():
        for note in result.notes:
            print(f"{name}: {note}")
    print(folder)


def _table(results: dict[str, Result]) -> Table:
    table = Table(title="quality and speed, one request at a time, against the plain engine")
    heads = ("setting", "request", "denoise", "CPU", "skipped", "SSIM", "worst", "PSNR", "right", "lost", "µs skipped")
    for head in heads:
        table.add_column(head)
    for name, r in results.items():
        speeds = [f"{value:.2f}x" for value in (r.speedup, r.denoise_speedup, r.cpu_speedup)]
        noise = "" if r.psnr is None else f"{r.psnr:.1f}"
        cost = "" if r.skipped_us is None else f"{r.skipped_us:.0f} of {r.computed_us:.0f}"
        alike = [f"{r.ssim:.4f}", f"{r.worst_ssim:.4f}"]
        table.add_row(name, *speeds, f"{r.skipped:.0%}", *alike, noise, f"{r.right:.1%}", str(r.loss), cost)
    return table


if __name__ == "__main__":
    main()
