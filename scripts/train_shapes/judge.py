"""Reads a scene back from a picture, by code: background, connected patches of colour, shape by best overlap."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .render import BACKGROUND_GRADIENT, ITEM_GRADIENT, item_masks
from .scenes import BACKGROUNDS, COLORS, RADIUS, SHAPES, Color, Item, Scene

FOREGROUND = 0.17  # distance from the background, colours in 0..1
MIN_AREA = 45  # pixels of a patch after its edge is worn off
MIN_OVERLAP = 0.72  # with the best template; less is no shape
GROWTHS = (1.0, 1.08, 1.16)  # the tips of a star are soft, so that its box comes out too small
SIZE_BORDER = (RADIUS["small"][1] + RADIUS["large"][0]) / 2
CELL_BORDERS = (0.38, 0.62)


def read_scene(picture: Tensor) -> Scene | None:
    """The scene of a `[rgb, y, x]` picture in 0..1; None where some patch is no shape at all."""
    background, patches = _look(picture)
    items = [_recognize(color, mask) for color, mask in patches]
    found = [item for item in items if item is not None]
    if len(found) < len(items) or not found:
        return None
    return Scene(items=tuple(sorted(found, key=lambda item: item.cell)), background=background)


def colors_in(picture: Tensor) -> set[str]:
    """The colours of all patches, whatever their shape."""
    return {color for color, _ in _look(picture)[1]}


def _look(picture: Tensor) -> tuple[str, list[tuple[str, np.ndarray]]]:
    pixels = picture.permute(1, 2, 0).numpy()
    background, away = _background(pixels)
    return background, _patches(pixels, away > FOREGROUND)


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The colour nearest to most pixels, and each pixel's distance from it."""
    distances = _distances(pixels, list(BACKGROUNDS.values()), BACKGROUND_GRADIENT)
    index = int(np.bincount(distances.argmin(0).ravel(), minlength=len(BACKGROUNDS)).argmax())
    return tuple(BACKGROUNDS)[index], distances[index]


def _distances(pixels: np.ndarray, colors: Sequence[Color], gradient: tuple[float, float]) -> np.ndarray:
    shade = np.linspace(*gradient, len(pixels))[None, :, None, None]
    wanted = np.clip(np.array(colors)[:, None, None, :] / 255 * shade, 0, 1)
    return np.linalg.norm(pixels[None] - wanted, axis=-1)


def _patches(pixels: np.ndarray, foreground: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Connected patches of one colour. Blended edge pixels resemble other colours: cores first, then the edges."""
    nearest = _distances(pixels, list(COLORS.values()), ITEM_GRADIENT).argmin(0)
    cores, colors = np.zeros(foreground.shape, int), []
    for index, color in enumerate(COLORS):
        worn = ndimage.binary_opening(foreground & (nearest == index), np.ones((3, 3)))
        labels, count = ndimage.label(worn, np.ones((3, 3)))
        for label in range(1, count + 1):
            if (labels == label).sum() >= MIN_AREA:
                colors.append(color)
                cores[labels == label] = len(colors)
    distance, (rows, columns) = ndimage.distance_transform_edt(cores == 0, return_indices=True)
    owners = np.where(foreground & (distance < 4), cores[rows, columns], 0)
    return [(color, owners == number) for number, color in enumerate(colors, start=1)]


@cache
def _template_box(shape: str) -> tuple[float, float, float, float]:
    """Width, height and centre of a shape of radius 1, measured on its picture."""
    unit = Item(shape=shape, color="red", size="large", cell=(1, 1), x=0.5, y=0.5, radius=0.25)
    return tuple(value / 0.25 for value in _box(item_masks([unit])[0].numpy() > 0.5))


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Width, height, and the centre's distance from the middle of the picture; shares of its side."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = len(mask)
    width, height, x, y = right - left, bottom - top, (left + right - side) / 2, (top + bottom - side) / 2
    return float(width / side), float(height / side), float(x / side), float(y / side)


def _recognize(color: str, mask: np.ndarray) -> Item | None:
    candidates = [_fitted(shape, color, mask, growth) for shape in SHAPES for growth in GROWTHS]
    templates = item_masks(candidates) > 0.5
    drawn = torch.from_numpy(mask)
    overlaps = (templates & drawn).sum((1, 2)) / (templates | drawn).sum((1, 2))
    best = int(overlaps.argmax())
    return candidates[best] if overlaps[best] >= MIN_OVERLAP else None


def _fitted(shape: str, color: str, mask: np.ndarray, growth: float) -> Item:
    width, height, x, y = _box(mask)
    unit_width, unit_height, unit_x, unit_y = _template_box(shape)
    radius = (width / unit_width + height / unit_height) / 2 * growth
    x, y = 0.5 + x - unit_x * radius, 0.5 + y - unit_y * radius
    size = "small" if radius < SIZE_BORDER else "large"
    return Item(shape=shape, color=color, size=size, cell=(_cell(y), _cell(x)), x=x, y=y, radius=radius)


def _cell(place: float) -> int:
    return sum(place > border for border in CELL_BORDERS)
