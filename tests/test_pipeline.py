"""Pipeline parallelism of every model: cut into stages it gives what it gives whole, bit by bit, alone and when rows
take turns.

Blanks are NaN, so a result in which one took part cannot be equal to anything.
"""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree

from denoised.features.pipeline import apply
from denoised.features.pipeline.cut import blocks_of
from denoised.spec.model_spec import ModelSpec
from denoised.steps.tally import counted
from tests.pipeline_toy import equal, turns
from tests.ranks import run_on_ranks
from tests.tiny import ROWS, UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]


@functools.cache
def root() -> Path:
    return Path(tempfile.mkdtemp(prefix="denoised-pipeline-"))


def num_bytes(modules: list[nn.Module]) -> int:
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def blocks_counted(models: dict[str, nn.Module], spec: ModelSpec) -> Iterator[Counter[str]]:
    """Calls of blocks of a plain model."""
    calls: Counter[str] = Counter()
    blocks = [block for model in models.values() for block in blocks_of(model, spec, 1).values()]
    hooks = [block.register_forward_pre_hook(lambda *_: calls.update(blocks=1)) for block in blocks]
    yield calls
    for hook in hooks:
        hook.remove()


@contextmanager
def forwards_kept(models: dict[str, nn.Module]) -> Iterator[list[tuple[str, list[Callable[[], Any]], list[Any]]]]:
    """By model: its first three forwards, and what they gave."""
    kept: list[tuple[str, list[Callable[[], Any]], list[Any]]] = []
    hooks = []
    for part, model in models.items():
        calls: list[Callable[[], Any]] = []
        outputs: list[Any] = []
        kept.append((part, calls, outputs))

        def keep(model: Any, args: Any, kwargs: Any, output: Any, calls: Any = calls, outputs: Any = outputs) -> None:
            if len(calls) < 3:
                calls.append(functools.partial(model, *args, **kwargs))
                outputs.append(output)

        hooks.append(model.register_forward_hook(keep, with_kwargs=True))
    yield kept
    for hook in hooks:
        hook.remove()


