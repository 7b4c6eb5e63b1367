"""Expert parallelism on gloo ranks: the plain result, with each expert called and held on one rank alone."""

from __future__ import annotations

import datetime
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, HiDreamImageTransformer2DModel
from diffusers import NucleusMoEImageTransformer2DModel as NucleusTransformer
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import nn

from denoised import DiffusionParallelConfig
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.features import expert, sequence, tensor
from denoised.rules import validate
from denoised.runtime.mesh import Mesh
from denoised.spec.model_spec import ModelSpec
from denoised.spec.registry import resolve
from denoised.steps.tally import counted
from tests.contract.support import REORDERED, difference, request_of, seed_of, tensors
from tests.ranks import run_on_ranks
from tests.tiny import UPSTREAM_WARNINGS, checkpoint
from tests.tiny.weights import randomize

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

NAME, NUM_EXPERTS = "hidream_i1", 4
SPEC = ModelSpec(pipeline="any")
_ROOT = Path(tempfile.mkdtemp(prefix="denoised-expert-"))


def mesh_of(**degrees: Any) -> Mesh:
    return Mesh(DiffusionParallelConfig(**degrees), device="cpu", timeout=datetime.timedelta(seconds=60))


def load(path: str) -> Any:
    import tests.contract.rank_setup  # noqa: F401

    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, index: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed_of(index))
    return tensors(pipeline(**request_of(NAME, index), generator=generator, output_type="latent").images)


def mixtures(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if hasattr(part, "experts")]


def resident(module: nn.Module) -> int:
    """Bytes of the parameters that are here."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.is_meta)


def watched(model: nn.Module) -> tuple[Counter[str], dict[tuple[int, int], int]]:
    """Counts, as they happen, calls of mixtures, and of each expert of each of them."""
    totals: Counter[str] = Counter()
    calls: dict[tuple[int, int], int] = Counter()
    for number, block in enumerate(mixtures(model)):
        block.register_forward_hook(lambda m, i, o: totals.update(["mixtures"]))
        for index, one in enumerate(block.get_submodule("experts").children()):
            one.register_forward_hook(lambda m, i, o, key=(number, index): calls.update([key]))
    return totals, calls


def dealt(rank: int, ranks: int, path: str, degrees: dict[str, Any], divide: bool, index: int) -> dict[str, Any]:
    """Difference, counts and bytes of one rank; `divide`: with tensor parallelism, as in the engine."""
    pipeline, mesh = load(path), mesh_of(**degrees)
    expected, model, spec = run(pipeline, index), pipeline.transformer, resolve(pipeline)
    before = sum(resident(block.get_submodule("experts")) for block in mixtures(model))
    expert.apply(model, spec, tensor=mesh.group("tensor"), sequence=mesh.span("ring", "ulysses"))
    held = sum(resident(block.get_submodule("experts")) for block in mixtures(model))
    if divide:
        tensor.apply(model, spec, mesh.group("tensor"))
    if mesh.axes["ring"] * mesh.axes["ulysses"] > 1:
        groups = {axis: mesh.group(axis) for axis in ("ring", "ulysses")}
        sequence.apply(model, spec, **groups, mode="advanced_uaa")
    after = sum(resident(block.get_submodule("experts")) for block in mixtures(model))
    totals, calls = watched(model)
    with counted() as counts:
        got = run(pipeline, index)
    return {
        "difference": difference(expected, got),
        "share": held / before,
        "cut": after != held,
        "calls": dict(calls),
        "mixtures": totals["mixtures"],
        "counts": dict(counts),
    }


LAYOUTS: list[tuple[dict[str, Any], bool]] = [
    ({"tensor_parallel_size": 2}, True),
    ({"tensor_parallel_size": 3}, False),  # uneven: two, one and one
    ({"ulysses_degree": 2}, False),
    ({"ring_degree": 3}, False),
    ({"ring_degree": 2, "ulysses_degree": 2}, False),
    ({"tensor_parallel_size": 2, "ulysses_degree": 2}, True),
]


@pytest.mark.parametrize(("degrees", "divide"), LAYOUTS)
def test_every_expert_acts_on_its_rank_alone(degrees: dict[str, Any], divide: bool) -> None:
    parallel = DiffusionParallelConfig(**degrees)
    ranks = parallel.world_size
    results = run_on_ranks(dealt, ranks, str(checkpoint(NAME, _ROOT)), degrees, divide, 2)
    called = [set(result["calls"]) for result in results]
    assert len(set().union(*called)) == sum(map(len, called)), "an expert was called on two ranks"
    shares = sorted(result["share"] for result in results)
    assert sum(shares) == pytest.approx(1)
    assert shares[-1] - shares[0] <= 1 / NUM_EXPERTS + 1e-9
    for result in results:
        counts = result["counts"]
        assert result["difference"] <= REORDERED, result
        assert counts["experts"] == sum(result["calls"].values()) > 0, result
        assert not result["cut"], "tensor parallelism cut experts that are dealt"
        travels = 2 * result["mixtures"] * (parallel.sequence_degree > 1)
        attention = 2 * counts.get("sequence_attention", 0) * (parallel.ulysses_degree > 1)
        assert counts.get("all_to_all", 0) == travels + attention, result
        if not divide:
            sums = result["mixtures"] * (parallel.tensor_parallel_size > 1)
            assert counts.get("all_reduce", 0) == sums, result


@torch.no_grad()
def lopsided(rank: int, ranks: int, lengths: list[int]) -> list[float]:
    """Differences of one block, in fp32 and bf16, with so many tokens on each rank."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(randomize(MOEFeedForwardSwiGLU(8, 16, 5, 3, _force_inference_output=True), 9).to(dtype))
        x = torch.randn(1, sum(lengths), 8, generator=torch.Generator().manual_seed(3)).to(dtype)
        expected = model(x).split(lengths, dim=1)[rank]
        mesh = mesh_of(ulysses_degree=ranks)
        expert.apply(model, SPEC, tensor=mesh.group("tensor"), sequence=mesh.span("ring", "ulysses"))
        got = model(x.split(lengths, dim=1)[rank])
        assert (got.dtype, got.shape) == (dtype, expected.shape)
        found.append(float((got - expected).abs().max() / expected.abs().max()) if lengths[rank] else 0.0)
    return found


