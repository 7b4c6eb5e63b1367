"""What can be on a picture: palettes, layouts and the seeded sampling of scenes. Knows nothing of pixels or words."""

import random
from dataclasses import dataclass

Cell = tuple[int, int]  # (row, column) of a 3 x 3 grid
Color = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "large")
COLORS = {
    "red": (222, 38, 44),
    "orange": (250, 138, 28),
    "yellow": (250, 216, 44),
    "green": (38, 162, 74),
    "cyan": (44, 200, 222),
    "blue": (44, 84, 224),
    "purple": (138, 58, 188),
    "pink": (250, 130, 186),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "black": (22, 22, 24),
    "gray": (134, 138, 142),
    "beige": (234, 220, 192),
    "navy": (22, 32, 78),
    "mint": (190, 234, 212),
    "lavender": (212, 204, 240),
}
CELLS: tuple[Cell, ...] = tuple((row, col) for row in range(3) for col in range(3))
PAIR_LAYOUTS: tuple[tuple[Cell, ...], ...] = (
    ((1, 0), (1, 2)),
    ((0, 1), (2, 1)),
    ((0, 0), (2, 2)),
    ((0, 2), (2, 0)),
)
PAIR_WEIGHTS = (5, 3, 1, 1)
LINE_LAYOUTS: tuple[tuple[Cell, ...], ...] = (((1, 0), (1, 1), (1, 2)), ((0, 1), (1, 1), (2, 1)))
TRIANGLE_LAYOUTS: tuple[tuple[Cell, ...], ...] = (((0, 1), (2, 0), (2, 2)), ((0, 0), (0, 2), (2, 1)))
TRIANGLE_WEIGHTS = (6, 4)
# What needs no words: in the centre, side by side, a pyramid.
USUAL_LAYOUTS = (((1, 1),), PAIR_LAYOUTS[0], TRIANGLE_LAYOUTS[0])
RADIUS = {"small": (0.115, 0.135), "large": (0.200, 0.222)}


@dataclass(frozen=True, kw_only=True)
class Item:
    shape: str
    color: str
    size: str
    cell: Cell
    x: float  # centre and radius, as shares of the picture's side
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    items: tuple[Item, ...]  # in reading order: top to bottom, then left to right
    background: str

    @property
    def has_usual_layout(self) -> bool:
        return tuple(item.cell for item in self.items) in USUAL_LAYOUTS


def sample_scene(rng: random.Random) -> Scene:
    """One random scene; equal attributes on several items are a little more frequent than chance."""
    cells, sizes = _sample_layout(rng)
    shapes = _sample_words(rng, SHAPES, len(cells), share_equal=0.15)
    colors = _sample_words(rng, tuple(COLORS), len(cells), share_equal=0.08)
    step = 0.31 if cells in LINE_LAYOUTS else 0.24
    items = tuple(
        _place(rng, shape=shape, color=color, size=size, cell=cell, step=step)
        for shape, color, size, cell in zip(shapes, colors, sizes, cells, strict=True)
    )
    return Scene(items=items, background=rng.choice(tuple(BACKGROUNDS)))


def scene_at(seed: int, index: int) -> Scene:
    return sample_scene(random.Random(f"scene-{seed}-{index}"))


def _sample_layout(rng: random.Random) -> tuple[tuple[Cell, ...], list[str]]:
    count = rng.choices((1, 2, 3), weights=(30, 40, 30))[0]
    if count == 1:
        return (rng.choices(CELLS, weights=[4 if cell == (1, 1) else 1 for cell in CELLS])[0],), [rng.choice(SIZES)]
    if count == 2:
        return rng.choices(PAIR_LAYOUTS, weights=PAIR_WEIGHTS)[0], rng.choices(SIZES, k=2)
    if rng.random() < 0.45:  # three in a line have room for small ones only
        return rng.choice(LINE_LAYOUTS), ["small"] * 3
    return rng.choices(TRIANGLE_LAYOUTS, weights=TRIANGLE_WEIGHTS)[0], rng.choices(SIZES, k=3)


def _sample_words(rng: random.Random, words: tuple[str, ...], count: int, share_equal: float) -> list[str]:
    if count > 1 and rng.random() < share_equal:
        return [rng.choice(words)] * count
    return rng.choices(words, k=count)


def _place(rng: random.Random, *, shape: str, color: str, size: str, cell: Cell, step: float) -> Item:
    radius = rng.uniform(*RADIUS[size])
    jitter = 0.012 if size == "large" else 0.02
    row, col = cell
    x = 0.5 + step * (col - 1) + rng.uniform(-jitter, jitter)
    y = 0.5 + step * (row - 1) + rng.uniform(-jitter, jitter)
    return Item(shape=shape, color=color, size=size, cell=cell, x=x, y=y, radius=radius)
