"""Adapters through the engine: alone on every row, two requests with different ones in flight, and on sharded weights.

The plain pipeline has the same files by its own loader, or, where diffusers has none for it, in its weights. Every
layer that is a matrix has one, so that each way of cutting a layer is met.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from denoised import DiffusionParallelConfig, LoRARequest, Omni, OmniRequestOutput
from tests import tiny
from tests.contract.parallel import PATIENCE, TRACES, counts, degrees_of
from tests.contract.support import (
    ORDER,
    REORDERED,
    as_omni,
    difference,
    folder,
    latent_type,
    media,
    request_of,
    seed_of,
    tensors,
)
from tests.tiny import loras
from tests.watchdog import within

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]

SCALE = 0.7
# A sum over a layer's own weights, or beside them, is another order of the same sum: rows without a loader.
FUSED = 2e-5
_ROOT = Path(tempfile.mkdtemp(prefix="denoised-loras-"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)
SOME = ["flux_dev", "qwen_image", "ovis_image"]
slow = pytest.mark.slow


def rows(quick: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else slow) for name in ORDER]


@functools.cache
def adapter(name: str, seed: int) -> tuple[str, str, dict[str, loras.Pair]]:
    """A file in diffusers' layout, the component that it is for, and what it holds."""
    pipeline = _pristine(name)
    component = next(c for c in ("transformer", "unet") if getattr(pipeline, c, None) is not None)
    found = loras.pairs(getattr(pipeline, component), seed=seed)
    file = _ROOT / f"{name}-{seed}.safetensors"
    return loras.write(file, loras.in_diffusers(found, component)), component, found


def asked_for(name: str, seed: int, scale: float = SCALE) -> LoRARequest:
    return LoRARequest(f"style-{seed}", seed, adapter(name, seed)[0], scale=scale)


@functools.cache
def reference(name: str, index: int, *seeds: int) -> list[torch.Tensor]:
    """What the plain pipeline gives with the adapters of these seeds, each at SCALE."""
    pipeline = _pristine.__wrapped__(name)  # one of its own
    with warnings.catch_warnings(action="ignore"):  # of what is advised against, and is what we compare with
        put(pipeline, name, seeds)
    generator = torch.Generator().manual_seed(seed_of(index))
    torch.set_num_threads(1)
    result = pipeline(**request_of(name, index), generator=generator, output_type=latent_type(name))
    return tensors(next(getattr(result, n) for n in ("images", "frames", "video", "audios") if hasattr(result, n)))


def put(pipeline: Any, name: str, seeds: tuple[int, ...]) -> None:
    """Adapters into a plain pipeline."""
    for seed in seeds:
        path, component, found = adapter(name, seed)
        if has_loader(name):
            pipeline.load_lora_weights(path, adapter_name=f"a{seed}")
        else:
            loras.fuse(getattr(pipeline, component), found, SCALE)
    if seeds and has_loader(name):
        pipeline.set_adapters([f"a{seed}" for seed in seeds], [SCALE] * len(seeds))


def has_loader(name: str) -> bool:
    return hasattr(_pristine(name), "load_lora_weights")


@functools.lru_cache(maxsize=2)
def _pristine(name: str) -> Any:
    import diffusers

    import tests.contract.rank_setup  # noqa: F401

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder(name))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


Want = tuple[int, tuple[LoRARequest, ...]]
"""Which request of the row, and its adapters."""


def run(name: str, wants: list[Want], **settings: Any) -> list[OmniRequestOutput]:
    """All in flight together; `settings` are degrees, or the engine's."""
    return within(PATIENCE, _run, name, wants, settings)


def _run(name: str, wants: list[Want], settings: dict[str, Any]) -> list[OmniRequestOutput]:
    degrees = {k: settings.pop(k) for k in list(settings) if k in DiffusionParallelConfig.__dataclass_fields__}
    parallel = DiffusionParallelConfig(**degrees)
    plugins = ("tests.contract.rank_setup",)
    with Omni(folder(name), parallel_config=parallel, num_threads=1, plugins=plugins, **settings) as omni:
        asked = [as_omni(request_of(name, i), seed_of(i), latent_type(name)) for i, _ in wants]
        params = [replace(p, lora_request=list(found)) for (_, p), (_, found) in zip(asked, wants, strict=True)]
        return omni.generate([p for p, _ in asked], params, use_tqdm=False)  # type: ignore[no-any-return]


def run_by_name(name: str, wants: list[Want], **degrees: Any) -> list[OmniRequestOutput]:
    """The same with adapters that all ranks are told to load before, and to forget afterwards."""
    return within(PATIENCE, _run_by_name, name, wants, DiffusionParallelConfig(**degrees))


