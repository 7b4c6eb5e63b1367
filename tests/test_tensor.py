"""Tensor parallelism on gloo ranks: every row's pipeline gives what the plain one gives, with fewer bytes a rank."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch import nn
from transformers import Ministral3Config, Ministral3ForCausalLM

from denoised import hf
from denoised.errors import InvalidConfigError
from denoised.features import tensor
from denoised.spec.model_spec import ModelSpec
from denoised.steps.tally import counted
from tests.contract.support import REORDERED, difference, request_of, seed_of, tensors
from tests.ranks import run_on_ranks
from tests.tiny import ROWS, UPSTREAM_WARNINGS, checkpoint
from tests.tiny.weights import randomize

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

DENOISERS = ("transformer", "transformer_2", "unet")
_ROOT = Path(tempfile.mkdtemp(prefix="denoised-tensor-"))


def load(path: str) -> Any:
    import tests.contract.rank_setup  # noqa: F401

    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, name: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed_of(0))
    result = pipeline(**request_of(name, 0), generator=generator, output_type=ROWS[name].output_type)
    return tensors(next(getattr(result, n) for n in ("images", "frames", "video", "audios") if hasattr(result, n)))


def parts(pipeline: Any, names: tuple[str, ...]) -> dict[str, nn.Module]:
    found = {name: getattr(pipeline, name, None) for name in names}
    return {name: part for name, part in found.items() if part is not None}


def matrices(model: nn.Module) -> int:
    """Bytes of the matrices of blocks: what stands in a list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    seen = {id(p): p for blocks in lists for p in blocks.parameters() if p.ndim > 1}
    return sum(p.numel() * p.element_size() for p in seen.values())


def outputs(value: Any) -> list[torch.Tensor]:
    """All tensors of a text encoder's output, however it is nested."""
    if isinstance(value, torch.Tensor):
        return [value.detach().float()]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in outputs(item)] if isinstance(value, list | tuple) else []


Call = tuple[str, Any, Any, list[torch.Tensor]]


def recorded(encoders: dict[str, nn.Module]) -> list[Call]:
    """A list that fills with the encoders' calls: which one, with what, and what it gave. What is being written, with
    the keys of earlier words, cannot be called again."""
    calls: list[Call] = []

    def record(name: str, args: Any, kwargs: Any, out: Any) -> None:
        if kwargs.get("past_key_values") is None:
            calls.append((name, args, kwargs, outputs(out)))

    for name, encoder in encoders.items():
        encoder.register_forward_hook(lambda m, *call, name=name: record(name, *call), with_kwargs=True)
    return calls


def exchanging(models: dict[str, nn.Module]) -> Counter[str]:
    """Counts, as they happen, calls of the layers that have to exchange, by their role."""
    calls: Counter[str] = Counter()
    for model in models.values():
        for module in model.modules():
            shard = getattr(module, "denoised_shard", None)
            if shard is not None:
                module.register_forward_hook(lambda m, i, o, role=shard.role: calls.update([role]))
    return calls


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def spec_of(pipeline: Any) -> ModelSpec:
    return ModelSpec(pipeline=type(pipeline).__name__)


def divided(rank: int, ranks: int, name: str, path: str) -> dict[str, Any]:
    """Differences, counts and shares of one row, with its denoisers and then its text encoders divided."""
    pipeline = load(path)
    models, encoders = parts(pipeline, DENOISERS), hf.text_encoders(pipeline)
    encoded = recorded(encoders)
    expected, embedded = run(pipeline, name), list(encoded)
    before, encoders_before = (sum(map(matrices, found.values())) for found in (models, encoders))
    for model in models.values():
        tensor.apply(model, spec_of(pipeline), world())
    calls = exchanging(models)
    with counted() as counts:
        got = run(pipeline, name)
    for key, encoder in encoders.items():
        tensor.apply_encoder(encoder, world(), name=key)
    with torch.no_grad(), counted() as encoder_counts:
        again = [t for key, args, kwargs, _ in embedded for t in outputs(encoders[key](*args, **kwargs))]
    return {
        "difference": difference(expected, got),
        "share": sum(map(matrices, models.values())) / before,
        "reduces": (counts["all_reduce"], calls["row"] + calls["norm"]),
        "gathers": (counts["all_gather"], calls["gathered"]),
        "encoders": difference([t for call in embedded for t in call[3]], again) if encoders else None,
        "encoders_share": sum(map(matrices, encoders.values())) / max(encoders_before, 1),
        "encoders_reduces": encoder_counts["all_reduce"],
    }


