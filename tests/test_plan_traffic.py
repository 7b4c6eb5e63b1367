"""What a plan predicts of exchanges and weights, against what the features do on two gloo ranks."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from denoised.features import expert, sequence, tensor
from denoised.runtime.plan import HARDWARE, Ask, Layout, Tokens, facts_of, predict
from denoised.runtime.planning import work
from denoised.spec.registry import resolve
from denoised.steps.tally import counted
from tests.contract.support import request_of
from tests.plan_counted import counted as counted_forward
from tests.ranks import run_on_ranks
from tests.tiny import UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

MIXTURES = "hidream_i1"
_ROOT = Path(tempfile.mkdtemp(prefix="denoised-plan-"))


def moved(rank: int, num_ranks: int, name: str, path: str, axis: str) -> dict[str, tuple[float, float]]:
    """Predicted and counted: calls and bytes of one step that this rank sent, and its denoiser's weights."""
    import tests.contract.rank_setup  # noqa: F401

    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    request = request_of(name, 0) if name == "flux_dev" else request_of(name, 0, unguided=True)
    spec, model = resolve(pipeline), pipeline.transformer
    sizes = {k: request[k] for k in ("height", "width", "num_frames") if k in request}
    facts = facts_of(pipeline, Ask(**sizes, text_tokens=request["max_sequence_length"]), model=name, dtype="float32")
    _apply(model, spec, axis, num_ranks)
    with counted() as counts:
        pipeline(**request, generator=torch.Generator().manual_seed(0), output_type="latent")
    found = predict(Layout(**{axis: num_ranks}), replace(facts, num_rows=1), HARDWARE["h100"])
    steps, traffic = request["num_inference_steps"], found.traffic[axis]
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "calls": (traffic.calls, _calls(counts) / steps),
        "bytes": (traffic.bytes, _sent(counts, num_ranks) / steps),
        "weights": (found.memory.weights["transformer"], held),
    }


def _apply(model: Any, spec: Any, axis: str, num_ranks: int) -> None:
    alone = [dist.new_group([rank]) for rank in range(num_ranks)][dist.get_rank()]
    world = dist.group.WORLD
    assert world is not None
    if axis == "tensor":
        tensor.apply(model, spec, world)
    else:
        groups = {"ring": alone, "ulysses": alone} | {axis: world}
        sequence.apply(model, spec, **groups, mode="strict")


def _calls(counts: dict[str, int]) -> int:
    return sum(counts[name] for name in ("all_reduce", "all_gather", "all_to_all")) + counts["ring_shift"] // 2


def _sent(counts: dict[str, int], num_ranks: int) -> float:
    """What a rank sends to others: of what it exchanges it keeps its own part, and of sums it sends two parts."""
    others = (num_ranks - 1) / num_ranks
    exchanged = counts["all_to_all_bytes"] + 2 * counts["all_reduce_bytes"]
    return exchanged * others + counts["ring_shift_bytes"] + counts["all_gather_bytes"] * (num_ranks - 1)


def dealt(rank: int, num_ranks: int, path: str, axis: str, tokens: Tokens) -> dict[str, tuple[float, float]]:
    """Predicted and counted, as in `moved`, of the model whose feed-forwards are mixtures, its experts dealt."""
    import tests.contract.rank_setup  # noqa: F401

    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    request = request_of(MIXTURES, 0, unguided=True)
    spec, model = resolve(pipeline), pipeline.transformer
    facts = facts_of(pipeline, Ask(height=request["height"], width=request["width"]), model=path, dtype="float32")
    denoiser = work.denoiser("transformer", model, tokens, spec)
    facts = replace(facts, denoisers=(denoiser,), tokens=tokens, num_rows=1)
    alone = [dist.new_group([other]) for other in range(num_ranks)][dist.get_rank()]
    groups = {"tensor": alone, "sequence": alone} | {"tensor" if axis == "tensor" else "sequence": dist.group.WORLD}
    expert.apply(model, spec, **groups)
    _apply(model, spec, axis, num_ranks)
    with counted() as counts:
        pipeline(**request, generator=torch.Generator().manual_seed(0), output_type="latent")
    found = predict(Layout(**{axis: num_ranks}, experts=True), facts, HARDWARE["h100"])
    held = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    steps = request["num_inference_steps"]
    return {
        "calls": (sum(part.calls for part in found.traffic.values()), _calls(counts) / steps),
        "bytes": (found.sent, _sent(counts, num_ranks) / steps),
        "weights": (found.memory.weights["transformer"], held),
    }


@pytest.mark.parametrize(("axis", "error"), [("tensor", 0.01), ("ulysses", 0.1)])
def test_predicted_traffic_of_experts(axis: str, error: float) -> None:
    """Tokens go to any of the experts, so that ranks of the sequence send more or less than their even share."""
    path = str(checkpoint(MIXTURES, _ROOT))
    real = counted_forward(MIXTURES, _ROOT)
    tokens = Tokens(image=real.image, text=real.text)
    for result in run_on_ranks(dealt, 2, path, axis, tokens, timeout=200):
        assert result["calls"][0] == result["calls"][1], result
        assert result["bytes"][0] == pytest.approx(result["bytes"][1], rel=error), result
        assert result["weights"][0] == pytest.approx(result["weights"][1], rel=0.01), result


@pytest.mark.parametrize("axis", ["tensor", "ulysses", "ring"])
@pytest.mark.parametrize("name", ["flux_dev", "wan22_ti2v"])
def test_predicted_traffic_is_what_the_features_send(name: str, axis: str) -> None:
    for result in run_on_ranks(moved, 2, name, str(checkpoint(name, _ROOT)), axis, timeout=200):
        for predicted, real in result.values():
            assert predicted == pytest.approx(real, rel=0.01), result
