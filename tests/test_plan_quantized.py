"""Quantized weights in a plan and in admission: bytes against those of models that were loaded, and refusals."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from denoised import hf
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, ModelError
from denoised.rules import validate
from denoised.runtime import denoiser, footprint, load, model_info, rescue
from denoised.runtime.plan import (
    HARDWARE,
    Ask,
    Layout,
    ModelFacts,
    admissible,
    facts_of,
    plan,
    plan_one,
    problem,
    read,
)
from denoised.runtime.planning.memory import memory
from denoised.runtime.planning.settings import with_settings
from denoised.runtime.planning.skeleton import skeleton
from denoised.runtime.room import Footprint
from denoised.spec.registry import resolve
from denoised.steps.parts import num_bytes
from denoised.steps.tally import counted
from tests import gguf_files, quantized
from tests.cli import denoised
from tests.plan_models import written
from tests.plan_ranks import first_of
from tests.tiny import ROWS, UPSTREAM_WARNINGS, checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

# Of a component's bytes on a rank: what plans call divided, and what is, differ in small things.
BOUND = 0.01
LOOSE = 0.05  # the same of models of any kind
ONE, TENSOR, STAGES = Layout(), Layout(tensor=2), Layout(pipeline=2)
BOTH = {"transformer": "int8", "text_encoder": "int8_weight_only"}
SETTINGS: dict[str, Any] = {"fp8": "fp8", "int8": "int8", "weights": "int8_weight_only", "gguf": "gguf", "both": BOTH}
_ROOT = Path(tempfile.mkdtemp(prefix="denoised-plan-quantized-"))


@functools.cache
def folder(kind: str) -> Path:
    """A checkpoint: a row's name, "gguf" or "came"."""
    if kind == "gguf":
        return gguf_files.pair(quantized.folder(), _ROOT / kind, gguf_files.Kind.Q8_0)[0]
    return quantized.prepared(_ROOT / kind) if kind == "came" else checkpoint(kind, _ROOT)


@functools.cache
def bare(kind: str) -> Path:
    """The same without any weights but those of a GGUF file."""
    target = _ROOT / "bare" / kind
    shutil.copytree(folder(kind), target, ignore=shutil.ignore_patterns("*.safetensors*"))
    assert not list(target.rglob("*.safetensors"))
    return target


@functools.cache
def plain_facts(kind: str) -> tuple[Any, ModelFacts]:
    """Without settings, and the pipeline that they are of."""
    pipeline = skeleton(str(bare(kind)))
    ask = Ask(height=64, width=64, text_tokens=8) if ROWS.get(kind) is None else _ask(kind)
    return pipeline, facts_of(pipeline, ask, model=str(bare(kind)), dtype="float32")


def facts(kind: str, setting: Any = None, **more: Any) -> ModelFacts:
    pipeline, plain = plain_facts(kind)
    config = EngineConfig(model=plain.model, quantization=setting, **more)
    return with_settings(plain, pipeline, config, device="cpu")


def _ask(name: str) -> Ask:
    request = ROWS[name].request(0)
    sizes = {k: request[k] for k in ("height", "width", "num_frames", "layers") if k in request}
    return Ask(**sizes, text_tokens=8)


def started(kind: str, setting: Any, layout: Layout, **more: Any) -> tuple[dict[str, int], Footprint | None]:
    """Bytes by component on the first rank of an engine, and what its admission counts, if there is a limit."""
    settings = {"quantization": setting, "parallel_config": layout.config(), "memory_limit_mb": 2**20} | more
    config = EngineConfig(model=str(folder(kind)), **settings)
    validate(config)
    with first_of(config.parallel_config) if layout.num_ranks > 1 else nullcontext() as mesh:
        pipeline = load.load(config, device="cpu", unread=True)
        spec = resolve(pipeline)
        info = model_info.describe(pipeline, spec, model=kind, device="cpu", dtype="float32", defaults={})
        found = footprint.measure(pipeline, info, config)
        denoiser.build(pipeline, spec, config, mesh)
    return {name: resident(part) for name, part in modules(pipeline).items()}, found


def modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in hf.components(pipeline).items() if isinstance(part, nn.Module)}


def resident(part: nn.Module) -> int:
    return sum(num_bytes(p) for p in part.parameters() if not p.is_meta)


def compare(kind: str, setting: Any, layout: Layout, model: ModelFacts) -> None:
    """What a plan says, what admission counts, and what is there."""
    assert problem(layout, model) is None
    there, found = started(kind, setting, layout)
    assert there == pytest.approx(memory(layout, model).weights, rel=BOUND), layout
    assert found is not None
    assert found.weights == pytest.approx(sum(there.values()), rel=BOUND), layout


