"""Offload through the engine, alone and over parallel layouts: the plain latents, with fewer bytes there at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from denoised import DiffusionParallelConfig, Omni, OmniRequestOutput
from tests.contract import parallel
from tests.contract.support import (
    EXACT,
    ORDER,
    REORDERED,
    as_omni,
    difference,
    folder,
    latent_type,
    media,
    reference,
    request_of,
    seed_of,
)
from tests.tiny import UPSTREAM_WARNINGS
from tests.watchdog import within

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

MODES: dict[str, dict[str, Any]] = {
    "layerwise": {"enable_layerwise_offload": True},
    "whole": {"enable_cpu_offload": True},
}
# Stages and ranks of the cfg axis add nothing up in another order, where guidance is two calls.
BOUNDS = {"tensor": REORDERED, "ulysses": REORDERED, "pipeline": EXACT, "cfg": EXACT}


def run(name: str, indexes: list[int], *, steps: int | None = None, **settings: Any) -> list[OmniRequestOutput]:
    """A row's requests, all in flight together, and no rows of different requests in one forward."""
    more = {} if steps is None else {"num_inference_steps": steps}
    asked = [as_omni(request_of(name, i) | more, seed_of(i), latent_type(name)) for i in indexes]
    return within(parallel.PATIENCE, _run, name, asked, settings)


def _run(name: str, asked: list[Any], settings: dict[str, Any]) -> list[OmniRequestOutput]:
    plugins = ("tests.contract.rank_setup",)
    with Omni(folder(name), num_threads=1, plugins=plugins, deterministic=True, **settings) as omni:
        return omni.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)  # type: ignore[no-any-return]


def in_files(name: str) -> int:
    return sum(file.stat().st_size for file in Path(folder(name)).rglob("*.safetensors"))


def check(name: str, mode: str, outputs: list[OmniRequestOutput], indexes: list[int], bound: float) -> None:
    """Equal latents, and on each rank weights that came, and never all of them at once."""
    for index, output in zip(indexes, outputs, strict=True):
        assert output.error is None, output.error
        assert difference(reference(name, index, latent_type(name)), media(output)) <= bound, f"request {index}"
    for counts in parallel.counts(outputs):
        assert 0 < counts["offload_peak_bytes"] < in_files(name)
        assert counts["offload_bytes"] >= counts["offload_peak_bytes"]
        assert bool(counts["offload_blocks"]) == (mode == "layerwise")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["flux_dev", "wan22_t2v", "sd3"])
def test_offload(name: str, mode: str) -> None:
    check(name, mode, run(name, [0], **MODES[mode]), [0], EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ORDER)
def test_offload_of_every_model(name: str, mode: str) -> None:
    """Three requests in flight, so that components come and go while requests are at different stages."""
    check(name, mode, run(name, [0, 1, 2], **MODES[mode]), [0, 1, 2], EXACT)


def test_blocks_that_a_cache_skips_are_not_fetched() -> None:
    """Against a cache that never skips, which costs the same otherwise."""
    settings = {"max_warmup_steps": 2, "residual_diff_threshold": 50.0}
    found = {}
    for skips, changed in ((False, {"residual_diff_threshold": 0.0}), (True, {})):
        more = {"cache_backend": "cache_dit", "cache_config": settings | changed}
        (output,) = run("qwen_image", [0], steps=8, **MODES["layerwise"], **more)
        assert output.error is None, output.error
        (found[skips],) = parallel.counts([output])
    plain, cached = found[False], found[True]
    assert plain["cache_blocks_skipped"] == 0
    assert plain["offload_blocks"] - cached["offload_blocks"] == cached["cache_blocks_skipped"] > 0
    each = (plain["offload_bytes"] - cached["offload_bytes"]) / cached["cache_blocks_skipped"]
    assert each * plain["offload_blocks"] > 0.8 * plain["offload_bytes"], "a whole block for each that is skipped"


def layout(method: str, name: str, mode: str) -> None:
    config = DiffusionParallelConfig(**parallel.degrees_of(method))
    outputs = run(name, [0, 1], parallel_config=config, **MODES[mode])
    check(name, mode, outputs, [0, 1], BOUNDS[method])
    if method in parallel.TRACES:
        assert all(counts[trace] for counts in parallel.counts(outputs) for trace in parallel.TRACES[method])


@pytest.mark.parametrize(("method", "mode"), [("tensor", "layerwise"), ("pipeline", "layerwise"), ("cfg", "whole")])
def test_offload_over_ranks(method: str, mode: str) -> None:
    layout(method, "qwen_image", mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("name", ["qwen_image", "wan22_t2v", "hunyuan_video15_t2v", "hidream_i1", "z_image"])
def test_offload_over_ranks_of_more_models(name: str, method: str, mode: str) -> None:
    layout(method, name, mode)
