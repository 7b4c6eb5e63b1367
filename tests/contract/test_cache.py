"""Caches through the engine: exact where nothing may be skipped, the library's own result where it has such a cache,
and the same decisions for a row whoever else is in flight and however many ranks there are.

Random weights change from step to step more than trained ones, so thresholds here are high.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, apply_first_block_cache, apply_mag_cache

from denoised import DiffusionParallelConfig, Omni, OmniRequestOutput
from denoised.errors import InvalidConfigError
from tests.contract.parallel import METHODS, PATIENCE, counts
from tests.contract.support import (
    EXACT,
    ORDER,
    REORDERED,
    as_omni,
    difference,
    engine,
    folder,
    latent_type,
    media,
    reference,
    request_of,
    seed_of,
)
from tests.watchdog import within

# Settings that skip on random weights: a dynamic one, one that expands, one that watches the input, one that counts.
LOOSE: dict[str, tuple[str, dict[str, Any]]] = {
    "dbcache": ("cache_dit", {"max_warmup_steps": 2, "residual_diff_threshold": 50.0}),
    "taylorseer": (
        "cache_dit",
        {
            "max_warmup_steps": 2,
            "residual_diff_threshold": 50.0,
            "Bn_compute_blocks": 1,
            "enable_taylorseer": True,
            "taylorseer_order": 2,
        },
    ),
    "tea_cache": ("tea_cache", {"rel_l1_thresh": 1.0, "coefficients": [1.0, 0.0]}),
    "mag_cache": ("mag_cache", {"threshold": 0.5, "mag_ratios": [0.9] * 10}),
}
STEPS = 8
# Their pipelines do not take a number of steps.
OWN_STEPS = ("helios_pyramid",)


def cached(name: str, kind: str, **more: Any) -> Omni:
    backend, settings = LOOSE[kind]
    return engine(name, cache_backend=backend, cache_config=settings, **more)


def ask(omni: Omni, name: str, indexes: list[int], steps: int = STEPS, **changes: Any) -> list[OmniRequestOutput]:
    """The row's requests with so many steps, all in flight together."""
    own = {} if name in OWN_STEPS else {"num_inference_steps": steps}
    asked = [as_omni({**request_of(name, i), **own, **changes}, seed_of(i), latent_type(name)) for i in indexes]
    outputs: list[OmniRequestOutput] = omni.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)
    for output in outputs:
        assert output.error is None, output.error
    return outputs


def report(output: OmniRequestOutput) -> dict[str, Any]:
    assert output.receipt is not None
    assert output.receipt.cache is not None
    return output.receipt.cache


def decisions(output: OmniRequestOutput) -> list[str]:
    """Row by row, 1 for each computed step."""
    return [row["steps"] for row in report(output)["rows"]]


def blocks_skipped(output: OmniRequestOutput) -> int:
    assert output.receipt is not None
    return sum(work.counts.get("cache_blocks_skipped", 0) for work in output.receipt.ranks)


# ------------------------------------------------------------------ one rank


NEVER: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen_image": ("tea_cache", {"rel_l1_thresh": 0.0, "coefficients": [1.0, 0.0]}),
    "flux_dev": ("cache_dit", {"residual_diff_threshold": 0.0, "max_warmup_steps": 1}),
    "sd3": ("first_block_cache", {"threshold": 0.0}),
}


@pytest.mark.parametrize("name", NEVER)
def test_a_threshold_of_zero_computes_every_step(name: str) -> None:
    """The plain pipeline's bytes, and a receipt that calls the cache inert."""
    backend, settings = NEVER[name]
    with engine(name, cache_backend=backend, cache_config=settings) as omni:
        prompt, params = as_omni(request_of(name, 0), seed_of(0), latent_type(name))
        (output,) = omni.generate([prompt], [params], use_tqdm=False)
    assert difference(reference(name, 0, latent_type(name)), media(output)) == EXACT
    assert report(output)["skipped"] == 0
    assert report(output)["computed"] == sum(len(row) for row in decisions(output)) > 0
    assert output.receipt is not None
    assert any(note.startswith(f"warning: cache_backend={backend!r} did not act") for note in output.receipt.notes)


# Each of LOOSE with what it never skips with, and the one that is its special case.
IDLE: dict[str, tuple[str, dict[str, Any]]] = {
    "dbcache": ("cache_dit", {"residual_diff_threshold": 0.0, "max_warmup_steps": 1}),
    "taylorseer": ("cache_dit", LOOSE["taylorseer"][1] | {"residual_diff_threshold": 0.0, "max_warmup_steps": 1}),
    "tea_cache": ("tea_cache", LOOSE["tea_cache"][1] | {"rel_l1_thresh": 0.0}),
    "mag_cache": ("mag_cache", LOOSE["mag_cache"][1] | {"threshold": 0.0}),
    "first_block_cache": ("first_block_cache", {"threshold": 0.0}),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) == ("flux_dev", "mag_cache") else pytest.mark.slow)
        for name in ORDER
        if name != "sdxl"
        for kind in IDLE
    ],
)
def test_a_threshold_of_zero_is_the_plain_pipeline_on_every_row(name: str, kind: str) -> None:
    backend, settings = IDLE[kind]
    with engine(name, cache_backend=backend, cache_config=settings) as omni:
        prompt, params = as_omni(request_of(name, 0), seed_of(0), latent_type(name))
        (output,) = omni.generate([prompt], [params], use_tqdm=False)
    assert difference(reference(name, 0, latent_type(name)), media(output)) == EXACT
    assert report(output)["skipped"] == 0
    assert report(output)["computed"] > 0