@pytest.mark.parametrize(
    ("method", "layouts"),
    [
        *((method, [TENSOR]) for method in SETTINGS),
        *(pytest.param(method, [ONE, STAGES], marks=pytest.mark.slow) for method in SETTINGS),
    ],
)
def test_bytes_are_those_of_a_model_that_is_loaded(method: str, layouts: list[Layout]) -> None:
    """From configurations (and the list of tensors of a GGUF file), on one rank, or on the first of two."""
    kind = "gguf" if method == "gguf" else "qwen_image"
    model, plain = facts(kind, SETTINGS[method]), memory(ONE, facts("qwen_image")).weights
    for layout in layouts:
        compare(kind, SETTINGS[method], layout, model)
    small = memory(ONE, model).weights
    assert small["transformer"] < (0.5 if method == "gguf" else 0.75) * plain["transformer"]
    assert (small["text_encoder"] < 0.9 * plain["text_encoder"]) == (method == "both")
    assert model.bytes_of("transformer") == pytest.approx(small["transformer"])


def test_models_that_come_quantized() -> None:
    model, plain = facts("came"), memory(ONE, facts("qwen_image")).weights
    for layout in (ONE, STAGES):
        compare("came", None, layout, model)
    small = memory(ONE, model).weights
    assert small["transformer"] < 0.5 * plain["transformer"], "all linear layers"
    assert small["text_encoder"] < 0.9 * plain["text_encoder"]
    assert small["vae"] == plain["vae"]


# Of these tensor parallelism divides other layers than the plan takes for divided, quantized or not.
OTHERWISE = ("sdxl", "wan21_vace", "glm_image", "sana")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.folder is None])
def test_bytes_of_every_row(name: str) -> None:
    try:
        model = facts(name, "int8_weight_only")
    except InvalidConfigError as error:
        assert "linear layers in blocks" in str(error)  # noqa: PT017
        return
    layouts = [ONE] if name in OTHERWISE else [ONE, TENSOR]
    for layout in (layout for layout in layouts if problem(layout, model) is None):
        there, _ = started(name, "int8_weight_only", layout, memory_limit_mb=None)
        assert there == pytest.approx(memory(layout, model).weights, rel=LOOSE), layout


def big(pipeline: str, setting: Any = None) -> ModelFacts:
    """A model of real size, for GPUs."""
    made, plain = _big(pipeline)
    return with_settings(plain, made, EngineConfig(model=plain.model, quantization=setting), device="cuda")


@functools.cache
def _big(pipeline: str) -> tuple[Any, ModelFacts]:
    made = skeleton(str(_written(pipeline)))
    return made, facts_of(made, Ask(height=1024, width=1024), model=str(_written(pipeline)))


@functools.cache
def _written(pipeline: str) -> Path:
    return written(pipeline, _ROOT)


def test_bytes_of_a_model_of_real_size_by_hand() -> None:
    """Qwen-Image: 60 blocks of width 3072, attention and feed-forward of two streams; modulation stays."""
    width, blocks = 3072, 60
    values = blocks * (8 * width * width + 2 * 2 * width * 4 * width)
    rows = blocks * (8 * width + 2 * (4 * width + width))
    whole = big("QwenImagePipeline").bytes_of("transformer")
    assert big("QwenImagePipeline", "int8").bytes_of("transformer") == whole - values + 5 * rows
    assert big("QwenImagePipeline", "fp8").bytes_of("transformer") == whole - values + 4 * rows
    halves = memory(TENSOR, big("QwenImagePipeline", "int8")).weights["transformer"]
    assert halves == pytest.approx((whole - values) / 2, rel=0.01)


def test_what_does_not_fit_fits_in_fewer_bits() -> None:
    text = "quantization='fp8' does not run on A100 SXM 80GB"
    h100, small = HARDWARE["h100"], HARDWARE["l40s"]
    with pytest.raises(InvalidConfigError, match="and 41.4 GiB are there"):
        plan(big("QwenImagePipeline"), small, 1)
    setting = '{"transformer": "int8", "text_encoder": "int8_weight_only"}'
    assert plan(big("QwenImagePipeline", setting), small, 1).best.good
    assert plan(big("QwenImagePipeline", "fp8"), h100, 4).best.good
    assert not any(layout.hsdp for layout in admissible(big("QwenImagePipeline", "fp8"), 4)), "it shards plain weights"
    with pytest.raises(InvalidConfigError, match=text):
        plan(big("QwenImagePipeline", "fp8"), HARDWARE["a100"], 2)
    with pytest.raises(InvalidConfigError, match=text):
        plan_one(big("QwenImagePipeline", "fp8"), HARDWARE["a100"], ONE)


