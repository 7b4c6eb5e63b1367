"""Reading weights: side by side on threads, mapped where that is all it takes; damage that is named; VAE settings."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKLCosmos, DiffusionPipeline
from torch import Tensor, nn

from denoised import Omni, OmniDiffusionSamplingParams
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, ModelError
from denoised.rules import validate
from denoised.runtime import load, stored, weights
from denoised.runtime.unread import Unread
from denoised.steps.tally import counted
from tests.tiny import UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

_ROOT = Path(tempfile.mkdtemp(prefix="denoised-loading-"))
KEY = "transformer_blocks.0.attn.to_q.weight"


def folder(name: str = "qwen_image") -> Path:
    return checkpoint(name, _ROOT)


def parts(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def state(pipeline: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value for name, part in parts(pipeline).items() for key, value in part.state_dict().items()
    }


def loaded(dtype: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, set[str], int]:
    """A pipeline whose weights were read so, the threads that read, and the bytes."""
    readers = noted(threads, monkeypatch)
    pipeline = load.load(EngineConfig(model=str(folder()), dtype=dtype), device="cpu", unread=True)
    assert all(isinstance(p, Unread) for p in pipeline.transformer.parameters())
    with counted() as counts:
        weights.fill_all(parts(pipeline).values(), threads=threads)
    return pipeline, readers, counts["weight_bytes_read"]


def noted(threads: int, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The threads that read from here on. The first so many wait for each other, so that none does the others' work;
    there is nobody to wait for if there are fewer."""
    readers: set[str] = set()
    together, lock = threading.Barrier(max(1, threads)), threading.Lock()

    def noting(path: Any, name: str) -> Tensor:
        me = threading.current_thread().name
        with lock:
            waits = me not in readers and me.startswith("weights")
            readers.add(me)
        if waits:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(timeout=10)
        return stored.mapped(path, name)

    monkeypatch.setattr(weights, "_stored", noting)
    monkeypatch.setattr(weights, "BATCH", 1)  # tiny weights would be handed to one thread, all at once
    return readers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [0, 3])
def test_threads_read_what_a_plain_load_reads(dtype: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, readers, num_bytes = loaded(dtype, threads, monkeypatch)
    expected = state(DiffusionPipeline.from_pretrained(folder(), dtype=getattr(torch, dtype)))
    got = state(pipeline)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert not isinstance(got[key], Unread), key
        assert torch.equal(got[key], value), key
        assert got[key].data_ptr() % 64 == value.data_ptr() % 64, f"kernels round by where {key} lies in a cache line"
    assert kinds(readers) == ({"weights": threads} if threads else {"MainThread": 1})
    entries = [entry for file in folder().rglob("*.safetensors") for entry in stored.entries(file).values()]
    assert num_bytes == sum(entry.end - entry.begin for entry in entries)


def kinds(readers: set[str]) -> dict[str, int]:
    """How many threads there are of each name, which a pool numbers."""
    return dict(Counter(name.split("_")[0] for name in readers))


def resident(tensor: Tensor) -> bool:
    """Whether its pages are those of its file."""
    start, lines = tensor.data_ptr(), Path("/proc/self/maps").read_text().splitlines()
    spans = [(*(int(x, 16) for x in line.split()[0].split("-")), line) for line in lines]
    return any(low <= start < high and line.endswith(".safetensors") for low, high, line in spans)


def test_whole_tensors_are_mapped_and_writing_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy is made on the CPU; of another dtype there must be one."""
    same, other = loaded("float32", 2, monkeypatch)[0], loaded("bfloat16", 2, monkeypatch)[0]
    weight = same.transformer.get_parameter(KEY)
    assert resident(weight)
    assert not resident(other.transformer.get_parameter(KEY))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    [file] = (folder() / "transformer").glob("*.safetensors")
    assert torch.equal(safetensors.torch.load_file(file)[KEY], before), "the file is as it was"


def test_the_engine_reads_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many as it is told, and gives what it gives without."""
    params = OmniDiffusionSamplingParams(num_inference_steps=2, height=64, width=64, seed=3, output_type="np")
    images = []
    cases = (({}, 0), ({"num_weight_load_threads": 2}, 2), ({"enable_multithread_weight_load": True}, 4))
    for settings, threads in cases:
        readers = noted(threads, monkeypatch)
        with Omni(str(folder()), num_threads=1, **settings) as omni:
            [output] = omni.generate("a cat sits on the table", params, use_tqdm=False)
        assert output.error is None, output.error
        images.append(output.images[0])
        assert kinds(readers).get("weights", 0) == threads
    assert all((image == images[0]).all() for image in images[1:])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def other_dtype(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b'"F32"', b'"F64"', 1))


