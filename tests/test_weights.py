"""Reading only what a rank keeps: every parameter as if cut from the whole model, fewer bytes read, a lower peak."""

from __future__ import annotations

import ctypes
import datetime
import gc
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import ModelError
from denoised.runtime import denoiser, load, weights
from denoised.runtime.mesh import Mesh
from denoised.runtime.weights import Unread
from denoised.spec.registry import resolve
from denoised.steps.tally import counted
from tests.ranks import run_on_ranks
from tests.tiny import UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

# Double stream, single stream, two experts, a mixture of experts, one stream, two kinds of text encoders.
NAMES = ("qwen_image", "flux_dev", "wan22_t2v", "hidream_i1", "z_image", "sd3")
TENSOR = {"tensor_parallel_size": 2, "text_encoder_tp_size": 2}
PIPELINE = {"pipeline_parallel_size": 2}
HSDP = {"cfg_parallel_size": 2, "use_hsdp": True}
_ROOT = Path(tempfile.mkdtemp(prefix="denoised-weights-"))

State = dict[str, Tensor]


def settings(path: Path | str, degrees: dict[str, Any], dtype: str = "float32") -> EngineConfig:
    return EngineConfig(model=str(path), dtype=dtype, parallel_config=DiffusionParallelConfig(**degrees))


def mesh_of(degrees: dict[str, Any]) -> Mesh:
    return Mesh(DiffusionParallelConfig(**degrees), device="cpu", timeout=datetime.timedelta(seconds=60))


def built(config: EngineConfig, mesh: Mesh, *, unread: bool) -> Any:
    """A rank's pipeline, as its worker makes it."""
    pipeline = load.load(config, device="cpu", unread=unread)
    denoiser.build(pipeline, resolve(pipeline), config, mesh)
    return pipeline


def state(pipeline: Any) -> State:
    """Everything with weights, tied tensors under each of their names."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {
        f"{name}.{key}": value
        for name, part in parts.items()
        for pairs in (part.named_parameters(remove_duplicate=False), part.named_buffers(remove_duplicate=False))
        for key, value in pairs
    }


def traits(value: Tensor) -> tuple[Any, ...]:
    return type(value), value.device, value.dtype, value.shape, value.stride(), value.requires_grad


def ties(values: State) -> set[frozenset[str]]:
    """Names that are one tensor."""
    names: dict[int, set[str]] = {}
    for name, value in values.items():
        names.setdefault(id(value), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def check_equal(got: State, expected: State, name: str) -> None:
    assert got.keys() == expected.keys()
    assert ties(got) == ties(expected), name
    for key, value in expected.items():
        assert traits(got[key]) == traits(value), (name, key, traits(got[key]), traits(value))
        if value.device.type != "meta":
            assert torch.equal(local(got[key]), local(value)), (name, key)
            # Kernels round by where a weight lies in a cache line: ours lies where that of a plain load does.
            assert local(value).data_ptr() % 64 in (0, local(got[key]).data_ptr() % 64), f"{name}: {key}"


def resident(values: State) -> int:
    """Bytes of what is there, each tensor once."""
    unique = {id(value): value for value in values.values() if value.device.type != "meta"}
    return sum(local(value).nbytes for value in unique.values())


def compared(rank: int, ranks: int, folders: list[str], degrees: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Bytes read, kept and in the files of each folder, once its state is what loading whole and cutting gives."""
    import tests.contract.rank_setup  # noqa: F401

    sizes, mesh = {}, mesh_of(degrees)
    for folder in folders:
        config = settings(folder, degrees, dtype)
        with counted() as counts:
            got = state(built(config, mesh, unread=True))
        check_equal(got, state(built(config, mesh, unread=False)), folder)
        sizes[Path(folder).name] = {
            "read": counts["weight_bytes_read"],
            "kept": resident(got),
            "files": in_files(folder),
        }
    return sizes


def in_files(folder: str) -> int:
    """Bytes of all tensors of a checkpoint."""
    headers = (load.read_header(file) for file in Path(folder).rglob("*.safetensors"))
    return sum(end - start for header in headers for start, end in (e["data_offsets"] for e in header.values()))


def folders(*names: str) -> list[str]:
    return [str(checkpoint(name, _ROOT)) for name in names]


def test_tensor_slices_are_those_of_the_whole_model() -> None:
    """Zeros in place of biases are not read, tables that a module computes for itself are in no file."""
    for sizes in run_on_ranks(compared, 2, folders(*NAMES), TENSOR, "float32", timeout=120):
        for name, size in sizes.items():
            assert 0.9 * size["kept"] <= size["read"] <= size["kept"], (name, size)
            assert size["read"] <= 0.8 * size["files"], (name, size)


def test_stages_read_their_own_blocks() -> None:
    """Converted to another dtype on the way: half as many bytes are kept as read."""
    both = run_on_ranks(compared, 2, folders(*NAMES), PIPELINE, "bfloat16", timeout=120)
    for sizes in both:
        for name, size in sizes.items():
            assert size["read"] < size["files"], (name, size)
            assert 0.9 * size["kept"] <= size["read"] / 2 <= size["kept"], (name, size)


def test_tensor_and_stages_on_four_ranks() -> None:
    degrees = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    alone = run_on_ranks(compared, 2, folders(*NAMES[:2]), {"tensor_parallel_size": 2}, "float32", timeout=120)
    for sizes in run_on_ranks(compared, 4, folders(*NAMES[:2]), degrees, "float32", timeout=120):
        for name, size in sizes.items():
            assert size["read"] <= min(size["kept"], alone[0][name]["read"] - 1), (name, size)


