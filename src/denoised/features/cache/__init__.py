"""Caches: blocks of a step are left out where they would add about what they added before (place 7 of the order).

One mechanism, several policies (`policies/`). The state of a row is its request's, so requests in any state of their
caches are in flight together; ranks that share a forward decide alike. Nothing is said of any model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from torch import nn

from denoised.checks import unknown_names
from denoised.errors import InvalidConfigError
from denoised.features.cache.passage import is_embedding
from denoised.features.cache.policies import kinds
from denoised.features.cache.policy import Policy
from denoised.features.cache.staged import Stages
from denoised.features.cache.wrapping import Gathers, Wrapping, attention_of
from denoised.spec.blocks import Stack, stacks
from denoised.spec.caches import published
from denoised.spec.model_spec import ModelSpec
from denoised.steps.collectives import Group


def apply(
    model: nn.Module,
    spec: ModelSpec,
    backend: str,
    config: dict[str, Any] | None,
    *,
    group: Group | None,
    component: str = "",
    calibration: dict[str, Any] | None = None,
    convoy: Group | None = None,
    gathers: Gathers | None = None,
    stages: Stages | None = None,
) -> None:
    """Let `model` skip blocks.

    Args:
        group: ranks that share a forward (sequence and tensor); None: there is one.
        convoy: ranks with rows of their own that gather weights together with this one; None: there are none.
        gathers: who gathers the weights of its blocks; None: they are whole.
        stages: of the model; None: it is not cut.
        component: its name in the pipeline, by which values of settings may be given.
        calibration: settings by backend that were found for this very model; those of `config` go before.

    Raises:
        InvalidConfigError: the cache cannot act on this model, or its settings make no sense.
    """
    policy = check(model, spec, backend, config, component=component, calibration=calibration)
    by_row = spec.declared and not spec.whole_calls
    ranks: dict[str, Any] = {"group": group, "convoy": convoy, "gathers": gathers, "stages": stages}
    Wrapping(model, _stacks(model, spec), policy, by_row=by_row, **ranks).wrap()


def check(
    model: nn.Module,
    spec: ModelSpec,
    backend: str,
    config: dict[str, Any] | None,
    *,
    component: str = "",
    calibration: dict[str, Any] | None = None,
) -> Policy:
    """What `apply` refuses, with nothing changed; the cache with its settings."""
    if backend not in kinds():
        near = get_close_matches(backend, kinds(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(kinds()))}."
        raise InvalidConfigError(f"cache_backend={backend!r} is not known; {hint}")
    known = (calibration or {}).get(backend) or published(type(model).__name__, getattr(model, "config", {}), backend)
    own = [of_component(settings, component, spec.denoisers) for settings in (known, config or {})]
    policy = policy_of(backend, own[0] | own[1])
    _check_blocks(model, spec, policy)
    return policy


def of_component(settings: Mapping[str, Any], component: str, names: Sequence[str]) -> dict[str, Any]:
    """Settings of one of the denoisers `names`: a value may be given by component. One that leaves it out is none.

    Raises:
        InvalidConfigError: a value names no denoiser.
    """
    by_name = {key: value for key, value in settings.items() if isinstance(value, dict)}
    for key, value in by_name.items():
        problem = unknown_names(value, names, f"cache_config: {key} is given for a component, and")
        if problem is not None:
            raise InvalidConfigError(problem)
    own = {key: value[component] for key, value in by_name.items() if component in value}
    return {key: value for key, value in settings.items() if key not in by_name} | own


def policy_of(backend: str, settings: dict[str, Any]) -> Policy:
    """The cache of this name with these settings. Raises InvalidConfigError."""
    kind = kinds()[backend]
    problem = unknown_names(settings, (f.name for f in fields(kind.Config)), f"cache_config: the key of {backend}")
    if problem:
        raise InvalidConfigError(problem)
    try:
        policy: Policy = kind.make(kind.Config(**settings))
    except InvalidConfigError as error:
        text = str(error)
        raise InvalidConfigError(text if text.startswith("cache_config") else f"cache_config: {text}") from error
    return policy


def _stacks(model: nn.Module, spec: ModelSpec) -> tuple[Stack, ...]:
    return tuple(stack for stack in stacks(model, spec.stacks) if stack.path not in spec.uncached)


def _check_blocks(model: nn.Module, spec: ModelSpec, policy: Policy) -> None:
    name, blocks = type(model).__name__, [block for stack in _stacks(model, spec) for block in stack.blocks]
    field = f"cache_backend={policy.name!r}"
    if not blocks:
        raise InvalidConfigError(f"{field}: {name} has no list of blocks to skip; leave it out.")
    if hasattr(model, "up_blocks"):
        raise InvalidConfigError(
            f"{field}: blocks of {name} change the size of pictures and hand them on past each other, so none can be "
            "skipped; leave it out."
        )
    kept = policy.look.first + policy.look.last
    if kept >= len(blocks):
        raise InvalidConfigError(
            f"cache_config: Fn_compute_blocks={policy.look.first} and Bn_compute_blocks={policy.look.last} leave none "
            f"of the {len(blocks)} blocks of {name} to skip; use at most {len(blocks) - 1} together."
        )
    _check_probe(field, name, blocks, policy)


def _check_probe(field: str, name: str, blocks: list[Any], policy: Policy) -> None:
    way_out = 'use cache_backend="cache_dit".'
    if policy.look.probe == "input" and not all(any(attention_of(block)) for block in blocks):
        raise InvalidConfigError(f"{field}: blocks of {name} have no attention to look at; {way_out}")
    names = [list(inspect.signature(block.forward).parameters) for block in blocks]
    if policy.look.probe == "timestep" and not all(any(map(is_embedding, found)) for found in names):
        raise InvalidConfigError(f"{field}: blocks of {name} are given no timestep embedding; {way_out}")
