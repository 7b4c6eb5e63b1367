"""Pipeline parallelism: every model cut into stages gives what it gives whole, bit by bit, and stages overlap.

Blanks are NaN, so a result in which one took part cannot be equal to anything.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import itertools
import tempfile
import time
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
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

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


def turns(stages: Stages) -> list[int]:
    """The rows that this stage went on with, one after the other."""
    return [row for row, _ in itertools.groupby(mark.row for mark in stages.marks if mark.what == "begin")]


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


def toy_on_stages(rank: int, size: int, costs: list[float] | None) -> tuple[list[bool], list[bool], dict[str, int]]:
    expected = [call() for call in toy_calls(toy())]
    model = toy()
    stages = apply(model, SPEC, dist.group.WORLD, costs=costs, max_rounds=1 if costs else 8)
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


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_stages_that_take_turns_send_it_too(num_stages: int) -> None:
    """A row comes back to a stage, and its last block is on another than the last one."""
    for scouted, together, counts in run_on_ranks(toy_on_stages, num_stages, None):
        assert scouted == together == [True] * 4
        assert counts["broadcast"] == 8


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
        "turns": turns(stages),
        "counts": dict(counts),
    }


class Slow(nn.Module):
    """Twelve blocks that take their time without a processor, so that the clock tells of waiting alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Nap() for _ in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functools.reduce(lambda x, block: block(x), self.blocks, x)


class Nap(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(NAP)
        return super().forward(x)


NAP = 0.04


def timed(rank: int, size: int, num_rows: int, max_rounds: int) -> tuple[float, float]:
    """How many times faster than one rank, at best of three, and the share of it that this stage waited."""
    torch.manual_seed(0)
    model = Slow().eval().requires_grad_(False)
    stages = apply(model, ModelSpec(pipeline="Slow"), dist.group.WORLD, max_rounds=max_rounds)
    calls = [functools.partial(model, torch.randn(1, 8)) for _ in range(num_rows)]
    found = []
    for _ in range(4):
        dist.barrier()
        started = time.perf_counter()
        stages.run_many(calls)
        found.append((12 * NAP * num_rows / (time.perf_counter() - started), stages.bubble()))
    return max(found[1:])


@pytest.mark.parametrize(
    ("size", "num_rows", "max_rounds", "ideal"),
    [(2, 2, 8, 24 / 13), (2, 2, 1, 4 / 3), (2, 3, 8, 36 / 19), (3, 3, 8, 36 / 14), (2, 1, 8, 1.0)],
)
def test_two_ranks_are_almost_twice_as_fast(size: int, num_rows: int, max_rounds: int, ideal: float) -> None:
    """As many times as the order of turns allows: sending, threads and bookkeeping take less than a tenth."""
    for speed, bubble in run_on_ranks(timed, size, num_rows, max_rounds):
        assert 0.9 * ideal < speed <= ideal
        assert bubble == pytest.approx(1 - ideal / size, abs=0.1)


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


def astray(rank: int, _: int) -> dict[str, Any]:
    """Rows that turn elsewhere than their signature did, fail, or pass by, among rows that do not."""
    whole, model = toy(), toy()
    stages = apply(model, SPEC, dist.group.WORLD)
    known, calls = toy_calls(whole), toy_calls(model)
    stages.run_many(calls)
    strengths = (1.0, 0.0, 0.5, 0.0, 2.0)
    rows = [functools.partial(calls[n % 3], strength=s) for n, s in enumerate(strengths)]
    fails = functools.partial(calls[3], fail=True)
    with counted() as counts:
        first = stages.run_many([calls[3], fails, *rows, lambda: 5], return_exceptions=True)
        second = stages.run_many([calls[3], fails, *rows], return_exceptions=True)
    expected = [known[3](), None, *(known[n % 3](strength=s) for n, s in enumerate(strengths))]
    return {
        "scouted": counts["pipeline_scouted"],
        "errors": [type(output[1]).__name__ for output in (first, second)],
        "none": first.pop(),
        "equal": [equal(a, b) for out in (first, second) for a, b in zip(out, expected, strict=True) if b is not None],
    }


def test_rows_that_go_astray_or_fail_hold_up_nobody() -> None:
    for stage in run_on_ranks(astray, 2) + run_on_ranks(astray, 3):
        assert stage["equal"] == [True] * 12
        assert stage["errors"] == ["ValueError"] * 2
        assert stage["none"] == 5
        assert stage["scouted"] > 2


def surroundings(rank: int, _: int) -> dict[str, Any]:
    """Rows under states of their own, which stay with them while they pause."""
    whole, model = toy(), toy()
    stages = apply(model, SPEC, dist.group.WORLD)
    seen: list[list[str]] = [[], [], [], []]

    def row(number: int, call: Callable[[], Any]) -> Any:
        half = torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 1)
        with half, Heard(seen[number]), torch.set_grad_enabled(number > 1):
            assert label.get() == "ours"
            label.set(str(number))
            output = call()
            assert label.get() == str(number)
            assert torch.is_grad_enabled() == (number > 1)
            assert torch.is_autocast_enabled("cpu") == (number % 2 == 1)
        return output

    def rows(of: nn.Module) -> list[Callable[[], Any]]:
        return [functools.partial(row, number, call) for number, call in enumerate(toy_calls(of))]

    label.set("ours")
    stages.run_many(rows(model))
    expected = []
    for number in range(4):
        expected.append(contextvars.copy_context().run(rows(whole)[number]))
    alone = [list(names) for names in seen]
    for names in seen:
        names.clear()
    with torch.no_grad():
        together = stages.run_many(rows(model))
    return {
        "equal": list(map(equal, together, expected)),
        "heard": [len(names) for names in seen],
        "alone": [len(names) for names in alone],
        "turns": turns(stages),
        "outside": (label.get(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()),
    }


class Heard(TorchFunctionMode):
    """Keeps the names of functions that are called within it."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.linear, torch.tanh, torch.Tensor.tanh, torch.Tensor.sin):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


label: contextvars.ContextVar[str] = contextvars.ContextVar("label", default="")


def test_what_torch_keeps_of_a_thread_stays_with_its_row() -> None:
    for stage in run_on_ranks(surroundings, 2):
        assert stage["equal"] == [True] * 4
        assert len(stage["turns"]) > 4
        assert len(set(stage["heard"])) == 1  # each row heard its own functions, and as many as the others
        assert stage["heard"][0] > 0
        assert stage["outside"] == ("ours", False, True)


def failing(rank: int, _: int) -> dict[str, Any]:
    """A block of stage 1 fails in a forward of a known shape; then glue fails; then a block at its first sight."""
    model = toy()
    stages = apply(model, SPEC, dist.group.WORLD)
    calls = toy_calls(model)
    good = stages.run_many(calls)[:2]
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
