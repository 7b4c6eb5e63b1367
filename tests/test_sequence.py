"""Sequence parallelism: every transformer's plain pipeline, with its denoisers spread over ranks."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.distributed import ProcessGroup, init_device_mesh

from denoised import hf
from denoised.errors import EngineError, InvalidConfigError, InvalidRequestError
from denoised.features import sequence
from denoised.spec.blocks import stacks
from denoised.spec.model_spec import ModelSpec
from denoised.spec.registry import resolve
from denoised.spec.sequence import Cut, Gather, SequencePlan
from denoised.steps.tally import counted
from tests.ranks import run_on_ranks
from tests.tiny import ROWS, checkpoint, small_images
from tests.tiny.row import PROMPTS

REORDERED = 1e-5  # sums in another order, fp32, relative to the largest value
UNEVEN = "advanced_uaa"
REFUSED = ("sana", "sdxl")
SPREAD = [name for name in ROWS if name not in REFUSED]
# One row of each class of denoiser.
CLASSES = (
    "flux_dev flux2_dev qwen_image_edit sd3 wan22_ti2v wan21_vace z_image longcat_image ovis_image ernie_image "
    "hidream_i1 cosmos3_video glm_image hunyuan_video15_i2v ltx2 helios stable_audio ltx pixart_sigma"
).split()
# Rows whose lengths happen to be even, text included.
EVEN = ("flux_dev", "qwen_image", "wan22_t2v", "z_image")
LONG = "a long prompt about many things that nobody has seen, " * 3


@functools.cache
def root() -> Path:
    return Path(tempfile.mkdtemp(prefix="denoised-sequence-"))


@functools.cache
def load(folder: Path) -> Any:
    with hf.quietly(bars=False):
        pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return [torch.as_tensor(value).float()]


def answer(pipeline: Any, name: str, request: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    with small_images():
        result = pipeline(**request, generator=generator, output_type=ROWS[name].output_type)
    parts = [getattr(result, part, None) for part in ("images", "frames", "video", "audio", "audios", "sound")]
    return torch.cat([t.flatten() for part in parts if part is not None for t in tensors(part)])


def denoisers(pipeline: Any) -> list[nn.Module]:
    return [getattr(pipeline, name) for name in resolve(pipeline).denoisers]


@contextmanager
def watched(pipeline: Any) -> Iterator[list[int]]:
    """Collects the number of tokens in the attention of each block of the longest stack: at its first projection."""
    tokens: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        tokens.append(args[0].numel() // args[0].shape[-1])

    handles = []
    for model in denoisers(pipeline):
        longest = max(stacks(model), key=lambda stack: len(stack.blocks))
        attentions = [next(p for p in block.modules() if hasattr(p, "processor")) for block in longest.blocks]
        linears = [next(p for p in attention.modules() if isinstance(p, nn.Linear)) for attention in attentions]
        handles += [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def requested(name: str, index: int | str) -> dict[str, Any]:
    """A row's request, or one for two prompts of different lengths, which makes masks."""
    if index != "masked":
        return ROWS[name].request(int(index))
    request = ROWS[name].request(0)
    return request | {"prompt": [PROMPTS[0], LONG], "negative_prompt": [request["negative_prompt"]] * 2}


@functools.cache
def plain(name: str, index: int | str) -> tuple[Tensor, list[int]]:
    pipeline = load(checkpoint(name, root()))
    torch.set_num_threads(1)
    with watched(pipeline) as tokens:
        return answer(pipeline, name, requested(name, index)), tokens


