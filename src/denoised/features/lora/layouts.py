"""From an adapter's file, in whatever layout, to the two matrices of each layer.

A file whose names are the layers' own (diffusers', PEFT's, Kohya's with underscores) is taken as it is. Else the
pipeline's class converts it, if it has a converter: that knows the names of the original models. What is then left
over is an error that lists it, with the log where it is long: an adapter that acts in part is not the adapter that
was asked for.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from denoised import hf
from denoised.errors import InvalidRequestError, one_line
from denoised.features.lora import names
from denoised.features.lora.beside import Factors
from denoised.features.lora.files import Raw
from denoised.features.lora.sites import Site, Sites

Place = tuple[str, str]
"""Component and path of a layer."""
_SHOWN = 8  # names in an error; the log gets all
_log = logging.getLogger(__name__)


def factors(raw: Raw, sites: Sites, *, component: str | None, title: str) -> dict[Place, Factors]:
    """The matrices by layer, of whole layers.

    Args:
        component: the denoiser that names without one mean; None: the first.
        title: what errors call the adapter.

    Raises:
        InvalidRequestError: it is no LoRA, or not all of it fits this pipeline.
    """
    _check_kind(raw, title)
    if component is not None and component not in sites.denoisers:
        known = ", ".join(sites.denoisers) or "none"
        raise InvalidRequestError(f"{title}: component={component!r:.40} is no denoiser here; there are: {known}.")
    look = _Finder(sites, component or sites.main)
    return _fitted(_parts(raw, look, sites, title), raw.settings, sites, title)


def _check_kind(raw: Raw, title: str) -> None:
    other = names.other_kind(list(raw.tensors))
    if other is not None or raw.settings.get("use_dora"):
        kind, key = other or ("DoRA", "use_dora")
        raise InvalidRequestError(
            f"{title} is a {kind} adapter ({key:.80}), which is not taken; merge it into the checkpoint, or extract "
            "a LoRA of it."
        )
    if not any(names.parse(key) for key in raw.tensors):
        first = next(iter(raw.tensors), "nothing")
        raise InvalidRequestError(f"{title} holds no LoRA, but {first:.80}; give a file with lora_A and lora_B.")


_Parts = dict[Place, dict[str, Tensor]]


class _Finder:
    """Finds the layer that a name in a file means. `main`: the component of names that say none."""

    def __init__(self, sites: Sites, main: str | None) -> None:
        self.sites, self.main = sites.by_component, main
        self._denoisers = sites.denoisers
        self._underscored = {name: _by_underscores(known) for name, known in self.sites.items()}

    def parts(self, tensors: Mapping[str, Tensor]) -> tuple[_Parts, list[str]]:
        """Tensors by layer and part, and the names that mean nothing here."""
        found: _Parts = {}
        unknown: dict[str, None] = {}
        for name, tensor in tensors.items():
            key = names.parse(name)
            place = self.place(key.path) if key is not None else None
            if key is None or place is None or key.part in found.get(place, {}):
                unknown[name if key is None else key.path] = None
            else:
                found.setdefault(place, {})[key.part] = tensor
        return found, list(unknown)

    def place(self, path: str) -> Place | None:
        for wrapper in names.WRAPPERS:
            path = path.removeprefix(wrapper)
        return self._said(path) or self._meant(path) or self._by_underscores(path) or self._only(path)

    def _said(self, path: str) -> Place | None:
        """`component.path`. What is said to be for the first denoiser is for the one that the request names."""
        component, _, rest = path.partition(".")
        if component in self._denoisers[:1]:
            component = self.main or component
        return self._in(component, rest.removeprefix(names.WRAPPERS[0]))

    def _meant(self, path: str) -> Place | None:
        prefixes = (prefix for prefix in names.MAIN_PREFIXES if path.startswith(prefix))
        found = (self._in(self.main, path.removeprefix(prefix)) for prefix in prefixes)
        return next((place for place in found if place is not None), None)

    def _by_underscores(self, path: str) -> Place | None:
        for prefix, component in names.UNDERSCORED.items():
            component = component or self.main
            if path.startswith(prefix) and component in self.sites:
                rest, known = path.removeprefix(prefix), self._underscored[component]
                found = (known.get(spelled) for spelled in names.spellings(rest, dot="_"))
                layer = next((layer for layer in found if layer is not None), None)
                return None if layer is None else (component, layer)
        return None

    def _only(self, path: str) -> Place | None:
        """The one component that has such a layer: what PEFT saved of a text encoder."""
        found = [name for name, known in self.sites.items() if path in known]
        return (found[0], path) if len(found) == 1 else None

    def _in(self, component: str | None, path: str) -> Place | None:
        known = self.sites.get(component or "", {})
        return next(((component or "", spelled) for spelled in names.spellings(path) if spelled in known), None)


def _by_underscores(known: Iterable[str]) -> dict[str, str | None]:
    """Paths by how Kohya writes them; None where two are written alike."""
    found: dict[str, str | None] = {}
    for path in known:
        written = path.replace(".", "_")
        found[written] = None if written in found else path
    return found


def _parts(raw: Raw, look: _Finder, sites: Sites, title: str) -> _Parts:
    found, unknown = look.parts(raw.tensors)
    if not unknown:
        return found
    try:
        converted = hf.converted_lora(sites.pipeline, raw.tensors)
    except Exception as error:  # whatever foreign names do to a converter
        raise _unmatched(found, unknown, sites, title, f" ({one_line(error):.200})") from error
    if converted is not None:
        found, unknown = look.parts(converted)
    if unknown or not found:
        raise _unmatched(found, unknown, sites, title)
    return found


def _unmatched(found: _Parts, unknown: list[str], sites: Sites, title: str, reason: str = "") -> InvalidRequestError:
    every = [f"{name:.100}" for name in unknown]
    few, rest = ", ".join(every[:_SHOWN]), len(every) - _SHOWN
    if rest > 0:
        _log.warning("%s: not in %s: %s", title, type(sites.pipeline).__name__, ", ".join(every))
        few += f" and {rest} more, which the log lists"
    count = f"{len(unknown)} of its {len(unknown) + len(found)} layers are not" if found else "none of its layers is"
    return InvalidRequestError(
        f"{title}: {count} in {type(sites.pipeline).__name__}: {few}{reason}; give an adapter of this model."
    )


def _fitted(parts: _Parts, settings: Mapping[str, Any], sites: Sites, title: str) -> dict[Place, Factors]:
    fitted = {}
    for place, found in parts.items():
        label = ".".join(place)
        if "down" not in found or "up" not in found:
            lacks = "up" if "down" in found else "down"
            raise InvalidRequestError(f"{title}: {label} lacks its lora_{lacks}; the file is not whole.")
        site = sites.by_component[place[0]][place[1]]
        down, up = (_as_deep(found[part], len(site.shape)) for part in ("down", "up"))
        _check_shapes(down, up, found.get("bias"), site, f"{title}: {label}")
        scale = _scale(place, down.shape[0], found.get("alpha"), settings)
        fitted[place] = Factors(down=down, up=up, bias=found.get("bias"), scale=scale)
    return fitted


def _as_deep(matrix: Tensor, ndim: int) -> Tensor:
    """A matrix as a kernel of one point, or such a kernel as a matrix: trainers write either."""
    while matrix.ndim > ndim and matrix.shape[-1] == 1:
        matrix = matrix.squeeze(-1)
    return matrix if matrix.ndim >= ndim else matrix.reshape(*matrix.shape, *(1,) * (ndim - matrix.ndim))


def _check_shapes(down: Tensor, up: Tensor, bias: Tensor | None, site: Site, label: str) -> None:
    outputs, inputs, *kernel = site.shape
    rank = down.shape[0] if down.ndim else 0
    fits = down.shape == (rank, inputs, *kernel) and up.shape == (outputs, rank, *(1 for _ in kernel)) and rank > 0
    if not fits or (bias is not None and bias.shape != (outputs,)):
        raise InvalidRequestError(
            f"{label} has lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)} for a layer of {site.shape}; "
            "give an adapter of this model."
        )


def _scale(place: Place, rank: int, alpha: Tensor | None, settings: Mapping[str, Any]) -> float:
    """alpha / rank: as the file says for the layer, else as its settings say; else 1."""
    if alpha is not None:
        return float(alpha) / rank
    component, path = place
    own = {key.removeprefix(f"{component}."): value for key, value in settings.items()}
    told = _of_pattern(own.get("alpha_pattern") or {}, path, own.get("lora_alpha"))
    if told is None:
        return 1.0
    return float(told) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _of_pattern(patterns: Mapping[str, Any], path: str, usual: Any) -> Any:
    """PEFT's rule: the first pattern that is the end of the path."""
    found = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path))
    return next(found, usual)
