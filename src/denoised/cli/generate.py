"""`denoised generate`: one prompt in, one file (or several) out.

Everything that can be refused is refused before the model is loaded, and nothing is left half-written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from denoised.cli.flags import ENGINE, PARALLEL, SAMPLING, flags, given, with_flags
from denoised.cli.ranks import leads
from denoised.cli.scales import Scales
from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import InvalidRequestError
from denoised.outputs import OmniRequestOutput
from denoised.request import OmniDiffusionSamplingParams, PromptDict
from denoised.rules import validate

_INERT = "Accepted for scripts written for vLLM-Omni; no effect."


def _option(*spellings: str, panel: str = "Prompt and output", **settings: Any) -> Any:
    return typer.Option(*spellings, rich_help_panel=panel, **settings)


GUIDANCE = flags(Scales, "Sampling")


@with_flags(GUIDANCE, SAMPLING, PARALLEL, ENGINE)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to make.", show_default=False)] = None,
    *,
    prompt_flag: Annotated[str | None, _option("--prompt", help="The prompt, as a flag.")] = None,
    negative_prompt: Annotated[str | None, _option("--negative-prompt", help="What to keep out.")] = None,
    image: Annotated[list[Path] | None, _option("--image", help="Input image; may be repeated.")] = None,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "-o",
            help=".png, .jpg or .webp for images; .mp4, .gif or .webm for videos; .wav for sound. "
            "Several outputs are numbered: output, output_1, ...",
        ),
    ] = None,
    as_json: Annotated[bool, _option("--json", help="Print the paths and the receipt as JSON.")] = False,
    omni: Annotated[bool, _option("--omni", help=_INERT, hidden=True)] = False,
    step_execution: Annotated[bool, _option("--step-execution", help=_INERT, hidden=True)] = False,
    **values: Any,
) -> None:
    """Make an image, a video or a sound from a prompt, and save it."""
    from denoised.media import files, images

    if output is not None and leads():  # other ranks write nothing, and may be on nodes that lack the folder
        files.check_target(output)
    settings = engine_settings(values)
    config = EngineConfig(**settings)
    validate(config)
    params = OmniDiffusionSamplingParams(**given(SAMPLING, values))
    scales = Scales(**given(GUIDANCE, values))
    request = prompt_dict(prompt, prompt_flag, negative_prompt)
    pictures = [images.read(path, max_pixels=config.max_pixels) for path in image or ()]
    result, paths = _run(settings, request, pictures, params, scales, output)
    if leads():
        _report(result, paths, as_json=as_json)


def engine_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `Omni`."""
    parallel = given(PARALLEL, values)
    settings = given(ENGINE, values)
    return settings | ({"parallel_config": DiffusionParallelConfig(**parallel)} if parallel else {})


def prompt_dict(prompt: str | None, flag: str | None, negative: str | None) -> PromptDict:
    """The prompt, which may be an argument or a flag.

    Raises:
        InvalidRequestError: it is both.
    """
    if prompt is not None and flag is not None:
        raise InvalidRequestError("the prompt is given as an argument and as --prompt; give it once.")
    text = prompt if prompt is not None else flag
    request: PromptDict = {} if text is None else {"prompt": text}
    if negative is not None:
        request["negative_prompt"] = negative
    return request


def _run(
    settings: dict[str, Any],
    request: PromptDict,
    pictures: list[Any],
    params: OmniDiffusionSamplingParams,
    scales: Scales,
    output: Path | None,
) -> tuple[OmniRequestOutput, list[Path]]:
    from denoised.cli.console import loading
    from denoised.media import files
    from denoised.media.save import save
    from denoised.runtime.omni import Omni

    with loading(str(settings.get("model", "shapes"))):
        engine = Omni(**settings)
    with engine:
        if pictures:
            converted = [picture.convert(engine.info.image_mode) for picture in pictures]
            request["multi_modal_data"] = {"image": converted if len(converted) > 1 else converted[0]}
        params = scales.onto(params, engine.info)
        target = files.target_for(output, engine.info.kind, engine.info.pipeline) if leads() else None
        [result] = engine.generate([request], params, use_tqdm=target is not None)
        if result.error is not None:
            raise InvalidRequestError(result.error)
        rate = engine.info.sample_rate
        return result, save(result, target, fps=params.fps, sample_rate=rate) if target is not None else []


def _report(result: OmniRequestOutput, paths: list[Path], *, as_json: bool) -> None:
    assert result.receipt is not None
    if as_json:
        receipt = result.receipt.as_dict()
        json.dump({"outputs": [str(path) for path in paths], "receipt": receipt}, sys.stdout, indent=2)
        print()
    else:
        print(*paths, sep="\n")
        print(result.receipt.line())
    for note in result.receipt.notes:  # what the pipeline itself warned of
        print("Note:", " ".join(note.split()), file=sys.stderr)
