"""Compiled blocks: the same results as written, one body for a class of block, every later compilation counted.

Most tests leave out the last step, from graphs to code of this device: torch traces, guards and calls graphs as it
does otherwise. Those marked slow, and the one on a toy, make code.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from denoised import Omni, OmniRequestOutput
from denoised.attention import graphs
from denoised.attention.intercept import Attention
from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import InvalidConfigError
from denoised.features import compile
from denoised.features.lora.beside import install
from denoised.rules import validate
from denoised.runtime import denoiser, warming
from denoised.spec.model_spec import ModelSpec
from denoised.steps.tally import counted
from tests.contract import support, test_cache
from tests.contract.test_lora import SCALE, adapter, asked_for
from tests.contract.test_lora import reference as with_adapters

BOUND = 1e-5  # sums in another order, fp32, relative to the largest value
# The same of blocks with quantized weights; int8 rounds activations, whose sums are in another order.
QUANTIZED = {"int8_weight_only": 2e-6, "int8": 0.06}
SPEC = ModelSpec(pipeline="Toy")


class Block(nn.Module):
    """Attention and one layer, of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        return x + torch.sin(attended.transpose(1, 2).flatten(2))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def close(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).abs().max() / expected.abs().max()) <= BOUND


@torch.no_grad()
def test_one_body_serves_all_blocks_and_lengths(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Toy().eval()
    inputs = {(rows, tokens): torch.randn(rows, tokens, 8) for rows in (1, 2, 3) for tokens in (8, 5)}
    expected = {shape: model(x) for shape, x in inputs.items()}
    for block in model.blocks:
        install(block.layer)  # what stands by for adapters, one object a layer
    compile.apply(model, SPEC, compile.Bodies())
    with counted() as counts, graphs.expected():
        assert close(model(inputs[1, 8]), expected[1, 8])
    assert counts["compiled_graphs"] == 1
    assert counts["compiled_blocks"] == 3
    assert not counts["recompiles"]
    with counted() as counts:
        assert close(model(inputs[1, 5]), expected[1, 5])
        assert not counts["compiled_graphs"]
    with counted() as counts, caplog.at_level(logging.WARNING, logger=graphs.__name__):
        assert close(model(inputs[2, 5]), expected[2, 5])
    assert counts["recompiles"] == counts["compiled_graphs"] == 1
    assert "had to wait" in caplog.text
    with counted() as counts:
        for shape in ((2, 8), (3, 8), (3, 5)):
            assert close(model(inputs[shape]), expected[shape])
        assert not counts["recompiles"]


@torch.no_grad()
def test_attention_inside_of_graphs_is_caught_too(traced: None) -> None:
    torch.manual_seed(0)
    model, inputs = Toy().eval(), [torch.randn(1, tokens, 8) for tokens in (6, 4)]
    expected, lengths = [model(x) for x in inputs], []

    def answer(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        lengths.append(query.shape[2])
        return F.scaled_dot_product_attention(query, key, value, **options)

    compile.apply(model, SPEC, compile.Bodies())
    with Attention(answer), counted() as counts, graphs.expected():
        assert all(close(model(x), result) for x, result in zip(inputs, expected, strict=True))
    assert counts["compiled_graphs"] == 1
    assert lengths == [6] * 3 + [4] * 3


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced, guarded and called, but no code is made of them."""
    monkeypatch.setattr(graphs, "generate", lambda graph, inputs: graph.forward)
    yield
    torch._dynamo.reset()


def ask(omni: Omni, indexes: list[int], row: str = "qwen_image") -> list[OmniRequestOutput]:
    outputs = support.ask(omni, row, indexes, support.latent_type(row))
    for index, output in zip(indexes, outputs, strict=True):
        expected = support.reference(row, index, support.latent_type(row))
        assert support.difference(expected, support.media(output)) <= BOUND
    return outputs


def counts_of(outputs: list[OmniRequestOutput], name: str) -> int:
    return sum(rank.counts.get(name, 0) for output in outputs if output.receipt for rank in output.receipt.ranks)


@pytest.mark.slow
def test_joined_rows_and_other_sizes_are_compiled_at_the_start(traced: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=warming.__name__):
        omni = support.engine("qwen_image", compile_shapes=("32x32",))
    assert "graphs for 32x32" in caplog.text
    with omni:
        # One alone, three with joined rows of texts of several lengths, and sizes that nobody declared.
        outputs = [*ask(omni, [0]), *ask(omni, [0, 1, 2])]
        assert counts_of(outputs, "compiled_blocks") > 0
        assert not counts_of(outputs, "recompiles")


def _acts_with_adapters(omni: Omni) -> None:
    """A request with an adapter runs as written, and gives what the pipeline gives with it."""
    prompt, params = support.as_omni(support.request_of("qwen_image", 0), support.seed_of(0), "latent")
    params = dataclasses.replace(params, lora_request=[asked_for("qwen_image", 3)])
    (output,) = omni.generate([prompt], [params], use_tqdm=False)
    assert support.difference(with_adapters("qwen_image", 0, 3), support.media(output)) <= 1e-4
    assert counts_of([output], "eager_blocks") > 0
    assert not counts_of([output], "compiled_blocks")


def test_what_was_not_compiled_at_the_start_is_in_the_receipt(traced: None) -> None:
    """A deterministic engine joins nothing, so that it has no code for two rows until a request has two."""
    with support.engine("qwen_image", compile_shapes=("32x32",), deterministic=True) as omni:
        outputs = ask(omni, [0, 2])
        assert counts_of(outputs, "compiled_blocks") > 0
        assert not counts_of(outputs, "recompiles")
        _acts_with_adapters(omni)
        prompt, params = support.as_omni(support.request_of("qwen_image", 0), 1, "latent")
        two = dataclasses.replace(params, num_outputs_per_prompt=2)
        first, second = (omni.generate([prompt], [two], use_tqdm=False) for _ in range(2))
    assert counts_of(first, "recompiles") > 0
    assert not counts_of(second, "recompiles")


def broken(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    raise RuntimeError("no compiler here")


def test_what_cannot_be_compiled(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, it is refused; by default blocks then run as they are written."""
    monkeypatch.setattr(graphs, "generate", broken)
    with pytest.raises(InvalidConfigError, match="blocks cannot be compiled .*no compiler here.*enforce_eager=True"):
        support.engine("qwen_image", enforce_eager=False)
    monkeypatch.setattr(warming, "is_asked", lambda config, device: True)
    with support.engine("qwen_image") as omni:
        outputs = ask(omni, [0])
    assert counts_of(outputs, "eager_blocks") > 0
    assert not counts_of(outputs, "compiled_blocks")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile_shapes": ("64",)}, "such as 1024x768"),
        ({"compile_shapes": ("64x64",), "enforce_eager": True}, "cannot go with enforce_eager=True"),
        ({"enforce_eager": False, "lora_path": "x"}, "cannot go with lora_path"),
    ],
)
def test_settings_that_cannot_act(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        validate(EngineConfig(**settings))


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(InvalidConfigError, match="Linear has no list of blocks"):
        compile.apply(nn.Linear(2, 2), SPEC, compile.Bodies())


def test_who_compiles() -> None:
    asked = [EngineConfig(), EngineConfig(compile_shapes=("8x8",)), EngineConfig(enforce_eager=False)]
    assert [warming.is_asked(config, "cpu") for config in asked] == [False, True, True]
    assert warming.is_asked(EngineConfig(), "cuda")
    assert not warming.is_asked(EngineConfig(enforce_eager=True), "cuda")
    assert not warming.is_asked(EngineConfig(lora_path="x"), "cuda")


def test_an_adapter_from_the_start_leaves_nothing_to_compile(
    traced: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By default on an accelerator: no body is made, where each request would run as written all the same."""
    monkeypatch.setattr(denoiser, "_computes_on", lambda: "cuda")
    with caplog.at_level(logging.INFO, logger=warming.__name__):
        omni = support.engine("qwen_image", lora_path=adapter("qwen_image", 3)[0], lora_scale=SCALE)
    assert "blocks are not compiled: with lora_path=" in caplog.text
    prompt, params = support.as_omni(support.request_of("qwen_image", 0), support.seed_of(0), "latent")
    with omni:
        (output,) = omni.generate([prompt], [params], use_tqdm=False)
    assert support.difference(with_adapters("qwen_image", 0, 3), support.media(output)) <= 1e-4
    assert not counts_of([output], "eager_blocks")  # nothing stands around blocks that might have been compiled
    assert not counts_of([output], "compiled_blocks")


def size_of(row: str) -> str:
    """Of its requests: tiny models cannot make what real ones make by default."""
    asked = support.request_of(row, 0)
    return "x".join(str(asked[name]) for name in ("width", "height", "num_frames") if name in asked)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["qwen_image", "sd3", "flux_dev", "wan22_ti2v"])
def test_code_of_this_device(row: str) -> None:
    with support.engine(row, compile_shapes=(size_of(row),)) as omni:
        assert counts_of(ask(omni, [0], row), "compiled_blocks") > 0
        outputs = ask(omni, [0, 1, 2], row)
        assert not counts_of([*outputs, *ask(omni, [0, 1, 2], row)], "recompiles")


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        {"cfg_parallel_size": 2},
        {"tensor_parallel_size": 2},
        {"ulysses_degree": 2, "ulysses_mode": "advanced_uaa"},
        {"ring_degree": 2, "ulysses_mode": "advanced_uaa"},
        {"pipeline_parallel_size": 2},
        {"cfg_parallel_size": 2, "use_hsdp": True},
    ],
    ids=lambda parallel: next(iter(parallel)) if "use_hsdp" not in parallel else "use_hsdp",
)
def test_over_ranks(parallel: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"num_threads": 1, "plugins": ("tests.contract.rank_setup", "tests.traced_only")}
    config = DiffusionParallelConfig(**parallel)
    with Omni(support.folder("qwen_image"), parallel_config=config, enforce_eager=False, **settings) as omni:
        outputs = [*ask(omni, [0]), *ask(omni, [0, 1, 2])]
        assert all(counts_of([output], "compiled_blocks") > 0 for output in outputs)
        assert not counts_of(ask(omni, [0, 1, 2]), "recompiles")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8_weight_only", "int8"])
def test_quantized_blocks_are_compiled(method: str) -> None:
    """To code of this device, against the same engine as its blocks are written."""
    outputs = []
    for eager in (True, False):
        with support.engine("qwen_image", quantization=method, enforce_eager=eager, deterministic=True) as omni:
            outputs.append(support.ask(omni, "qwen_image", [0], "latent")[0])
    eager, compiled = outputs
    for output in outputs:
        assert output.receipt is not None
        assert output.receipt.quantized[0]["method"] == method
        assert output.receipt.quantized[0]["layers"] >= 8
    assert counts_of([compiled], "compiled_blocks") > 0
    assert not counts_of([compiled], "eager_blocks")
    assert not counts_of([eager], "compiled_blocks")
    assert support.difference(support.media(eager), support.media(compiled)) <= QUANTIZED[method]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"enable_layerwise_offload": True},
        {"enable_cpu_offload": True},
        {"attention_backend": "native_math"},
        {"cache_backend": "cache_dit", "cache_config": {"residual_diff_threshold": 0.0}},
        {"cache_backend": "first_block_cache", "cache_config": {"threshold": 0.0}},
    ],
    ids=lambda settings: "-".join(map(str, next(iter(settings.items())))),
)
def test_with_other_features(traced: None, settings: dict[str, Any]) -> None:
    with support.engine("qwen_image", enforce_eager=False, **settings) as omni:
        outputs = [*ask(omni, [0]), *ask(omni, [0, 1, 2])]
        assert all(counts_of([output], "compiled_blocks") > 0 for output in outputs)
        assert not counts_of(ask(omni, [0, 1, 2]), "recompiles")


@pytest.mark.slow
@pytest.mark.parametrize(("row", "probe"), [("qwen_image", "input"), ("flux_dev", "input"), ("wan22_t2v", "timestep")])
def test_a_cache_looks_into_compiled_blocks(traced: None, row: str, probe: str) -> None:
    """TeaCache asks what the first block's attention would be given, and leaves the block there."""
    settings = {"rel_l1_thresh": 1.0, "coefficients": [1.0, 0.0], "probe": probe}
    outputs = []
    for more in ({"enforce_eager": True}, {"compile_shapes": (size_of(row),)}):
        with support.engine(row, cache_backend="tea_cache", cache_config=settings, **more) as omni:
            outputs.append(test_cache.ask(omni, row, [0, 1]))
    eager, compiled = outputs
    assert counts_of(compiled, "compiled_blocks") > 0
    for one, other in zip(eager, compiled, strict=True):
        assert test_cache.decisions(one) == test_cache.decisions(other)
        assert test_cache.report(other)["skipped"] > 0
        assert support.difference(support.media(one), support.media(other)) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [{"tensor_parallel_size": 2}, {"ulysses_degree": 2, "ulysses_mode": "advanced_uaa"}],
    ids=lambda parallel: next(iter(parallel)),
)
def test_experts_over_ranks(parallel: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"num_threads": 1, "plugins": ("tests.contract.rank_setup", "tests.traced_only")}
    config = DiffusionParallelConfig(enable_expert_parallel=True, **parallel)
    settings |= {"compile_shapes": (size_of("hidream_i1"),)}
    settings["default_sampling_params"] = {"extra_args": {"max_sequence_length": 40}}
    with Omni(support.folder("hidream_i1"), parallel_config=config, **settings) as omni:
        outputs = [*ask(omni, [0], "hidream_i1"), *ask(omni, [0, 1], "hidream_i1")]
    for output in outputs:
        assert output.receipt is not None
        for rank in output.receipt.ranks:
            assert rank.counts["compiled_blocks"] > 0
            assert rank.counts["experts"] > 0
