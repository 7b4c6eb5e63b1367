"""Attention kernels by name: each gives what torch gives, is counted, and is refused where it cannot run."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from denoised import Omni, hf
from denoised.attention.backends import BACKENDS, find
from denoised.attention.intercept import Attention, open_modes, paused
from denoised.config import DiffusionParallelConfig
from denoised.errors import EngineError, InvalidConfigError, InvalidRequestError
from denoised.features import attention_backend, sequence
from denoised.spec.registry import resolve
from denoised.steps.tally import counted
from tests.contract import support
from tests.ranks import run_on_ranks
from tests.tiny import ROWS, checkpoint

BOUND = 1e-5  # sums in another order, fp32, relative to the largest value
CPU = torch.device("cpu")
HERE = ("native", "native_flash", "native_math", "flex")
GPU_ONLY = ("native_efficient", "native_cudnn", "flash", "flash_3", "sage", "xformers")
plain = torch.nn.functional.scaled_dot_product_attention


def close(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).abs().max() / expected.abs().max()) <= BOUND


@pytest.mark.parametrize("name", ["native_flash", "native_math", pytest.param("flex", marks=pytest.mark.slow)])
def test_kernel_gives_what_torch_gives(name: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 16) for n in (9, 12, 12))
    blind = torch.rand(2, 1, 9, 12) > 0.3
    blind[..., 0] = True
    for mask in (None, blind, torch.randn(1, 4, 9, 12), torch.randn(9, 12)):
        got = BACKENDS[name].answer(query, key, value, attn_mask=mask)
        assert got is not None
        assert close(got, plain(query, key, value, attn_mask=mask))
    causal = BACKENDS[name].answer(query, key[:, :, :9], value[:, :, :9], is_causal=True, scale=0.3)
    assert causal is not None
    assert close(causal, plain(query, key[:, :, :9], value[:, :, :9], is_causal=True, scale=0.3))
    grouped = BACKENDS[name].answer(query, key[:, :2], value[:, :2], enable_gqa=True)
    assert grouped is not None
    assert close(grouped, plain(query, key[:, :2], value[:, :2], enable_gqa=True))
    flat = BACKENDS[name].answer(query[0], key[0], value[0])
    assert flat is not None
    assert close(flat, plain(query[0], key[0], value[0]))


@functools.cache
def folder(row: str) -> Path:
    return checkpoint(row, Path(tempfile.mkdtemp(prefix="denoised-backends-")))


def load(row: str) -> Any:
    with hf.quietly(bars=False):
        pipeline = DiffusionPipeline.from_pretrained(folder(row))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def answer(pipeline: Any, row: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    result = pipeline(**ROWS[row].request(0), generator=generator, output_type=ROWS[row].output_type)
    return torch.as_tensor(next(getattr(result, n) for n in ("images", "frames") if hasattr(result, n)))


@pytest.mark.parametrize("row", ["qwen_image", "sd3", "flux_dev", "wan22_ti2v"])
def test_models_attend_by_it(row: str) -> None:
    pipeline = load(row)
    expected, denoisers = answer(pipeline, row), resolve(pipeline).denoisers
    for name in ("native_flash", "native_math"):
        pipeline = load(row)
        for denoiser in denoisers:
            attention_backend.apply(getattr(pipeline, denoiser), BACKENDS[name], denoiser)
        with counted() as counts:
            assert close(answer(pipeline, row), expected)
        assert counts[f"attention_{name}"] > 0
        assert not open_modes()


def test_engine_attends_by_it_and_says_so() -> None:
    expected = support.reference("qwen_image", 0, support.latent_type("qwen_image"))
    setting = "transformer=flex,text_encoder=math"
    with support.engine("qwen_image", attention_backend=setting) as omni:
        (output,) = support.ask(omni, "qwen_image", [0], support.latent_type("qwen_image"))
    assert support.difference(expected, support.media(output)) <= BOUND
    assert output.receipt is not None
    assert output.receipt.ranks[0].counts["attention_flex"] > 0


def switches() -> dict[str, Any]:
    """What is the whole process's: torch's choice of kernels, and diffusers' own backend."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    names = [name for name in dir(torch.backends.cuda) if name.endswith("_sdp_enabled")]
    found = {name: getattr(torch.backends.cuda, name)() for name in names}
    return found | {"diffusers": _AttentionBackendRegistry.get_active_backend()[0]}


