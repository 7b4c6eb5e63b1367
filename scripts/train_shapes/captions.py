"""Captions: what is said of a scene, in how many ways. A `Claim` is the checkable content of a caption.

Every noun is followed by a mark while the text is put together, so that the text encoder can be taught at the noun
what has been said of its object.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from .scenes import LINE_LAYOUTS, Cell, Item, Scene

MARK = "\x00"
DROPPED = ("", " ", "blurry", "low quality", "bad quality", "bad quality, blurry", "blurry, low quality", "ugly")
DROP_SHARE = 0.12
HELD_OUT_SHARE = 16  # one of so many contents is kept for the evaluation
NUMBERS = {1: ("one", "a single"), 2: ("two", "two", "a pair of"), 3: ("three",)}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
THINGS = ("shape", "object", "thing")
CELL_PHRASES: dict[Cell, tuple[str, ...]] = {
    (0, 0): ("in the top left corner", "in the upper left corner", "at the top left", "in the top left"),
    (0, 1): ("at the top", "at the top center", "on top"),
    (0, 2): ("in the top right corner", "in the upper right corner", "at the top right", "in the top right"),
    (1, 0): ("on the left", "on the left side", "at the left"),
    (1, 1): ("in the center", "in the middle", "at the center"),
    (1, 2): ("on the right", "on the right side", "at the right"),
    (2, 0): ("in the bottom left corner", "in the lower left corner", "at the bottom left", "in the bottom left"),
    (2, 1): ("at the bottom", "at the bottom center"),
    (2, 2): ("in the bottom right corner", "in the lower right corner", "at the bottom right", "in the bottom right"),
}
RELATIONS: dict[tuple[Cell, Cell], tuple[str, ...]] = {
    ((1, 0), (1, 2)): ("to the left of", "to the left of", "left of", "on the left of"),
    ((1, 2), (1, 0)): ("to the right of", "to the right of", "right of", "on the right of"),
    ((0, 1), (2, 1)): ("above", "above", "over"),
    ((2, 1), (0, 1)): ("below", "below", "under", "beneath"),
}


@dataclass(frozen=True, kw_only=True)
class Mention:
    """What a caption says of one object; `None` is not said."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    cell: Cell | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a caption says of the picture; mentions in the order of the words."""

    count: int | None = None
    mentions: tuple[Mention, ...] = ()
    background: str | None = None


@dataclass(frozen=True, kw_only=True)
class Caption:
    text: str
    claim: Claim
    nouns: tuple[int, ...] = ()  # where the noun of each mention ends, as an index into the text


