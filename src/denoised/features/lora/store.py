"""The adapters that are in memory: read when a request needs one, shared by requests, bounded by dropping the oldest.

All ranks do the same in the same order, so they hold the same adapters without asking each other; only whether reading
went well is agreed on, for a file may be there on one machine and not on another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from denoised.errors import InvalidRequestError, one_line
from denoised.features.lora import files, layouts, proof
from denoised.features.lora.beside import Factors, is_reached, local
from denoised.features.lora.sites import Site, Sites
from denoised.lora_request import Lora
from denoised.steps.forward import Active

Gather = Callable[[Any], list[Any]]
"""What every rank says, in order of rank; all ranks call it."""


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """One adapter beside its layers. num_bytes: of its whole matrices, as in the file, which all ranks count alike."""

    key: str
    places: tuple[layouts.Place, ...]
    components: tuple[str, ...]
    num_bytes: int


class Adapters:
    """Args:
    sites: of the pipeline, after whatever cuts it has cut.
    device: where adapters live, also those of layers whose weights wait elsewhere.
    max_adapters, max_bytes: of those in memory, beside the start-up adapter; None: any.
    gather: agrees with the other ranks.
    """

    def __init__(
        self,
        sites: Sites,
        *,
        device: torch.device,
        max_adapters: int,
        max_bytes: int | None = None,
        gather: Gather = lambda word: [word],
    ) -> None:
        self._sites, self._device, self._gather = sites, device, gather
        self._max_adapters, self._max_bytes = max_adapters, max_bytes
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._keys: dict[Any, str] = {}  # by Lora.source
        self._users: dict[str, tuple[str, ...]] = {}  # keys by request
        self._leaving: set[str] = set()
        self._pinned: tuple[Lora, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of all adapters in memory, whole."""
        return sum(loaded.num_bytes for loaded in self._loaded.values())

    @property
    def num_loaded(self) -> int:
        return len(self._loaded)

    def start_with(self, lora: Lora) -> None:
        """An adapter that is active in every request from here on. Raises InvalidRequestError."""
        self._load(lora, bounded=False)
        self._pinned = (lora,)

    def load(self, lora: Lora) -> None:
        """Have it in memory before a request asks for it. Raises InvalidRequestError."""
        self._hold(lora)

    def unload(self, lora: Lora) -> None:
        """Free its memory, whenever its file was read, at once or when the last request that uses it has ended."""
        read = {key for (path, _, component), key in self._keys.items() if (path, component) == lora.place}
        self._leaving |= read - set(self._pinned_keys())
        self._sweep()

    def take(self, request_id: str, loras: Iterable[Lora]) -> None:
        """Have a request's adapters in memory, until `release`.

        Raises:
            InvalidRequestError: an adapter cannot be read, does not fit the model, or there is no room for it.
        """
        keys: list[str] = []
        self._users.setdefault(request_id, ())
        try:
            for lora in loras:
                key = self._hold(lora)
                if key in (*keys, *self._pinned_keys()):
                    raise InvalidRequestError(
                        f"{_title(lora)} is active in this request already; leave it out, or sum up the scales."
                    )
                keys.append(key)
                self._users[request_id] = tuple(keys)
        except BaseException:
            self.release(request_id)
            raise

    def release(self, request_id: str) -> None:
        """The request is over."""
        if self._users.pop(request_id, None) is not None:
            self._sweep()

    def told(self, loras: Iterable[Lora]) -> list[dict[str, Any]]:
        """For receipts: what acts, and how many layers it is for."""
        loras = tuple(loras)
        both = [*self._pinned, *loras]
        layers = self.places(loras)
        return [{"name": x.name, "scale": x.scale, "layers": len(n)} for x, n in zip(both, layers, strict=True)]

    def places(self, loras: Iterable[Lora]) -> list[tuple[layouts.Place, ...]]:
        """The layers of each, in the order of `told`."""
        return [self._loaded[self._keys[lora.source]].places for lora in (*self._pinned, *loras)]

    def acted(self, request_id: str, *, denoised: bool) -> list[proof.Acted]:
        """Of a request that is about to be released, the adapters in the order of `told`."""
        keys = (*self._pinned_keys(), *self._users.get(request_id, ()))
        return [proof.acted(self._sites, key, self._loaded[key].places, denoised=denoised) for key in keys]

    def fingerprint(self, loras: Iterable[Lora]) -> list[list[Any]]:
        """Equal for adapters of equal content and strength, whatever they are called."""
        return [[self._keys[lora.source], lora.scale] for lora in (*self._pinned, *loras)]

    # ---- loading

    def _pinned_keys(self) -> tuple[str, ...]:
        return tuple(self._keys[lora.source] for lora in self._pinned)

    def active(self, loras: Iterable[Lora]) -> dict[str, tuple[Active, ...]]:
        """What acts in a request that has them, by component."""
        found: dict[str, tuple[Active, ...]] = {}
        for lora in (*self._pinned, *loras):
            loaded = self._loaded[self._keys[lora.source]]
            for component in loaded.components if lora.scale else ():
                found[component] = (*found.get(component, ()), Active(key=loaded.key, scale=lora.scale))
        return found

    def _hold(self, lora: Lora) -> str:
        key = self._keys.get(lora.source)
        if key is None:
            key = self._load(lora, bounded=True)
        self._loaded.move_to_end(key)
        self._leaving.discard(key)
        return key

    def _load(self, lora: Lora, *, bounded: bool) -> str:
        """Read it on all ranks, or on none."""
        fitted: dict[layouts.Place, Factors] = {}
        key = problem = ""
        try:
            key, fitted = self._read(lora)
        except Exception as error:  # memory, a disk: what one rank may meet and another not
            problem = _sentence(lora, error)
        self._agree(lora, problem, key)
        if key not in self._loaded:
            num_bytes = sum(factors.num_bytes for factors in fitted.values())
            if bounded:
                self._make_room(lora, num_bytes)
            self._put(lora, key, fitted, num_bytes)
        self._keys[lora.source] = key
        return key

    def _agree(self, lora: Lora, problem: str, key: str) -> None:
        """Raises InvalidRequestError on all ranks if something is wrong on one."""
        said = self._gather((problem, key))
        problem = next((problem for problem, _ in said if problem), "")
        if not problem and len({key for _, key in said}) > 1:
            problem = f"{_title(lora)} is not the same file for all ranks; give a path that every node reads alike."
        if problem:
            raise InvalidRequestError(problem)

    def _read(self, lora: Lora) -> tuple[str, dict[layouts.Place, Factors]]:
        raw = files.read(lora.path, title=_title(lora))
        if raw.num_bytes != lora.stamp[0]:  # a request that waited, or was begun again on other ranks
            raise InvalidRequestError(f"{_title(lora)} has changed since it was asked for; send the request again.")
        key = f"{raw.digest} {lora.component or ''}".strip()
        if key in self._loaded:
            return key, {}
        return key, layouts.factors(raw, self._sites, component=lora.component, title=_title(lora))

    def _put(self, lora: Lora, key: str, fitted: Mapping[layouts.Place, Factors], num_bytes: int) -> None:
        components = tuple(dict.fromkeys(component for component, _ in fitted))
        self._loaded[key] = _Loaded(key=key, places=tuple(fitted), components=components, num_bytes=num_bytes)
        problem = ""
        try:
            for (component, path), factors in fitted.items():
                self._put_beside(self._sites.by_component[component][path], f"{component}.{path}", key, factors)
        except Exception as error:
            problem = _sentence(lora, error)
        try:
            self._agree(lora, problem, key)
        except InvalidRequestError:
            self._drop(key)
            raise

    def _put_beside(self, site: Site, label: str, key: str, factors: Factors) -> None:
        if site.beside is None:
            return
        if not is_reached(site.layer, site.beside):
            raise RuntimeError(f"the forward of {label} was replaced by one that does not call what it found")
        site.beside.weights[key] = local(factors, site.layer, self._device, site.dtype)

    # ---- room

    def _make_room(self, lora: Lora, num_bytes: int) -> None:
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            raise InvalidRequestError(
                f"{_title(lora)} takes {num_bytes / 2**20:.1f} MB, more than max_lora_mb={self._max_bytes / 2**20:g}; "
                "raise that, or give a smaller one."
            )
        while not self._has_room(num_bytes):
            oldest = next(iter(self._free()), None)
            if oldest is None:
                raise InvalidRequestError(
                    f"{_title(lora)} finds no room: max_loras={self._max_adapters} or max_lora_mb is used up by "
                    "requests in flight; ask again when one has ended, or raise them."
                )
            self._drop(oldest)

    def _has_room(self, num_bytes: int) -> bool:
        pinned = self._pinned_keys()
        others = [loaded for key, loaded in self._loaded.items() if key not in pinned]
        taken = sum(loaded.num_bytes for loaded in others)
        return len(others) < self._max_adapters and (self._max_bytes is None or taken + num_bytes <= self._max_bytes)

    def _free(self) -> list[str]:
        """Those that nobody uses, the one that was not used for longest first."""
        used = {key for keys in self._users.values() for key in keys} | set(self._pinned_keys())
        return [key for key in self._loaded if key not in used]

    def _sweep(self) -> None:
        for key in self._leaving & set(self._free()):
            self._drop(key)

    def _drop(self, key: str) -> None:
        loaded = self._loaded.pop(key)
        self._leaving.discard(key)
        self._keys = {source: known for source, known in self._keys.items() if known != key}
        for component in loaded.components:
            for site in self._sites.by_component[component].values():
                if site.beside is not None:
                    site.beside.forget(key)


def _sentence(lora: Lora, error: Exception) -> str:
    by_user = isinstance(error, InvalidRequestError)
    return str(error) if by_user else f"{_title(lora)} cannot be loaded: {one_line(error)}."


def _title(lora: Lora) -> str:
    """Not its path, which over HTTP is none of the caller's business."""
    return f"lora_request={lora.name!r:.200}"