def _run_by_name(name: str, wants: list[Want], parallel: DiffusionParallelConfig) -> list[OmniRequestOutput]:
    plugins = ("tests.contract.rank_setup",)
    with Omni(folder(name), parallel_config=parallel, num_threads=1, plugins=plugins) as omni:
        adapters = [lora for _, found in wants for lora in found]
        for lora in adapters:
            omni.load_lora(lora)
        assert omni.stats().replicas[0].loras == len(adapters)
        asked = [as_omni(request_of(name, i), seed_of(i), latent_type(name)) for i, _ in wants]
        params = [
            replace(p, lora_request=[lora.lora_name for lora in found])
            for (_, p), (_, found) in zip(asked, wants, strict=True)
        ]
        outputs: list[OmniRequestOutput] = omni.generate([p for p, _ in asked], params, use_tqdm=False)
        for lora in adapters:
            omni.unload_lora(lora.lora_name)
        assert omni.stats().replicas[0].loras == 0
    return outputs


def check(name: str, output: OmniRequestOutput, index: int, *seeds: int, bound: float) -> None:
    assert difference(reference(name, index, *seeds), media(output)) <= bound
    assert output.receipt is not None
    layers = len(adapter(name, 1)[2])
    assert [each["layers"] for each in output.receipt.loras] == [layers] * len(seeds)
    assert [note for note in output.receipt.notes if "did not act in" in note] == []


@pytest.mark.parametrize("name", rows(SOME))
def test_every_row(name: str) -> None:
    """Two requests with different adapters, one with both and one with none, in turn, as if each were alone."""
    one, two = asked_for(name, 1), asked_for(name, 2)
    wants: list[Want] = [(0, (one,)), (1, (two,)), (0, (one, two)), (1, ())]
    outputs = run(name, wants)
    bound = REORDERED if has_loader(name) else FUSED
    for output, (index, found) in zip(outputs, wants, strict=True):
        check(name, output, index, *(each.lora_int_id for each in found), bound=bound)
        assert output.receipt is not None
        assert output.receipt.rows_joined == 0
        acted = sum(work.counts.get("lora_layers", 0) for work in output.receipt.ranks)
        assert bool(acted) == bool(found)
    assert difference(reference(name, 0), media(outputs[0])) > 0.01
    assert difference(media(outputs[0]), media(outputs[2])) > 0.01


QUICK = [("flux_dev", "tensor"), ("flux_dev", "pipeline"), ("qwen_image", "hsdp"), ("qwen_image", "ulysses")]
CELLS = [
    pytest.param(name, method, marks=() if (name, method) in QUICK else slow)
    for name in ORDER
    for method in ("cfg", "tensor", "pipeline", "ulysses", "hsdp")
]
NO_SEQUENCE = ("sana", "sdxl")


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_on_two_ranks(name: str, method: str) -> None:
    """Different adapters in flight, on layers that are cut, dealt, gathered, or given part of a sequence; where they
    are cut or dealt, loaded by name."""
    if method == "ulysses" and name in NO_SEQUENCE:
        pytest.skip("its sequence cannot be cut, with or without adapters")
    ask = run_by_name if method in ("tensor", "pipeline") else run
    outputs = ask(name, [(0, (asked_for(name, 1),)), (1, (asked_for(name, 2),))], **degrees_of(method))
    bound = REORDERED if has_loader(name) else FUSED
    check(name, outputs[0], 0, 1, bound=bound)
    check(name, outputs[1], 1, 2, bound=bound)
    for counted in counts(outputs):
        assert counted["lora_layers"] > 0
        assert all(counted[trace] > 0 for trace in TRACES.get(method, ()))
    if method == "pipeline":  # a stage adds beside its own blocks alone
        assert all(
            counted["lora_layers"] < len(adapter(name, 1)[2]) * w.forwards * 2 for counted, w in _ranks(outputs)
        )


def _ranks(outputs: list[OmniRequestOutput]) -> list[Any]:
    assert outputs[0].receipt is not None
    return list(zip(counts(outputs), outputs[0].receipt.ranks, strict=True))


def test_equal_adapters_share_forwards_and_the_start_up_adapter_stays() -> None:
    """Joined where adapter and strength agree, apart where only the strength differs; the start-up one is in all."""
    name = "flux_dev"
    one = asked_for(name, 1)
    wants: list[Want] = [(0, (one,)), (1, (one,)), (0, (replace(one, scale=0.2),)), (0, ())]
    outputs = run(name, wants, lora_path=adapter(name, 2)[0], lora_scale=SCALE)
    for output, (index, seeds) in zip(outputs, [(0, (2, 1)), (1, (2, 1)), (0, None), (0, (2,))], strict=True):
        if seeds is not None:
            check(name, output, index, *seeds, bound=REORDERED)
    joined = [output.receipt.rows_joined for output in outputs if output.receipt is not None]
    assert min(joined[:2]) > 0
    assert joined[2:] == [0, 0]
    assert difference(media(outputs[0]), media(outputs[2])) > 0.01
