"""Quality budgets: what is asked for, what was measured, which cache follows from it; and the measures themselves."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from denoised import DiffusionParallelConfig
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, InvalidRequestError, ModelError
from denoised.features.cache import policy_of
from denoised.features.cache.policies import kinds
from denoised.outputs import OmniRequestOutput, RankWork, Receipt
from denoised.rules import validate
from denoised.runtime import calibrations
from denoised.runtime.budget import Measured, best, choices, choose
from denoised.runtime.cache_report import inert
from denoised.runtime.conditions import Conditions, sizes
from denoised.runtime.likeness import pictures, psnr, ssim
from denoised.runtime.measuring import skipped, work


def measured(threshold: float, num_steps: int, work: float, worst: float) -> Measured:
    return Measured(
        backend="cache_dit",
        config={"residual_diff_threshold": threshold},
        num_steps=num_steps,
        num_pictures=4,
        skipped=1 - work,
        work=work,
        ssim=worst,
        worst=worst,
    )


CAREFUL = [measured(0.1, 20, 0.8, 0.995), measured(0.1, 50, 0.6, 0.99)]
BOLD = [measured(0.2, 50, 0.3, 0.96), measured(0.2, 20, 0.5, 0.99)]
RASH = [measured(0.4, 20, 0.3, 0.97), measured(0.4, 50, 0.2, 0.5)]
INERT = [measured(0.0, 20, 1.0, 1.0)]
FOUND = [*RASH, *CAREFUL, *INERT, *BOLD]


def test_the_least_work_that_keeps_to_the_budget_at_every_number_of_steps() -> None:
    def threshold(least: float) -> float | None:
        found = choose(FOUND, least)
        return None if found is None else float(found.config["residual_diff_threshold"])

    assert [threshold(least) for least in (0.4, 0.95, 0.98, 0.999)] == [0.4, 0.2, 0.1, None]
    assert len(choices(FOUND)) == 3, "what never skipped is no choice"
    assert choose(INERT, 0.5) is None
    closest = best(FOUND)
    assert closest is not None
    assert closest.worst == 0.99
    assert closest.num_steps == [20, 50]
    assert [closest.expected(steps).num_steps for steps in (1, 30, 40, 90)] == [20, 20, 50, 50]


# ------------------------------------------------------------------ the engine's setting


@pytest.mark.parametrize(
    ("quality", "least", "caches"),
    [("lossless", 1.0, False), ("high", 0.98, True), ({"ssim": 0.9}, 0.9, True), ('{"ssim": 1}', 1.0, False)],
)
def test_a_quality_is_a_name_or_a_number(quality: Any, least: float, caches: bool) -> None:
    config = EngineConfig(quality=quality)
    assert (config.least_ssim, config.caches) == (least, caches)


@pytest.mark.parametrize("quality", ["best", {"psnr": 30}, {"ssim": 0}, {"ssim": 1.1}, {"ssim": True}, 0.9, "{", {}])
def test_other_qualities_are_refused(quality: Any) -> None:
    with pytest.raises(InvalidConfigError, match=r"^quality=.*'lossless', 'high', or \{'ssim': x\}"):
        EngineConfig(quality=quality)


STAGES = DiffusionParallelConfig(pipeline_parallel_size=2, cfg_parallel_size=2, use_hsdp=True)
PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"cache_backend": "tea_cache"}, "quality chooses cache_backend and cache_config itself"),
    ({"cache_config": {"threshold": 0.1}}, "quality chooses cache_backend and cache_config itself"),
    ({"parallel_config": STAGES}, "cache_backend and quality cannot go with pipeline_parallel_size"),
]


@pytest.mark.parametrize(("settings", "says"), PAIRS)
def test_what_quality_cannot_go_with(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfigError, match=says):
        validate(EngineConfig(quality="high", **settings))


def test_lossless_goes_with_everything_that_a_cache_cannot() -> None:
    validate(EngineConfig(quality="lossless", parallel_config=STAGES))


# ------------------------------------------------------------------ the model's calibration


def model(folder: Path, found: list[Measured]) -> str:
    """A folder that is a model to whoever looks for its calibration."""
    (folder / "model_index.json").write_text("{}")
    calibrations.write(folder / calibrations.FILE, {"settings": {"tea_cache": {"probe": "input"}}, "r2": 0.5}, found)
    return str(folder)


def test_the_engine_gets_the_cache_and_the_receipt_what_was_promised(tmp_path: Path) -> None:
    name = model(tmp_path, FOUND)
    assert calibrations.beside(name) == {"tea_cache": {"probe": "input"}}
    assert calibrations.measured(name) == FOUND
    config, promise = calibrations.within(EngineConfig(model=name, quality={"ssim": 0.95}))
    assert (config.cache_backend, config.cache_config) == ("cache_dit", {"residual_diff_threshold": 0.2})
    assert config.quality is None
    assert promise is not None
    told = promise.onto(receipt(50, computed=30, skipped=70))
    assert told.quality is not None
    assert told.quality["expected"] == {"ssim": 0.96, "worst_ssim": 0.96, "skipped": 0.7, "num_inference_steps": 50}
    assert told.quality["skipped"] == 0.7
    assert told.notes == []
    (note,) = promise.onto(receipt(8, computed=1, skipped=0)).notes
    assert note.startswith("warning: quality={'ssim': 0.95} was measured at 20 to 50 steps, and this request has 8")


def rows_of(**steps: str) -> dict[str, Any]:
    """A cache's report: steps by component and branch, as `transformer_2__1`."""
    names = {name: name.split("__") for name in steps}
    rows = [
        {"component": component, "branch": int(branch), "row": 0, "steps": steps[name]}
        for name, (component, branch) in names.items()
    ]
    told = "".join(steps.values())
    return {"backend": "tea_cache", "computed": told.count("1"), "skipped": told.count("0"), "rows": rows}


