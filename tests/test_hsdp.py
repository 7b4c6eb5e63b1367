"""Weights sharded per block: bytes on each rank fall, blocks are gathered one at a time, no bit of a result moves."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, Qwen3ForCausalLM, T5EncoderModel

from denoised.errors import InvalidConfigError
from denoised.features import hsdp
from denoised.spec.registry import resolve
from denoised.steps.boards import board_of
from denoised.steps.tally import counted
from tests.ranks import run_on_ranks
from tests.tiny import ROWS, UPSTREAM_WARNINGS, checkpoint, encoders, small_images, tokenizers
from tests.tiny.weights import randomize

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

ROOT = Path(tempfile.mkdtemp(prefix="denoised-hsdp-"))
# What one rank has more than its share: lengths that cannot be divided evenly.
UNEVEN = 0.02


@dataclass(frozen=True, kw_only=True)
class Measured:
    """difference: the largest. resident: this rank's share of the bytes of each component, after the request."""

    difference: float
    spread: float
    gathers: int
    resident: dict[str, float]


def load(folder: str, **settings: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, **settings)
    pipeline.set_progress_bar_config(disable=True)
    for part in weighty(pipeline).values():
        align(part)
    return pipeline


def align(module: nn.Module) -> None:
    """Weights lie where their file has them, and kernels round by how memory is aligned; gathered weights are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def weighty(pipeline: Any) -> dict[str, nn.Module]:
    """Denoisers, encoders and what else has weights, but no VAE."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in modules.items() if not hasattr(part, "decode") and list(part.parameters())}


def result(pipeline: Any, name: str) -> Tensor:
    row = ROWS[name]
    generator = torch.Generator().manual_seed(0)
    with small_images():
        output = pipeline(**row.request(0), generator=generator, output_type=row.output_type, return_dict=False)[0]
    return (output if isinstance(output, Tensor) else torch.cat(list(output))).float()


def resident(module: nn.Module) -> int:
    """Bytes of the memory behind a module's parameters on this rank, padding included."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return sum({s.data_ptr(): s.nbytes() for s in (p.untyped_storage() for p in local)}.values())


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def run_row(rank: int, world_size: int, name: str, folder: str, shape: tuple[int, ...], dtype: str) -> Measured:
    pipeline = load(folder, dtype=getattr(torch, dtype))
    expected, spec, mesh = result(pipeline, name), resolve(pipeline), mesh_of(*shape)
    parts = weighty(pipeline)
    whole = {component: resident(part) for component, part in parts.items()}
    for component, part in parts.items():
        hsdp.apply(part, spec if component in spec.denoisers else None, mesh)
    with counted() as counts:
        got = result(pipeline, name)
    return Measured(
        difference=float((got - expected).abs().max()),
        spread=float(expected.std()),
        gathers=counts["hsdp_all_gather"],
        resident={component: resident(part) / whole[component] for component, part in parts.items()},
    )


def check(measured: list[Measured], num_shards: int) -> None:
    for of_rank in measured:
        assert of_rank.difference == 0
        assert of_rank.spread > 0.05, "the result is flat"
        assert of_rank.gathers > 2 * len(of_rank.resident), "blocks are gathered apart"
        assert max(of_rank.resident.values()) < 1 / num_shards + UNEVEN, of_rank.resident


@pytest.mark.parametrize("name", ROWS)
def test_every_row_on_two_ranks(name: str) -> None:
    folder = str(checkpoint(name, ROOT))
    check(run_on_ranks(run_row, 2, name, folder, (2,), "float32", timeout=250), num_shards=2)


@pytest.mark.parametrize("name", ["flux_dev", "wan22_t2v"])
def test_two_copies_of_two_shards(name: str) -> None:
    folder = str(checkpoint(name, ROOT))
    check(run_on_ranks(run_row, 4, name, folder, (2, 2), "float32", timeout=250), num_shards=2)


def test_several_dtypes_in_one_block() -> None:
    """Wan in bfloat16 keeps norms and modulation in float32."""
    folder = str(checkpoint("wan22_ti2v", ROOT))
    dtypes = {p.dtype for p in load(folder, dtype=torch.bfloat16).transformer.blocks[0].parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}
    check(run_on_ranks(run_row, 2, "wan22_ti2v", folder, (2,), "bfloat16", timeout=250), num_shards=2)


def flux() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=5,
        num_single_layers=10,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return randomize(model, 1)


def flux_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 6, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 16, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(4, 3),
    }


def living() -> int:
    """Bytes of all memory that tensors of this process hold."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and not issubclass(type(x), DTensor)]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


def is_gathered(block: nn.Module) -> bool:
    return not any(isinstance(parameter, DTensor) for parameter in block.parameters())


