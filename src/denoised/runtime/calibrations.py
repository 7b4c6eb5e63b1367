"""What was found out about a model for caches, kept beside its weights: `calibration.json`, settings by backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from denoised.errors import ModelError, one_line
from denoised.runtime import load

FILE = "calibration.json"


def place(model: Any) -> Path:
    """Where a model's calibration is kept.

    Raises:
        ModelError: it has no folder of its own.
    """
    found = load.locate(str(model))
    if not isinstance(found, Path):
        raise ModelError(f"model={model!r} has no folder to keep a calibration in; download it, or use --output.")
    return found / FILE


def beside(model: Any) -> dict[str, Any]:
    """The settings that lie in a model's folder; empty for a hub id, a pipeline object, or where there are none.

    Raises:
        ModelError: the file is damaged.
    """
    place = load.locate(str(model)) if isinstance(model, str | Path) else None
    if not isinstance(place, Path) or not (place / FILE).is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads((place / FILE).read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{place / FILE} is no calibration ({one_line(error)}); run `denoised calibrate`.") from error
    return found
