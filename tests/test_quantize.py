"""Quantized weights: what methods make of a layer, what is left alone, how weights are quantized as they are read,
refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from denoised import DiffusionParallelConfig
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.features import quantize
from denoised.features.quantize import methods
from denoised.features.quantize.layers import layers
from denoised.rules import validate
from denoised.runtime import checkpoints, denoiser, load, quantizing, weights
from denoised.runtime.memory import HighWater
from denoised.runtime.unread import Unread
from denoised.spec.registry import resolve
from denoised.steps.parts import is_made, num_bytes, parts
from tests.quantized import built, folder
from tests.tiny import UPSTREAM_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

CPU = torch.device("cpu")


class Calls(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


# ---- methods


@pytest.mark.parametrize("method", ["int8", "int8_weight_only", "fp8"])
def test_a_layer_is_what_torchao_makes_of_it(method: str) -> None:
    """The same product, of fewer bytes, by a kernel of integers where that is what the name says."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(2, 5, 64)
    weight, plain = layer.weight.detach(), layer(x)
    chosen = methods.method(method, CPU)
    assert chosen.quantize is not None
    made = chosen.quantize(weight)
    assert num_bytes(made) < 0.32 * weight.nbytes
    with torch.no_grad(), Calls() as calls:
        y = F.linear(x, made, layer.bias)
    assert ("aten::_int_mm" in calls.names) == (method == "int8")
    assert ("aten::_scaled_mm" in calls.names) == (method == "fp8")
    assert 0 < (y - plain).norm() / plain.norm() < (0.05 if method == "fp8" else 0.01)
    configs = {"int8": Int8DynamicActivationInt8WeightConfig, "int8_weight_only": Int8WeightOnlyConfig}
    if method in configs:
        quantize_(layer, configs[method]())
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_rows_are_quantized_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Which changes nothing."""
    weight = torch.randn(48, 64)
    whole = methods.method(method, CPU).quantize(weight)  # type: ignore[misc]
    monkeypatch.setattr(methods, "ELEMENTS", 5 * 64)
    pieces = methods.method(method, CPU).quantize(weight)  # type: ignore[misc]
    assert pieces.shape == whole.shape
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(parts(pieces), parts(whole), strict=True))


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_a_row_does_not_depend_on_the_rows_beside_it(method: str) -> None:
    """Not even on one that is much larger: each has a scale of its own."""
    weight, x = torch.randn(48, 64), torch.randn(9, 64)
    x[8] *= 1000
    made = methods.method(method, CPU).quantize(weight)  # type: ignore[misc]
    apart = torch.cat([F.linear(row[None], made) for row in x])
    assert torch.allclose(F.linear(x, made), apart, rtol=1e-5, atol=1e-5)


def test_what_does_not_run_here_is_refused_with_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that this machine lacks, as PyTorch tells it."""

    def lacking(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    monkeypatch.setattr(methods, "_to_fp8", lacking)
    methods.check_runs.cache_clear()
    expected = r"quantization='fp8' does not run on this CPU \(RuntimeError.*\); use 'int8' or 'int8_weight_only'"
    with pytest.raises(InvalidConfigError, match=expected):
        quantize.check("fp8", CPU, torch.float32)
    methods.check_runs.cache_clear()
    quantize.check("int8", CPU, torch.float32)


# ---- which layers


def test_blocks_are_quantized_but_for_norms_and_modulation() -> None:
    model = DiffusionPipeline.from_pretrained(folder()).transformer
    paths = {path.replace("transformer_blocks.0.", "") for path, _ in layers(model) if ".0." in path}
    attention = {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")}
    attention |= {"attn.to_out.0", "attn.to_add_out"}
    mlps = {f"{side}_mlp.net.{part}" for side in ("img", "txt") for part in ("0.proj", "2")}
    assert {path for path in paths if not path.startswith("transformer_blocks")} == attention | mlps
    fewer = {path for path, _ in layers(model, ("txt_mlp", "to_?"))}
    assert {path for path, _ in layers(model)} - fewer == {
        path for path, _ in layers(model) if "txt_mlp" in path or path[-4:] in ("to_q", "to_k", "to_v")
    }


class _Net(nn.Module):
    """Blocks, one of whose weights is somebody else's too, and one that is not here."""

    def __init__(self, num_blocks: int = 4, width: int = 32) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(num_blocks)])
        self.lm_head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_shared_weights_and_those_of_other_ranks_stay() -> None:
    net = _Net()
    net.blocks[1][0].weight = net.lm_head.weight  # type: ignore[index,union-attr,assignment]
    net.blocks[2].to("meta")
    assert [path for path, _ in layers(net)] == ["blocks.0.0", "blocks.3.0"]
    done = quantize.apply(net, "int8", component="net", patterns=(), later=weights.later)
    assert done.layers == 2
    assert done.bytes_before == 2 * 32 * 32 * 4
    assert done.bytes_after == 2 * (32 * 32 + 32 * 5), "codes, a scale and a zero a row"


# ---- as weights are read


