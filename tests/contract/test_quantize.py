"""Quantization through the engine: what torchao and diffusers give with the same weights, near to what the plain
pipeline gives, and the same on every layout of ranks.

A product of int8 or fp8 activations rounds them, so that sums in another order are rounded otherwise here and there,
and what follows is as far off as quantization itself puts it. Where nothing is summed in another order it is equal.
"""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from denoised import DiffusionParallelConfig, LoRARequest, Omni, OmniRequestOutput
from denoised.features.quantize.layers import layers
from denoised.spec.registry import resolve
from tests import gguf_files
from tests.contract import parallel, test_lora
from tests.contract.support import (
    EXACT,
    ORDER,
    REORDERED,
    as_omni,
    difference,
    folder,
    latent_type,
    media,
    reference,
    request_of,
    seed_of,
    tensors,
)
from tests.tiny import UPSTREAM_WARNINGS
from tests.watchdog import within

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

slow = pytest.mark.slow
_ROOT = Path(tempfile.mkdtemp(prefix="denoised-quantized-"))
# How far from the plain pipeline's latents, as a share of their norm. Random weights and strong guidance are not kind
# to errors: a product of one layer is off by 0.008, 0.004, 0.035 and 0.004 of its norm.
FAR = {"int8": 0.06, "int8_weight_only": 0.02, "fp8": 0.16, "gguf": 0.02}
# Double stream, guidance in one batch, single stream, video with two experts.
ROWS = ["qwen_image", "sd3", "flux_dev", "wan22_t2v"]
# Bytes of a quantized weight, of those that it had in float32: codes, a scale a row or a block, and small change.
SHARE = {"int8": 0.30, "int8_weight_only": 0.30, "fp8": 0.28, "gguf": 0.28}
COMPONENTS = ("transformer", "transformer_2", "unet")


def run(
    name: str,
    indexes: list[int],
    method: Any,
    *,
    model: str = "",
    loras: tuple[LoRARequest, ...] = (),
    **settings: Any,
) -> list[OmniRequestOutput]:
    """A row's requests, all in flight together."""
    asked = [as_omni(request_of(name, i), seed_of(i), latent_type(name)) for i in indexes]
    asked = [(prompt, replace(params, lora_request=list(loras) or None)) for prompt, params in asked]
    return within(parallel.PATIENCE, _run, model or folder(name), asked, {"quantization": method} | settings)


def _run(model: str, asked: list[Any], settings: dict[str, Any]) -> list[OmniRequestOutput]:
    plugins = ("tests.contract.rank_setup",)
    with Omni(model, num_threads=1, plugins=plugins, **{"deterministic": True, **settings}) as omni:
        return omni.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)  # type: ignore[no-any-return]


@functools.cache
def pair(name: str, kind: Any = gguf_files.Kind.Q8_0) -> tuple[str, str]:
    """A row's checkpoint with a GGUF file, and one with the weights that this holds."""
    packed, plain = gguf_files.pair(Path(folder(name)), _ROOT / f"{name}-{kind.name}", kind)
    return str(packed), str(plain)


def model_of(name: str, method: str) -> str:
    return pair(name)[0] if method == "gguf" else folder(name)


def asked_of(method: str) -> Any:
    """GGUF files are made of one component."""
    return {"transformer": "gguf"} if method == "gguf" else method


@functools.cache
def plainly(name: str, method: str, index: int = 0) -> list[torch.Tensor]:
    """The plain pipeline, whose weights torchao has quantized, or are what the GGUF file holds."""
    from diffusers import DiffusionPipeline
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    pipeline = DiffusionPipeline.from_pretrained(pair(name)[1] if method == "gguf" else folder(name))
    pipeline.set_progress_bar_config(disable=True)
    configs = {"int8": Int8DynamicActivationInt8WeightConfig, "int8_weight_only": Int8WeightOnlyConfig}
    for part in COMPONENTS if method in configs else ():
        if getattr(pipeline, part, None) is not None:
            paths = {path for path, _ in layers(getattr(pipeline, part))}
            quantize_(getattr(pipeline, part), configs[method](), filter_fn=lambda _, path, paths=paths: path in paths)
    if method == "fp8":
        for _, layer in layers(pipeline.transformer):
            layer.weight = torch.nn.Parameter(in_fp8(layer.weight.detach()), requires_grad=False)  # type: ignore[assignment,arg-type]
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed_of(index))
    result = pipeline(**request_of(name, index), generator=generator, output_type=latent_type(name))
    return tensors(next(getattr(result, n) for n in ("images", "frames", "video", "audios") if hasattr(result, n)))


