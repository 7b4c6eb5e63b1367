"""GGUF files: what blocks mean, what can be done to them as they are, and files in place of a model's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, ModelError
from denoised.features.quantize.layers import layers
from denoised.features.quantize.packed import Packed
from denoised.runtime import gguf_choice, load, quantizing
from denoised.steps.parts import changed, is_made, num_bytes, parts
from tests import gguf_files
from tests.gguf_files import Kind
from tests.quantized import built, folder, image, plain_image
from tests.tiny import UPSTREAM_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, *gguf_files.K_KINDS]


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


# ---- files of a model


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
    larger = tmp_path / "larger.gguf"
    gguf_files.write(folder(), larger, Kind.Q8_0, named=_with_one_block_more)
    with pytest.raises(
        ModelError, match="larger.gguf holds parts of blocks .*: transformer_blocks.77.* a larger model"
    ):
        load_with(larger)
    scraps = tmp_path / "scraps.gguf"
    gguf_files.write(folder(), scraps, Kind.Q8_0, named=lambda state: {**state, "scraps": torch.zeros(2)})
    load_with(scraps)
    without = tmp_path / "without"
    shutil.copytree(folder(), without)
    for file in (without / "transformer").glob("*.safetensors*"):
        file.unlink()
    other.rename(without / "x.gguf")
    with pytest.raises(ModelError, match="no weights in safetensors.*x.gguf is read with quantization='gguf'"):
        load.locate(str(without), elsewhere=())


def _with_one_block_more(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = {name: tensor for name, tensor in state.items() if name.startswith("transformer_blocks.0.")}
    return {**state, **{name.replace(".0.", ".77.", 1): tensor for name, tensor in first.items()}}