def test_a_cache_that_is_idle_in_a_part_is_told() -> None:
    """One expert, or one branch of guidance; where nothing acts, no part is named."""
    acts = rows_of(transformer__0="1101", transformer__1="1011", transformer_2__0="110", transformer_2__1="101")
    assert inert(acts) == []
    (expert,) = inert(rows_of(transformer__0="1101", transformer_2__0="111", transformer_2__1="111"))
    assert expert.startswith("warning: cache_backend='tea_cache' did not act in transformer_2: all of up to 3 steps")
    (branch,) = inert(rows_of(transformer__0="1101", transformer__1="1111"))
    assert "did not act in branch 1 of transformer: all of up to 4 steps" in branch
    (all_of_it,) = inert(rows_of(transformer__0="111", transformer__1="1111"))
    assert "did not act: all of up to 4 steps" in all_of_it
    assert "cache_config" in all_of_it


def test_an_idle_cache_of_a_quality_is_told_without_settings_that_are_refused(tmp_path: Path) -> None:
    promise = calibrations.within(EngineConfig(model=model(tmp_path, FOUND), quality={"ssim": 0.95}))[1]
    assert promise is not None
    idle = rows_of(transformer__0="1" * 30)
    told = promise.onto(dataclasses.replace(receipt(30, computed=30, skipped=0), cache=idle, notes=inert(idle)))
    (note,) = told.notes
    assert "did not act" in note
    assert "ask for a lower quality, or ask for more steps" in note
    assert "cache_config" not in note


def test_a_request_unlike_the_calibration_is_told(tmp_path: Path) -> None:
    name = model(tmp_path, FOUND)
    file = tmp_path / calibrations.FILE
    then = Conditions(sizes=["64x64"], dtype="", quantization={"transformer": "int8"}, adapters=[])
    file.write_text(json.dumps(json.loads(file.read_text()) | {"conditions": dataclasses.asdict(then)}))
    promise = calibrations.within(EngineConfig(model=name, quality={"ssim": 0.95}))[1]
    assert promise is not None
    plain = receipt(30, computed=15, skipped=15)
    same = dataclasses.replace(plain, quantized=[{"component": "transformer", "method": "int8"}])
    assert promise.onto(same, ["64x64"]).notes == promise.onto(same).notes == []
    other = dataclasses.replace(plain, dtype="bfloat16", loras=[{"name": "ink", "scale": 0.5, "layers": 8}])
    notes = promise.onto(other, ["64x96"]).notes
    assert all(note.startswith("warning: quality={'ssim': 0.95} was measured ") for note in notes)
    assert [note.split("measured ")[1].split(";")[0] for note in notes] == [
        "at 64x64, and this request is 64x96",
        "in , and this request is bfloat16",
        "with transformer in int8, and this request has no quantization",
        "with no adapter, and this request has adapter ink @ 0.5",
    ]


def test_sizes_of_pictures_and_videos_in_any_form() -> None:
    frames = np.zeros((5, 32, 48, 3))
    images = [Image.new("RGB", (48, 32)), frames[0], torch.zeros(3, 32, 48)]
    output = OmniRequestOutput(request_id="0", prompt={"prompt": ""}, images=images, videos=[frames, list(frames)])
    assert sizes(output) == ["48x32"] * 3 + ["48x32x5"] * 2


def test_lossless_is_no_cache_and_needs_no_calibration() -> None:
    config, promise = calibrations.within(EngineConfig(model="owner/name", quality="lossless"))
    assert config.cache_backend is None
    assert promise is not None
    told = promise.onto(receipt(8, computed=0, skipped=0)).quality
    assert told is not None
    assert (told["cache_backend"], told["skipped"]) == (None, 0.0)
    assert calibrations.within(EngineConfig()) == (EngineConfig(), None)