def in_fp8(matrix: torch.Tensor) -> torch.Tensor:
    """Torchao's tensor, made by hand: its own way asks for a GPU first."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    active = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
    found: torch.Tensor = Float8Tensor.from_hp(
        matrix, granularity=PerRow(), mm_config=Float8MMConfig(use_fast_accum=True), act_quant_kwargs=active
    )
    return found


def off(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    a, b = torch.cat([t.flatten() for t in expected]), torch.cat([t.flatten() for t in got])
    return float((a - b).norm() / a.norm())


def acted(output: OmniRequestOutput, method: str) -> None:
    """The receipt says what was quantized, and that it became so much smaller."""
    assert output.receipt is not None
    done = output.receipt.quantized
    assert {entry["method"] for entry in done} == {method}
    for entry in done:
        assert entry["layers"] >= 8
        assert 0 < entry["bytes_after"] <= SHARE[method] * entry["bytes_before"]


def check(name: str, method: str) -> None:
    (output,) = run(name, [0], asked_of(method), model=model_of(name, method))
    got = media(output)
    acted(output, method)
    assert 0 < off(reference(name, 0, latent_type(name)), got) <= FAR[method]
    assert difference(plainly(name, method), got) <= REORDERED


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if ROWS.index(name) == number else slow)
        for name in ROWS
        for number, method in enumerate(FAR)
    ],
)
def test_near_the_plain_pipeline_and_equal_to_the_library(name: str, method: str) -> None:
    check(name, method)


@slow
@pytest.mark.parametrize("method", ["int8", "int8_weight_only"])
@pytest.mark.parametrize("name", ORDER)
def test_every_row(name: str, method: str) -> None:
    """Near is told by the library: models differ in how much of an error their guidance makes."""
    try:
        outputs = run(name, [0], method)
    except Exception as error:
        assert "linear layers in blocks" in str(error)  # noqa: PT017
        pytest.skip(str(error))
    acted(outputs[0], method)
    assert off(plainly(name, method), media(outputs[0])) <= FAR[method]


# Of the parts of a path, what is no matrix of a block: as the models' authors name it, not as our list does.
SMALL = re.compile(
    r"(^|_)(norm\d*|norm_.*|ln|mod|modulation|adaln.*|ada_ln.*|scale_shift.*)(_|$)"  # what shifts and scales
    r"|embed|(^|_)emb(_|$)|caption|projector|time|patch|rope|pos_|guidance_in|router|(^|_)gate$|head$"
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("hidream_i1", "glm_image") else slow) for name in ORDER]
)
def test_nothing_small_is_quantized(name: str) -> None:
    """By names that are written here, and not by the list that chooses."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    spec = resolve(pipeline)
    for component in spec.denoisers:
        model = getattr(pipeline, component)
        chosen = {path for path, _ in layers(model, spec.unquantized)}
        assert [path for path in chosen if any(SMALL.search(part) for part in path.split("."))] == []
        assert all(type(model.get_submodule(path)) is torch.nn.Linear for path in chosen)
        small = [p for p, part in model.named_modules() if isinstance(part, torch.nn.Linear) and p not in chosen]
        assert small, "a model has layers to leave alone, so that the patterns have something to find"


@functools.cache
def alone(name: str, method: str, index: int) -> OmniRequestOutput:
    (output,) = run(name, [index], asked_of(method), model=model_of(name, method))
    return output


# What layouts do to the result of one rank, where weights alone are quantized: nothing, or sums in another order. Only
# tensor's int8 shards differ: they have scales of their own, each of a part of the columns.
EQUAL = ("cfg", "pipeline")
LAYOUTS = ("cfg", "ulysses", "ring", "tensor", "pipeline", "text_encoder_tp")
QUICK = {("tensor", "gguf"), ("pipeline", "int8")}


def bound(layout: str, method: str) -> float:
    if layout in EQUAL:
        return EXACT
    rounds = method in ("int8", "fp8") or (layout, method) == ("tensor", "int8_weight_only")
    return 2 * FAR[method] if rounds else REORDERED


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        pytest.param(layout, method, marks=() if (layout, method) in QUICK else slow)
        for layout in LAYOUTS
        for method in FAR
    ],
)
def test_two_ranks_give_what_one_gives(layout: str, method: str) -> None:
    name = "qwen_image"
    config = DiffusionParallelConfig(**parallel.degrees_of(layout))
    outputs = run(name, [0, 1], asked_of(method), model=model_of(name, method), parallel_config=config)
    for index, output in enumerate(outputs):
        whole = alone(name, method, index)
        assert difference(media(whole), media(output)) <= bound(layout, method)
    acted(outputs[0], method)
    assert all(counts[trace] for counts in parallel.counts(outputs) for trace in parallel.TRACES.get(layout, ()))
    shares = [output.receipt.quantized[0]["bytes_before"] for output in (outputs[0], whole)]  # type: ignore[union-attr]
    assert 0.45 < shares[0] / shares[1] < 0.65 if layout in ("pipeline", "tensor") else shares[0] == shares[1]


@slow
def test_tiles_of_the_vae_over_ranks() -> None:
    """Decoded pictures; on one rank in the same tiles."""
    request = request_of("sd3", 0) | {"height": 64, "width": 96, "num_inference_steps": 2}
    asked = [as_omni(request, seed_of(0), "pt")]
    config = DiffusionParallelConfig(**parallel.degrees_of("vae_patch"))
    (one,) = within(
        parallel.PATIENCE, _run, folder("sd3"), asked, {"quantization": "int8_weight_only", "vae_use_tiling": True}
    )
    (two,) = within(
        parallel.PATIENCE, _run, folder("sd3"), asked, {"quantization": "int8_weight_only", "parallel_config": config}
    )
    assert difference(media(one), media(two)) <= REORDERED
    assert all(counts["vae_tiles"] for counts in parallel.counts([two]))
    acted(two, "int8_weight_only")