def is_held_out(claim: Claim) -> bool:
    """Whether this content is kept from training. Only contents with enough to say are; the rest is too common."""
    said = [mention for mention in claim.mentions if mention.shape and mention.color]
    if not said or claim.count != len(said):
        return False
    return int(hashlib.sha256(repr(claim).encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def sample_caption(rng: random.Random, scene: Scene) -> Caption:
    """A training caption: never one whose content is held out."""
    if rng.random() < DROP_SHARE:
        return Caption(text=rng.choice(DROPPED), claim=Claim())
    while True:
        caption = (_partial if rng.random() < 0.15 else describe)(rng, scene)
        if not is_held_out(caption.claim):
            return caption


def describe(rng: random.Random, scene: Scene) -> Caption:
    """A caption that names every object of the scene.

    Places are left out only where the layout is the usual one, and the objects are then named in reading order: as
    people do, who say where a thing is when it is not where one would expect it.
    """
    items = list(scene.items)
    says_size, says_place = rng.random() < 0.65, rng.random() < (0.3 if scene.has_usual_layout else 1)
    mentions = [_mention(rng, item, says_size=says_size) for item in items]
    body, mentions = _BODIES[len(items)](rng, items, mentions, says_place)
    return _finish(rng, body, Claim(count=len(items), mentions=tuple(mentions)), scene)


def _mention(rng: random.Random, item: Item, *, says_size: bool) -> Mention:
    draw = rng.random()
    shape = None if draw < 0.06 else item.shape
    color = None if 0.06 <= draw < 0.16 else item.color
    return Mention(shape=shape, color=color, size=item.size if says_size and rng.random() < 0.85 else None)


Body = tuple[str, list[Mention]]


def _single(rng: random.Random, items: list[Item], mentions: list[Mention], says_place: bool) -> Body:
    mention = mentions[0]
    if not says_place:
        return _phrase(rng, mention), [mention]
    mention = replace(mention, cell=items[0].cell)
    where = rng.choice(CELL_PHRASES[items[0].cell])
    if rng.random() < 0.15:
        return f"{where}, {_phrase(rng, mention)}", [mention]
    return f"{_phrase(rng, mention)} {where}", [mention]


def _pair(rng: random.Random, items: list[Item], mentions: list[Mention], says_place: bool) -> Body:
    order = rng.sample((0, 1), 2)
    first, second = (mentions[index] for index in order)
    cells = items[order[0]].cell, items[order[1]].cell
    if not says_place:
        return _unplaced(rng, mentions)
    first, second = replace(first, cell=cells[0]), replace(second, cell=cells[1])
    if cells in RELATIONS and rng.random() < 0.7:
        return _related(rng, first, second)
    separator = rng.choice((" and ", ", "))
    return separator.join(_phrase_at_place(rng, mention) for mention in (first, second)), [first, second]


def _related(rng: random.Random, first: Mention, second: Mention) -> Body:
    relation = rng.choice(RELATIONS[first.cell, second.cell])
    style = rng.random()
    if style < 0.7:
        return f"{_phrase(rng, first)} {relation} {_phrase(rng, second)}", [first, second]
    if style < 0.85:
        return f"{relation} {_phrase(rng, second)}, {_phrase(rng, first)}", [second, first]
    return f"{_phrase(rng, second)} with {_phrase(rng, first)} {relation} it", [second, first]


def _triple(rng: random.Random, items: list[Item], mentions: list[Mention], says_place: bool) -> Body:
    cells = tuple(item.cell for item in items)
    if not says_place:
        return _unplaced(rng, mentions)
    placed = [replace(mention, cell=item.cell) for mention, item in zip(mentions, items, strict=True)]
    if cells in LINE_LAYOUTS and rng.random() < 0.6:
        return _in_line(rng, placed, cells)
    if cells not in LINE_LAYOUTS and rng.random() < 0.4:
        return _two_and_one(rng, placed)
    placed = rng.sample(placed, 3) if rng.random() < 0.5 else placed
    return _join([_phrase_at_place(rng, mention) for mention in placed]), placed


def _in_line(rng: random.Random, placed: list[Mention], cells: tuple[Cell, ...]) -> Body:
    words = _join([_phrase(rng, mention) for mention in placed])
    across = cells == LINE_LAYOUTS[0]
    return f"{'from left to right' if across else 'from top to bottom'}{rng.choice((': ', ', '))}{words}", placed


def _two_and_one(rng: random.Random, placed: list[Mention]) -> Body:
    pair = [mention for mention in placed if mention.cell[1] != 1]
    alone = next(mention for mention in placed if mention.cell[1] == 1)
    pair_words = " and ".join(_phrase(rng, mention) for mention in pair)
    if rng.random() < 0.5:
        return f"{pair_words} {'above' if alone.cell[0] == 2 else 'below'} {_phrase(rng, alone)}", [*pair, alone]
    return f"{_phrase(rng, alone)} {'above' if alone.cell[0] == 0 else 'below'} {pair_words}", [alone, *pair]


_BODIES: dict[int, Callable[..., Body]] = {1: _single, 2: _pair, 3: _triple}


def _unplaced(rng: random.Random, mentions: list[Mention]) -> Body:
    """A list of objects; equal ones may be counted ("two red circles")."""
    if len(set(mentions)) == 1 and rng.random() < 0.7:
        phrase = _phrase(rng, mentions[0], count=len(mentions))
        return phrase, mentions
    words = _join([_phrase(rng, mention) for mention in mentions])
    if rng.random() < 0.25:
        words = f"{_number(rng, len(mentions))} {rng.choice(THINGS)}s: {words}"
    return words, mentions


def _partial(rng: random.Random, scene: Scene) -> Caption:
    """Few words that are true of the scene: a colour, a shape, a count, a background."""
    item, style, count = rng.choice(scene.items), rng.random(), len(scene.items)
    if style < 0.30:
        text = rng.choice((item.color, f"something {item.color}", f"{item.color} {rng.choice(THINGS)}"))
        return _finish(rng, text + MARK, Claim(mentions=(Mention(color=item.color),)), scene, plain=True)
    if style < 0.45:
        text = rng.choice((item.shape + MARK, _phrase(rng, Mention(shape=item.shape))))
        return _finish(rng, text, Claim(mentions=(Mention(shape=item.shape),)), scene, plain=True)
    if style < 0.55:
        text = rng.choice((f"something {item.size}{MARK}", rng.choice(SIZE_WORDS[item.size]) + MARK))
        return _finish(rng, text, Claim(mentions=(Mention(size=item.size),)), scene, plain=True)
    if style < 0.65:
        return _finish(rng, f"{scene.background} background", Claim(background=scene.background), scene, plain=True)
    kind = rng.choice(("", "", "colorful ", "different "))
    noun = rng.choice(THINGS) + ("s" if count > 1 else "")
    return _finish(rng, f"{_number(rng, count)} {kind}{noun}", Claim(count=count), scene)


def _phrase(rng: random.Random, mention: Mention, count: int = 1) -> str:
    """ "a large red circle" and the like, the noun marked once for each object it stands for."""
    size = rng.choice(SIZE_WORDS[mention.size]) if mention.size else ""
    noun = mention.shape or rng.choice(THINGS)
    plural = {"cross": "crosses"}.get(noun, noun + "s")
    words = " ".join(word for word in (size, mention.color, noun if count == 1 else plural) if word)
    if count > 1:
        return f"{_number(rng, count)} {words}{MARK * count}"
    article = "an" if words[0] in "aeiou" else "a"
    return f"{rng.choices((article, 'the', 'one'), weights=(88, 7, 5))[0]} {words}{MARK}"


def _phrase_at_place(rng: random.Random, mention: Mention) -> str:
    return f"{_phrase(rng, mention)} {rng.choice(CELL_PHRASES[mention.cell])}"


def _number(rng: random.Random, count: int) -> str:
    return rng.choice(NUMBERS[count])


def _join(phrases: list[str]) -> str:
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


_BACKGROUND_PHRASES = (*(" on a {} background",) * 4, " against a {} background", ", {} background", " on {}")
_PREFIXES = ("a photo of ", "a picture of ", "an image of ", "a drawing of ", "there is ")


def _finish(rng: random.Random, body: str, claim: Claim, scene: Scene, *, plain: bool = False) -> Caption:
    """Adds a prefix, the background and punctuation, and takes the marks out."""
    if body.startswith(("a ", "an ", "two ", "three ")) and rng.random() < 0.15:
        body = rng.choice(_PREFIXES) + body
    if not plain and rng.random() < 0.55:
        claim = replace(claim, background=scene.background)
        body += rng.choice(_BACKGROUND_PHRASES).format(scene.background)
    if rng.random() < 0.12:
        body = body[0].upper() + body[1:] + rng.choice(("", "."))
    nouns, text = [], ""
    for char in body:
        if char == MARK:
            nouns.append(len(text))
        else:
            text += char
    return Caption(text=text, claim=claim, nouns=tuple(nouns))


def claim_holds(claim: Claim, scene: Scene) -> bool:
    """Whether a scene is as the claim says; partial claims ask for what they name only."""
    if claim.count is not None and claim.count != len(scene.items):
        return False
    if claim.background is not None and claim.background != scene.background:
        return False
    return _assignable(list(claim.mentions), list(scene.items))


def _assignable(mentions: list[Mention], items: list[Item]) -> bool:
    if not mentions:
        return True
    first, rest = mentions[0], mentions[1:]
    fitting = [index for index, item in enumerate(items) if _fits(first, item)]
    return any(_assignable(rest, items[:index] + items[index + 1 :]) for index in fitting)


def _fits(mention: Mention, item: Item) -> bool:
    names = (field.name for field in fields(mention))
    return all(getattr(mention, name) in (None, getattr(item, name)) for name in names)