def kernels_of(output: Any) -> dict[str, int]:
    counts = output.receipt.ranks[0].counts
    return {name: n for name, n in counts.items() if name.startswith("attention_")}


def test_two_engines_of_one_process_attend_differently_and_no_switch_is_set() -> None:
    """Requests of both in flight at once; each component of each engine by its own kernel."""
    before, row, kind = switches(), "qwen_image", support.latent_type("qwen_image")
    assert len(before) >= 4
    assert torch.nn.functional.scaled_dot_product_attention is plain
    math, flash = "native_math", "native_flash"
    settings = [{"transformer": math, "text_encoder": flash}, {"transformer": flash, "text_encoder": math}]
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(support.engine(row, attention_backend=setting)) for setting in settings]
        with ThreadPoolExecutor(2) as pool:
            answers = pool.map(lambda omni: support.ask(omni, row, [0], kind)[0], engines)
            during = switches()
            first, second = answers
    assert before == during == switches()
    assert torch.nn.functional.scaled_dot_product_attention is plain
    for output in (first, second):
        assert support.difference(support.reference(row, 0, kind), support.media(output)) <= BOUND
    one, two = kernels_of(first), kernels_of(second)
    assert one.keys() == two.keys() == {"attention_native_math", "attention_native_flash"}
    # The denoiser attends in each step, the encoder once.
    assert one["attention_native_math"] == two["attention_native_flash"] > one["attention_native_flash"]
    assert one["attention_native_flash"] == two["attention_native_math"] > 0


