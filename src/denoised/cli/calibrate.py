"""`denoised calibrate`: finds out what caches need to know of a model, and what they do to its pictures, and writes it
down."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from denoised.cli.flags import ENGINE, PARALLEL, SAMPLING, given, with_flags
from denoised.cli.generate import engine_settings
from denoised.cli.ranks import leads
from denoised.config import EngineConfig
from denoised.errors import InvalidRequestError
from denoised.request import OmniDiffusionSamplingParams, PromptDict
from denoised.rules import validate

if TYPE_CHECKING:
    from denoised.runtime.budget import Measured

BACKENDS = ("tea_cache", "mag_cache")
# Of many kinds, so that a fit to them holds for others.
PROMPTS = (
    "a red fox in fresh snow at sunrise",
    "an old street in the rain, people with umbrellas",
    "a bowl of fruit on a wooden table",
    "two robots play chess",
    "a lighthouse on a cliff, waves and gulls",
    "a portrait of an old sailor",
    "a map of an invented island",
    "a hot air balloon over a green valley",
)
# Numbers of denoising steps at which caches are measured, unless one is asked for.
NUM_STEPS = (20, 50)
_OURS = ("model", "cache_backend", "cache_config", "quality")
_ENGINE = {name: flag for name, flag in ENGINE.items() if name not in _OURS}


@with_flags(SAMPLING, PARALLEL, _ENGINE)
def calibrate(
    model: Annotated[str, typer.Argument(help="Hub id, folder in diffusers layout, or built-in name.")],
    *,
    cache_backend: Annotated[
        str, typer.Option("--cache-backend", help=f"Whose settings --output gets: {' or '.join(BACKENDS)}.")
    ] = BACKENDS[0],
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file with a prompt a line (default: eight of our own).")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", help="Of all prompts.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Input image of all prompts.")] = None,
    degree: Annotated[int, typer.Option("--degree", min=1, max=8, help="Of TeaCache's polynomial.")] = 4,
    probe: Annotated[
        str | None,
        typer.Option(
            "--probe",
            help="What is watched: input or timestep (default: those that the model has, and the better kept).",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file that can be given as --cache-config.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write it into the model's folder, where engines look for it.")
    ] = False,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Make the prompts' pictures with settings from careful to bold, and measure how alike they stay: "
            "what quality=... goes by (default: with --save).",
        ),
    ] = None,
    num_steps: Annotated[
        list[int] | None,
        typer.Option("--measure-at", min=2, help="Denoising steps to measure at; may be repeated (default: 20, 50)."),
    ] = None,
    **values: Any,
) -> None:
    """Watch a model run without a cache, fit what caches need to know of it, and say how well the fit holds."""
    from denoised.runtime import calibrating, calibrations, measuring

    if cache_backend not in BACKENDS:
        raise InvalidRequestError(f"cache_backend={cache_backend!r}: must be one of {', '.join(BACKENDS)}.")
    settings = engine_settings({**dict.fromkeys(ENGINE), **values}) | {"model": model}
    validate(EngineConfig(**settings, cache_backend="calibration"))
    place = calibrations.place(model) if save and leads() else None
    texts = _texts(prompts)
    asked = [_prompt(text, negative_prompt, image) for text in texts]
    params = OmniDiffusionSamplingParams(**given(SAMPLING, values))
    watched = calibrating.PROBES if probe is None else (probe,)
    found = calibrating.best(asked, params, degree=degree, probes=watched, settings=settings, say=_skip)
    if leads():
        _report(found.as_dict())
    if output is not None and leads():
        output.write_text(json.dumps(found.settings[cache_backend], indent=2) + "\n")
    if place is not None:  # before what takes long, and what a model without pictures cannot have
        calibrations.write(place, found.as_dict(), [])
    if measure or (measure is None and save):
        at = num_steps or ([params.num_inference_steps] if params.num_inference_steps else list(NUM_STEPS))
        measured = measuring.measure(asked, params, num_steps=at, known=found.settings, settings=settings, say=_say)
        if place is not None:
            calibrations.write(place, found.as_dict(), measured)


def _texts(path: Path | None) -> list[str]:
    if path is None:
        return list(PROMPTS)
    try:
        found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"prompts={str(path)!r} cannot be read ({error}); give a text file.") from error
    if not found:
        raise InvalidRequestError(f"prompts={str(path)!r} holds no prompt; give one a line.")
    return found


def _prompt(text: str, negative: str | None, image: Path | None) -> PromptDict:
    from denoised.media import images

    prompt: PromptDict = {"prompt": text}
    if negative is not None:
        prompt["negative_prompt"] = negative
    if image is not None:
        prompt["multi_modal_data"] = {"image": images.read(image, max_pixels=EngineConfig().max_pixels)}
    return prompt


def _report(found: dict[str, Any]) -> None:
    json.dump(found["settings"], sys.stdout, indent=2)
    print()
    print(
        f"{found['num_points']} steps of {found['num_runs']} runs: of the changes of what blocks add, a polynomial of "
        f"those of the {found['probe']} explains R² = {found['r2']:.4f}; ratios differ by up to "
        f"{found['ratio_spread']:.1%} between rows"
    )


def _skip(probe: str, problem: str) -> None:
    if leads():
        print(f"--probe {probe} is skipped: {problem}", file=sys.stderr, flush=True)


def _say(one: Measured) -> None:
    if not leads():
        return
    settings = ", ".join(f"{name} {value}" for name, value in one.config.items())
    print(
        f"{one.backend} ({settings}), {one.num_steps} steps: {one.skipped:.0%} skipped, {one.work:.0%} of the blocks "
        f"run; SSIM {one.ssim:.4f}, worst {one.worst:.4f}",
        flush=True,
    )