def test_sharded_blocks_are_those_of_the_whole_model() -> None:
    """Each is read whole, and kept in part."""
    for sizes in run_on_ranks(compared, 2, folders("flux_dev", "sd3"), HSDP, "float32", timeout=120):
        for name, size in sizes.items():
            assert size["kept"] < 0.8 * size["files"], (name, size)
            assert size["read"] <= size["files"], (name, size)


def large(folder: Path) -> str:
    """A checkpoint whose denoiser has about 200 MB, in files of 50 MB."""
    shutil.copytree(checkpoint("qwen_image", _ROOT), folder)
    shutil.rmtree(folder / "transformer")
    config = QwenImageTransformer2DModel.load_config(str(checkpoint("qwen_image", _ROOT) / "transformer"))
    sizes = {"num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 54, "axes_dims_rope": (6, 24, 24)}
    QwenImageTransformer2DModel.from_config({**config, **sizes}).save_pretrained(
        folder / "transformer", max_shard_size="50MB"
    )
    return str(folder)


def peak(rank: int, ranks: int, folder: str, degrees: dict[str, Any], unread: bool) -> int:
    """Bytes that this process grows by at most, its pages of files among them, while it loads."""
    mesh, config = mesh_of(degrees), settings(folder, degrees, "bfloat16")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that calls before gave back would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = memory("VmRSS")
    pipeline = built(config, mesh, unread=unread)
    after = memory("VmHWM")
    del pipeline
    return after - before


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_the_peak_is_what_a_rank_keeps(tmp_path: Path) -> None:
    """And a tensor of the files' dtype, and a block where blocks are sharded. Loaded whole, all of it shows."""
    folder, small = large(tmp_path / "large"), folders("qwen_image")[0]
    whole = in_files(folder) / 2  # loaded as bfloat16
    assert whole > 95e6
    layouts = (({"tensor_parallel_size": 4}, 0.5), ({"pipeline_parallel_size": 4}, 0.5))
    for degrees, most in (*layouts, ({"cfg_parallel_size": 4, "use_hsdp": True}, 0.8)):
        run_on_ranks(peak, 4, small, degrees, True)  # what is imported on the way is not counted
        peaks = run_on_ranks(peak, 4, folder, degrees, True, timeout=120)
        assert max(peaks) < most * whole, (degrees, peaks, whole)
    assert min(run_on_ranks(peak, 4, folder, layouts[0][0], False, timeout=120)) > whole


def damaged(folder: Path, change: Any, component: str = "transformer") -> Path:
    """A copy of a checkpoint, with a component's tensors changed."""
    shutil.copytree(checkpoint("qwen_image", _ROOT), folder)
    [file] = (folder / component).glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    file.unlink()
    safetensors.torch.save_file(tensors, folder / component / file.name, metadata={"format": "pt"})
    return folder


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    """And the libraries open files as before, also after an error."""
    before = safetensors.torch.load_file, transformers.modeling_utils.safe_open
    key = "transformer_blocks.0.attn.to_q.weight"
    with pytest.raises(ModelError, match=f"lacks the weight {key}"):
        load.load(settings(damaged(tmp_path / "a", lambda t: t.pop(key)), {}), device="cpu", unread=True)
    assert (safetensors.torch.load_file, transformers.modeling_utils.safe_open) == before
    folder = damaged(tmp_path / "c", lambda tensors: None)
    pipeline = load.load(settings(folder, {}), device="cpu", unread=True)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=r"model.safetensors can no longer be read for .*weight"):
        weights.fill(pipeline.transformer)


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("transformer", "transformer_blocks.0.attn.to_q.weight"),
        ("text_encoder", "model.layers.0.self_attn.q_proj.weight"),  # the library has another name for it now
    ],
)
@pytest.mark.parametrize("unread", [True, False])
def test_the_file_of_a_wrong_shape_is_named(tmp_path: Path, component: str, key: str, unread: bool) -> None:
    """Of diffusers' components, of which the library names the weight alone, and of transformers', not even that."""
    folder = damaged(tmp_path / "model", lambda tensors: tensors.update({key: tensors[key][0].clone()}), component)
    [file] = (folder / component).glob("*.safetensors")
    with pytest.raises(
        ModelError, match=rf"cannot be loaded: {file}: {key} has shape \[\d+\] instead of \[\d+, \d+\]"
    ):
        load.load(settings(folder, {}), device="cpu", unread=unread)


def test_an_unread_tensor_is_read_by_arithmetic_alone(tmp_path: Path) -> None:
    values = torch.arange(12.0).view(4, 3)
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": values}, file)
    with weights.unread("cpu"):
        unread = safetensors.torch.load_file(file)["w"]
    with counted() as counts:
        half = torch.cat([part.t() for part in unread.bfloat16().chunk(2)], dim=1)[:, 1:]
        assert isinstance(half, Unread)
        assert half.dtype == torch.bfloat16
        assert not counts
        zeros = torch.zeros_like(unread)
        assert isinstance(zeros, Unread)
        assert zeros.read().count_nonzero() == 0
        assert counts["weight_bytes_read"] == 0
        assert torch.equal(half.read(), values.bfloat16().t()[:, 1:])
        assert counts["weight_bytes_read"] == 3 * 3 * 4
        assert torch.equal(unread + 1, values + 1)
        assert type(unread + 1) is Tensor
    with pytest.raises(AssertionError, match="not read yet"):
        unread.mul_(2)
    with weights.unread("meta"):
        assert safetensors.torch.load_file(file)["w"].to("cpu").device.type == "meta"
