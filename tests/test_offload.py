"""Offload on the CPU: equal results, fewer bytes in memory at once, a model larger than what is allowed."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from torch import Tensor, nn

from denoised import Omni, OmniDiffusionSamplingParams
from denoised.config import EngineConfig
from denoised.errors import DenoisedError, InvalidConfigError
from denoised.features.offload import Home, Offload
from denoised.outputs import OmniRequestOutput, Receipt
from denoised.request import Request
from denoised.runtime import denoiser, failures, load, rescue, weights
from denoised.runtime.memory import HighWater, in_use
from denoised.runtime.offloading import offload_of
from denoised.runtime.planning.ask import Ask
from denoised.runtime.planning.reading import read
from denoised.runtime.unread import Unread
from denoised.spec.registry import resolve
from denoised.steps.tally import counted
from tests.ranks import run_on_ranks
from tests.tiny import UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

_ROOT = Path(tempfile.mkdtemp(prefix="denoised-offload-"))
MB = 2**20
LAYERS: dict[str, Any] = {"enable_layerwise_offload": True}
WHOLE: dict[str, Any] = {"enable_cpu_offload": True}
PROMPT = "a cat sits on the table"
ASK: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "height": 64, "width": 64}
SAMPLING = OmniDiffusionSamplingParams(num_inference_steps=2, height=64, width=64, seed=7, output_type="np")


def folder(name: str) -> str:
    return str(checkpoint(name, _ROOT))


def offloaded(name: str, **settings: Any) -> tuple[Any, Offload]:
    """A pipeline whose weights are away, as a worker makes it, but for the traps."""
    config = EngineConfig(model=folder(name), **settings)
    pipeline = load.load(config, device="cpu", unread=True)
    offload = offload_of(pipeline, resolve(pipeline), config)
    assert offload is not None
    offload.place(list(denoiser.modules(pipeline)), [pipeline.transformer])
    return pipeline, offload


def run(pipeline: Any) -> Tensor:
    image: Tensor = pipeline(**ASK, generator=torch.Generator().manual_seed(7), output_type="pt").images
    return image


def plain(path: str) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def size(*modules: nn.Module) -> int:
    """Bytes of weights, each tensor once."""
    unique = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in unique.values())


def in_memory(*modules: nn.Module) -> int:
    """Bytes of weights that are there now."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values() if not isinstance(t, Unread))


def watch(pipeline: Any, parts: list[nn.Module]) -> list[int]:
    """Bytes of all components that are there whenever a block of the denoiser runs."""
    seen: list[int] = []
    for block in pipeline.transformer.transformer_blocks:
        block.attn.register_forward_pre_hook(lambda *_: seen.append(in_memory(*parts)))
    return seen


def test_blocks_come_one_by_one() -> None:
    """Never more than the rest of the denoiser, one block, and one that was fetched ahead, which is in no module."""
    expected = run(plain(folder("qwen_image")))
    pipeline, offload = offloaded("qwen_image", **LAYERS)
    parts = list(denoiser.modules(pipeline))
    nothing, total = in_memory(*parts), size(*parts)
    seen = watch(pipeline, parts)
    with counted() as counts:
        assert torch.equal(run(pipeline), expected)
    blocks = [size(block) for block in pipeline.transformer.transformer_blocks]
    rest = size(pipeline.transformer) - sum(blocks)
    assert seen == [nothing + rest + blocks[0]] * (3 * 4)
    assert max(seen) < 0.3 * total
    assert nothing < 0.01 * total, "what is in no file"
    assert counts["offload_peak_bytes"] < 0.35 * total
    assert counts["offload_blocks"] >= 3 * 4 + 2, "blocks of the denoiser and of the others"
    assert counts["offload_prefetched"] >= 3 * 4 - 1
    assert offload.resident < 0.2 * total, "the VAE's, which ran last"


def test_whole_components_take_turns() -> None:
    pipeline, offload = offloaded("qwen_image", **WHOLE)
    parts = list(denoiser.modules(pipeline))
    nothing, seen = in_memory(*parts), watch(pipeline, parts)
    with counted() as counts:
        assert torch.equal(run(pipeline), run(plain(folder("qwen_image"))))
    assert seen == [nothing + size(pipeline.transformer)] * (3 * 4)
    assert counts["offload_peak_bytes"] == size(pipeline.transformer)
    assert counts["offload_fetches"] == 3, "text encoder, denoiser, VAE"
    assert offload.resident == pytest.approx(size(pipeline.vae), rel=0.01)


