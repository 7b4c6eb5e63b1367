"""Every feature that is no axis of ranks beside every method that is one, and beside the other features.

A pair is green, with the traces of both, or refused with its reason. What a feature gives alone is shown in its own
tests; here the pair has to give the same: what loses nothing is compared with the plain pipeline, the rest with one
rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import pytest
import torch

from denoised import DiffusionParallelConfig, Omni, OmniRequestOutput
from denoised.attention import graphs
from denoised.errors import InvalidConfigError
from tests.contract import test_lora, test_quantize
from tests.contract.parallel import METHODS, PATIENCE, acted, counts, degrees_of
from tests.contract.support import EXACT, REORDERED, as_omni, difference, folder, media, request_of, seed_of
from tests.contract.test_cache import LOOSE
from tests.tiny.row import Request
from tests.watchdog import within

slow = pytest.mark.slow
STEPS = 5  # of which a cache skips some


@dataclass(frozen=True, kw_only=True)
class Feature:
    """settings: that ask for it. trace: what it leaves in the counts of every rank. lossy: it changes results."""

    settings: dict[str, Any] = field(default_factory=dict)
    trace: str = ""
    lossy: bool = False


_BACKEND, _CACHE = LOOSE["dbcache"]
FEATURES = {
    "cache": Feature(
        settings={"cache_backend": _BACKEND, "cache_config": _CACHE}, trace="cache_blocks_skipped", lossy=True
    ),
    "quantization": Feature(settings={"quantization": "int8_weight_only"}, lossy=True),
    "lora": Feature(trace="lora_layers", lossy=True),
    "cpu_offload": Feature(settings={"enable_cpu_offload": True}, trace="offload_bytes"),
    "layerwise_offload": Feature(settings={"enable_layerwise_offload": True}, trace="offload_blocks"),
    "compile": Feature(trace="compiled_blocks"),  # settings: `compiled`
    "attention_backend": Feature(settings={"attention_backend": "native_math"}, trace="attention_native_math"),
}
# Whose blocks have what the method divides; decoded pictures of several tiles.
MODELS = {"expert": "hidream_i1", "vae_patch": "sd3"}
TILED: Request = {"height": 64, "width": 96}
REFUSED = {
    ("quantization", "hsdp"): "quantization cannot go with use_hsdp=True",
    ("cpu_offload", "hsdp"): "use_hsdp=True shards weights over ranks and gathers them",
    ("layerwise_offload", "hsdp"): "use_hsdp=True shards weights over ranks and gathers them",
    ("cpu_offload", "layerwise_offload"): "choose one of them",
}
# Run by CI. The others are of `scripts/test-full`.
QUICK = {("cache", "data"), ("lora", "text_encoder_tp"), ("layerwise_offload", "vae_patch"), ("lora", "cpu_offload")}


# Have a test of their own below.
APART = {("lora", "compile")}


def _cells() -> list[Any]:
    pairs = [(feature, method) for feature in FEATURES for method in METHODS]
    pairs += [(a, b) for a, b in combinations(FEATURES, 2) if not (FEATURES[a].lossy and FEATURES[b].lossy)]
    pairs = [pair for pair in pairs if pair not in APART]
    return [pytest.param(*pair, marks=() if pair in QUICK or pair in REFUSED else slow) for pair in pairs]


@pytest.mark.pair("{first}", "{second}")
@pytest.mark.parametrize(("first", "second"), _cells())
def test_feature(first: str, second: str, record_property: Callable[[str, object], None]) -> None:
    if (first, second) in REFUSED:
        with pytest.raises(InvalidConfigError, match=REFUSED[first, second]) as caught:
            run((first, second))
        record_property("refused", str(caught.value))
        return
    outputs = run((first, second))
    lossy = tuple(name for name in (first, second) if name in FEATURES and FEATURES[name].lossy)
    expected = alone(lossy, model_of(second), tiles=second == "vae_patch")
    apart = test_quantize.off if first == "quantization" else difference  # as its bounds are measured
    for whole, output in zip(expected, outputs, strict=True):
        assert apart(whole, media(output)) <= bound(first, second)
    shown(outputs, (first, second))


@pytest.mark.pair("cache", "lora")
def test_a_cache_beside_an_adapter() -> None:
    """Exactly the adapter's result where nothing is skipped, and another one where blocks are."""
    expected = alone(("lora",), "qwen_image")
    never = run(("lora",), cache_backend="cache_dit", cache_config={**_CACHE, "residual_diff_threshold": 0.0})
    skips = run(("cache", "lora"))
    for whole, idle, output in zip(expected, never, skips, strict=True):
        assert difference(whole, media(idle)) == EXACT
        assert difference(whole, media(output)) > REORDERED
    shown(skips, ("cache", "lora"))