REFUSED: list[tuple[str, Any, dict[str, Any], Layout, str]] = [
    ("qwen_image", {"transformer_9": "int8"}, {}, ONE, "quantization names 'transformer_9'"),
    ("qwen_image", {"vae": "int8"}, {}, ONE, "has no linear layers in blocks; leave vae out"),
    ("came", "int8", {}, ONE, "quantized already"),
    ("came", None, {}, TENSOR, "tensor_parallel_size=2 would cut transformer, whose weights came quantized"),
    ("came", None, {}, Layout(cfg=2, hsdp=True), "use_hsdp=True shards plain weights only, and those of"),
    ("came", None, {}, Layout(cfg=2, text_encoder_tp=2), "text_encoder_tp_size=2 would cut text_encoder"),
    ("qwen_image", "int8", {}, Layout(cfg=2, hsdp=True), "quantization cannot go with use_hsdp=True"),
    ("gguf", "gguf", {}, Layout(tensor=4), ""),
    ("qwen_image", None, {"attention_backend": "flex"}, Layout(ring=2, uneven=True), "gives no softmax denominators"),
    ("qwen_image", None, {"attention_backend": "flash"}, ONE, "attention_backend='flash' runs on cuda, not on cpu"),
]


@pytest.mark.parametrize(("kind", "setting", "more", "layout", "says"), REFUSED)
def test_plan_and_engine_refuse_alike(
    kind: str, setting: Any, more: dict[str, Any], layout: Layout, says: str
) -> None:
    """Before a weight is read."""
    with pytest.raises(InvalidConfigError) as planned:
        plan_one(facts(kind, setting, **more), HARDWARE["cpu"], layout)
    with pytest.raises(InvalidConfigError) as refused, counted() as counts:
        started(kind, setting, layout, **more, memory_limit_mb=None)  # so that the engine itself is asked
    assert says in str(planned.value)
    assert says in str(refused.value)
    assert counts["weight_bytes_read"] == 0


def test_what_only_a_plan_refuses() -> None:
    with pytest.raises(InvalidConfigError, match="takes weights in bfloat16 on this device, and these are float32"):
        read(str(bare("qwen_image")), Ask(), dtype="float32", config=EngineConfig(quantization="fp8"), device="cuda")
    other = _ROOT / "other"
    shutil.copytree(bare("came"), other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (other / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="transformer comes quantized by 'bitsandbytes'"):
        read(str(other), Ask())
    kernels = facts("qwen_image", attention_backend="flex")
    assert not any(layout.ring > 1 for layout in admissible(kernels, 2))
    assert any(layout.ring > 1 for layout in admissible(facts("qwen_image"), 2))


def test_errors_for_want_of_memory_say_what_quantization_saves() -> None:
    model = str(bare("qwen_image"))
    asked, config = read(model, Ask(height=64, width=64), dtype="float32"), EngineConfig(model=model)
    asked = replace(asked, num_rows=0, decode_bytes=0.0)
    found = {way.change: way.num_bytes for way in rescue.ways(asked, config, 0.8 * rescue.needs(asked, config))}
    small = memory(ONE, facts("qwen_image", "int8_weight_only")).weights
    assert found["quantization='int8_weight_only'"] == sum(small.values())
    stored = EngineConfig(model=model, quantization="int8")
    text = rescue.with_advice("out of memory.", replace(stored, memory_limit_mb=1))
    assert "quantization" not in text, "it is set"
    need = sum(memory(ONE, facts("qwen_image", "int8")).weights.values())
    assert f"a rank needs {need / 2**20:.0f} MB" in text


def test_command_line() -> None:
    folder, size = _written("FluxPipeline"), ("--height", 256, "--width", 256)
    setting = '{"transformer": "fp8", "text_encoder_2": "int8_weight_only"}'
    shown = denoised("plan", folder, "--quantization", setting, *size)
    assert shown.exit_code == 0, shown.stderr
    assert "transformer in fp8, text_encoder_2 in int8_weight_only" in shown.stdout
    refused = denoised("plan", folder, "--quantization", "fp9")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "quantization must be one of fp8" in refused.stderr
    ring = denoised("plan", folder, "--attention-backend", "xformers", "--ring", 2, *size)
    assert "ring_degree=2 merges" in ring.stderr
