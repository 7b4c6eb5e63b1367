"""Attention kernels by name, for the components of one engine: never a switch of the whole process.

A component's methods run within a mode that catches torch's attention (`attention/intercept.py`). It stands outside of
what spreads a sequence, so that the kernel computes what is left after the exchange of heads; a ring merges parts,
for which it needs a kernel that gives softmax's denominator. A component that never attends is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from denoised.attention import kernels
from denoised.attention.backends import BACKENDS, Backend, find, usable
from denoised.attention.intercept import Attention
from denoised.errors import EngineError, InvalidConfigError
from denoised.steps.tally import counted

FIELD = "attention_backend"
# What pipelines call on components, beside `forward`.
_METHODS = ("forward", "encode", "decode")


def choice(setting: str | Mapping[str, str] | None, denoisers: tuple[str, ...]) -> dict[str, str]:
    """Component to name. A name alone is for the denoisers; a flag names components: "vae=flex,unet=flash".

    Raises:
        InvalidConfigError: a part of the list names no component, or there is nothing that the name could be for.
    """
    if setting is None:
        return {}
    if isinstance(setting, str) and "=" in setting:
        return _listed(setting)
    if isinstance(setting, str) and not denoisers:
        raise InvalidConfigError(
            f"{FIELD}={setting!r}: this model has no component named transformer or unet for it to act on; name "
            "components, as in 'vae=native', or leave it out."
        )
    return dict.fromkeys(denoisers, setting) if isinstance(setting, str) else dict(setting)


def _listed(setting: str) -> dict[str, str]:
    pairs = [part.strip().partition("=") for part in setting.split(",")]
    names = [name for name, _, _ in pairs]
    wrong = next(("".join(pair) for pair in pairs if not all(pair) or names.count(pair[0]) > 1), None)
    if wrong is not None:
        raise InvalidConfigError(
            f"{FIELD}={setting!r}: {wrong!r} is not one component and its kernel; write each component once, as in "
            "'transformer=flex,vae=native', or one name alone for the denoisers."
        )
    return {name: kernel for name, _, kernel in pairs}


def check(
    components: Mapping[str, Any], chosen: Mapping[str, str], *, device: torch.device, ring_degree: int
) -> dict[str, Backend]:
    """The kernels of components, with nothing changed. Raises InvalidConfigError."""
    found = _found(components, chosen)
    for name, backend in found.items():
        _check_package(backend, device.type)
        _check(components[name], backend, device.type, _dtype(components[name]))
        problem = ring_problem(backend.name, device.type, ring_degree)
        if problem is not None:
            raise InvalidConfigError(problem)
    return found


def check_planned(
    components: Mapping[str, Any], chosen: Mapping[str, str], *, device: torch.device, dtype: torch.dtype
) -> dict[str, Backend]:
    """The same for another machine, whose packages are not known here; weights would be of this dtype."""
    found = _found(components, chosen)
    for name, backend in found.items():
        _check(components[name], backend, device.type, dtype)
    return found


def _found(components: Mapping[str, Any], chosen: Mapping[str, str]) -> dict[str, Backend]:
    modules = [name for name, part in components.items() if isinstance(part, nn.Module)]
    for name in chosen:
        if name not in modules:
            raise InvalidConfigError(
                f"{FIELD}: this model has no component {name!r} with weights; use one of {', '.join(modules)}."
            )
    return {name: _known(kernel) for name, kernel in chosen.items()}


def _known(name: Any) -> Backend:
    backend = find(name) if isinstance(name, str) else None
    if backend is None:
        raise InvalidConfigError(f"{FIELD}={name!r} is not known; use one of {', '.join(BACKENDS)}.")
    return backend


def _check_package(backend: Backend, device: str) -> None:
    if backend.package is not None and device in backend.devices and backend.is_missing:
        module, install = backend.package
        raise InvalidConfigError(
            f"{FIELD}='{backend.name}' needs {module}, which is not installed: {install}; or use {_usable(device)}."
        )


def ring_problem(name: str, device: str, ring_degree: int) -> str | None:
    """Why a ring of so many ranks cannot merge what this kernel gives."""
    if ring_degree == 1 or BACKENDS[name].with_lse is not None:
        return None
    able = ", ".join(other for other in usable(device) if BACKENDS[other].with_lse is not None)
    return (
        f"{FIELD}='{name}' gives no softmax denominators, by which ring_degree={ring_degree} merges; use {able}, or "
        "ulysses_degree in place of ring_degree."
    )


def _usable(device: str) -> str:
    return ", ".join(usable(device))


def _dtype(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _check(model: nn.Module, backend: Backend, device: str, dtype: torch.dtype | None) -> None:
    """What can be told without a request: the device, the weights' dtype and the channels of a head."""
    if device not in backend.devices:
        kinds = " or ".join(backend.devices)
        raise InvalidConfigError(
            f"{FIELD}='{backend.name}' runs on {kinds}, not on {device}; here you can use {_usable(device)}."
        )
    dtypes, step, largest = backend.limits(device)
    name = type(model).__name__
    if dtypes and dtype is not None and dtype not in dtypes:
        allowed = " or ".join(str(kind).removeprefix("torch.") for kind in dtypes)
        raise InvalidConfigError(
            f"{FIELD}='{backend.name}' computes in {allowed}, and {name} is {dtype}; set dtype, or use 'native'."
        )
    channels = head_channels(model)
    if channels is not None and (channels % step or channels > (largest or channels)):
        raise InvalidConfigError(
            f"{FIELD}='{backend.name}' takes heads of up to {largest or 'any number of'} channels in steps of {step}, "
            f"and {name} has {channels}; use 'native'."
        )


def head_channels(model: nn.Module) -> int | None:
    """Of one head, where a configuration says so: the field of that name means another thing without the other."""
    config = getattr(model, "config", {})
    get = config.get if hasattr(config, "get") else lambda name: getattr(config, name, None)
    channels = get("attention_head_dim")
    return channels if isinstance(channels, int) and get("num_attention_heads") else None


def apply(model: nn.Module, backend: Backend, name: str) -> None:
    """Let a component attend by this kernel. `name`: the component's, for errors. After what spreads a sequence."""
    proved: list[bool] = []
    for method in _METHODS:
        function = getattr(model, method, None)
        if callable(function):
            model.__dict__[method] = _within(function, backend, name, proved)


def _within(function: Callable[..., Any], backend: Backend, name: str, proved: list[bool]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attending(*args: Any, **kwargs: Any) -> Any:
        with counted() as counts, Attention(backend.answer), kernels.chosen(backend.ring_kernel):
            output = function(*args, **kwargs)
        if not proved:  # later a cache may skip all blocks
            if not counts[f"attention_{backend.name}"]:
                raise EngineError(
                    f"{FIELD}='{backend.name}': {name} never called torch's attention, so that nothing would act; "
                    "leave it out, or name other components."
                )
            proved.append(True)
        return output

    return attending