def on_ranks(rank: int, world_size: int, path: str, row: str, name: str, ring: int) -> tuple[Tensor, dict[str, int]]:
    from torch.distributed import init_device_mesh

    mesh = init_device_mesh("cpu", (ring, world_size // ring), mesh_dim_names=("ring", "ulysses"))
    with hf.quietly(bars=False):
        pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    spec = resolve(pipeline)
    for denoiser in spec.denoisers:
        model = getattr(pipeline, denoiser)
        groups = {axis: mesh.get_group(axis) for axis in ("ring", "ulysses")}
        sequence.apply(model, spec, **groups, mode="advanced_uaa")
        attention_backend.apply(model, BACKENDS[name], denoiser)
    with counted() as counts:
        result = answer(pipeline, row)
    return result, dict(counts)


@pytest.mark.parametrize(("row", "name", "ring"), [("sd3", "native_math", 1), ("qwen_image", "native_math", 2)])
def test_kernel_computes_what_is_left_of_a_spread_sequence(row: str, name: str, ring: int) -> None:
    expected = answer(load(row), row)
    for got, counts in run_on_ranks(on_ranks, 2, str(folder(row)), row, name, ring):
        assert close(got, expected)
        # A ring of two computes two blocks for each exchange; Ulysses one.
        assert counts[f"attention_{name}"] == ring * counts["sequence_attention"] > 0


def test_modes_are_asked_from_inside_out_also_when_paused() -> None:
    seen: list[str] = []

    def outer(*args: Any, **options: Any) -> Tensor:
        seen.append("outer")
        return plain(*args, **options)

    def inner(*args: Any, **options: Any) -> Tensor:
        seen.append("inner")
        return plain(*args, **options)  # comes to the outer one

    x = torch.randn(1, 2, 3, 8)
    with Attention(outer), Attention(inner):
        eager = plain(x, x, x)
        with paused():
            assert not open_modes()
            assert torch.equal(torch.ops.denoised.attention(x, x, x, None, False, None, False), eager)
        assert len(open_modes()) == 2
    assert seen == ["inner", "outer"] * 2


def model_of(**config: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = config  # type: ignore[assignment]
    return model


def refusal(name: str, *, device: str = "cpu", ring: int = 1, component: str = "transformer", **config: Any) -> str:
    parts = {"transformer": model_of(**config), "vae": nn.Linear(1, 1)}
    with pytest.raises(InvalidConfigError) as error:
        attention_backend.check(parts, {component: name}, device=torch.device(device), ring_degree=ring)
    return str(error.value)


@pytest.mark.parametrize("name", GPU_ONLY)
def test_gpu_kernels_are_refused_on_cpu(name: str) -> None:
    message = refusal(name)
    assert f"'{name}'" in message
    assert "not on cpu; here you can use native, native_flash, native_math, flex" in message


def test_what_can_be_known_at_start_is_refused_at_start() -> None:
    assert "use one of native, native_flash" in refusal("fast")
    assert "pip install sageattention" in refusal("sage", device="cuda")
    assert "pip install flash-attn" in refusal("flash_2", device="cuda")
    assert "no component 'unet'" in refusal("native", component="unet")
    assert "ring_degree=2" in refusal("flex", ring=2)
    assert "is float32".replace("is ", "is torch.") in refusal("native_cudnn", device="cuda")
    heads = {"attention_head_dim": 512, "num_attention_heads": 2}
    assert "has 512" in refusal("xformers", device="cuda", **heads) or BACKENDS["xformers"].is_missing
    assert find("_native_flash") is BACKENDS["native_flash"]
    assert find("math") is BACKENDS["native_math"]
    assert attention_backend.choice("vae=math, transformer=flex", ("transformer",)) == {
        "vae": "math",
        "transformer": "flex",
    }


@pytest.mark.parametrize("setting", ["flex,vae=native", "vae=native,", "vae=", "vae=flex,vae=native"])
def test_a_list_of_kernels_is_taken_whole_or_refused(setting: str) -> None:
    with pytest.raises(InvalidConfigError, match="is not one component and its kernel"):
        attention_backend.choice(setting, ("transformer",))


@pytest.mark.parametrize("name", ["flex", "fast"])
def test_a_name_alone_needs_a_denoiser(name: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"'{name}': this model has no component named transformer or unet"):
        attention_backend.choice(name, ())


def test_what_only_a_request_shows_is_that_requests_error() -> None:
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(InvalidRequestError, match="attention_backend='flash' takes no mask"):
        BACKENDS["flash"].answer(x, x, x, attn_mask=torch.ones(3, 3))
    with pytest.raises(InvalidRequestError, match="native_flash' takes no values of 4 channels"):
        BACKENDS["native_flash"].answer(x, x, x[..., :4])


def test_component_that_never_attends_is_an_error() -> None:
    layer = nn.Linear(2, 2)
    attention_backend.apply(layer, BACKENDS["native"], "vae")
    with pytest.raises(EngineError, match="vae never called torch's attention"):
        layer(torch.zeros(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    "row", ["qwen_image", "sd3", "flux_dev", "wan22_ti2v", "ltx2", "z_image", "hunyuan_video15_t2v"]
)
def test_every_kernel_of_this_device(row: str, name: str) -> None:
    expected, pipeline = answer(load(row), row), load(row)
    for denoiser in resolve(pipeline).denoisers:
        attention_backend.apply(getattr(pipeline, denoiser), BACKENDS[name], denoiser)
    with counted() as counts:
        assert close(answer(pipeline, row), expected)
    assert counts[f"attention_{name}"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["ulysses_degree", "ring_degree"])
def test_engine_over_ranks(axis: str) -> None:
    expected = support.reference("qwen_image", 0, "latent")
    parallel = DiffusionParallelConfig(**{axis: 2}, ulysses_mode="advanced_uaa")
    settings: dict[str, Any] = {"num_threads": 1, "attention_backend": "native_math"}
    with Omni(support.folder("qwen_image"), parallel_config=parallel, **settings) as omni:
        (output,) = support.ask(omni, "qwen_image", [0], "latent")
    assert support.difference(expected, support.media(output)) <= BOUND
    assert output.receipt is not None
    assert all(rank.counts["attention_native_math"] > 0 for rank in output.receipt.ranks)