def library(name: str, apply: Any, config: Any) -> list[torch.Tensor]:
    """The plain pipeline with diffusers' own cache."""
    import tests.contract.rank_setup  # noqa: F401

    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    pipeline.set_progress_bar_config(disable=True)
    apply(pipeline.transformer, config)
    request = {**request_of(name, 0), "num_inference_steps": STEPS}
    result = pipeline(**request, generator=torch.Generator().manual_seed(seed_of(0)), output_type="latent")
    return [result.images]


@pytest.mark.parametrize("name", ["qwen_image", "flux_dev"])
def test_a_first_block_cache_gives_what_the_library_gives(name: str) -> None:
    """Alone, where the library's state on the module does no harm."""
    expected = library(name, apply_first_block_cache, FirstBlockCacheConfig(threshold=0.9))
    with engine(name, cache_backend="first_block_cache", cache_config={"threshold": 0.9}) as omni:
        (output,) = ask(omni, name, [0])
    assert 0 < report(output)["skipped"] < report(output)["computed"] + report(output)["skipped"]
    assert difference(expected, media(output)) <= REORDERED
    assert blocks_skipped(output) == report(output)["skipped"] * (5 if name == "flux_dev" else 3)


def test_a_mag_cache_gives_what_the_library_gives() -> None:
    ratios = [1.0, 0.95, 0.9, 0.97, 0.96, 0.94, 0.98, 0.99]
    settings: dict[str, Any] = {"threshold": 0.12, "max_skip_steps": 2, "retention_ratio": 0.2, "mag_ratios": ratios}
    expected = library("flux_dev", apply_mag_cache, MagCacheConfig(num_inference_steps=STEPS, **settings))
    with engine("flux_dev", cache_backend="mag_cache", cache_config=settings) as omni:
        (output,) = ask(omni, "flux_dev", [0])
    assert report(output)["skipped"] > 0
    assert difference(expected, media(output)) <= REORDERED


@pytest.mark.parametrize(("name", "kind"), [("qwen_image", "taylorseer"), ("flux_dev", "tea_cache")])
def test_interleaved_equals_solo_hit_for_hit(name: str, kind: str) -> None:
    """Three requests of different steps and sizes, each as if it were alone, to the byte; and then joined."""
    with cached(name, kind, deterministic=True) as omni:
        lengths = ((0, 8), (1, 7), (2, 9))
        alone = [ask(omni, name, [i], steps)[0] for i, steps in lengths]
        requests = [({**request_of(name, i), "num_inference_steps": steps}, seed_of(i)) for i, steps in lengths]
        prompts = [as_omni(request, seed, "latent") for request, seed in requests]
        together = omni.generate([p for p, _ in prompts], [s for _, s in prompts], use_tqdm=False)
    with cached(name, kind) as omni:
        joined = ask(omni, name, [0, 1])
        beside = [ask(omni, name, [i])[0] for i in (0, 1)]
    for solo, other in zip(alone, together, strict=True):
        assert difference(media(solo), media(other)) == EXACT
        assert decisions(solo) == decisions(other)
        assert report(solo)["skipped"] > 0
    for solo, other in zip(beside, joined, strict=True):
        assert difference(media(solo), media(other)) <= REORDERED
        assert decisions(solo) == decisions(other)
        assert other.receipt is not None
        assert other.receipt.rows_joined > 0


def test_joined_rows_that_decide_differently_are_parted() -> None:
    """One request is a few steps ahead: masks tell its rows to skip where the other's are computed."""
    settings = {"scm_steps_mask_policy": "fast", "scm_steps_policy": "static"}
    with engine("flux_dev", cache_backend="cache_dit", cache_config=settings) as omni:
        short, long = ({**request_of("flux_dev", i), "num_inference_steps": n} for i, n in ((0, 6), (1, 12)))
        asked = [as_omni(request, seed_of(i), "latent") for i, request in enumerate((short, long))]
        together = omni.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)
        alone = [omni.generate([p], [s], use_tqdm=False)[0] for p, s in asked]
    parted = together[0].receipt.ranks[0].counts["cache_parted"]
    assert parted > 0
    assert together[0].receipt.rows_joined > 0
    for solo, other in zip(alone, together, strict=True):
        assert decisions(solo) == decisions(other)
        assert difference(media(solo), media(other)) <= REORDERED


def test_too_few_steps_are_noted() -> None:
    with engine("flux_dev", cache_backend="cache_dit") as omni:
        (output,) = ask(omni, "flux_dev", [0], steps=3)
    assert decisions(output) == ["111"]
    assert output.receipt is not None
    assert any("all of up to 3 steps" in note and "more steps" in note for note in output.receipt.notes)