def spread(
    rank: int, world_size: int, folder: Path, name: str, ring: int, mode: str, index: int | str
) -> tuple[Tensor, dict[str, int], list[int]]:
    """The pipeline's answer on this rank, what was counted, and the tokens that attention was called with here."""
    mesh = init_device_mesh("cpu", (ring, world_size // ring), mesh_dim_names=("ring", "ulysses"))
    groups = {axis: mesh.get_group(axis) for axis in ("ring", "ulysses")}
    pipeline = load(folder)
    try:
        for model in denoisers(pipeline):
            sequence.apply(model, resolve(pipeline), ring=groups["ring"], ulysses=groups["ulysses"], mode=mode)
        with counted() as counts, watched(pipeline) as tokens:
            return answer(pipeline, name, requested(name, index)), dict(counts), tokens
    finally:  # the next test finds it pristine
        for model in denoisers(pipeline):
            for module in model.modules():
                module.__dict__.pop("forward", None)


def check(name: str, *, ring: int, ulysses: int, mode: str, index: int | str) -> None:
    expected, all_tokens = plain(name, index)
    results = run_on_ranks(spread, ring * ulysses, checkpoint(name, root()), name, ring, mode, index)
    for got, counts, _ in results:
        assert float((got - expected).abs().max() / expected.abs().max()) < REORDERED
        attentions = counts["sequence_attention"]
        assert attentions >= len(all_tokens) > 0
        assert counts["all_gather"] > 0
        assert counts.get("all_to_all", 0) == (2 * attentions if ulysses > 1 else 0)
        assert counts.get("ring_shift", 0) == 2 * (ring - 1) * attentions
    parts = [tokens for _, _, tokens in results]
    assert [sum(column) for column in zip(*parts, strict=True)] == all_tokens
    if mode == "strict":
        assert all(part == parts[0] for part in parts)


@pytest.mark.parametrize("name", SPREAD)
def test_uneven_lengths_and_heads(name: str) -> None:
    check(name, ring=1, ulysses=3, mode=UNEVEN, index=2)


@pytest.mark.parametrize("name", CLASSES)
def test_ulysses_inside_a_ring(name: str) -> None:
    check(name, ring=2, ulysses=2, mode=UNEVEN, index=0)


@pytest.mark.parametrize("name", EVEN)
def test_even_lengths(name: str) -> None:
    check(name, ring=1, ulysses=2, mode="strict", index=0)
    check(name, ring=2, ulysses=1, mode="strict", index=0)


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
@pytest.mark.parametrize(("ring", "ulysses"), [(1, 3), (3, 1)])
def test_masks(name: str, ring: int, ulysses: int) -> None:
    check(name, ring=ring, ulysses=ulysses, mode=UNEVEN, index="masked")


class Silent(nn.Module):
    """A denoiser whose attention is its own: nothing can catch it, so spreading it would give a wrong result."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        mixed = torch.softmax(hidden_states @ hidden_states.transpose(1, 2), dim=-1) @ hidden_states
        result: Tensor = self.proj_out(mixed)
        return result


class Attentive(Silent):
    def forward(self, hidden_states: Tensor, other: Tensor | None = None) -> Tensor:
        x = hidden_states.unsqueeze(1)
        return self.proj_out(nn.functional.scaled_dot_product_attention(x, x, x).squeeze(1))  # type: ignore[no-any-return]


PLAN = SequencePlan(
    cuts=(Cut(module="", item="hidden_states", stream="hidden_states"),),
    gathers=(Gather(module="proj_out", stream="hidden_states"),),
)


def own(model: nn.Module, plan: SequencePlan, mode: str, ulysses: ProcessGroup, ring: ProcessGroup) -> nn.Module:
    spec = ModelSpec(pipeline="OwnPipeline", sequence_plan=plan)
    sequence.apply(model, spec, ring=ring, ulysses=ulysses, mode=mode)
    return model


def errors(rank: int, world_size: int, folders: dict[str, Path]) -> list[str]:
    """What each misuse says; one that says nothing fails."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("ring", "ulysses"))
    groups = {"ring": mesh.get_group("ring"), "ulysses": mesh.get_group("ulysses")}
    nowhere = SequencePlan(cuts=(Cut(module="blocks.0", item=0),), gathers=PLAN.gathers)
    no_input = SequencePlan(cuts=(Cut(module="proj_out", item="other"),), gathers=PLAN.gathers)
    whole = SequencePlan(cuts=(Cut(module="", item="other", stream="hidden_states"),), gathers=PLAN.gathers)
    spec = ModelSpec(pipeline="AnyPipeline")
    open_end = SequencePlan(cuts=PLAN.cuts, gathers=(Gather(module="", stream="never"),))
    attempts = [
        lambda: sequence.apply(denoisers(load(folders["sana"]))[0], spec, mode=UNEVEN, **groups),
        lambda: sequence.apply(denoisers(load(folders["flux_dev"]))[0], spec, mode="strict", **groups),
        lambda: own(Silent(), nowhere, UNEVEN, **groups),
        lambda: own(Silent(), no_input, UNEVEN, **groups),
        lambda: own(Silent(), PLAN, UNEVEN, **groups)(torch.randn(1, 6, 8)),
        lambda: own(Attentive(), whole, UNEVEN, **groups)(torch.randn(1, 6, 8)),
        lambda: own(Attentive(), open_end, UNEVEN, **groups)(torch.randn(1, 6, 8)),
        lambda: own(Attentive(), PLAN, "strict", **groups)(torch.randn(1, 7, 8)),
        lambda: own(Attentive(), PLAN, UNEVEN, **groups)(torch.randn(1, 2, 8)),
    ]
    return [caught(attempt) for attempt in attempts]


def caught(attempt: Any) -> str:
    with pytest.raises((EngineError, InvalidConfigError, InvalidRequestError)) as error:
        attempt()
    return f"{error.type.__name__}: {error.value}"


def test_what_cannot_be_spread_is_refused() -> None:
    folders = {name: checkpoint(name, root()) for name in ("sana", "flux_dev")}
    for told in run_on_ranks(errors, 3, folders):
        assert [text.split(":")[0] for text in told] == ["InvalidConfigError"] * 4 + ["EngineError"] * 3 + [
            "InvalidRequestError"
        ] * 2
        for text, part in zip(
            told,
            (
                "nothing says how the sequence of SanaTransformer2DModel can be cut",
                "ulysses_degree=3 does not divide the 4 heads of FluxTransformer2DModel; use one of 1, 2, 4",
                "names 'blocks.0', which this model does not have",
                "names input 'other' of 'proj_out', which takes only input",
                "no attention exchanged the pieces",
                "was not cut",
                "was not put together again",
                "7 tokens of hidden_states cannot be dealt evenly to ring_degree x ulysses_degree = 3 ranks",
                "2 tokens of hidden_states are fewer than ring_degree x ulysses_degree = 3 ranks",
            ),
            strict=True,
        ):
            assert part in text


class Skipping(Attentive):
    skip = False

    def forward(self, hidden_states: Tensor, other: Tensor | None = None) -> Tensor:
        return self.proj_out(hidden_states) if self.skip else super().forward(hidden_states)  # type: ignore[no-any-return]


def skipping(rank: int, world_size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("ring", "ulysses"))
    groups = {"ring": mesh.get_group("ring"), "ulysses": mesh.get_group("ulysses")}
    model, x = Skipping(), torch.ones(1, 6, 8)
    own(model, PLAN, UNEVEN, **groups)
    model.skip = True
    told = caught(lambda: model(x))
    model.skip = False
    model(x)
    model.skip = True
    assert model(x).shape == x.shape
    return told


def test_a_cache_may_skip_all_blocks() -> None:
    """Once the sequence has been seen to be exchanged, but not before."""
    assert all("no attention exchanged" in told for told in run_on_ranks(skipping, 2))
