"""Still images: reading inputs, writing outputs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from denoised.errors import InvalidRequestError

if TYPE_CHECKING:
    from PIL import Image

QUALITY = 95


def read(path: Path, *, max_pixels: int) -> Image.Image:
    """An input image, in RGBA so that nothing of it is lost. Its size is read before its pixels.

    Raises:
        InvalidRequestError: no such file, no image, or more than `max_pixels`.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is next
            file = Image.open(path)
        with file:
            pixels = None if file.width * file.height > max_pixels else file.convert("RGBA")
    except FileNotFoundError as error:
        raise InvalidRequestError(f"image={str(path)!r}: no such file; check the path.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequestError(f"image={str(path)!r} is no readable image; give a PNG, JPEG or WebP.") from error
    if pixels is None:
        raise InvalidRequestError(
            f"image={str(path)!r} has {file.width} x {file.height} pixels, more than max_pixels={max_pixels}; "
            "make it smaller or raise max_pixels."
        )
    return pixels


def write(image: Image.Image, path: Path) -> None:
    """One image in the format of the path's suffix."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        image.convert("RGB").save(path, quality=QUALITY)
    elif path.suffix.lower() == ".webp":
        image.save(path, quality=QUALITY)
    else:
        image.save(path)
