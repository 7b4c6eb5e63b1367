"""Quantized weights: what blocks mean, what is left alone, how weights are quantized as they are read, refusals."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel, TorchAoConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, ModelError
from denoised.features import quantize
from denoised.features.quantize import methods
from denoised.features.quantize.layers import layers
from denoised.features.quantize.packed import Packed
from denoised.rules import validate
from denoised.runtime import checkpoints, denoiser, gguf_choice, load, quantizing, weights
from denoised.runtime.memory import HighWater
from denoised.runtime.unread import Unread
from denoised.spec.registry import resolve
from denoised.steps.parts import changed, is_made, num_bytes, parts
from tests import gguf_files
from tests.gguf_files import Kind
from tests.tiny import UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

_ROOT = Path(tempfile.mkdtemp(prefix="denoised-quantize-"))
CPU = torch.device("cpu")
KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, *gguf_files.K_KINDS]
ASK: dict[str, Any] = {"prompt": "a cat sits on the table", "num_inference_steps": 2, "height": 64, "width": 64}


def folder(name: str = "qwen_image") -> Path:
    return checkpoint(name, _ROOT)


def built(**settings: Any) -> Any:
    """A pipeline as a rank makes it, and its weights read."""
    config = EngineConfig(**{"model": str(folder())} | settings)
    validate(config)
    pipeline = load.load(config, device="cpu", unread=load.reads_late(config, "cpu"))
    denoiser.build(pipeline, resolve(pipeline), config, None)
    return pipeline


def image(model: Path | str, **settings: Any) -> Tensor:
    """Of the engine."""
    params = OmniDiffusionSamplingParams(seed=7, output_type="pt", num_inference_steps=2, height=64, width=64)
    with Omni(str(model), num_threads=1, **settings) as omni:
        (output,) = omni.generate(ASK["prompt"], params, use_tqdm=False)
    assert output.error is None, output.error
    return torch.as_tensor(output.images[0]).float()


def plain_image(model: Path | str) -> Tensor:
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    found: Tensor = pipeline(**ASK, generator=torch.Generator().manual_seed(7), output_type="pt").images[0]
    return found


class Calls(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


# ---- blocks of GGUF files


def packed(kind: Any, rows: int = 6, columns: int = 512) -> tuple[Packed, Tensor]:
    """Blocks, and what they mean by the gguf package."""
    weight = np.random.default_rng(int(kind)).standard_normal((rows, columns), dtype=np.float32)
    made = gguf_files.blocks(weight, kind)
    return Packed(torch.from_numpy(made), int(kind), torch.float32), torch.from_numpy(
        gguf.quants.dequantize(made, kind).copy()
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_mean_what_the_format_says(kind: Any) -> None:
    """As they are, cut by rows and by blocks of columns, and put together: all exactly, and without being unpacked."""
    found, meant = packed(kind)
    assert torch.equal(found.values(), meant)
    cuts = [
        (found[2:5], meant[2:5]),
        (found[:, 256:], meant[:, 256:]),
        (torch.cat([found, found]), meant.repeat(2, 1)),
    ]
    cuts += list(zip(found.chunk(3), meant.chunk(3), strict=True))
    for part, expected in cuts:
        assert isinstance(part, Packed)
        assert torch.equal(part.values(), expected)
    assert num_bytes(found) < meant.nbytes / 3
    x, bias = torch.randn(2, 3, 512), torch.randn(6)
    assert torch.equal(F.linear(x, nn.Parameter(found, requires_grad=False), bias), F.linear(x, meant, bias))


def test_what_blocks_cannot_do_they_do_as_their_values() -> None:
    found, meant = packed(Kind.Q8_0)
    assert torch.equal(found.reshape(-1), meant.reshape(-1))
    assert torch.equal(torch.empty_like(meant).copy_(found), meant)
    half = found.to(torch.bfloat16)
    assert isinstance(half, Packed)
    assert torch.allclose(half.values().float(), meant, rtol=2**-7, atol=1e-6)
    with pytest.raises(InvalidConfigError, match="blocks of 32 values, and would be cut inside of one"):
        found[:, 16:48]
    mixed = torch.cat([found, packed(Kind.Q4_0)[0]])
    assert not is_made(mixed)


def test_parts_are_changed_and_put_together() -> None:
    found, meant = packed(Kind.Q4_0)
    copy = changed(found, torch.clone)
    assert torch.equal(copy.values(), meant)  # type: ignore[attr-defined]
    assert parts(copy)[0].data_ptr() != parts(found)[0].data_ptr()
    assert parts(meant)[0] is meant


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


# ---- models that come quantized


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose denoiser diffusers has saved in int8, and its text encoder transformers."""
    root = tmp_path_factory.mktemp("prepared") / "model"
    shutil.copytree(folder(), root)
    made = QwenImageTransformer2DModel.from_pretrained(
        root, subfolder="transformer", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    shutil.rmtree(root / "transformer")
    made.save_pretrained(root / "transformer")
    encoder = type(DiffusionPipeline.from_pretrained(folder()).text_encoder).from_pretrained(
        root / "text_encoder",
        quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()),
        dtype=torch.float32,
    )
    shutil.rmtree(root / "text_encoder")
    encoder.save_pretrained(root / "text_encoder")
    assert json.loads((root / "transformer" / "config.json").read_text())["quantization_config"]
    return root


