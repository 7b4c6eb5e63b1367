"""Caches where ranks have different blocks (stages), or different rows and parts of every weight (HSDP with cfg):
the decisions and the numbers of one rank, and blocks, gathers and looks counted where they happened or did not.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from denoised import OmniRequestOutput
from tests.contract.parallel import METHODS, PATIENCE, counts
from tests.contract.support import (
    EXACT,
    REORDERED,
    as_omni,
    difference,
    latent_type,
    media,
    reference,
    request_of,
    seed_of,
)
from tests.contract.test_cache import LOOSE, ask, compare, decisions, ranks, report
from tests.watchdog import within

STAGES = METHODS["pipeline"](2)
SHARDED = {"cfg_parallel_size": 2, "use_hsdp": True}
# Blocks of a forward.
BLOCKS = {"qwen_image": 4, "flux_true_cfg": 6}
# Looks at every step, and never skips.
NEARLY_ZERO: dict[str, Any] = {
    "cache_backend": "cache_dit",
    "cache_config": {"residual_diff_threshold": 1e-9, "max_warmup_steps": 1},
}
# Which steps are skipped depends on how many a request has, so that requests in flight decide differently.
MASKED: dict[str, Any] = {
    "cache_backend": "cache_dit",
    "cache_config": {"scm_steps_mask_policy": "fast", "scm_steps_policy": "static"},
}


def forwards(output: OmniRequestOutput) -> int:
    """Steps of all rows."""
    return sum(map(len, decisions(output)))


@pytest.mark.parametrize(("name", "kind"), [("qwen_image", "tea_cache"), ("flux_true_cfg", "taylorseer")])
def test_stages_skip_as_one_rank_does(name: str, kind: str) -> None:
    """To the byte, and every block is either run or skipped, once, on its own stage."""
    (output,) = compare(name, kind, STAGES, bound=EXACT, indexes=(0,))
    found = counts([output])
    total = sum(found, Counter[str]())
    assert total["blocks_run"] + total["cache_blocks_skipped"] == BLOCKS[name] * forwards(output), total
    first, second = (work["cache_told"] for work in found)
    assert first == second > 0, "all stages hear of all looks"


@pytest.mark.slow
def test_stages_that_look_and_never_skip_give_the_plain_pipeline() -> None:
    """Two requests in flight; what the first blocks gave in a look is not computed again."""

    def run() -> list[OmniRequestOutput]:
        with ranks("flux_true_cfg", STAGES, deterministic=True, **NEARLY_ZERO) as omni:
            asked = [as_omni(request_of("flux_true_cfg", i), seed_of(i), "latent") for i in (0, 1)]
            return omni.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)

    outputs = within(PATIENCE, run)
    for index, output in enumerate(outputs):
        assert difference(reference("flux_true_cfg", index, latent_type("flux_true_cfg")), media(output)) == EXACT
        assert report(output)["skipped"] == 0
    assert all(work["cache_told"] > 0 for work in counts(outputs))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen_image", "tea_cache"), pytest.param("flux_true_cfg", "dbcache", marks=pytest.mark.slow)],
)
def test_ranks_that_gather_together_decide_for_themselves(name: str, kind: str) -> None:
    """Two requests of two branches on two ranks: every rank gathers equally often, and less often than without."""
    outputs = compare(name, kind, SHARDED)
    first, second = counts(outputs)
    assert first["hsdp_all_gather"] == second["hsdp_all_gather"] > 0
    assert first["cache_agreed"] == second["cache_agreed"] > 0
    alone = forwards(outputs[0]) + forwards(outputs[1])
    assert first["hsdp_all_gather"] < (BLOCKS[name] + 1) * alone


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [STAGES, SHARDED], ids=["stages", "sharded"])
def test_rows_that_decide_differently_are_parted_on_ranks(degrees: dict[str, Any]) -> None:
    """Joined rows of requests with different numbers of steps: each decides as if it were alone."""
    name, steps = "flux_dev", (6, 12, 12, 6)
    requests = [{**request_of(name, i % 2), "num_inference_steps": number} for i, number in enumerate(steps)]
    asked = [as_omni(request, seed_of(i), "latent") for i, request in enumerate(requests)]

    def run() -> tuple[list[OmniRequestOutput], list[OmniRequestOutput]]:
        with ranks(name, degrees, **MASKED) as omni:
            together = omni.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)
            return together, [omni.generate([p], [s], use_tqdm=False)[0] for p, s in asked]

    together, alone = within(PATIENCE, run)
    assert any(work["cache_parted"] > 0 for work in counts(together))
    for solo, other in zip(alone, together, strict=True):
        assert decisions(solo) == decisions(other)
        assert report(solo)["skipped"] > 0
        assert difference(media(solo), media(other)) <= REORDERED


# ------------------------------------------------------------------ wide


LAYOUTS: dict[str, dict[str, Any]] = {
    "stages": STAGES,
    "three stages": METHODS["pipeline"](3),
    "sharded": SHARDED,
    "cfg, stages": METHODS["cfg"](2) | STAGES,
    "stages, ulysses": STAGES | METHODS["ulysses"](2),
    "stages, ring": STAGES | METHODS["ring"](2),
    "stages, tensor": STAGES | METHODS["tensor"](2),
    "stages, sharded": STAGES | METHODS["ulysses"](2) | {"use_hsdp": True},
    "sharded, ulysses": SHARDED | METHODS["ulysses"](2),
    "sharded, tensor": SHARDED | METHODS["tensor"](2),
    "sharded, ring, two copies": SHARDED | METHODS["ring"](2) | {"hsdp_replicate_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOSE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_with_every_cache(layout: str, kind: str) -> None:
    for name in ("qwen_image", "flux_true_cfg", "wan22_t2v", "sd3"):
        # A third of a small model may be just the blocks at either end, which are always computed.
        compare(name, kind, LAYOUTS[layout], everywhere=layout != "three stages")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(1, 2), (2, 2), (3, 1), (4, 1)])
def test_first_and_last_blocks_on_any_stages(settings: tuple[int, int]) -> None:
    first, last = settings
    config = {"max_warmup_steps": 2, "residual_diff_threshold": 50.0, "enable_taylorseer": True}
    more = {"cache_config": config | {"Fn_compute_blocks": first, "Bn_compute_blocks": last}}

    def run(degrees: dict[str, Any]) -> list[OmniRequestOutput]:
        with ranks("flux_true_cfg", degrees, deterministic=True, cache_backend="cache_dit", **more) as omni:
            return ask(omni, "flux_true_cfg", [0, 1])

    for degrees in (STAGES, METHODS["pipeline"](3), SHARDED):
        for one, several in zip(run({}), within(PATIENCE, run, degrees), strict=True):
            assert report(one) == report(several)
            assert report(one)["skipped"] > 0
            assert difference(media(one), media(several)) <= REORDERED