def check(name: str, results: list[dict[str, Any]], *, share: float, encoders_share: float) -> None:
    for result in results:
        assert result["difference"] <= REORDERED, (name, result)
        assert result["reduces"][0] == result["reduces"][1] > 0, (name, result)
        assert result["gathers"][0] == result["gathers"][1], (name, result)
        assert result["share"] < share, (name, result)
        if result["encoders"] is not None:
            assert result["encoders"] <= REORDERED, (name, result)
            assert result["encoders_reduces"] > 0, (name, result)
            assert result["encoders_share"] < encoders_share, (name, result)


@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_give_the_plain_result(name: str) -> None:
    results = run_on_ranks(divided, 2, name, str(checkpoint(name, _ROOT)), timeout=200)
    # Half of the blocks' matrices; the convolutions of a UNet and the vision towers of encoders stay whole.
    check(name, results, share={"sdxl": 0.76}.get(name, 0.53), encoders_share=0.57)


# Key heads: klein's encoder and Stable Audio's cross-attention have two for four queries, so ranks hold copies.
@pytest.mark.parametrize("name", ["flux2_klein", "stable_audio", "wan22_t2v"])
def test_four_ranks_give_the_plain_result(name: str) -> None:
    results = run_on_ranks(divided, 4, name, str(checkpoint(name, _ROOT)), timeout=200)
    check(name, results, share=0.3, encoders_share=0.32)


def half_precision(rank: int, ranks: int, path: str) -> tuple[float, float, set[torch.dtype]]:
    """Errors against fp32 of the plain and of the divided model in bf16, and the dtypes of its output."""
    pipeline = load(path)
    calls = recorded({"transformer": pipeline.transformer})
    run(pipeline, "wan22_t2v")
    _, args, kwargs, exact = calls[0]
    low = {
        key: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for key, v in kwargs.items()
    }
    model = pipeline.transformer.bfloat16()
    with torch.no_grad():
        plain = model(*args, **low)
        tensor.apply(model, spec_of(pipeline), world())
        got = model(*args, **low)
    return difference(exact, outputs(plain)), difference(exact, outputs(got)), {t.dtype for t in got}


def test_half_precision_is_no_worse_than_the_plain_model() -> None:
    for plain, got, dtypes in run_on_ranks(half_precision, 2, str(checkpoint("wan22_t2v", _ROOT)), timeout=120):
        assert got < 1.5 * plain
        assert dtypes == {torch.bfloat16}


def shards(rank: int, ranks: int, path: str) -> dict[str, tuple[Any, torch.Size, bool]]:
    """Of each divided layer: its shard, the shape of its weight, and whether that is the shard of the whole."""
    whole, model = load(path).transformer, load(path).transformer
    tensor.apply(model, ModelSpec(pipeline=""), world())
    return {
        name: (layer.denoised_shard, layer.weight.shape, torch.equal(layer.weight, shard_of(whole, name, layer)))
        for name, layer in model.named_modules()
        if hasattr(layer, "denoised_shard")
    }


def shard_of(whole: nn.Module, name: str, layer: Any) -> torch.Tensor:
    return layer.denoised_shard.take(whole.get_submodule(name).weight)  # type: ignore[no-any-return]


