"""Pictures from bytes that strangers send, and to bytes that go back.

Formats are named, so that Pillow's rarer decoders are never reached; sizes are read before pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from denoised.server.problems import Refusal, invalid

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
QUALITY = 95
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def decode(raw: bytes, *, param: str, max_pixels: int) -> Image.Image:
    """A picture as its author sees it (turned as its EXIF says), in RGBA if it has an alpha channel, else RGB.

    Raises:
        Refusal: no PNG, JPEG or WebP, several frames, or more than `max_pixels`.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, where our own limit is next; and of odd EXIF
            file = Image.open(io.BytesIO(raw), formats=FORMATS)
            _check(file, param, max_pixels)
            return ImageOps.exif_transpose(file).convert("RGBA" if file.has_transparency_data else "RGB")
    except Refusal:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file makes its decoders run into
        raise invalid(f"{param} is no readable picture; send a PNG, JPEG or WebP.", param=param) from error


def _check(file: Any, param: str, max_pixels: int) -> None:
    if file.width * file.height > max_pixels:
        raise invalid(
            f"{param} has {file.width} x {file.height} pixels, more than max_pixels={max_pixels}; make it smaller.",
            param=param,
        )
    if getattr(file, "n_frames", 1) > 1:
        raise invalid(f"{param} has {file.n_frames} frames; send one of them.", param=param)


def decode_mask(raw: bytes, *, size: tuple[int, int], max_pixels: int) -> Image.Image:
    """White where to paint, [L]. OpenAI's masks say so by being transparent there, others by being white.

    Raises:
        Refusal: unreadable, or not of the picture's `size`.
    """
    from PIL import ImageChops

    mask = decode(raw, param="mask", max_pixels=max_pixels)
    if mask.size != size:
        shown = " x ".join(map(str, mask.size))
        raise invalid(f"mask has {shown} pixels; it must have those of image: {size[0]} x {size[1]}.", param="mask")
    return ImageChops.invert(mask.getchannel("A")) if mask.mode == "RGBA" else mask.convert("L")


def of_data_url(url: str, *, param: str, max_bytes: int) -> bytes:
    """The bytes of a base64 `data:` URL.

    Raises:
        Refusal: it is none, or too long.
    """
    head, comma, text = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise invalid(f"{param} is no data: URL of a picture; send data:image/png;base64,...", param=param)
    if len(text) > max_bytes * 4 // 3 + 4:
        raise invalid(f"{param} is longer than {max_bytes} bytes; send less.", param=param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{param} is no base64; send data:image/png;base64,...", param=param) from error


def encode(image: Any, format: str, compression: int | None = None) -> bytes:
    """One picture as a file of that format. JPEG has no alpha channel; nothing of the request is written into it."""
    file = io.BytesIO()
    if format == "png":
        image.save(file, "PNG")
    else:
        picture = image.convert("RGB") if format == "jpeg" else image
        picture.save(file, format.upper(), quality=QUALITY if compression is None else compression)
    return file.getvalue()


def encode_all(images: Sequence[Any], format: str, compression: int | None, *, opaque: bool) -> list[str]:
    """Pictures in base64. `opaque`: without an alpha channel."""
    plain = [image.convert("RGB") if opaque else image for image in images]
    return [base64.b64encode(encode(image, format, compression)).decode() for image in plain]


def flat(items: Sequence[Any]) -> list[Any]:
    """Layered models give a list of layers for each picture."""
    found: list[Any] = []
    for item in items:
        found += flat(item) if isinstance(item, list | tuple) else [item]
    return found