def flat(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def generate(pipeline: Any, name: str) -> list[torch.Tensor]:
    from tests.contract.support import tensors

    row = ROWS[name]
    generator = torch.Generator().manual_seed(7)
    result = pipeline(**row.request(0), generator=generator, output_type=row.output_type)
    return tensors(next(getattr(result, n) for n in ("images", "frames", "video", "audios") if hasattr(result, n)))


def compare_row(rank: int, _: int, name: str, folder: str) -> dict[int, Any]:
    """The row's first request: whole, on three stages, and on two by the first two ranks."""
    from diffusers import DiffusionPipeline

    import tests.contract.rank_setup  # noqa: F401
    from denoised.spec.registry import resolve

    if rank == 0:
        checkpoint(name, Path(folder))
    dist.barrier()
    pipeline = DiffusionPipeline.from_pretrained(checkpoint(name, Path(folder)))
    pipeline.set_progress_bar_config(disable=True)
    spec = resolve(pipeline)
    # Copies: weights mapped from a file lie at odd addresses, and where weights lie decides how sums round (1e-6).
    whole = {part: copy.deepcopy(getattr(pipeline, part)) for part in spec.denoisers}
    expected, calls = None, Counter()
    for part, model in whole.items():
        setattr(pipeline, part, model)
    if rank == 0:
        with blocks_counted(whole, spec) as calls:
            expected = generate(pipeline, name)
    pair = dist.new_group([0, 1])
    found = {3: on_stages(pipeline, name, spec, whole, dist.group.WORLD)}
    if rank < 2:
        found[2] = on_stages(pipeline, name, spec, whole, pair)
    return {"expected": expected, "calls": calls["blocks"], **found}


def on_stages(pipeline: Any, name: str, spec: ModelSpec, whole: dict[str, nn.Module], group: Any) -> dict[str, Any]:
    """One way to cut, on copies."""
    models = {part: copy.deepcopy(model) for part, model in whole.items()}
    for part, model in models.items():
        setattr(pipeline, part, model)
    total = num_bytes(list(models.values()))
    blocks = {(part, n): num_bytes([b]) for part, m in models.items() for n, b in blocks_of(m, spec, 1).items()}
    stages = {part: apply(model, spec, group) for part, model in models.items()}
    own = [(part, n) for part, stage in stages.items() for n in stage.blocks]
    with counted() as counts, forwards_kept(models) as kept:
        result = generate(pipeline, name)
    part, calls, outputs = max(kept, key=lambda entry: len(entry[1]))
    with torch.no_grad():
        together = stages[part].run_many(calls)
    return {
        "result": result,
        "together": [equal(flat(a), flat(b)) for a, b in zip(together, outputs, strict=True)],
        "turns": turns(stages[part]),
        "num_blocks": len(blocks_of(models[part], spec, 1)),
        "blocks": own,
        "counts": dict(counts),
        "resident": num_bytes(list(models.values())),
        "expected_resident": total - sum(blocks.values()) + sum(blocks[key] for key in own),
        "all_blocks": list(blocks),
    }


@pytest.mark.parametrize("name", ROWS)
def test_a_pipeline_on_stages_is_the_plain_pipeline(name: str) -> None:
    ranks = run_on_ranks(compare_row, 3, name, str(root()), timeout=240)
    for num_stages in (2, 3):
        found = [rank[num_stages] for rank in ranks[:num_stages]]
        for stage in found:
            assert all(map(torch.equal, stage["result"], ranks[0]["expected"]))
            assert stage["resident"] == stage["expected_resident"]
            assert stage["counts"]["blocks_run"] > 0
            assert stage["together"] == [True] * len(stage["together"])
            if stage["num_blocks"] >= 2 * num_stages and len(stage["together"]) > 1:
                assert len(stage["turns"]) > len(stage["together"]), "rows did not take turns"
        assert sorted(sum((stage["blocks"] for stage in found), [])) == sorted(found[0]["all_blocks"])
        assert sum(stage["counts"]["blocks_run"] for stage in found) == ranks[0]["calls"]
        assert sum(stage["counts"].get("send", 0) for stage in found) > 0


def overlap(rank: int, _: int, folder: str) -> dict[str, Any]:
    """Stage 1 does not begin its first row before stage 0 has begun the second one."""
    from diffusers import DiffusionPipeline

    from denoised.spec.registry import resolve

    pipeline = DiffusionPipeline.from_pretrained(folder)
    model, store = pipeline.transformer, dist.distributed_c10d._get_default_store()
    calls = qwen_calls(model)
    with torch.no_grad():
        expected = [call()[0] for call in calls]
        stages = apply(model, resolve(pipeline), dist.group.WORLD)
        singles = [call()[0] for call in calls]
        begun = itertools.count(1)

        def meet(*_: Any) -> None:
            if rank == 0:
                store.set(f"row {next(begun)}", "begun")
            else:
                store.wait(["row 2"], timedelta(seconds=20))

        hook = model.get_submodule(stages.blocks[0]).register_forward_pre_hook(meet)
        with counted() as counts:
            together = [output[0] for output in stages.run_many(calls)]
    hook.remove()
    return {
        "equal": [equal(expected, singles), equal(expected, together)],
        "marks": [(mark.what, mark.row) for mark in stages.marks],
        "bubble": stages.bubble(),
        "turns": turns(stages),
        "counts": dict(counts),
    }


def qwen_calls(model: nn.Module) -> list[Callable[[], Any]]:
    """Rows of one size with texts of four lengths."""
    torch.manual_seed(3)
    inputs: dict[str, Any] = {"timestep": torch.tensor([0.5]), "img_shapes": [[(1, 4, 4)]], "return_dict": False}
    width = model.config.joint_attention_dim
    return [
        functools.partial(
            model,
            hidden_states=torch.randn(1, 16, model.config.in_channels),
            encoder_hidden_states=torch.randn(1, length, width),
            encoder_hidden_states_mask=torch.ones(1, length, dtype=torch.int64),
            **inputs,
        )
        for length in (5, 9, 7, 12)
    ]


def test_rows_overlap() -> None:
    folder = str(checkpoint("qwen_image", root()))
    first, last = run_on_ranks(overlap, 2, folder)
    for stage in (first, last):
        assert stage["equal"] == [True, True]
        assert stage["counts"]["blocks_run"] == 8
        assert 0 < stage["bubble"] < 1
        assert [row for what, row in stage["marks"] if what == "output"] == [0, 1, 2, 3]
    assert (first["counts"]["send"], last["counts"]["send"]) == (16, 8)  # two tensors of four rows, over three borders
    assert first["turns"] == last["turns"] == [0, 1, 2, 3] * 2