@torch.no_grad()
def one_model(rank: int, world_size: int) -> dict[str, Any]:
    mesh = mesh_of(world_size)
    assert board_of(mesh.get_group(), torch.device("cpu")) is not None  # of which only touched pages take memory
    empty = living()
    model, inputs = flux(), flux_inputs()
    bytes_whole, names, kind = living() - empty, list(model.state_dict()), type(model)
    expected = model(**inputs).sample
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    hsdp.apply(model, None, mesh)
    seen: list[tuple[int, float]] = []
    for block in blocks:  # a module's own hooks are outside of what shards it; its first child's are inside
        child = next(block.children())
        child.register_forward_pre_hook(
            lambda *_: seen.append((sum(map(is_gathered, blocks)), (living() - empty) / bytes_whole))
        )
    with counted() as counts:
        called = model(**inputs).sample
    forward = model.forward  # as a trap keeps it
    direct = forward(**inputs).sample
    return {
        "differences": [float((x - expected).abs().max()) for x in (called, direct)],
        "gathers": counts["hsdp_all_gather"],
        "inside": list(seen),
        "left": (living() - empty) / bytes_whole,
        "same": (list(model.state_dict()) == names, type(model) is kind, str(model.dtype), model.device.type),
        "recovered": recovered(model, inputs, expected),
    }


def recovered(model: nn.Module, inputs: dict[str, Tensor], expected: Tensor) -> tuple[str, float, int]:
    """A forward that fails in the middle of a block, and what the next one gives."""

    def fail(*_: Any) -> None:
        raise ValueError("a bad request")

    hook = model.get_submodule("single_transformer_blocks.7.norm").register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="a bad request") as raised:
        model(**inputs)
    hook.remove()
    gathered = sum(is_gathered(block) for block in model.get_submodule("single_transformer_blocks").children())
    return str(raised.value), float((model(**inputs).sample - expected).abs().max()), gathered


def test_one_block_at_a_time_and_freed_afterwards() -> None:
    for got in run_on_ranks(one_model, 2):
        assert got["differences"] == [0, 0]
        assert got["gathers"] == 1 + 15  # the rest, and each block
        assert [num for num, _ in got["inside"]] == [1] * 30
        assert max(share for _, share in got["inside"]) < 0.8
        assert got["left"] < 0.5 + UNEVEN
        assert got["same"] == (True, True, "torch.float32", "cpu")
        assert got["recovered"] == ("a bad request", 0, 0)


@torch.no_grad()
def other_ways_in(rank: int, world_size: int) -> dict[str, Any]:
    """Weights that are used by other methods than the model's forward, and two names for one weight."""
    mesh, found = mesh_of(world_size), {}
    for name, (build, use) in WAYS.items():
        model = build().eval()
        align(model)
        expected = use(model)
        hsdp.apply(model, None, mesh)
        with counted() as counts:
            got = use(model)
        found[name] = (float((got - expected).abs().max()), counts["hsdp_all_gather"] > 0)
    model = t5()
    hsdp.apply(model, None, mesh)
    found["tied"] = (
        model.shared.weight is model.encoder.embed_tokens.weight,
        isinstance(model.shared.weight, DTensor),
    )
    return found


def t5() -> T5EncoderModel:
    return encoders.t5(tokenizers.t5())


def clip_text() -> CLIPTextModel:
    return encoders.clip(tokenizers.clip())


def clip() -> CLIPModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=sizes | {"vocab_size": 40}, vision_config=vision, projection_dim=8)
    model = CLIPModel(config)  # with a scale that is a scalar
    randomize(model.text_model, 3)
    randomize(model.text_projection, 4)
    return model


def qwen3_tied() -> Qwen3ForCausalLM:
    model = encoders.qwen3_causal(tokenizers.qwen())
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


IDS = torch.tensor([[3, 5, 7, 9]])
HIDDEN = torch.linspace(-1, 1, 2 * encoders.WIDTH).reshape(1, 2, -1)
WAYS: dict[str, tuple[Any, Any]] = {
    "encode": (t5, lambda model: model(IDS)[0]),
    "embed": (t5, lambda model: model.get_input_embeddings()(IDS)),
    "part": (clip_text, lambda model: model.encoder(inputs_embeds=HIDDEN).last_hidden_state),
    "norm": (clip_text, lambda model: model.final_layer_norm(HIDDEN)),
    "block": (clip_text, lambda model: model.encoder.layers[1](HIDDEN, None)),
    "features": (clip, lambda model: model.get_text_features(IDS).pooler_output),
    "generate": (qwen3_tied, lambda model: model.generate(IDS, max_new_tokens=3, do_sample=False).float()),
}


def test_other_ways_in_than_forward() -> None:
    for found in run_on_ranks(other_ways_in, 2):
        assert found == dict.fromkeys(WAYS, (0, True)) | {"tied": (True, True)}


def refusals(rank: int, world_size: int) -> list[str]:
    quantized = nn.Linear(2, 2)
    quantized.register_buffer("codes", torch.zeros(64, dtype=torch.int8))
    cases = [(flux(), mesh_of(2, 1)), (quantized, mesh_of(2)), (nn.Identity(), mesh_of(2))]
    return [refusal(model, mesh) for model, mesh in cases]


def refusal(model: nn.Module, mesh: DeviceMesh) -> str:
    with pytest.raises(InvalidConfigError) as raised:
        hsdp.apply(model, None, mesh)
    return str(raised.value)


def test_what_cannot_be_sharded_is_refused() -> None:
    alone, quantized, empty = run_on_ranks(refusals, 2)[0]
    assert alone.startswith("hsdp_shard_size=1: one rank has nobody to share the weights of FluxTransformer2DModel")
    assert quantized.startswith("use_hsdp=True: Linear holds 64 of its 88 bytes in buffers")
    assert empty.startswith("use_hsdp=True: Identity has no weights")
