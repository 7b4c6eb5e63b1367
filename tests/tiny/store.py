"""Checkpoints on disk, made once even when several processes ask at the same time."""

import os
import shutil
import tempfile
from pathlib import Path

from tests.tiny.row import Row


def save_once(row: Row, root: Path) -> Path:
    """The folder of the row's checkpoint under `root`.

    Each process that finds none builds its own aside and renames it; the first wins, and the weights are the same
    whoever built them, so nobody waits on a lock that a killed process would leave behind.
    """
    target = root / (row.folder or row.name)
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        row.build().save_pretrained(aside)
        os.rename(aside, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
