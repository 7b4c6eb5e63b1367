"""Which pipeline classes of diffusers make media from text alone, and why the others are left out.

Told from the classes themselves: every exported pipeline whose call takes a prompt is accounted for.
"""

from __future__ import annotations

import inspect

import diffusers
from diffusers import DiffusionPipeline

# Arguments that a class starts from, beside the prompt.
_INPUTS = frozenset(
    "image video mask mask_image control_image control_video control_camera_video conditioning_frames token_indices "
    "reference_latents reference_audio audio init_audio cond_image".split()
)
# Their inputs are optional, or go by other names.
_BY_NAME = ("ControlNet", "DiffEdit", "Pix2PixZero", "GLIGENTextImage", "TemporalRefine", "Inpaint", "AudioToAudio")

# Classes whose arguments do not tell that they are out of scope.
OTHERS = {
    "LLaDA2Pipeline": "makes text",
    "DiffusionGemmaPipeline": "makes text",
    "JoyImageEditPlusPipeline": "edits pictures, and has nothing to work on without one",
}
# Why a class that makes media from text is not built here.
_LATER = "no tiny build yet"
UNBUILT: dict[str, str] = {
    "OmniGenPipeline": "its processor needs torchvision, which has no build for a CPU torch",
    "AltDiffusionPipeline": _LATER,
    "BriaFibo2Pipeline": _LATER,
    "Kandinsky6TI2VAPipeline": _LATER,
    "LTXI2VLongMultiPromptPipeline": _LATER,
    "UniDiffuserPipeline": _LATER,
    "VQDiffusionPipeline": _LATER,
    "VersatileDiffusionTextToImagePipeline": _LATER,
}


def with_prompt() -> list[str]:
    """All exported pipeline classes whose call takes a prompt."""
    return [name for name in sorted(dir(diffusers)) if "prompt" in _parameters(name)]


def needs_input(name: str) -> bool:
    """Whether a class starts from a picture, a video, sound or the like."""
    parameters = _parameters(name)
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    others = set(required) - {"self", "prompt"} | (_INPUTS & set(parameters))
    return bool(others) or any(part in name for part in _BY_NAME)


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    found = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        return {}
    return dict(inspect.signature(found.__call__).parameters)


def out_of_scope() -> list[str]:
    """Classes that start from more than text, and are not built here all the same."""
    from tests.sweep.cases import CASES

    return [n for n in with_prompt() if needs_input(n) and not {n} & (CASES.keys() | UNBUILT.keys() | OTHERS.keys())]
