"""Pictures that come with a request, as files, as data: URLs or, if allowed, by URL: decoded, for the engine."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from denoised.server import pictures
from denoised.server.fetch import fetch
from denoised.server.problems import invalid
from denoised.server.within import serving_of


async def of_url(request: Request, url: str, param: str) -> bytes:
    """The bytes of a picture.

    Raises:
        Refusal: no data: URL and fetching is not allowed, or it cannot be had.
    """
    config = serving_of(request).config
    if url.startswith("data:"):
        return pictures.of_data_url(url, param=param, max_bytes=config.max_body)
    if not config.allow_url_fetch:
        raise invalid(f"{param}: this server fetches no URLs; upload the picture or send a data: URL.", param=param)
    return await fetch(url, param=param, max_bytes=config.max_body)


async def input_images(request: Request, raw: list[bytes], masks: list[bytes], *, param: str) -> dict[str, Any]:
    """`multi_modal_data` of these files.

    Raises:
        Refusal: no picture, one that is unreadable, or several masks.
    """
    engine = serving_of(request).loaded()
    most, mode = engine.config.max_pixels, engine.info.image_mode
    if not raw:
        raise invalid(f"{param} is missing; upload a PNG, JPEG or WebP.", param=param)
    if len(masks) > 1:
        raise invalid("mask is given twice; give it once.", param="mask")

    def decode() -> dict[str, Any]:
        images = [pictures.decode(one, param=param, max_pixels=most).convert(mode) for one in raw]
        found: dict[str, Any] = {"image": images if len(images) > 1 else images[0]}
        for mask in masks:
            found["mask_image"] = pictures.decode_mask(mask, size=images[0].size, max_pixels=most)
        return found

    return await asyncio.to_thread(decode)