def test_a_budget_that_nobody_can_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="never measured; run `denoised calibrate"):
        calibrations.within(EngineConfig(model=model(tmp_path, []), quality="high"))
    with pytest.raises(InvalidConfigError, match="of owner/name was never measured"):
        calibrations.within(EngineConfig(model="owner/name", quality="high"))
    with pytest.raises(InvalidConfigError, match=r"SSIM of 0.999; the best that is known is 0.99 \(cache_dit\)"):
        calibrations.within(EngineConfig(model=model(tmp_path, FOUND), quality={"ssim": 0.999}))
    (tmp_path / calibrations.FILE).write_text(json.dumps({"settings": {}, "measured": [{"backend": "x"}]}))
    with pytest.raises(ModelError, match="is no calibration"):
        calibrations.within(EngineConfig(model=str(tmp_path), quality="high"))


def receipt(steps: int, *, computed: int, skipped: int, **counts: int) -> Receipt:
    ranks = [RankWork(rank=0, forwards=1, rows=1, seconds=1.0, counts=counts)]
    cache = {"backend": "cache_dit", "computed": computed, "skipped": skipped, "rows": []}
    named: dict[str, Any] = dict.fromkeys(("model", "pipeline", "dtype", "device"), "")
    return Receipt(**named, world_size=1, parallel={}, seed=0, steps=steps, ranks=ranks, cache=cache)


# ------------------------------------------------------------------ what is measured


def test_every_rung_of_a_ladder_is_a_setting_of_its_cache() -> None:
    own = {"tea_cache": {"coefficients": [1.0]}, "mag_cache": {"mag_ratios": [1.0]}}
    ladders = {name: kind.LADDER for name, kind in kinds().items() if hasattr(kind, "LADDER")}
    assert ladders.keys() == {"tea_cache", "cache_dit", "mag_cache"}
    for name, ladder in ladders.items():
        assert len(ladder) == len({json.dumps(config) for config in ladder})
        assert all(policy_of(name, own.get(name, {}) | config) for config in ladder)


def test_work_counts_blocks_that_run_in_every_step() -> None:
    counts = {"cache_forwards_skipped": 6, "cache_forwards_computed": 4, "cache_blocks_skipped": 24}
    found = OmniRequestOutput(
        request_id="0", prompt={"prompt": ""}, receipt=receipt(10, computed=4, skipped=6, **counts)
    )
    assert skipped(found) == 0.6
    # Four of five blocks are left out in a skipped step; DBCache with its one first block.
    assert work(found, "cache_dit", {}) == pytest.approx(0.4 + 0.6 / 5)
    none = OmniRequestOutput(request_id="0", prompt={"prompt": ""}, receipt=receipt(10, computed=10, skipped=0))
    assert (skipped(none), work(none, "cache_dit", {})) == (0.0, 1.0)


def test_ssim_is_what_its_definition_gives() -> None:
    """By hand for pictures of the window's size, which have one place; flat ones have no variance. Noise lowers it."""
    c1, c2 = 0.01**2, 0.03**2
    a, b = np.random.default_rng(0).random((2, 11, 11))
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / np.outer(weights, weights).sum()
    ma, mb = (weights * a).sum(), (weights * b).sum()
    va, vb, cov = ((weights * x).sum() for x in ((a - ma) ** 2, (b - mb) ** 2, (a - ma) * (b - mb)))
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert ssim(torch.tensor(a)[None, None], torch.tensor(b)[None, None]) == [pytest.approx(expected, abs=1e-9)]
    flat = torch.full((1, 3, 32, 24), 0.25)
    assert ssim(flat, torch.full_like(flat, 0.75)) == [pytest.approx((0.375 + c1) / (0.625 + c1))]
    noise = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    assert ssim(noise, noise) == [pytest.approx(1.0)] * 2
    close, far = (ssim(noise, (noise + size * noise.flip(3)).clamp(0, 1))[0] for size in (0.05, 0.4))
    assert far < close < 1


def test_psnr_is_what_its_definition_gives() -> None:
    zero = torch.zeros(2, 3, 8, 8)
    other = torch.stack([torch.full((3, 8, 8), 0.1), torch.zeros(3, 8, 8)])
    assert psnr(zero, other) == [pytest.approx(20.0), math.inf]


def test_pictures_of_outputs() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 51))
    (found,) = pictures(OmniRequestOutput(request_id="0", prompt={"prompt": ""}, images=[image]))
    assert found.shape == (3, 2, 4)
    assert found[:, 1, 3].tolist() == [1.0, 0.0, 0.2]
    frames = pictures(OmniRequestOutput(request_id="0", prompt={"prompt": ""}, videos=[[image, image]]))
    assert frames.shape == (2, 3, 2, 4)
    for other in ({"error": "broken"}, {"audios": [1]}):
        with pytest.raises(InvalidRequestError, match=r"broken|makes none; calibrate it with --no-measure"):
            pictures(OmniRequestOutput(request_id="0", prompt={"prompt": ""}, **other))  # type: ignore[arg-type]
