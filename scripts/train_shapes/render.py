"""Draws scenes: signed distance functions, anti-aliased, with a soft vertical gradient. Vectorised over pictures."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .scenes import BACKGROUNDS, COLORS, SHAPES, Color, Item, Scene

SIDE = 128
BACKGROUND_GRADIENT = (1.03, 0.93)  # brightness at the top and at the bottom
ITEM_GRADIENT = (1.06, 0.94)
STAR_TIP = 1.1
STAR_NOTCH = 0.47


def render(scenes: Sequence[Scene], side: int = SIDE) -> Tensor:
    """Pictures as `[scene, rgb, y, x]`, values in -1..1."""
    axis = (torch.arange(side) + 0.5) / side
    image = _rgb([BACKGROUNDS[scene.background] for scene in scenes]) * _gradient(axis, BACKGROUND_GRADIENT)
    image = image.expand(-1, -1, -1, side).clone()
    for slot in range(max(len(scene.items) for scene in scenes)):
        having = [index for index, scene in enumerate(scenes) if slot < len(scene.items)]
        items = [scenes[index].items[slot] for index in having]
        alpha = item_masks(items, side)[:, None]
        paint = _rgb([COLORS[item.color] for item in items]) * _gradient(axis, ITEM_GRADIENT)
        image[having] = torch.lerp(image[having], paint.expand(-1, -1, -1, side), alpha)
    return image.clamp(0, 1) * 2 - 1


def item_masks(items: Sequence[Item], side: int = SIDE) -> Tensor:
    """Coverage of each item as `[item, y, x]`, 0..1."""
    axis = (torch.arange(side) + 0.5) / side
    masks = torch.zeros(len(items), side, side)
    for shape in SHAPES:
        index = [i for i, item in enumerate(items) if item.shape == shape]
        if not index:
            continue
        place = torch.tensor([(items[i].x, items[i].y, items[i].radius) for i in index]).float()
        x, y, radius = place[:, :, None, None].unbind(1)
        distance = DISTANCES[shape]((axis[None, None, :] - x) / radius, (axis[None, :, None] - y) / radius)
        masks[index] = (0.5 - distance * radius * side).clamp(0, 1)
    return masks


def _rgb(colors: Sequence[Color]) -> Tensor:
    return torch.tensor(colors).float()[:, :, None, None] / 255


def _gradient(axis: Tensor, ends: tuple[float, float]) -> Tensor:
    top, bottom = ends
    return (top + (bottom - top) * axis)[None, None, :, None]


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y) - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.87


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.25  # the middle of its height, not of its circumcircle
    return torch.maximum(y, x.abs() * math.sqrt(0.75) - y * 0.5) - 0.58


def _star(x: Tensor, y: Tensor) -> Tensor:
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)  # from the upward tip
    angle = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    radius = torch.sqrt(x * x + y * y)
    along, across = radius * torch.cos(angle), radius * torch.sin(angle)
    notch_x, notch_y = STAR_NOTCH * math.cos(sector / 2), STAR_NOTCH * math.sin(sector / 2)
    edge_x, edge_y = notch_x - STAR_TIP, notch_y
    return ((along - STAR_TIP) * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.sqrt(x * x + y * y) - 0.77).abs() - 0.23


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.31, torch.maximum(x, y) - 0.98)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
