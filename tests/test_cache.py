"""Caches without an engine: what each decides, step for step, and what stands for skipped blocks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import EngineError, InvalidConfigError
from denoised.features.cache import policy_of
from denoised.features.cache.change import changes, magnitude
from denoised.features.cache.expansion import Expansion
from denoised.features.cache.fitting import fitted
from denoised.features.cache.masks import MASKS, mask
from denoised.features.cache.policies import kinds
from denoised.features.cache.policy import Past, Policy, Step
from denoised.rules import validate
from denoised.spec.caches import PUBLISHED, published


def steps(policy: Policy, change: list[float | None], *, possible: bool = True) -> str:
    """1 for each step that is computed, 0 for each that is skipped, if a row changes so."""
    past, told = Past(), ""
    for number, value in enumerate(change):
        step = Step(number=number, num_steps=len(change), possible=possible and number > 0)
        asked = policy.asks(past, step)
        skips, past = policy.decide(past, step, value if asked else None)
        told += "01"[not skips]
    assert past.seen == len(change)
    assert past.skipped == told.count("0")
    return told


# ------------------------------------------------------------------ masks


def test_masks_of_28_steps_are_those_that_are_documented() -> None:
    written = {
        "slow": "1111111101110011100110010001",
        "medium": "1111110110001100011000110001",
        "fast": "1111110100010000100000100001",
        "ultra": "1111001000001000000100000001",
    }
    assert {name: "".join("01"[on] for on in mask(name, 28)) for name in MASKS} == written


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_any_number_of_steps(name: str) -> None:
    shares = []
    for num in range(1, 120):
        found = mask(name, num)
        assert len(found) == num
        assert found[0]
        assert found[-1]
        shares.append(sum(found) / num)
    documented = sum(mask(name, 28)) / 28
    assert all(abs(share - documented) < 0.06 for share in shares[39:]), "the share of computed steps is kept"


def test_faster_masks_compute_less() -> None:
    for num in range(1, 101):
        counts = [sum(mask(name, num)) for name in MASKS]
        assert counts == sorted(counts, reverse=True), num


# ------------------------------------------------------------------ policies


def test_tea_cache_adds_up_rescaled_changes() -> None:
    settings = {"rel_l1_thresh": 1.0, "coefficients": [2.0, 0.0, 0.1]}
    tea = policy_of("tea_cache", settings)
    rescaled = [float(np.polyval([2.0, 0.0, 0.1], x)) for x in (0.0, 0.5, 1.0)]
    assert [tea.rescaled(x) for x in (0.0, 0.5, 1.0)] == pytest.approx(rescaled)  # type: ignore[attr-defined]
    # 0.6 a step: the second step is below 1.0, the third is not, and the sum begins again.
    assert steps(tea, [None] + [0.5] * 8) == "101010101"
    assert steps(tea, [None] + [0.5] * 7) == "10101011", "the last step is always computed"
    assert steps(policy_of("tea_cache", settings | {"max_warmup_steps": 4}), [0.0] * 8) == "11110001"
    assert steps(policy_of("tea_cache", settings | {"rel_l1_thresh": 0.0}), [0.0] * 8) == "1" * 8


def test_a_polynomial_below_zero_foretells_no_change() -> None:
    """A sum that shrinks would let a threshold of zero skip."""
    tea = policy_of("tea_cache", {"rel_l1_thresh": 1e-9, "coefficients": [1.0, -5.0]})
    assert steps(tea, [1.0] * 6) == "100001"


def test_cache_dit_warms_up_and_keeps_its_limits() -> None:
    base: dict[str, Any] = {"max_warmup_steps": 2, "max_continuous_cached_steps": -1}
    assert steps(policy_of("cache_dit", base), [0.1] * 8) == "11000000"
    assert steps(policy_of("cache_dit", base), [0.1, 0.1, 0.1, 0.3, 0.1, 0.24, 0.1, 0.2]) == "11010100"
    assert steps(policy_of("cache_dit", base | {"max_cached_steps": 3}), [0.1] * 8) == "11000111"
    assert steps(policy_of("cache_dit", base | {"max_continuous_cached_steps": 2}), [0.1] * 8) == "11001001"
    assert steps(policy_of("cache_dit", base | {"residual_diff_threshold": 0.0}), [0.0] * 8) == "1" * 8
    assert steps(policy_of("cache_dit", base), [0.1] * 8, possible=False) == "1" * 8


def test_a_warm_up_may_be_a_share_of_the_steps() -> None:
    """The larger of number and share counts; half a step is one."""
    for backend, own in (("cache_dit", {"max_continuous_cached_steps": -1}), ("tea_cache", {"coefficients": [0.0]})):
        policy = policy_of(backend, own | {"max_warmup_steps": 2, "warmup_ratio": 0.3})
        found = [len(steps(policy, [0.0] * num).split("0")[0]) for num in (4, 5, 6, 10, 15, 50)]
        assert found == [2, 2, 2, 3, 5, 15], backend


def test_masks_override_warm_up_and_static_ones_ask_nobody() -> None:
    settings = {"scm_steps_mask_policy": "fast", "max_warmup_steps": 1, "scm_steps_policy": "static"}
    written = "".join("01"[on] for on in mask("fast", 20))
    assert steps(policy_of("cache_dit", settings), [9.0] * 20) == written
    dynamic = policy_of("cache_dit", settings | {"scm_steps_policy": "dynamic", "max_continuous_cached_steps": -1})
    assert steps(dynamic, [0.1] * 20) == written
    assert steps(dynamic, [9.0] * 20) == "1" * 20


def test_first_block_cache_is_dbcache_without_limits() -> None:
    change = [0.1, 0.01, 0.04, 0.06, 0.01, 0.2, 0.0]
    special = {"max_warmup_steps": 1, "max_continuous_cached_steps": -1, "residual_diff_threshold": 0.05}
    first, general = policy_of("first_block_cache", {"threshold": 0.05}), policy_of("cache_dit", special)
    assert steps(first, change) == steps(general, change) == "1001010"
    assert first.look == general.look


def test_mag_cache_adds_up_foretold_errors() -> None:
    settings: dict[str, Any] = {"threshold": 0.25, "max_skip_steps": 9, "retention_ratio": 0.2}
    flat = policy_of("mag_cache", settings | {"mag_ratios": [0.9] * 10})
    # Sizes 0.9, 0.81, .. are off by 0.1, 0.19: the second step is beyond 0.25.
    assert steps(flat, [None] * 10) == "1101010101"
    equal = policy_of("mag_cache", settings | {"mag_ratios": [1.0] * 5})
    assert steps(equal, [None] * 10) == "1100000000"
    assert steps(policy_of("mag_cache", settings | {"mag_ratios": [1.0], "max_skip_steps": 2}), [None] * 10) == (
        "1100100100"
    )
    ratio = policy_of("mag_cache", settings | {"mag_ratios": [1.0, 2.0, 3.0]}).ratio  # type: ignore[attr-defined]
    assert [ratio(Step(number=n, num_steps=9)) for n in (0, 4, 8)] == [1.0, 2.0, 3.0]


# ------------------------------------------------------------------ Taylor expansions, changes, rows


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_an_expansion_is_the_polynomial_of_its_differences(order: int) -> None:
    """Against numpy: differences of computed steps as derivatives, in float64, steps computed unevenly."""
    computed = [0, 1, 3, 4, 7]
    values = {t: np.sin(np.arange(4) + 0.3 * t) for t in computed}
    found: Expansion | None = None
    terms: list[Any] = []
    last = 0
    for t in computed:
        new = [values[t]]
        for term in terms[:order]:
            new.append((new[-1] - term) / (t - last))
        terms, last = new, t
        found = Expansion.of(torch.from_numpy(values[t]), t, order=order, earlier=found)
    factorials = [1, 1, 2, 6]
    for at in (8, 9, 12):
        powers = [np.array([term[i] / factorials[n] for n, term in enumerate(terms)]) for i in range(4)]
        foretold = [np.polyval(power[::-1], at - 7) for power in powers]
        assert found is not None
        assert found.value(at).numpy() == pytest.approx(foretold, rel=1e-12)


def test_an_expansion_of_order_one_is_exact_on_a_line() -> None:
    line = {t: torch.tensor([2.0 * t + 1.0, -t], dtype=torch.float64) for t in range(12)}
    first = Expansion.of(line[2], 2, order=1, earlier=None)
    second = Expansion.of(line[5], 5, order=1, earlier=first)
    assert torch.equal(first.value(9), line[2]), "one step alone tells no slope"
    assert torch.equal(second.value(9), line[9])


def test_changes_are_of_all_tensors_and_of_what_both_have() -> None:
    old, new = (
        [torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0]])],
        [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]])],
    )
    assert changes([(old, new), (new, new)], None) == [3 / 4, 0.0]
    assert changes([([torch.ones(1, 2, 3)], [torch.full((1, 4, 3), 2.0)])], None) == [1.0], "padding is left out"
    assert magnitude([torch.ones(4)], [torch.full((4,), 3.0)], None) == 3.0
    with pytest.raises(EngineError, match="was kept"):
        fitted(torch.ones(1, 2, 3), (1, 3, 4))


# ------------------------------------------------------------------ settings


REFUSED = [
    ("cache_dit", {"Fn_compute_block": 1}, "did you mean 'Fn_compute_blocks'"),
    ("cache_dit", {"Fn_compute_blocks": 0}, "Fn_compute_blocks=0: must be at least 1"),
    ("cache_dit", {"scm_steps_mask_policy": "turbo"}, "slow, medium, fast, ultra"),
    ("cache_dit", {"enable_taylorseer": 1}, "enable_taylorseer=1"),
    ("tea_cache", {"rel_l1_thresh": -1}, "must be at least 0"),
    ("tea_cache", {}, "denoised calibrate"),
    ("tea_cache", {"coefficients": ["a"]}, "must hold numbers"),
    ("mag_cache", {}, "denoised calibrate"),
]


@pytest.mark.parametrize(("backend", "settings", "says"), REFUSED)
def test_settings_are_refused_in_one_sentence(backend: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfigError, match="^cache_config: ") as caught:
        policy_of(backend, settings)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


PAIRS = [
    ({"cache_config": {"rel_l1_thresh": 0.1}}, "set cache_backend"),
    (
        {
            "cache_backend": "cache_dit",
            "parallel_config": DiffusionParallelConfig(cfg_parallel_size=2, use_hsdp=True, pipeline_parallel_size=2),
        },
        "leave out one of the three",
    ),
    (
        {"cache_backend": "calibration", "parallel_config": DiffusionParallelConfig(pipeline_parallel_size=2)},
        "pipeline_parallel_size cannot go with calibration",
    ),
]


@pytest.mark.parametrize(("settings", "says"), PAIRS)
def test_what_a_cache_cannot_go_with(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfigError, match=says):
        validate(EngineConfig(**settings))


def test_every_cache_is_one_file_with_a_config_of_its_own() -> None:
    assert {"tea_cache", "cache_dit", "mag_cache", "first_block_cache"} <= kinds().keys()
    for kind in kinds().values():
        assert all(field.kw_only and field.metadata["help"] for field in fields(kind.Config))


def test_published_settings_are_valid_and_of_that_model_alone() -> None:
    for entry in PUBLISHED:
        assert entry.source
        assert policy_of(entry.backend, entry.settings).name == entry.backend
    flux = {"num_layers": 19, "num_single_layers": 38}
    assert published("FluxTransformer2DModel", flux, "tea_cache")["coefficients"][0] == 498.651651
    assert not published("FluxTransformer2DModel", flux | {"num_layers": 2}, "tea_cache")
    assert not published("FluxTransformer2DModel", flux, "mag_cache")