def test_damage_names_the_file(tmp_path: Path) -> None:
    for number, damage in enumerate((cut, other_dtype)):
        path = tmp_path / str(number)
        shutil.copytree(folder(), path)
        [file] = (path / "transformer").glob("*.safetensors")
        damage(file)
        with pytest.raises(ModelError, match=str(file)):
            load.load(EngineConfig(model=str(path)), device="cpu", unread=True)
    with pytest.raises(ModelError, match=f"{file}: .*, which its shape .* does not need; download it again"):
        stored.entries(file)


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for value in (1.0, 2.0):
        safetensors.torch.save_file({"w": torch.full((3, 5), value), "none": torch.zeros(0, 4)}, file)
        assert torch.equal(stored.mapped(file, "w"), torch.full((3, 5), value))
        assert stored.mapped(file, "none").shape == (0, 4)
    cut_short = file.read_bytes()[:-4]
    file.write_bytes(cut_short)
    with pytest.raises(ModelError, match=f"{file} has {len(cut_short)} bytes instead of"):
        stored.mapped(file, "w")


def test_settings_that_cannot_act_are_refused() -> None:
    with pytest.raises(InvalidConfigError, match="num_weight_load_threads cannot go with"):
        validate(EngineConfig(num_weight_load_threads=2, enable_multithread_weight_load=False))
    with pytest.raises(InvalidConfigError, match="act on files, and a pipeline object has none"):
        validate(EngineConfig(model=object(), num_weight_load_threads=2))
    assert load.num_load_threads(EngineConfig(), "cpu") == 0
    assert load.num_load_threads(EngineConfig(), "cuda") == load.LOAD_THREADS
    assert load.num_load_threads(EngineConfig(num_weight_load_threads=7), "cpu") == 7
    assert load.num_load_threads(EngineConfig(enable_multithread_weight_load=False), "cuda") == 0


@torch.no_grad()
def test_slices_and_tiles_are_what_the_vae_decodes() -> None:
    """Two small pictures are two decodes, and one decode without slicing; a large one is tiles, and whole without."""
    decoded: dict[str, list[tuple[int, ...]]] = {}
    for name in ("", "vae_use_slicing", "vae_use_tiling"):
        vae = load.load(EngineConfig(model=str(folder()), **({name: True} if name else {})), device="cpu").vae
        seen = decoded.setdefault(name, [])
        vae.decoder.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(tuple(args[0].shape)))
        vae.decode(torch.zeros(2, vae.config.z_dim, 1, 4, 4))
        wide = vae.tile_sample_min_width // vae.spatial_compression_ratio + 8
        vae.decode(torch.zeros(1, vae.config.z_dim, 1, 4, wide))
    rows = {name: [shape[0] for shape in shapes] for name, shapes in decoded.items()}
    assert rows[""] == [2, 1]
    assert rows["vae_use_slicing"] == [1, 1, 1]
    assert len(rows["vae_use_tiling"]) > 2
    assert max(shape[-1] for shape in decoded["vae_use_tiling"]) < wide == max(shape[-1] for shape in decoded[""])


def test_vae_settings_that_had_nothing_to_act_on_are_noted() -> None:
    params = OmniDiffusionSamplingParams(num_inference_steps=2, height=64, width=64, seed=3, output_type="np")
    wide = dataclasses.replace(params, width=320, height=320)
    two = dataclasses.replace(params, num_outputs_per_prompt=2)
    with Omni(str(folder()), num_threads=1, vae_use_tiling=True, vae_use_slicing=True) as omni:
        found = []
        for each in (params, two, wide):
            [output] = omni.generate("a cat", each, use_tqdm=False)
            assert output.error is None, output.error
            found.append([note.split()[0] for note in output.receipt.notes if "did not act" in note])
    assert found == [["vae_use_slicing", "vae_use_tiling"], ["vae_use_tiling"], ["vae_use_slicing"]]


def test_vae_settings_act_or_are_refused() -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder())
    config = EngineConfig(model=pipeline, vae_use_tiling=True, vae_use_slicing=True)
    vae = load.load(config, device="cpu").vae
    assert vae.use_tiling
    assert vae.use_slicing
    sizes = {"encoder_block_out_channels": (8, 8), "decode_block_out_channels": (8, 8)}
    never_asks = AutoencoderKLCosmos(latent_channels=4, num_layers=1, attention_resolutions=(), resolution=32, **sizes)
    pipeline.vae = never_asks
    with pytest.raises(InvalidConfigError, match=r"vae_use_tiling=True: the VAE of \w+ .AutoencoderKLCosmos. cannot"):
        load.load(EngineConfig(model=pipeline, vae_use_tiling=True), device="cpu")
    load.load(EngineConfig(model=pipeline, vae_use_slicing=True), device="cpu")
