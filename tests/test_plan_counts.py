"""What `denoised plan` counts, against forwards that ran: operations and tokens of every row's denoiser."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from denoised.runtime.plan import Ask, Denoiser, ModelFacts, facts_of, read
from denoised.runtime.planning import work
from denoised.runtime.planning.skeleton import skeleton
from denoised.spec.registry import resolve
from tests.plan_counted import Counted, counted
from tests.tiny import ROWS, UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

# Operations of one denoiser call: predicted over counted. Helios carries history, which only its self-attention reads.
ERROR, ERROR_WITH_HISTORY = 0.02, 0.25
# Input pictures, history or the spec decide how many tokens these have, so that lengths are taken from the forward.
FROM_FORWARD = frozenset(
    "qwen_image_edit qwen_image_edit_plus qwen_image_layered longcat_image_edit hunyuan_video15_i2v wan21_vace "
    "helios helios_pyramid cosmos3_image cosmos3_video".split()
)
# What is outside their blocks is most of a tiny model, and nothing of a real one: a hidden size of 2048 that the class
# fixes, for the second text encoder's few tokens; patches of the history.
ONLY_BLOCKS = frozenset("hunyuan_video15_t2v hunyuan_video15_i2v helios helios_pyramid".split())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


def _facts(name: str, root: Path, real: Counted) -> ModelFacts:
    """Of the row's checkpoint, copied without its weights."""
    source, bare = checkpoint(name, root), root / "bare" / name
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    assert not list(bare.rglob("*.safetensors"))
    request = ROWS[name].request(0)
    sizes = {k: request[k] for k in ("height", "width", "num_frames", "layers") if k in request}
    pictures = {"pictures": 1} if name == "flux_kontext" else {}
    return read(str(bare), Ask(**sizes, **pictures, text_tokens=real.text), dtype="float32")


def _denoiser(name: str, model: ModelFacts, real: Counted, root: Path) -> Denoiser:
    """With the plan's own lengths, or those of the forward."""
    if name not in FROM_FORWARD:
        return model.denoisers[0]
    pipeline = skeleton(str(root / "bare" / name))
    spec = resolve(pipeline)
    tokens = replace(model.tokens, image=real.image, text=real.text)
    return work.denoiser("transformer", getattr(pipeline, spec.denoisers[0]), tokens, spec)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.folder is None])
def test_operations_and_tokens_are_those_of_a_forward_that_ran(name: str, root: Path) -> None:
    real = counted(name, root)
    model = _facts(name, root, real)
    found = _denoiser(name, model, real, root)
    inside = sum(block.flops for block in found.blocks)
    error = ERROR_WITH_HISTORY if name.startswith("helios") else ERROR
    if found.blocks:
        assert abs(inside / real.blocks - 1) < error
    if name not in ONLY_BLOCKS:
        assert abs(found.work.flops / real.flops - 1) < error
    if name not in FROM_FORWARD and found.heads:  # a UNet's levels differ in length
        assert model.tokens.image == real.image


@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
def test_a_model_that_is_loaded_has_the_facts_of_its_configs(name: str, root: Path) -> None:
    """Admission asks a pipeline with its weights; in bfloat16, to see that no product of its own is made."""
    folder, ask = str(checkpoint(name, root)), Ask(height=64, width=64, text_tokens=8)
    loaded = DiffusionPipeline.from_pretrained(folder).to(torch.bfloat16)
    real = facts_of(loaded, ask, model=folder, dtype="bfloat16")
    paper = facts_of(skeleton(folder), ask, model=folder, dtype="bfloat16")
    assert real.denoisers == paper.denoisers
    assert real.decode_bytes == paper.decode_bytes
    assert real.decode_bytes