def test_layers_say_how_they_were_cut() -> None:
    """Packed layers are cut part by part; that is what an adapter's matrices are cut by."""
    results = run_on_ranks(shards, 2, str(checkpoint("flux2_dev", _ROOT)))
    packed = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    for rank, found in enumerate(results):
        assert all(equal for _, _, equal in found.values())
        shard, shape, _ = found[packed]
        assert (shard.role, shard.dim, shard.sizes) == ("column", 0, (64, 64, 64, 192, 192))
        assert [start for start, _ in shard.ranges()] == [
            p + rank * n // 2 for p, n in zip((0, 64, 128, 192, 384), shard.sizes, strict=True)
        ]
        assert shape == (288, 64)
        assert found["single_transformer_blocks.0.attn.to_out"][0].sizes == (64, 192)


DENOISER_HEADS = "tensor_parallel_size=3 does not divide the 4 heads of {}; use {}."
ENCODER_HEADS = "text_encoder_tp_size=3 does not divide the 4 heads of {}; use 1, 2 or 4."
CHANNELS = "tensor_parallel_size=4 does not divide the 170 feed-forward channels of {}; use 1 or 2."
REFUSED = {
    ("flux_dev", 3): [
        DENOISER_HEADS.format("FluxTransformer2DModel", "1, 2 or 4"),
        ENCODER_HEADS.format("text_encoder (CLIPTextModel)"),
        ENCODER_HEADS.format("text_encoder_2 (T5EncoderModel)"),
    ],
    ("z_image", 3): [
        DENOISER_HEADS.format("ZImageTransformer2DModel", "1 or 2"),
        ENCODER_HEADS.format("text_encoder (Qwen3Model)"),
    ],
    ("z_image", 4): [CHANNELS.format("ZImageTransformer2DModel")],
}


def refusals(rank: int, ranks: int, path: str) -> tuple[list[str], bool]:
    """What ranks are told, of denoisers and encoders, and whether all weights of the denoiser are as they were."""
    pipeline = load(path)
    before = {id(p): p.shape for p in pipeline.transformer.parameters()}
    told = [error(lambda: tensor.apply(pipeline.transformer, spec_of(pipeline), world()))]
    for name, encoder in hf.text_encoders(pipeline).items():
        if ranks not in tensor.allowed_degrees(encoder):
            told.append(error(lambda k=name, m=encoder: tensor.apply_encoder(m, world(), name=k)))
    return told, before == {id(p): p.shape for p in pipeline.transformer.parameters()}


