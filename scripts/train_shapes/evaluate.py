"""Measures the exported model through the plain diffusers pipeline, on captions whose content it never saw.

A picture counts as right if everything its caption says holds: count, shapes, colours, sizes, places, background.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from torch import Tensor

from .captions import Caption, Claim, Mention, claim_holds, describe, is_held_out
from .judge import colors_in, read_scene
from .render import render
from .scenes import CELLS, COLORS, SHAPES, SIZES, Scene, sample_scene, scene_at
from .train import DESTINATION

RESULTS = Path(__file__).with_name("results.json")
JUDGE_SCENES = 3_000_000  # first index of the scenes on which the judge is tested
NEUTRAL = " "
OPEN_PROMPTS = ("two shapes", "three colorful shapes", "two objects", "three shapes", "a circle", "two stars")
GUIDANCES = (1.0, 2.0, 4.0, 6.0, 8.0)
STEPS = (4, 8, 20, 50)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    folder: Path = DESTINATION
    seed: int = 1
    batch_size: int = 32
    num_main: int = 320  # pictures at the main setting
    num_cell: int = 48  # pictures per cell of the table
    num_negative: int = 96  # pictures with and without the negative prompt
    guidance: float = 4.0
    steps: int = 20


def held_out_captions(seed: int, count: int) -> list[Caption]:
    rng, captions = random.Random(f"held-out-{seed}"), []
    while len(captions) < count:
        caption = describe(rng, sample_scene(rng))
        if is_held_out(caption.claim):
            captions.append(caption)
    return captions


def generate(
    pipeline: QwenImagePipeline, prompts: Sequence[str], settings: Evaluation, *, negative: str = NEUTRAL
) -> Tensor:
    """Pictures `[prompt, rgb, y, x]` in 0..1."""
    pictures = []
    for first in range(0, len(prompts), settings.batch_size):
        chosen = list(prompts[first : first + settings.batch_size])
        result = pipeline(
            prompt=chosen,
            negative_prompt=[negative] * len(chosen),
            true_cfg_scale=settings.guidance,
            num_inference_steps=settings.steps,
            height=128,
            width=128,
            generator=torch.Generator().manual_seed(settings.seed * 10_000 + first),
            output_type="pt",
        )
        pictures.append(result.images.float())
    return torch.cat(pictures)


def accuracy(captions: Sequence[Caption], scenes: Sequence[Scene | None]) -> float:
    pairs = zip(captions, scenes, strict=True)
    return sum(scene is not None and claim_holds(caption.claim, scene) for caption, scene in pairs) / len(captions)


def by_attribute(captions: Sequence[Caption], scenes: Sequence[Scene | None]) -> dict[str, float]:
    """Accuracy of one kind of statement alone, over the captions that make it."""
    table = {}
    for name, only in PARTS.items():
        reduced = [replace(caption, claim=only(caption.claim)) for caption in captions]
        pairs = [(caption, scene) for caption, scene in zip(reduced, scenes, strict=True) if caption.claim != Claim()]
        table[name] = round(accuracy(*zip(*pairs, strict=True)), 4)
    return table


def by_place(captions: Sequence[Caption], scenes: Sequence[Scene | None]) -> dict[str, float]:
    """Accuracy of captions that say where every object is, and of those that leave it to the model."""
    table = {}
    for name, wanted in (("said", True), ("open", False)):
        pairs = [pair for pair in zip(captions, scenes, strict=True) if _is_placed(pair[0]) == wanted]
        table[name] = round(accuracy(*zip(*pairs, strict=True)), 4)
    return table


def _is_placed(caption: Caption) -> bool:
    return all(mention.cell for mention in caption.claim.mentions)


def _only_mentions(attribute: str) -> Callable[[Claim], Claim]:
    def reduce(claim: Claim) -> Claim:
        mentions = [Mention(**{attribute: getattr(mention, attribute)}) for mention in claim.mentions]
        return Claim(mentions=tuple(mention for mention in mentions if mention != Mention()))

    return reduce


PARTS: dict[str, Callable[[Claim], Claim]] = {
    "count": lambda claim: Claim(count=claim.count),
    "shapes": _only_mentions("shape"),
    "colors": _only_mentions("color"),
    "sizes": _only_mentions("size"),
    "places": _only_mentions("cell"),
    "background": lambda claim: Claim(background=claim.background),
}


@torch.no_grad()
def check_judge(vae: AutoencoderKLQwenImage, count: int = 256) -> dict[str, float]:
    """Captions of real scenes, decoded by the VAE, must hold; with one word exchanged they must not."""
    rng = random.Random("judge")
    truth = [scene_at(0, JUDGE_SCENES + index) for index in range(count)]
    captions = [describe(rng, scene) for scene in truth]
    wrong = [_exchange_word(rng, caption, scene) for caption, scene in zip(captions, truth, strict=True)]
    pictures = render(truth)[:, :, None].to(vae.dtype)
    decoded = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pictures.split(16)]
    scenes = [read_scene(picture) for picture in (torch.cat(decoded)[:, :, 0].float() + 1) / 2]
    return {
        "pictures": count,
        "true_accepted": round(accuracy(captions, scenes), 4),
        "one_word_wrong_accepted": round(accuracy(wrong, scenes), 4),
    }


def _exchange_word(rng: random.Random, caption: Caption, scene: Scene) -> Caption:
    """The caption with another shape, colour, size or place for one object, such that it is false of the scene."""
    values: dict[str, Sequence[Any]] = {"shape": SHAPES, "color": list(COLORS), "size": SIZES, "cell": CELLS}
    while True:
        mentions = list(caption.claim.mentions)
        index, name = rng.randrange(len(mentions)), rng.choice(list(values))
        mentions[index] = replace(mentions[index], **{name: rng.choice(values[name])})
        claim = replace(caption.claim, mentions=tuple(mentions))
        if not claim_holds(claim, scene):
            return replace(caption, claim=claim)


def negative_prompt(pipeline: QwenImagePipeline, settings: Evaluation) -> dict[str, float]:
    """How many pictures of prompts that leave the colour open have something red, without and with the negative."""
    prompts = [OPEN_PROMPTS[index % len(OPEN_PROMPTS)] for index in range(settings.num_negative)]
    shares = {}
    for name, negative in (("without", NEUTRAL), ("with", "red")):
        pictures = generate(pipeline, prompts, settings, negative=negative)
        shares[f"red_{name}"] = round(sum("red" in colors_in(picture) for picture in pictures) / len(pictures), 4)
    return {"pictures": settings.num_negative, **shares}


def table(pipeline: QwenImagePipeline, settings: Evaluation) -> Iterator[dict[str, float]]:
    captions = held_out_captions(settings.seed + 1, settings.num_cell)
    prompts = [caption.text for caption in captions]
    for guidance in GUIDANCES:
        for steps in STEPS:
            pictures = generate(pipeline, prompts, replace(settings, guidance=guidance, steps=steps))
            right = accuracy(captions, [read_scene(picture) for picture in pictures])
            yield {"guidance": guidance, "steps": steps, "accuracy": round(right, 4)}


def load_pipeline(folder: Path) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main_setting(pipeline: QwenImagePipeline, settings: Evaluation) -> dict[str, object]:
    captions = held_out_captions(settings.seed, settings.num_main)
    scenes = [read_scene(picture) for picture in generate(pipeline, [caption.text for caption in captions], settings)]
    failures = [
        caption.text
        for caption, scene in zip(captions, scenes, strict=True)
        if scene is None or not claim_holds(caption.claim, scene)
    ]
    return {
        "guidance": settings.guidance,
        "steps": settings.steps,
        "pictures": len(captions),
        "accuracy": round(accuracy(captions, scenes), 4),
        "by_place": by_place(captions, scenes),
        "by_attribute": by_attribute(captions, scenes),
        "failures": failures[:20],
    }


MEASUREMENTS: dict[str, Callable[[QwenImagePipeline, Evaluation], object]] = {
    "main": main_setting,
    "judge": lambda pipeline, settings: check_judge(pipeline.vae),
    "negative_prompt": negative_prompt,
    "table": lambda pipeline, settings: list(table(pipeline, settings)),
}


def record(name: str, value: object) -> None:
    """Replaces one measurement; the others stay, so that several can be made side by side."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {key: value if key == name else results.get(key) for key in MEASUREMENTS}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.train_shapes.evaluate", description=__doc__)
    parser.add_argument("--folder", type=Path, default=DESTINATION)
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--dry", type=int, metavar="N", help="the main setting on N pictures only; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Evaluation(folder=options.folder)
    pipeline = load_pipeline(settings.folder)
    if options.dry:
        print(json.dumps(main_setting(pipeline, replace(settings, num_main=options.dry)), indent=1))
        return
    for name in options.only:
        value = MEASUREMENTS[name](pipeline, settings)
        print(name, json.dumps(value), flush=True)
        record(name, value)


if __name__ == "__main__":
    main()
