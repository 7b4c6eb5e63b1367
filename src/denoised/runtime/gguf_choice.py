"""Which GGUF file holds the weights of which component, from the settings and the folder. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError

GGUF = "gguf"
# The components that a bare setting means, as `ModelSpec.denoisers` has them; models have some of them.
DENOISERS = ("transformer", "transformer_2", "unet", "prior")


def files(config: EngineConfig) -> dict[str, Path]:
    """Component to file; empty where none is asked for, or the model is an object.

    Raises:
        InvalidConfigError: there is none, or more than one; or one that is named is not there.
    """
    asked = {part: value for part, value in config.quantized.items() if value == GGUF or value.endswith(".gguf")}
    if not asked or not isinstance(config.model, str | Path):
        return {}
    folder = Path(config.model).expanduser()
    return {name: _file(name, value, folder) for name, value in _spread(asked, folder).items()}


def _spread(asked: Mapping[str, str], folder: Path) -> dict[str, str]:
    """A bare setting is for each denoiser; one file cannot be for several."""
    if "" not in asked:
        return dict(asked)
    value, names = asked[""], _denoisers(folder)
    if value != GGUF and len(names) > 1:
        raise InvalidConfigError(
            f"quantization={value!r}: this model has the denoisers {' and '.join(names)}; name a file for each: "
            f"{{{', '.join(f'{name!r}: ...' for name in names)}}}."
        )
    return dict.fromkeys(names, value)


def _denoisers(folder: Path) -> tuple[str, ...]:
    """Those that a local folder has; of a hub id its first one is all that is known."""
    index = folder / "model_index.json"
    try:
        named = json.loads(index.read_text()) if index.is_file() else {DENOISERS[0]: ["", ""]}
    except ValueError:  # a damaged folder is refused by who loads it
        named = {}
    return tuple(name for name in DENOISERS if (named.get(name) or [None])[0] is not None)


def _file(component: str, value: str, folder: Path) -> Path:
    if value != GGUF:
        path = Path(value).expanduser()
        if not path.is_file():
            raise InvalidConfigError(f"quantization={{{component!r}: {value!r}}}: no such file; give its path.")
        return path
    found = sorted((folder / component).glob("*.gguf")) or sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        names = f"{len(found)} ({', '.join(file.name for file in found)})" if found else "none"
        raise InvalidConfigError(
            f"quantization='gguf' takes the one *.gguf file in {folder / component} or {folder}, and there are "
            f"{names}; name it: {{{component!r}: 'path/to/file.gguf'}}."
        )
    return found[0]