@slow
@pytest.mark.pair("lora", "compile")
def test_an_adapter_beside_compiled_blocks() -> None:
    """A request with one runs blocks as they are written, and the other one those that are compiled."""
    outputs = run(("lora", "compile"))
    expected = [alone(("lora",), "qwen_image")[0], alone((), "qwen_image")[1]]
    for whole, output in zip(expected, outputs, strict=True):
        assert difference(whole, media(output)) <= REORDERED
    adapted, plain = (output.receipt.ranks[0].counts for output in outputs if output.receipt is not None)
    assert adapted["lora_layers"] > 0
    assert adapted["eager_blocks"] > 0
    assert "compiled_blocks" not in adapted
    assert plain["compiled_blocks"] > 0
    assert "eager_blocks" not in plain


def model_of(method: str) -> str:
    return MODELS.get(method, "qwen_image")


def bound(feature: str, method: str) -> float:
    """Shards of a quantized layer have scales of their own, also those of the ranks that experts are dealt to."""
    layout = "tensor" if method == "expert" else method
    return test_quantize.bound(layout, "int8_weight_only") if feature == "quantization" else REORDERED


def run(names: tuple[str, ...], model: str = "", **settings: Any) -> list[OmniRequestOutput]:
    """Two requests in flight with these features and methods."""
    model = model or model_of(names[-1])
    adapted = (0,) if {"lora", "compile"} <= set(names) else (0, 1) if "lora" in names else ()
    asked = [_asked(model, index, index in adapted, "vae_patch" in names) for index in (0, 1)]
    methods = [name for name in names if name in METHODS]
    for name in names:
        settings |= FEATURES[name].settings if name in FEATURES else {}
    if "compile" in names:
        settings |= compiled(model, tiled="vae_patch" in names)
    return within(PATIENCE, _run, model, asked, DiffusionParallelConfig(**degrees_of(*methods)), settings)


def compiled(model: str, *, tiled: bool) -> dict[str, Any]:
    """Blocks compiled for the sizes that are asked for: tiny models cannot make what real ones make by default."""
    asked = request_of(model, 0) | (TILED if tiled else {})
    own = {"max_sequence_length": 40} if model == "hidream_i1" else {}  # of the warm-up, as of the requests
    return {
        "enforce_eager": False,
        "compile_shapes": (f"{asked['width']}x{asked['height']}",),
        "default_sampling_params": {"extra_args": own},
    }


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced and called, but no code is made of them: here, and by `tests.traced_only` on ranks."""
    monkeypatch.setattr(graphs, "generate", lambda graph, inputs: graph.forward)
    yield
    torch._dynamo.reset()


def _asked(model: str, index: int, adapted: bool, tiled: bool) -> Any:
    request = request_of(model, index) | {"num_inference_steps": STEPS} | (TILED if tiled else {})
    prompt, params = as_omni(request, seed_of(index), "pt" if tiled else "latent")
    return prompt, replace(params, lora_request=[test_lora.asked_for(model, 1)] if adapted else None)


def _run(
    model: str, asked: list[Any], parallel: DiffusionParallelConfig, settings: dict[str, Any]
) -> list[OmniRequestOutput]:
    plugins = ["tests.contract.rank_setup"]
    if "enforce_eager" in settings and parallel.world_size > 1:  # one rank is this process
        plugins.append("tests.traced_only")
    with Omni(
        folder(model),
        parallel_config=parallel,
        num_threads=1,
        plugins=tuple(plugins),
        deterministic=True,
        **settings,
    ) as omni:
        outputs: list[OmniRequestOutput] = omni.generate(
            [prompt for prompt, _ in asked], [params for _, params in asked], use_tqdm=False
        )
    for output in outputs:
        assert output.error is None, output.error
    return outputs


@functools.cache
def alone(names: tuple[str, ...], model: str, *, tiles: bool = False) -> list[list[torch.Tensor]]:
    """What one rank gives with these features; without any of them it is the plain pipeline's, as test_rows shows."""
    asked = [_asked(model, index, "lora" in names, tiles) for index in (0, 1)]
    settings: dict[str, Any] = {"vae_use_tiling": tiles}
    for name in names:
        settings |= FEATURES[name].settings
    outputs = within(PATIENCE, _run, model, asked, DiffusionParallelConfig(), settings)
    return [media(output) for output in outputs]


def shown(outputs: list[OmniRequestOutput], names: tuple[str, ...]) -> None:
    """The traces of all, on every rank."""
    acted(outputs, tuple(name for name in names if name in METHODS))
    features = {name: FEATURES[name] for name in names if name in FEATURES}
    for rank, counted in enumerate(counts(outputs)):
        for name, feature in features.items():
            assert not feature.trace or counted[feature.trace] > 0, (name, rank, counted)
    for output in outputs:
        assert output.receipt is not None
        assert ("quantization" in names) == bool(output.receipt.quantized)
        assert ("lora" in names) == bool(output.receipt.loras)
        assert ("cache" in names) == bool(output.receipt.cache and output.receipt.cache["skipped"])