def test_a_quantized_checkpoint_loads(prepared: Path) -> None:
    params = OmniDiffusionSamplingParams(seed=7, output_type="pt", num_inference_steps=2, height=64, width=64)
    with Omni(str(prepared), num_threads=1) as omni:
        (output,) = omni.generate(ASK["prompt"], params, use_tqdm=False)
    assert output.receipt is not None
    done = {entry["component"]: entry for entry in output.receipt.quantized}
    assert {name: entry["method"] for name, entry in done.items()} == dict.fromkeys(
        ("text_encoder", "transformer"), "Int8Tensor"
    )
    assert done["transformer"]["layers"] > 48
    assert torch.equal(torch.as_tensor(output.images[0]).float(), plain_image(prepared))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quantization": {"text_encoder": "int8"}}, "text_encoder of this model is quantized already"),
        ({"quantization": "int8"}, "transformer of this model is quantized already .* leave transformer out"),
        ({"enable_cpu_offload": True}, "those of transformer came quantized and stay mapped; leave them off"),
        (
            {"parallel_config": DiffusionParallelConfig(tensor_parallel_size=2)},
            "tensor_parallel_size=2 would cut transformer, whose weights came quantized; leave it at 1",
        ),
        (
            {"parallel_config": DiffusionParallelConfig(use_hsdp=True, cfg_parallel_size=2)},
            "use_hsdp=True shards plain weights only, and those of text_encoder came quantized",
        ),
    ],
    ids=str,
)
def test_a_quantized_checkpoint_is_not_cut(prepared: Path, settings: dict[str, Any], says: str) -> None:
    config = EngineConfig(model=str(prepared), **settings)
    pipeline = load.load(config, device="cpu", unread=True)
    with pytest.raises(InvalidConfigError, match=says):
        quantizing.check(pipeline, resolve(pipeline), config)


# ---- GGUF files of a model