def test_weights_are_quantized_as_they_are_read(tmp_path: Path) -> None:
    """Nothing is read when they are marked; then the most that is there is what is kept and a few matrices."""
    num, width = 40, 1024
    file, size = tmp_path / "weights.safetensors", width * width * 4
    safetensors.torch.save_file({f"blocks.{n}.0.weight": torch.randn(width, width) for n in range(num)}, file)
    net = _Net(num, width=1)
    with weights.unread("cpu"):
        state = safetensors.torch.load_file(file)
    for n in range(num):
        net.blocks[n][0] = nn.Linear(width, width, device="meta")  # type: ignore[index,operator]
        net.blocks[n][0].weight = nn.Parameter(state.pop(f"blocks.{n}.0.weight"), requires_grad=False)  # type: ignore[index,union-attr]
    quantize.check("int8", CPU, torch.float32)
    done = quantize.apply(net, "int8", component="net", patterns=(), later=weights.later)
    assert all(isinstance(layer.weight, Unread) and not layer.weight.is_filled for _, layer in layers(net))
    assert done.bytes_before == num * size
    before = HighWater()
    with before:
        pass
    with HighWater() as high:
        weights.fill_all([net], threads=0)
    rise = (high.mb - before.mb) * 2**20
    held = sum(num_bytes(layer.weight) for _, layer in layers(net))
    assert held == done.bytes_after < 0.26 * done.bytes_before
    assert rise < done.bytes_after + 12 * size, f"{rise / 2**20:.0f} MB"
    assert 12 * size < done.bytes_before / 3


def test_threads_quantize_alike() -> None:
    one, two = (built(quantization="int8", num_weight_load_threads=n) for n in (None, 2))
    theirs = dict(two.transformer.named_parameters())
    for name, weight in one.transformer.named_parameters():
        assert is_made(weight) == is_made(theirs[name])
        assert all(torch.equal(a, b) for a, b in zip(parts(weight), parts(theirs[name]), strict=True)), name


def test_a_quantized_model_is_another_one_to_checkpoints() -> None:
    prints = []
    for setting in (None, "int8", "int8_weight_only"):
        config = EngineConfig(model=str(folder()), quantization=setting)
        pipeline = load.load(config, device="cpu", unread=True)
        fingerprint = checkpoints.to_fingerprint(pipeline)
        denoiser.build(pipeline, resolve(pipeline), config, None)
        prints.append(fingerprint())
    assert len(set(prints)) == 3


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quantization": "fp9"}, "must be one of fp8, int8, int8_weight_only, gguf"),
        ({"quantization": {"transformer": 8}}, "must be one of"),
        ({"quantization": {}}, "must be one of"),
        ({"quantization": '{"transformer": "int7"}'}, "must be one of"),
        ({"quantization": "gguf", "model": object()}, "a pipeline object has its own; give the folder"),
        (
            {"quantization": "int8", "parallel_config": DiffusionParallelConfig(use_hsdp=True, cfg_parallel_size=2)},
            "cannot go with use_hsdp=True, which shards plain weights only",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_act(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfigError, match=says):
        validate(EngineConfig(**settings))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"transformer_9": "int8"}, "names 'transformer_9', and QwenImagePipeline has the components"),
        ({"vae": "int8"}, "vae .AutoencoderKLQwenImage. has no linear layers in blocks; leave vae out"),
        ('{"scheduler": "int8"}', "names 'scheduler'"),
    ],
    ids=str,
)
def test_components_that_cannot_be_quantized(setting: Any, says: str) -> None:
    with pytest.raises(InvalidConfigError, match=says):
        built(quantization=setting)


def test_a_method_that_finds_nothing_to_act_on_is_an_error() -> None:
    with pytest.raises(InvalidConfigError, match="net ._Net. has 6 layers, none of which it can take; leave net out"):
        quantize.apply(_Net(), "gguf", component="net", patterns=(), later=weights.later)
    net = _Net()
    net.blocks = nn.ModuleList()
    with pytest.raises(InvalidConfigError, match="net ._Net. has no linear layers in blocks; leave net out"):
        quantize.apply(net, "int8", component="net", patterns=(), later=weights.later)


def test_kernels_of_accelerators_take_some_shapes_and_dtypes() -> None:
    cuda = torch.device("cuda")
    assert not methods.method("fp8", cuda).fits(torch.Size((64, 24)))
    assert methods.method("int8", cuda).fits(torch.Size((64, 24)))
    assert not methods.method("int8", cuda).fits(torch.Size((64, 20)))
    assert methods.method("int8_weight_only", cuda).fits(torch.Size((64, 20)))
    with pytest.raises(InvalidConfigError, match="takes weights in bfloat16 on this device, and these are float32"):
        quantize.check("fp8", cuda, torch.float32)


def test_a_pipeline_object_is_quantized_in_place() -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder())
    config, spec = EngineConfig(model=pipeline, quantization="int8"), resolve(pipeline)
    quantizing.apply(pipeline, spec, config)
    found = [layer.weight for _, layer in layers(pipeline.transformer)]
    assert all(is_made(weight) for weight in found)
    assert pipeline.transformer.dtype == torch.float32