REFUSED = [
    ("sdxl", "cache_dit", {}, "none can be skipped; leave it out"),
    ("flux_dev", "cache_dit", {"Fn_compute_blocks": 5, "Bn_compute_blocks": 1}, "use at most 5 together"),
    ("flux_dev", "tea_cash", {}, "did you mean 'tea_cache'"),
    ("flux_dev", "tea_cache", {}, "run `denoised calibrate`"),
    ("qwen_image", "tea_cache", {"coefficients": [1.0], "prob": "input"}, "did you mean 'probe'"),
    ("z_image", "tea_cache", {"coefficients": [1.0], "probe": "timestep"}, "given no timestep embedding"),
]


def test_what_cannot_act_is_refused_at_start() -> None:
    for name, backend, settings, says in REFUSED:
        with pytest.raises(InvalidConfigError) as caught:
            engine(name, cache_backend=backend, cache_config=settings)
        assert says in str(caught.value)
        assert "cache_" in str(caught.value).split()[0]


# ------------------------------------------------------------------ several ranks


def ranks(name: str, degrees: dict[str, Any], **settings: Any) -> Omni:
    parallel = DiffusionParallelConfig(**degrees)
    return Omni(
        folder(name),
        parallel_config=parallel,
        num_threads=1,
        plugins=("tests.contract.rank_setup",),
        **settings,
    )


def on_ranks(
    name: str, kind: str, degrees: dict[str, Any], *, indexes: tuple[int, ...] = (0, 1), **more: Any
) -> list[OmniRequestOutput]:
    """Requests in flight together, rows never joined."""

    def run() -> list[OmniRequestOutput]:
        backend, settings = LOOSE[kind]
        cache = {"cache_backend": backend, "cache_config": settings}
        with ranks(name, degrees, **{"deterministic": True, **cache, **more}) as omni:
            return ask(omni, name, list(indexes))

    return within(PATIENCE, run)


def compare(
    name: str,
    kind: str,
    degrees: dict[str, Any],
    *,
    bound: float = REORDERED,
    indexes: tuple[int, ...] = (0, 1),
    everywhere: bool = True,
    **more: Any,
) -> list[OmniRequestOutput]:
    """Decision for decision, and number for number, what one rank gives; every rank skipped, or some did."""
    expected = on_ranks(name, kind, {}, indexes=indexes)
    got = on_ranks(name, kind, degrees, indexes=indexes, **more)
    for one, several in zip(expected, got, strict=True):
        assert report(one) == report(several)
        assert report(one)["skipped"] > 0
        assert difference(media(one), media(several)) <= bound
    skipped = [counted["cache_blocks_skipped"] for counted in counts(got)]
    assert max(skipped) > 0
    assert min(skipped) > 0 or not everywhere
    return got


def test_three_branches_on_two_ranks_keep_three_states() -> None:
    """Guidance in one batch, split over ranks, and a skip-layer branch beside it."""
    (output, _) = compare("sd3_skip_layer", "dbcache", {"cfg_parallel_size": 2})
    rows = [(row["branch"], row["row"], row["steps"]) for row in report(output)["rows"]]
    assert rows == [(0, 0, "11000100"), (0, 1, "11000100"), (1, 0, "1100")]


@pytest.mark.parametrize(("method", "kind"), [("ulysses", "tea_cache"), ("tensor", "dbcache")])
def test_ranks_that_share_a_forward_decide_alike(method: str, kind: str) -> None:
    outputs = compare("qwen_image", kind, METHODS[method](2))
    for rank in zip(*(output.receipt.ranks for output in outputs if output.receipt is not None), strict=True):
        assert all(work.counts["all_reduce"] > 0 for work in rank), "the change is agreed"


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOSE)
@pytest.mark.parametrize("method", ["cfg", "ulysses", "ring", "tensor", "sharded", "offload"])
def test_every_method_with_every_cache(method: str, kind: str) -> None:
    if method == "offload":
        compare("qwen_image", kind, {}, bound=EXACT, enable_layerwise_offload=True)
        return
    degrees = METHODS["ulysses"](2) | {"use_hsdp": True} if method == "sharded" else METHODS[method](2)
    for name in ("qwen_image", "flux_true_cfg", "wan22_t2v"):
        compare(name, kind, degrees)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOSE)
@pytest.mark.parametrize("name", [name for name in ORDER if name != "sdxl"])
def test_every_row_with_every_cache(name: str, kind: str) -> None:
    """Interleaved as alone, to the byte; joined within the bound."""
    with cached(name, kind, deterministic=True) as omni:
        alone = [ask(omni, name, [i])[0] for i in (0, 1)]
        together = ask(omni, name, [0, 1])
    with cached(name, kind) as omni:
        joined = ask(omni, name, [0, 1])
    for solo, other, shared in zip(alone, together, joined, strict=True):
        # Each size of the pyramid begins anew, and has fewer steps than a warm-up.
        assert report(solo)["skipped"] > 0 or name in OWN_STEPS
        assert difference(media(solo), media(other)) == EXACT
        assert difference(media(solo), media(shared)) <= REORDERED
        assert report(solo) == report(other) == report(shared)
