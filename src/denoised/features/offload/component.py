"""Components that take turns on the device, each whole or with blocks that come one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from denoised.errors import InvalidConfigError
from denoised.features.offload.ring import Ring
from denoised.features.offload.store import Group, Home, Store
from denoised.spec.blocks import SMALLEST_SHARE

WHOLE, LAYERS, NUM_LAYERS = FIELDS = ("enable_cpu_offload", "enable_layerwise_offload", "layerwise_num_gpu_layers")
# Methods beside `forward` that pipelines call on components.
_METHODS = ("encode", "decode", "generate")


class _Component:
    """One component: its blocks, if they come one by one, and all the rest."""

    def __init__(self, store: Store, rest: Group, ring: Ring | None) -> None:
        self._store, self._rest, self._ring = store, rest, ring

    def come(self) -> None:
        self._store.hold(self._rest)

    def go(self) -> None:
        self._store.let_go(self._rest)
        if self._ring is not None:
            self._ring.leave()


class Offload:
    """Offloading of one pipeline. Components hold their weights from their first use until another one is used.

    num_layers: blocks that may be on the device at once; None: components come whole.
    """

    def __init__(self, home: Home, *, device: torch.device, num_layers: int | None) -> None:
        self._store, self._num_layers = Store(home, device), num_layers
        self._rings: dict[nn.Module, Ring] = {}
        self._here: _Component | None = None

    @property
    def resident(self) -> int:
        """Bytes of weights that are on the device now."""
        return self._store.resident

    def check(self, model: nn.Module) -> None:
        """What this denoiser refuses, with nothing changed. Raises InvalidConfigError."""
        if self._num_layers is None:
            return
        name, num_blocks = type(model).__name__, len(_blocks(model))
        if not num_blocks:
            raise InvalidConfigError(
                f"{LAYERS}=True: {name} has no list of blocks that could come one by one; use {WHOLE}=True."
            )
        if self._num_layers >= num_blocks:
            raise InvalidConfigError(
                f"{NUM_LAYERS}={self._num_layers} leaves none of the {num_blocks} blocks of {name} to be away; use at "
                f"most {num_blocks - 1}, or leave {LAYERS} off."
            )

    def gate(self, model: nn.Module) -> None:
        """Let the blocks of a model ask for their weights. Before anything wraps blocks that may keep one waiting."""
        blocks = _blocks(model)
        if self._num_layers is not None and blocks and model not in self._rings:
            self._rings[model] = Ring(self._store, blocks, self._num_layers)

    def place(self, models: list[nn.Module], denoisers: list[nn.Module]) -> None:
        """Send the weights of all models away, after all that cuts them. Those of denoisers must go.

        Raises:
            InvalidConfigError: they cannot: the weights of a pipeline object on the CPU are nowhere else.
        """
        found = {id(model): self._find(model) for model in models}
        for model in models:
            num_bytes, component = found[id(model)]
            if not num_bytes and model in denoisers:
                raise InvalidConfigError(self._cannot_go(model))
            self._route(model, component)
        self._store.settled()

    def _cannot_go(self, model: nn.Module) -> str:
        field = WHOLE if self._num_layers is None else LAYERS
        return (
            f"{field}=True: the weights of {type(model).__name__} are in no file to be read from again, as those of "
            f"a pipeline object on the CPU; save it with save_pretrained() and give the folder, or leave {field} off."
        )

    def _find(self, model: nn.Module) -> tuple[int, _Component]:
        self.gate(model)
        ring = self._rings.get(model)
        num_bytes = ring.find() if ring is not None else 0
        inside = _ids(ring.blocks if ring is not None else [])
        rest = self._store.group(_Alone(part) for part in model.modules() if id(part) not in inside)
        return num_bytes + rest.num_bytes, _Component(self._store, rest, ring)

    def _route(self, model: nn.Module, component: _Component) -> None:
        """Whatever of a component runs outside of its blocks, all of its rest comes first."""
        enter = functools.partial(self._enter, component)
        ring = self._rings.get(model)
        inside = _ids(ring.blocks if ring is not None else _blocks(model))
        for part in [part for part in model.modules() if id(part) not in inside and _runs(part)]:
            _precede(part, "forward", enter)
        for method in [method for method in _METHODS if hasattr(model, method)]:
            _precede(model, method, enter)
        if ring is not None:
            ring.enter = enter

    def _enter(self, component: _Component) -> None:
        if self._here is component:
            return
        if self._here is not None:
            self._here.go()
        self._here = None  # should its weights not come
        component.come()
        self._here = component


class _Alone(nn.Module):
    """A module without those below it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers = module._parameters, module._buffers


def _precede(module: nn.Module, method: str, first: Callable[[], None]) -> None:
    """Call `first` before a method, whose signature still shows."""
    function = getattr(module, method)

    @functools.wraps(function)
    def preceded(*args: Any, **kwargs: Any) -> Any:
        first()
        return function(*args, **kwargs)

    module.__dict__[method] = preceded


def _ids(modules: list[nn.Module]) -> set[int]:
    """Of these modules and all below them."""
    return {id(part) for module in modules for part in module.modules()}


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Entries of the outermost lists of modules that hold a share of the weights worth it, each once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    lists = (part for part in _lists(model) if sum(p.numel() for p in part.parameters()) >= SMALLEST_SHARE * total)
    return list({id(block): block for part in lists for block in part}.values()) if total else []


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """A list of lists is looked into."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and all(_runs(entry) for entry in child):
            yield child
        else:
            yield from _lists(child)


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward of its own; containers do not."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward
