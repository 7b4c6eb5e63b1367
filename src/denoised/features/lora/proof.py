"""In which of its layers an adapter has run: what a receipt says of those whose forward nobody called.

A model may read a layer's weight and never call the layer, or leave the layer out; what stands beside it is then left
out as well, and nothing fails.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

from denoised.features.lora.layouts import Place
from denoised.features.lora.sites import Site, Sites

Acted = tuple[int, int]
"""Of one adapter on one rank, a bit for each of its layers: those that this rank would run, and those that ran."""
_FEW = 4


def acted(sites: Sites, key: str, places: Sequence[Place], *, denoised: bool) -> Acted:
    """Since it is in memory. denoised: this rank ran denoiser forwards with it.

    Components that had no turn, as an encoder whose results were kept, are left out: their layers say nothing.
    """
    found = [(number, component, _site(sites, component, path)) for number, (component, path) in enumerate(places)]
    ran = [(number, component) for number, component, site in found if site.beside and key in site.beside.ran]
    judged = {component for _, component in ran} | ({sites.main} if denoised and len(sites.denoisers) == 1 else set())
    held = (number for number, component, site in found if component in judged and site.beside is not None)
    return _bits(held), _bits(number for number, _ in ran)


def problem(name: str, places: Sequence[Place], ranks: Sequence[Acted]) -> str | None:
    """A sentence on the layers that no rank ran it in."""
    held, ran = (_any(found) for found in zip(*ranks, strict=True))
    missed = [".".join(place) for number, place in enumerate(places) if (held & ~ran) >> number & 1]
    if not missed:
        return None
    more = f" and {len(missed) - _FEW} more" if len(missed) > _FEW else ""
    return (
        f"warning: lora_request={name!r:.200} did not act in {len(missed)} of its {len(places)} layers, whose forward "
        f"the model does not call: {', '.join(missed[:_FEW])}{more}."
    )


def _site(sites: Sites, component: str, path: str) -> Site:
    return sites.by_component[component][path]


def _bits(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in numbers)


def _any(found: Iterable[int]) -> int:
    return functools.reduce(operator.or_, found, 0)