def error(action: Any) -> str:
    with pytest.raises(InvalidConfigError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize(("name", "degree"), REFUSED)
def test_a_degree_that_does_not_divide_is_refused(name: str, degree: int) -> None:
    for told, untouched in run_on_ranks(refusals, degree, str(checkpoint(name, _ROOT))):
        assert untouched
        assert told == REFUSED[name, degree]


def adapted(rank: int, ranks: int, path: str) -> tuple[float, float]:
    """How far the divided model with cut adapters is from the whole one with whole adapters, and from no adapters."""
    pipeline = load(path)
    calls = recorded({"transformer": pipeline.transformer})
    run(pipeline, "flux2_dev")
    _, args, kwargs, plain = calls[0]
    whole, model = load(path).transformer, pipeline.transformer
    tensor.apply(model, spec_of(pipeline), world())
    for name, layer in model.named_modules():
        if hasattr(layer, "denoised_shard"):
            down, up = adapter(name, whole.get_submodule(name))
            adapt(whole.get_submodule(name), down, up)
            cut_down, cut_up = (
                (down, layer.denoised_shard.take(up))
                if layer.denoised_shard.dim == 0
                else (layer.denoised_shard.take(down), up)
            )
            adapt(layer, cut_down, cut_up)
    with torch.no_grad():
        expected, got = outputs(whole(*args, **kwargs)), outputs(model(*args, **kwargs))
    return difference(expected, got), difference(plain, got)


def adapter(name: str, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    down, up = (
        torch.randn(2, layer.in_features, generator=generator),
        torch.randn(layer.out_features, 2, generator=generator),
    )
    return down / 20, up / 20


def adapt(layer: Any, down: torch.Tensor, up: torch.Tensor) -> None:
    """As an adapter does that knows nothing of ranks: beside the forward that it finds."""
    base = layer.forward
    layer.forward = lambda x: base(x) + x @ down.T @ up.T


def test_adapters_are_cut_by_the_shards() -> None:
    for same, effect in run_on_ranks(adapted, 2, str(checkpoint("flux2_dev", _ROOT))):
        assert same <= REORDERED
        assert effect > 0.01


def unknown(rank: int, ranks: int, path: str) -> list[str]:
    """What two ranks are told of layers that the plan does not know, and of a model without any that it does."""
    pipeline = load(path)
    pipeline.transformer.fuse_qkv_projections()
    nothing = nn.ModuleList([nn.Linear(4, 4)])
    models = [pipeline.transformer, nothing]
    assert [tensor.allowed_degrees(model, spec_of(pipeline)) for model in models] == [(1,), (1,)]
    return [error(lambda m=m: tensor.apply(m, spec_of(pipeline), world())) for m in models]


def test_layers_of_unknown_use_are_refused() -> None:
    for fused, nothing in run_on_ranks(unknown, 2, str(checkpoint("wan22_t2v", _ROOT))):
        assert fused == (
            "tensor_parallel_size=2 would divide blocks.0.attn1.to_qkv of WanTransformer3DModel, "
            "whose use its name does not tell; leave it at 1."
        )
        assert nothing == "tensor_parallel_size=2 would divide only 0% of the blocks of ModuleList; leave it at 1."


def generated(rank: int, ranks: int, path: str | None) -> bool:
    """A divided language model writes what the whole one writes: its cache of keys has this rank's heads."""
    encoder = _enhancer() if path is None else load(path).text_encoder
    tokens = torch.tensor([[5, 7, 11, 13]])
    whole = encoder.generate(tokens, max_new_tokens=6, do_sample=False)
    tensor.apply_encoder(encoder, world(), name="text_encoder")
    return torch.equal(whole, encoder.generate(tokens, max_new_tokens=6, do_sample=False))


def _enhancer() -> Any:
    """What ERNIE-Image's `pe` is: it rewrites prompts."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Ministral3Config(vocab_size=64, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes)
    return randomize(Ministral3ForCausalLM(config), 1).eval()


def test_a_divided_language_model_generates() -> None:
    assert all(run_on_ranks(generated, 2, str(checkpoint("qwen_image", _ROOT))))
    assert all(run_on_ranks(generated, 2, None))


def test_what_reads_text_is_told_by_what_it_is() -> None:
    """Whatever it is called; encoders of pictures are others."""
    assert hf.reads_text("pe", _enhancer())
    found = {name: list(hf.text_encoders(load(str(checkpoint(name, _ROOT))))) for name in ("glm_image", "sd3")}
    assert found["glm_image"] == ["text_encoder", "vision_language_encoder"]
    assert found["sd3"] == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    looks = load(str(checkpoint("hunyuan_video15_i2v", _ROOT))).image_encoder
    assert not hf.reads_text("image_encoder", looks)


def written(rank: int, ranks: int, path: str) -> tuple[float, float, int]:
    """GLM-Image with its language model divided: the difference, its share, and its exchanges."""
    pipeline = load(path)
    expected = run(pipeline, "glm_image")
    before = matrices(pipeline.vision_language_encoder)
    tensor.apply_encoder(pipeline.vision_language_encoder, world(), name="vision_language_encoder")
    with counted() as counts:
        got = run(pipeline, "glm_image")
    return difference(expected, got), matrices(pipeline.vision_language_encoder) / before, counts["all_reduce"]


def test_a_divided_language_model_writes_the_same_coarse_picture() -> None:
    for found, share, reduces in run_on_ranks(written, 2, str(checkpoint("glm_image", _ROOT))):
        assert found == 0  # what it writes are numbers of a codebook
        assert share < 0.57
        assert reduces > 3 * 2 * 2  # of each word: attention and feed-forward of three layers


def test_allowed_degrees() -> None:
    degrees = {}
    for name in ("flux_dev", "z_image", "stable_audio"):
        degrees[name] = tensor.allowed_degrees(load(str(checkpoint(name, _ROOT))).transformer)
    assert degrees == {"flux_dev": (1, 2, 4), "z_image": (1, 2), "stable_audio": (1, 2, 4)}
