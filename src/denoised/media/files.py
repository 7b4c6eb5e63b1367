"""Output files: which suffix is which kind, whether one can be written, and writing it all or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from denoised.errors import InvalidRequestError
from denoised.spec.model_spec import Kind

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4", ".gif", ".webm"),
    "audio": (".wav",),
}


def check_target(path: Path) -> None:
    """Refuse a path that could not be written, before anyone waits for what goes there.

    Raises:
        InvalidRequestError: unknown suffix, no such folder, or no right to write there.
    """
    known = [suffix for suffixes in SUFFIXES.values() for suffix in suffixes]
    if path.suffix.lower() not in known:
        raise InvalidRequestError(f"output={str(path)!r}: the suffix must be one of {', '.join(known)}.")
    if not path.parent.is_dir():
        raise InvalidRequestError(f"output={str(path)!r}: {path.parent} is no folder; make it or choose another.")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise InvalidRequestError(f"output={str(path)!r} cannot be overwritten; choose another path.")
    probe = _aside(path)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise _unwritable(path, error) from error
    probe.unlink()


def target_for(path: Path | None, kind: Kind, pipeline: str) -> Path:
    """`path` if its suffix fits what the model makes; without one, `output` in the working folder.

    Raises:
        InvalidRequestError: the model makes something else.
    """
    if path is None:
        path = Path("output" + SUFFIXES[kind][0])
        check_target(path)
    if path.suffix.lower() not in SUFFIXES[kind]:
        fitting = ", ".join(SUFFIXES[kind])
        raise InvalidRequestError(f"output={str(path)!r}: {pipeline} makes {kind}s; use one of {fitting}.")
    return path


def numbered(path: Path, count: int) -> list[Path]:
    """`count` paths: output, output_1, output_2 ..."""
    return [path if i == 0 else path.with_stem(f"{path.stem}_{i}") for i in range(count)]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its name when all went well and disappears otherwise.

    Raises:
        InvalidRequestError: it could not be written.
    """
    aside = _aside(path)
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """A name that nobody has, of the same suffix: encoders choose their format by it."""
    return path.with_name(f".{secrets.token_hex(6)}{path.suffix}")


def _unwritable(path: Path, error: OSError) -> InvalidRequestError:
    reason = error.strerror or str(error)
    return InvalidRequestError(f"output={str(path)!r} cannot be written ({reason}); choose another path.")
