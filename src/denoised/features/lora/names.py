"""How adapters name their matrices and the layers that these are for. Data, and looking names up; no models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["down", "up", "bias", "alpha"]

_MATRIX = re.compile(
    r"(?P<path>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|(?:lora|lora_linear_layer)\.(?:down|up))"
    r"(?:\.\w+)?\.(?P<kind>weight|bias)"  # between them PEFT may write the adapter's name
)
_ALPHA = re.compile(r"(?P<path>.+)\.alpha")
_UP = ("lora_B", "lora_up", "lora.up", "lora_linear_layer.up")

# Kinds of adapters whose sum is no product of two small matrices, by what is in their names.
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
}

# What files write before the names of a denoiser's layers, the longest first.
MAIN_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.", "")
WRAPPERS = ("base_model.model.",)
# Kohya's: the path follows with underscores for dots. None: the denoiser.
UNDERSCORED: dict[str, str | None] = {
    "lora_unet_": None,
    "lora_transformer_": None,
    "lycoris_": None,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
# A part of the paths of CLIP's layers that some releases of transformers have and others do not.
OPTIONAL = "text_model."


@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a file: which part of the adapter of which layer, by the file's name for that."""

    path: str
    part: Part


def parse(key: str) -> Key | None:
    """None: it is nothing of a LoRA."""
    alpha = _ALPHA.fullmatch(key)
    if alpha is not None:
        return Key(path=alpha["path"], part="alpha")
    found = _MATRIX.fullmatch(key)
    if found is None:
        return None
    is_up = found["part"] in _UP
    if found["kind"] == "bias":
        return Key(path=found["path"], part="bias") if is_up else None
    return Key(path=found["path"], part="up" if is_up else "down")


def other_kind(keys: list[str]) -> tuple[str, str] | None:
    """The kind of adapter that this is instead of a LoRA, and the key that tells so."""
    return next(((kind, key) for key in keys for mark, kind in OTHER_KINDS.items() if mark in key), None)


def spellings(path: str, dot: str = ".") -> list[str]:
    """A path, and as another release of transformers has it. `dot`: what stands for dots."""
    optional = OPTIONAL.replace(".", dot)
    return [path, path.removeprefix(optional) if path.startswith(optional) else optional + path]
