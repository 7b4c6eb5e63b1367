"""A layout that the plan admits is one that the engine starts, and one that it leaves out is one that it refuses.

The engine's side is `denoiser._divide`, where all refusals are, on meshes without processes (`tests/plan_ranks.py`).
Both sides have configurations alone, no weights.
"""

from __future__ import annotations

import copy
import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from denoised import hf
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.rules import validate
from denoised.runtime import denoiser
from denoised.runtime.plan import HARDWARE, Ask, Layout, ModelFacts, facts_of, plan, problem
from denoised.runtime.planning.limits import without_values
from denoised.runtime.planning.skeleton import skeleton
from denoised.spec.registry import resolve
from tests.plan_ranks import first_of
from tests.tiny import ROWS, UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

NUM_RANKS = (2, 4, 8)
SAMPLED = 10  # layouts a row, beside every single axis; --full takes all
SETTINGS = ("hsdp", "experts", "uneven")
NAMES = [name for name, row in ROWS.items() if row.folder is None]
# Rows with the denoiser and encoders of another one: a full run has them too.
ALIKE = {
    *("qwen_image_2512", "qwen_image_edit", "qwen_image_edit_plus", "qwen_image_layered", "sd3_skip_layer"),
    *("flux_schnell", "flux_kontext", "flux_true_cfg", "flux2_klein", "z_image_turbo", "longcat_image_edit"),
    *("hunyuan_video15_i2v", "wan22_i2v", "helios_pyramid", "cosmos3_video"),
}


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="denoised-plan-") as folder:
        yield Path(folder)


def bare(name: str, root: Path) -> Any:
    """The pipeline of a row, from its configuration files."""
    source, folder = checkpoint(name, root), root / "bare" / name
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    assert not list(folder.rglob("*.safetensors"))
    return skeleton(str(folder))


def facts(name: str, pipeline: Any) -> ModelFacts:
    request = ROWS[name].request(0)
    sizes = {k: request[k] for k in ("height", "width", "num_frames", "layers") if k in request}
    return facts_of(pipeline, Ask(**sizes, text_tokens=8), model=name, dtype="float32")


def engine_refusal(pipeline: Any, layout: Layout) -> str | None:
    """What the engine says to it, if it does not start."""
    parallel = layout.config()
    try:
        validate(EngineConfig(parallel_config=parallel))
        with first_of(parallel) as mesh:
            denoiser._divide(_copied(pipeline), resolve(pipeline), parallel, mesh, None, None)
    except InvalidConfigError as error:
        return str(error)
    return None


def _copied(pipeline: Any) -> Any:
    """Features change modules in place."""
    other = copy.copy(pipeline)
    for name, part in hf.components(pipeline).items():
        if isinstance(part, torch.nn.Module):
            setattr(other, name, without_values(part))
    return other


def singles() -> list[Layout]:
    """Every setting alone, on two ranks."""
    axes = [Layout(**{axis: 2}) for axis in ("cfg", "pipeline", "ring", "ulysses", "tensor")]
    two = Layout(cfg=2)
    over = [replace(two, hsdp=True), replace(two, vae_patch=2), replace(two, text_encoder_tp=2)]
    return [*axes, *over, Layout(tensor=2, experts=True), Layout(ulysses=2, experts=True)]


def combinations() -> list[Layout]:
    """All axes on 2, 4 and 8 ranks, with all that may lie over them."""
    found = []
    for sizes in itertools.product((1, 2, 4, 8), repeat=5):
        axes = dict(zip(("cfg", "pipeline", "ring", "ulysses", "tensor"), sizes, strict=True))
        if (base := Layout(**axes)).num_ranks in NUM_RANKS:
            switched = itertools.product((False, True), repeat=len(SETTINGS))
            found += [replace(base, **dict(zip(SETTINGS, s, strict=True))) for s in switched]
            found += [replace(base, vae_patch=n) for n in (2, base.num_ranks)]
            found += [replace(base, text_encoder_tp=n) for n in (2, base.num_ranks)]
    return found


def compare(name: str, root: Path, layouts: list[Layout]) -> None:
    pipeline = bare(name, root)
    model = facts(name, pipeline)
    recommended = [plan(replace(model, num_rows=8), HARDWARE["h100"], n).best.prediction.layout for n in NUM_RANKS]
    accepted = {layout: engine_refusal(pipeline, layout) is None for layout in [*recommended, *layouts]}
    assert [layout for layout in accepted if accepted[layout] != (problem(layout, model) is None)] == []
    assert all(accepted[layout] for layout in recommended)
    assert {True, False} <= set(accepted.values())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in NAMES])
def test_plan_and_engine_refuse_the_same(name: str, root: Path) -> None:
    compare(name, root, [*singles(), *random.Random(name).sample(combinations(), SAMPLED)])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_plan_and_engine_refuse_the_same_everywhere(name: str, root: Path) -> None:
    compare(name, root, combinations())


def test_refusals_name_the_way_out(root: Path) -> None:
    model = facts("hidream_i1", bare("hidream_i1", root))
    for layout, words in (
        (Layout(tensor=3), "tensor_parallel_size=3 does not divide HiDreamImageTransformer2DModel; use one of 1, 2"),
        (Layout(tensor=4, ulysses=2, uneven=True, experts=True), "at most 4"),
        (Layout(ulysses=8), "ulysses_mode=advanced_uaa"),
        (Layout(pipeline=99), "use at most"),
        (Layout(cfg=8, text_encoder_tp=8), "text_encoder_tp_size=8 does not divide text_encoder"),
    ):
        assert words in str(problem(layout, model))