@pytest.mark.parametrize("lengths", [[7, 0, 2], [0, 1, 0], [0, 0, 0]])
def test_ranks_and_experts_without_tokens(lengths: list[int]) -> None:
    for single, half in run_on_ranks(lopsided, 3, lengths):
        assert single <= REORDERED
        assert half <= 2**-7  # three terms, summed in another order


def packed_model() -> NucleusTransformer:
    """Experts that choose their tokens, with their weights in one module: 5 in each of two blocks."""
    model = NucleusTransformer(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="all_moe",
        num_experts=5,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
    )
    return randomize(model, 5)


@torch.no_grad()
def answer(model: NucleusTransformer) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(2, num, width, generator=generator) for num, width in ((24, 16), (7, 32)))
    mask = torch.ones(2, 7, dtype=torch.bool)
    shapes = [(1, 4, 6)] * 2
    output = model(image, shapes, text, mask, torch.tensor([0.5, 0.3]), return_dict=False)
    return tensors(list(output))


def packed(rank: int, ranks: int) -> tuple[float, float, dict[str, int]]:
    model, mesh = packed_model(), mesh_of(tensor_parallel_size=ranks)
    expected = answer(model)
    before = sum(resident(block.get_submodule("experts")) for block in mixtures(model))
    expert.apply(model, SPEC, tensor=mesh.group("tensor"), sequence=mesh.span("ring", "ulysses"))
    after = sum(resident(block.get_submodule("experts")) for block in mixtures(model))
    with counted() as counts:
        return difference(expected, answer(model)), after / before, dict(counts)


@pytest.mark.parametrize("ranks", [2, 3])
def test_experts_in_one_module(ranks: int) -> None:
    results = run_on_ranks(packed, ranks)
    assert [round(share * 5) for _, share, _ in results] == {2: [2, 3], 3: [1, 2, 2]}[ranks]
    for wrong, share, counts in results:
        assert wrong == 0  # every expert sees its own tokens, in their order
        assert counts["experts"] == 2 * round(share * 5)
        assert counts["all_gather"] == 2


def odd_model() -> nn.Module:
    """A list of experts, and nothing that tells how they are called."""
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    return model


def small_flux() -> nn.Module:
    sizes: dict[str, int] = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 1,
    }
    widths = {"joint_attention_dim": 8, "pooled_projection_dim": 8}
    return FluxTransformer2DModel(in_channels=4, **sizes, **widths, axes_dims_rope=(2, 2, 4))


def hidream() -> nn.Module:
    model: nn.Module = load(str(checkpoint(NAME, _ROOT))).transformer
    return model


def refusals(rank: int, ranks: int, model: nn.Module, tensor_size: int) -> str:
    mesh = mesh_of(tensor_parallel_size=tensor_size, ulysses_degree=ranks // tensor_size)
    try:
        expert.apply(model, SPEC, tensor=mesh.group("tensor"), sequence=mesh.span("ring", "ulysses"))
    except InvalidConfigError as error:
        assert not any(parameter.is_meta for parameter in model.parameters()), "refused, and changed"
        return str(error)
    raise AssertionError("accepted")


def refused(model: nn.Module, ranks: int, tensor_size: int) -> str:
    (message,) = set(run_on_ranks(refusals, ranks, model, tensor_size))
    return str(message)


def test_what_cannot_act_is_refused() -> None:
    start = "enable_expert_parallel=True: "
    flux = "FluxTransformer2DModel has no mixture-of-experts blocks; leave it off."
    assert refused(small_flux(), 2, 2) == start + flux
    model = hidream()
    assert isinstance(model, HiDreamImageTransformer2DModel)
    assert "one rank has nobody" in refused(model, 1, 1)
    assert "4 experts a block for 6 ranks; make tensor_parallel_size x" in refused(model, 6, 2)
    assert "is not known; leave it off." in refused(odd_model(), 2, 2)
    assert "choose among all tokens" in refused(packed_model(), 2, 1)


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({}, ("tensor_parallel_size, ulysses_degree or ring_degree",)),
        ({"cfg_parallel_size": 2}, ("leave it off",)),
        ({"ulysses_degree": 2, "use_hsdp": True}, ("unequal weights", "use_hsdp=True")),
    ],
)
def test_settings_that_cannot_act_are_refused(degrees: dict[str, Any], words: tuple[str, ...]) -> None:
    parallel = DiffusionParallelConfig(enable_expert_parallel=True, **degrees)
    with pytest.raises(InvalidConfigError, match="enable_expert_parallel=True") as caught:
        validate(EngineConfig(model="here", parallel_config=parallel))
    assert all(word in str(caught.value) for word in words), caught.value