@pytest.mark.parametrize("method", ["int8", pytest.param("gguf", marks=slow)])
def test_interleaved_requests_equal_solo_ones(method: str) -> None:
    """Nothing of one request is in the scales of another."""
    outputs = run("qwen_image", [0, 1], asked_of(method), model=model_of("qwen_image", method))
    for index, output in enumerate(outputs):
        assert difference(media(alone("qwen_image", method, index)), media(output)) == EXACT


@pytest.mark.parametrize(
    "settings",
    [pytest.param({"enable_cpu_offload": True}, marks=slow), {"enable_layerwise_offload": True}],
    ids=str,
)
@pytest.mark.parametrize("method", ["int8", pytest.param("gguf", marks=slow)])
def test_offload(method: str, settings: dict[str, Any]) -> None:
    """On the CPU a weight is quantized each time that it comes."""
    (output,) = run("qwen_image", [0], asked_of(method), model=model_of("qwen_image", method), **settings)
    assert difference(media(alone("qwen_image", method, 0)), media(output)) == EXACT
    acted(output, method)
    (counts,) = parallel.counts([output])
    whole = sum(file.stat().st_size for file in Path(folder("qwen_image")).rglob("*.safetensors"))
    assert 0 < counts["offload_peak_bytes"] < (0.2 if "layerwise" in str(settings) else 0.5) * whole


@pytest.mark.pair("quantization", "lora")
@pytest.mark.parametrize(
    ("layout", "method"),
    [
        *(("", method) for method in ("int8_weight_only", "int8", "gguf")),
        *(pytest.param(layout, "int8_weight_only", marks=slow) for layout in ("tensor", "pipeline")),
        *(pytest.param(layout, "gguf", marks=slow) for layout in ("tensor", "pipeline")),
        pytest.param("", "fp8", marks=slow),
    ],
)
def test_lora_beside_quantized_layers(layout: str, method: str) -> None:
    """An adapter adds to the layer's product, whatever that is made of."""
    adapter = test_lora.asked_for("qwen_image", 1)
    config = DiffusionParallelConfig(**(parallel.degrees_of(layout) if layout else {}))
    model = model_of("qwen_image", method)
    (output,) = run("qwen_image", [0], asked_of(method), model=model, loras=(adapter,), parallel_config=config)
    adapted = test_lora.reference("qwen_image", 0, 1)
    assert off(adapted, media(output)) <= 2 * FAR[method]
    assert off(reference("qwen_image", 0, latent_type("qwen_image")), media(output)) > 4 * FAR[method]
    assert output.receipt is not None
    assert output.receipt.loras
    acted(output, method)


@pytest.mark.pair("cache", "quantization")
def test_caches_skip_blocks_of_quantized_layers() -> None:
    settings = {"cache_backend": "first_block_cache", "cache_config": {"threshold": 10.0}}
    cached = run("flux_dev", [0], None, **settings)[0]
    (output,) = run("flux_dev", [0], "int8_weight_only", **settings)
    assert output.receipt is not None
    assert cached.receipt is not None
    assert output.receipt.cache is not None
    assert cached.receipt.cache is not None
    assert output.receipt.cache["skipped"] == cached.receipt.cache["skipped"] > 0
    assert off(media(cached), media(output)) <= FAR["int8_weight_only"]


def test_text_encoders_too() -> None:
    (output,) = run("qwen_image", [0], {"transformer": "int8_weight_only", "text_encoder": "int8_weight_only"})
    assert {entry["component"] for entry in output.receipt.quantized} == {"transformer", "text_encoder"}  # type: ignore[union-attr]
    distance = off(media(alone("qwen_image", "int8_weight_only", 0)), media(output))
    assert 0 < distance <= 2 * FAR["int8_weight_only"]


def test_an_adapter_and_a_cache_beside_quantized_layers() -> None:
    """All three on one request: a cache that never skips changes nothing, and one that does skips."""
    adapter, steps = test_lora.asked_for("qwen_image", 1), {"coefficients": [1.0, 0.0]}
    outputs = [
        run("qwen_image", [0], "int8_weight_only", loras=(adapter,), **settings)[0]
        for settings in (
            {},
            {"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": 0.0, **steps}},
            {"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": 100.0, **steps}},
        )
    ]
    for output in outputs:
        acted(output, "int8_weight_only")
        assert output.receipt is not None
        assert output.receipt.loras
    never, often = (output.receipt.cache for output in outputs[1:] if output.receipt is not None)
    assert never is not None
    assert often is not None
    assert (never["skipped"], often["skipped"] > 0) == (0, True)
    assert never["computed"] > often["computed"]
    assert difference(media(outputs[0]), media(outputs[1])) == EXACT
    assert difference(media(outputs[0]), media(outputs[2])) > REORDERED
