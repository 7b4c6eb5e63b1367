"""Models that come quantized: loaded as they are, and not cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.runtime import load, quantizing
from denoised.spec.registry import resolve
from tests.quantized import ASK, folder, plain_image, prepared
from tests.tiny import UPSTREAM_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = prepared(tmp_path_factory.mktemp("prepared") / "model")
    assert json.loads((root / "transformer" / "config.json").read_text())["quantization_config"]
    return root


def test_a_quantized_checkpoint_loads(model: Path) -> None:
    params = OmniDiffusionSamplingParams(seed=7, output_type="pt", num_inference_steps=2, height=64, width=64)
    with Omni(str(model), num_threads=1) as omni:
        (output,) = omni.generate(ASK["prompt"], params, use_tqdm=False)
    assert output.receipt is not None
    done = {entry["component"]: entry for entry in output.receipt.quantized}
    assert {name: entry["method"] for name, entry in done.items()} == dict.fromkeys(
        ("text_encoder", "transformer"), "Int8Tensor"
    )
    assert done["transformer"]["layers"] > 48
    assert torch.equal(torch.as_tensor(output.images[0]).float(), plain_image(model))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quantization": {"text_encoder": "int8"}}, "text_encoder of this model is quantized already"),
        ({"quantization": "int8"}, "transformer of this model is quantized already .* leave transformer out"),
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
def test_a_quantized_checkpoint_is_not_cut(model: Path, settings: dict[str, Any], says: str) -> None:
    config = EngineConfig(model=str(model), **settings)
    pipeline = load.load(config, device="cpu", unread=True)
    with pytest.raises(InvalidConfigError, match=says):
        quantizing.check(pipeline, resolve(pipeline), config)


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_no_component_that_came_quantized_is_offloaded_on_the_cpu(model: Path, tmp_path: Path, name: str) -> None:
    """It would stay where it is, for it cannot be read from its files again: refused, be it the only one."""
    (other,) = {"transformer", "text_encoder"} - {name}
    root = tmp_path / "model"
    shutil.copytree(model, root)
    shutil.rmtree(root / other)
    shutil.copytree(folder() / other, root / other)
    for field in ("enable_cpu_offload", "enable_layerwise_offload"):
        config = EngineConfig(model=str(root), **{field: True})
        pipeline = load.load(config, device="cpu", unread=True)
        with pytest.raises(
            InvalidConfigError, match=f"those of {name} came quantized and stay mapped; leave them off"
        ):
            quantizing.check(pipeline, resolve(pipeline), config)