def test_a_gguf_file_in_place_of_the_weights(tmp_path: Path) -> None:
    """Names of diffusers, blocks of a K kind and of a plain one; the weights stay packed."""
    packed_, plain = gguf_files.pair(folder(), tmp_path, Kind.Q4_K, rest=Kind.Q8_0)
    assert torch.equal(image(packed_, quantization="gguf"), plain_image(plain))
    pipeline = built(model=str(packed_), quantization="gguf")
    found = [layer.weight for layer in pipeline.transformer.modules() if isinstance(layer, nn.Linear)]
    found = [weight for weight in found if is_made(weight)]
    assert {type(weight) for weight in found} == {Packed}
    assert len(found) > len(list(layers(pipeline.transformer))), "what the file has packed stays so, modulation too"
    assert {weight.kind for weight in found} == {Kind.Q4_K, Kind.Q8_0}
    (done,) = quantizing.report(pipeline)
    assert sum(map(num_bytes, found)) == done["bytes_after"] < 0.25 * done["bytes_before"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gguf_files_of_every_kind(kind: Any, tmp_path: Path) -> None:
    packed_, plain = gguf_files.pair(folder(), tmp_path, kind, rest=Kind.F16)
    assert torch.equal(image(packed_, quantization="gguf"), plain_image(plain))


def test_a_gguf_file_with_its_authors_names(tmp_path: Path) -> None:
    """diffusers' converter renames, and cuts the matrix of queries, keys and values, of blocks that stay packed."""
    packed_, plain = gguf_files.pair(
        folder("z_image"), tmp_path, Kind.Q4_0, named=gguf_files.z_image_of_its_authors, back=gguf_files.z_image_back
    )
    file = (packed_ / "transformer" / "model.gguf").rename(tmp_path / "elsewhere.gguf")
    pipeline = built(model=str(packed_), quantization={"transformer": str(file)})
    expected = DiffusionPipeline.from_pretrained(plain).transformer.state_dict()
    linear = ((path, layer) for path, layer in pipeline.transformer.named_modules() if isinstance(layer, nn.Linear))
    names = {f"{path}.weight" for path, layer in linear if isinstance(layer.weight, Packed)}
    assert any("to_q" in name for name in names)
    for name, tensor in pipeline.transformer.state_dict().items():
        assert isinstance(tensor, Packed) == (name in names)
        assert torch.equal(tensor.values() if isinstance(tensor, Packed) else tensor, expected[name]), name


def test_which_file(tmp_path: Path) -> None:
    root = tmp_path / "model"
    (root / "transformer").mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "X"], "vae": ["diffusers", "Y"]}))

    def chosen(value: Any) -> dict[str, Path]:
        return gguf_choice.files(EngineConfig(model=str(root), quantization=value))

    with pytest.raises(InvalidConfigError, match=r"there are none; name it: \{'transformer': 'path/to/file.gguf'\}"):
        chosen("gguf")
    (root / "beside.gguf").touch()
    assert chosen("gguf") == {"transformer": root / "beside.gguf"}
    (root / "transformer" / "own.gguf").touch()
    assert chosen({"transformer": "gguf", "vae": "int8"}) == {"transformer": root / "transformer" / "own.gguf"}
    (root / "transformer" / "more.gguf").touch()
    with pytest.raises(InvalidConfigError, match=r"there are 2 \(more.gguf, own.gguf\); name it"):
        chosen("gguf")
    assert chosen(str(root / "beside.gguf")) == {"transformer": root / "beside.gguf"}
    with pytest.raises(InvalidConfigError, match=r"'nowhere.gguf'}: no such file; give its path"):
        chosen({"transformer": "nowhere.gguf"})
    (root / "model_index.json").write_text(
        json.dumps({n: ["diffusers", "X"] for n in ("transformer", "transformer_2")})
    )
    with pytest.raises(InvalidConfigError, match="has the denoisers transformer and transformer_2; name a file for"):
        chosen(str(root / "beside.gguf"))
    assert chosen("int8") == {}


def test_files_that_are_not_of_the_model(tmp_path: Path) -> None:
    def load_with(file: Path, component: str = "transformer") -> None:
        load.load(EngineConfig(model=str(folder()), quantization={component: str(file)}), device="cpu", unread=True)

    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"\1" * 40)
    with pytest.raises(ModelError, match="damaged.gguf is no readable GGUF file"):
        load_with(damaged)
    other = tmp_path / "other.gguf"
    gguf_files.write(folder("flux_dev"), other, Kind.Q8_0)
    with pytest.raises(ModelError, match="lacks the weight .* is it a file of another model"):
        load_with(other)
    with pytest.raises(ModelError, match="is no model of diffusers; name a denoiser"):
        load_with(other, "text_encoder")
    without = tmp_path / "without"
    shutil.copytree(folder(), without)
    for file in (without / "transformer").glob("*.safetensors*"):
        file.unlink()
    other.rename(without / "x.gguf")
    with pytest.raises(ModelError, match="no weights in safetensors.*x.gguf is read with quantization='gguf'"):
        load.locate(str(without), elsewhere=())


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