def test_kept_blocks_are_fetched_once() -> None:
    """With n blocks, all but one stay while the denoiser is in use."""
    fetched = {}
    for num_layers in (1, 3):
        pipeline, _ = offloaded("qwen_image", **LAYERS, layerwise_num_gpu_layers=num_layers)
        parts = list(denoiser.modules(pipeline))
        nothing, seen = in_memory(*parts), watch(pipeline, parts)
        with counted() as counts:
            run(pipeline)
        fetched[num_layers] = counts["offload_bytes"]
        block = size(pipeline.transformer.transformer_blocks[0])
        rest = size(pipeline.transformer) - 4 * block
        assert max(seen) == nothing + rest + num_layers * block
    assert fetched[1] - fetched[3] >= 2 * 2 * block, "two blocks in the second and third step"


class _Shares(nn.Module):
    """Two blocks with one matrix, which the rest uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.head = nn.Linear(8, 8, bias=False)
        self.blocks[1].weight = self.head.weight = self.blocks[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result


def _away(tensor: Tensor) -> Tensor:
    kept = tensor.detach().clone()
    return Unread(torch.empty_like(kept, device="meta"), tensor.device, stored=lambda: kept)


def test_shared_weights_and_errors_leave_nothing_behind() -> None:
    torch.manual_seed(0)
    model, x = _Shares(), torch.randn(2, 8)
    expected = model(x)
    offload = Offload(Home(away=_away, fetch=weights.fetch), device=torch.device("cpu"), num_layers=1)
    offload.place([model], [model])
    matrix = 8 * 8 * 4
    assert torch.equal(model(x), expected)
    assert offload.resident == matrix, "the shared matrix, which is part of the rest"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.blocks[2](torch.randn(2, 9))
    assert offload.resident == matrix
    assert torch.equal(model(x), expected)
    assert torch.equal(model.blocks[2].weight @ x.T, model.blocks[2](x).T), (
        "a weight that is away can be computed with"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LAYERS | WHOLE, "choose one of them"),
        ({"layerwise_num_gpu_layers": 2}, "layerwise_num_gpu_layers acts with enable_layerwise_offload=True only"),
        (LAYERS | {"layerwise_num_gpu_layers": 4}, "leaves none of the 4 blocks .* use at most 3"),
    ],
)
def test_refused_at_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        Omni(folder("qwen_image"), **settings, num_threads=1)


def test_objects_have_no_files() -> None:
    with pytest.raises(InvalidConfigError, match=r"a pipeline object has none; save it with save_pretrained"):
        Omni(plain(folder("qwen_image")), **WHOLE, num_threads=1)


# ---- a limit on memory


def large(path: Path) -> str:
    """A checkpoint whose denoiser has about 200 MB in 16 blocks, in files of 50 MB."""
    shutil.copytree(checkpoint("qwen_image", _ROOT), path)
    shutil.rmtree(path / "transformer")
    config = QwenImageTransformer2DModel.load_config(str(checkpoint("qwen_image", _ROOT) / "transformer"))
    sizes = {"num_layers": 16, "num_attention_heads": 6, "attention_head_dim": 54, "axes_dims_rope": (6, 24, 24)}
    torch.manual_seed(0)
    QwenImageTransformer2DModel.from_config({**config, **sizes}).save_pretrained(
        path / "transformer", max_shard_size="50MB"
    )
    return str(path)


def answer(path: str, **settings: Any) -> OmniRequestOutput:
    with Omni(path, num_threads=1, encoder_cache_mb=0, **settings) as omni:
        return omni.generate(PROMPT, SAMPLING, use_tqdm=False)[0]


def limited(rank: int, ranks: int, path: str, room: int) -> dict[str, Any]:
    """What comes of a model that does not fit: plainly, and with offload."""
    os.environ["DENOISED_KEEP_PAGES"] = "0"  # what is freed is given back
    ctypes.CDLL(None).mallopt(-2, 2**17)  # M_TOP_PAD: ask for no more than is needed
    answer(str(checkpoint("qwen_image", _ROOT)))  # what is imported and allocated on the way is not counted
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (in_use("VmData") + room, hard))
    try:
        with pytest.raises(DenoisedError) as failed:
            answer(path)
        gc.collect()  # the mapped files of the attempt
        before = in_use("VmRSS")
        with HighWater() as high:
            output = answer(path, **LAYERS)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    assert output.error is None, output.error
    return {
        "error": str(failed.value),
        "images": output.images,
        "rise": high.mb * MB - before,
        "receipt": output.receipt,
    }


def test_a_model_larger_than_memory_runs(tmp_path: Path) -> None:
    path = large(tmp_path / "large")
    weights_size = sum(file.stat().st_size for file in Path(path).rglob("*.safetensors"))
    assert weights_size > 190 * MB
    [found] = run_on_ranks(limited, 1, path, 100 * MB, timeout=120, fresh=True)  # no memory that others freed
    receipt: Receipt = found["receipt"]
    expected = answer(path)
    assert all((a == b).all() for a, b in zip(found["images"], expected.images, strict=True)), "not one bit differs"
    assert found["rise"] < 0.5 * weights_size, "resident, files that are mapped included"
    assert receipt.ranks[0].counts["offload_peak_bytes"] < 0.25 * weights_size
    assert receipt.ranks[0].counts["offload_bytes"] > weights_size, "blocks were read in each step"
    assert set(receipt.stage_peak_memory_mb) == {"encode", "denoise", "decode"}
    assert max(receipt.stage_peak_memory_mb.values()) <= receipt.peak_memory_mb + 0.1, "one is rounded"
    assert "emory" in found["error"]
    assert "by the plan's arithmetic a rank needs" in found["error"]
    assert "enable_layerwise_offload=True (" in found["error"].split("what would fit:")[1]


def test_the_three_settings_fit_by_the_arithmetic_of_the_plan() -> None:
    facts = read(folder("qwen_image"), Ask(height=64, width=64), dtype="float32")
    config = EngineConfig(model=folder("qwen_image"))
    need = rescue.needs(facts, config)
    found = rescue.ways(facts, config, 0.9 * need)
    assert len(found) == 3
    assert all(way.num_bytes <= 0.9 * need for way in found)
    assert [way.change for way in found] == [
        "dtype='bfloat16'",
        "enable_layerwise_offload=True",
        "quantization='int8_weight_only'",
    ]
    small = dataclasses.replace(config, quantization="int8_weight_only")
    quantized = rescue.needs(rescue.as_stored(facts, small), small)
    assert 0.25 * need < quantized < need, "what is not in blocks stays as it is"
    assert found[2].num_bytes == quantized
    least = rescue.ways(facts, config, 1.0)
    assert [way.num_bytes for way in least] == sorted(way.num_bytes for way in least), (
        "none fits: those that need least"
    )
    layers = EngineConfig(model=folder("qwen_image"), **LAYERS)
    pipeline, _ = offloaded("qwen_image", **LAYERS)
    with counted() as counts:
        run(pipeline)
    assert counts["offload_peak_bytes"] <= rescue.needs(facts, layers), "the plan's number holds"


def out_of_memory(config: EngineConfig, **sizes: int) -> str:
    """The error of a request, as a rank tells it."""
    params = OmniDiffusionSamplingParams(**sizes)
    request = Request(request_id="0", prompt={"prompt": PROMPT}, params=params, seed=0)
    told = rescue.advised(failures.refused(request, MemoryError("no more")), request, config)
    assert told.error_kind == "out_of_memory"
    return str(told.error)


def test_a_request_that_ran_out_is_told_the_settings_that_fit() -> None:
    config = EngineConfig(model=folder("qwen_image"))
    facts = rescue.as_stored(read(folder("qwen_image"), Ask(height=256, width=256), dtype="float32"), config)
    limit = int(0.9 * rescue.needs(facts, config) / MB)
    small = dataclasses.replace(config, memory_limit_mb=limit)
    text = out_of_memory(small, height=256, width=256)
    assert f"by the plan's arithmetic a rank needs {rescue.needs(facts, config) / MB:.0f} MB of {limit} MB" in text
    ways = rescue.ways(facts, config, limit * MB)
    assert len(ways) == 3
    listed = ", ".join(f"{way.change} ({way.num_bytes / MB:.0f} MB)" for way in ways)
    assert text.endswith(f"what would fit: {listed}.")


def test_advice_without_arithmetic_is_not_refused(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Of a pipeline object on the CPU, offload would be; of a model that cannot be read nothing is known."""
    pipeline = DiffusionPipeline.from_pretrained(folder("qwen_image"), dtype=torch.float32)
    text = out_of_memory(EngineConfig(model=pipeline))
    assert "use a smaller height and width, or the pipeline in bfloat16 (.to(torch.bfloat16))." in text
    assert "offload" not in rescue.with_advice("out of memory.", EngineConfig(model=pipeline))
    with pytest.raises(InvalidConfigError, match="a pipeline object has none"):
        offload_of(pipeline, resolve(pipeline), EngineConfig(model=pipeline, enable_layerwise_offload=True))
    gone = EngineConfig(model=str(_ROOT / "gone"), dtype="bfloat16")
    assert out_of_memory(gone).endswith("is not known for this model; use a smaller height and width.")
    assert not caplog.records
    monkeypatch.setattr(rescue, "_facts", lambda *asked: [].pop())
    assert out_of_memory(gone).endswith("use a smaller height and width.")
    assert "IndexError" in caplog.text, "what nobody expected is in the log"
