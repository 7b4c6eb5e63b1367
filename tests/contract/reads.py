"""A plugin for ranks: whoever reads a weight leaves a mark in the model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from denoised.runtime import weights

MARK = "weights-were-read"
_stored = weights._stored


def _marking(path: Any, name: str) -> Any:
    folder = Path(path).parent.parent
    if folder.is_dir():  # other tests of this process may have taken theirs away
        (folder / MARK).touch()
    return _stored(path, name)


weights._stored = _marking
