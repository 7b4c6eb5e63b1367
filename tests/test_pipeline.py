"""Pipeline parallelism: every model cut into stages gives what it gives whole, bit by bit, and stages overlap.

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

from denoised.errors import EngineError
from denoised.features.pipeline import Stages, apply
from denoised.features.pipeline.cut import blocks_of
from denoised.spec.model_spec import ModelSpec
from denoised.steps.tally import counted
from tests.pipeline_toy import SPEC, InPlace, toy, toy_calls
from tests.ranks import run_on_ranks
from tests.tiny import ROWS, UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]


@functools.cache
def root() -> Path:
    return Path(tempfile.mkdtemp(prefix="denoised-pipeline-"))


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


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
    with counted() as counts:
        result = generate(pipeline, name)
    return {
        "result": result,
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
        assert sorted(sum((stage["blocks"] for stage in found), [])) == sorted(found[0]["all_blocks"])
        assert sum(stage["counts"]["blocks_run"] for stage in found) == ranks[0]["calls"]
        assert sum(stage["counts"].get("send", 0) for stage in found) > 0


def toy_on_stages(rank: int, size: int, costs: list[float]) -> tuple[list[bool], list[bool], dict[str, int]]:
    expected = [call() for call in toy_calls(toy())]
    model = toy()
    stages = apply(model, SPEC, dist.group.WORLD, costs=costs)
    calls = toy_calls(model)
    scouted = [equal(call(), output) for call, output in zip(calls, expected, strict=True)]
    with counted() as counts:
        together = stages.run_many(calls)
    return scouted, list(map(equal, together, expected)), dict(counts)


@pytest.mark.parametrize("cut", [(1, 5), (3, 3), (4, 2), (5, 1), (1, 1, 4), (2, 2, 2), (3, 2, 1)], ids=str)
def test_whatever_crosses_a_cut_is_sent(cut: tuple[int, ...]) -> None:
    """Cuts are forced by costs: blocks of a range cost what makes it as dear as the others."""
    costs = [1 / length for length in cut for _ in range(length)]
    for scouted, together, counts in run_on_ranks(toy_on_stages, len(cut), costs):
        assert scouted == together == [True] * 4
        assert counts["broadcast"] == 8  # two outputs of each row, and nothing else
        assert "pipeline_scouted" not in counts


def turned(rank: int, _: int) -> list[Any]:
    """Forwards of one signature that call other blocks, as a number decides; and what was found out anew for each."""
    whole, model = toy(), toy()
    apply(model, SPEC, dist.group.WORLD)
    found: list[Any] = []
    for strength in (1.0, 0.5, 0.0, 0.0, 2.0):
        with counted() as counts:
            output = toy_calls(model)[0](strength=strength)
        found.append((equal(output, toy_calls(whole)[0](strength=strength)), counts["pipeline_scouted"]))
    return found


def test_a_forward_that_takes_another_way_is_watched_again() -> None:
    assert run_on_ranks(turned, 2) == [[(True, 1), (True, 0), (True, 1), (True, 0), (True, 1)]] * 2


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
    assert first["counts"]["send"] == 8
    assert first["marks"].index(("begin", 3)) < first["marks"].index(("output", 0))


def failing(rank: int, _: int) -> dict[str, Any]:
    """A block of stage 1 fails in a forward of a known shape; then glue fails; then a block at its first sight."""
    model = toy()
    stages = apply(model, SPEC, dist.group.WORLD)
    calls = toy_calls(model)
    good = stages.run_many(calls[:2])
    with broken(model, stages, rank == 1):
        known = stages.run_many([*calls[:2], *calls], return_exceptions=True)
    again = stages.run_many(calls[:2])
    x, context = calls[3].args
    glue = stages.run_many(
        [calls[3], functools.partial(model, x, context, fail=True), calls[3]], return_exceptions=True
    )
    changing = toy(last=InPlace)
    apply(changing, SPEC, dist.group.WORLD)
    return {
        "known": known,
        "again": [equal(a, b) for a, b in zip(again, good, strict=True)],
        "glue": [type(glue[1]).__name__, equal(glue[0], glue[2])],
        "changing": caught(toy_calls(changing)[0]),
    }


@contextmanager
def broken(model: nn.Module, stages: Stages, here: bool) -> Iterator[None]:
    """On this stage, the first block fails at the second row."""

    def fail(*_: Any) -> None:
        if next(turn) == 1:
            raise MemoryError("no room")

    turn = itertools.count()
    part = next(model.get_submodule(stages.blocks[0]).children())
    hook = part.register_forward_pre_hook(fail if here else lambda *_: None)
    yield
    hook.remove()


def caught(call: Callable[[], Any]) -> str:
    try:
        call()
    except EngineError as error:
        return str(error)
    return ""


def test_errors_leave_nobody_waiting() -> None:
    first, second = run_on_ranks(failing, 2)
    assert [type(output).__name__ for output in second["known"]].count("MemoryError") == 1
    assert not any(isinstance(output, Exception) for output in first["known"])
    for stage in (first, second):
        assert stage["again"] == [True, True]
        assert stage["glue"] == ["ValueError", True]
        assert "changes its input in place" in stage["changing"]
