"""Equal calls are encoded once; what is handed out and what is kept are separate copies; the bound is in bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from denoised.runtime.encoder_cache import EncoderCache
from denoised.steps.ambient import Ambient
from denoised.steps.deferred import Source
from denoised.steps.forward import Call, Stage, Target

QUIET = Ambient(grad=False, inference=False, autocast=())


def encode(ids: Any = None, mask: Any = None, **_: Any) -> Any:
    raise AssertionError("the cache never runs anything")


def call(
    *args: Any,
    name: str = "text_encoder",
    method: str = "forward",
    stage: Stage = Stage.ENCODE,
    ambient: Ambient = QUIET,
    **kwargs: Any,
) -> Call:
    target = Target(name=name, method=method, stage=stage, function=encode)
    source = Source(lambda: None)
    return Call(task_id="a", target=target, args=args, kwargs=kwargs, branch=0, ambient=ambient, source=source)


IDS = torch.arange(6).reshape(1, 6)


def test_equal_content_hits_however_it_is_passed() -> None:
    cache = EncoderCache(1 << 20)
    key = cache.key(call(IDS, mask=None))
    assert key is not None
    assert cache.get(key) is None
    cache.put(key, (torch.ones(2),))
    assert cache.key(call(ids=IDS.clone(), mask=None)) == key
    assert torch.equal(cache.get(key)[0], torch.ones(2))


@pytest.mark.parametrize(
    "other",
    [
        call(IDS + 1),
        call(IDS.to(torch.int32)),
        call(IDS.float()),
        call(IDS.reshape(6, 1)),
        call(IDS, mask=torch.ones(1, 6)),
        call(IDS, output_hidden_states=True),
        call(IDS, name="text_encoder_2"),
        call(IDS, method="encode"),
        call(IDS, ambient=Ambient(grad=False, inference=True, autocast=())),
        call(IDS, ambient=Ambient(grad=False, inference=False, autocast=(("cpu", True, torch.bfloat16),))),
    ],
)
def test_whatever_may_change_the_output_is_in_the_key(other: Call) -> None:
    cache = EncoderCache(1 << 20)
    assert cache.key(other) is not None
    assert cache.key(other) != cache.key(call(IDS))


def test_nesting_is_part_of_the_content() -> None:
    cache = EncoderCache(1 << 20)
    a, b = torch.zeros(1), torch.ones(1)
    keys = [cache.key(call([a, b])), cache.key(call([[a], b])), cache.key(call([[a, b]])), cache.key(call({"a": [b]}))]
    assert len({*keys}) == 4


@pytest.mark.parametrize(
    "never",
    [
        call(IDS, method="generate"),
        call(IDS, stage=Stage.DECODE),
        call(IDS, stage=Stage.DENOISE),
        call(IDS, generator=torch.Generator()),
        call(IDS, processor=object()),
        call(IDS, ambient=Ambient(grad=True, inference=False, autocast=())),  # an output with a history has no copy
    ],
)
def test_what_cannot_be_kept_always_runs(never: Call) -> None:
    cache = EncoderCache(1 << 20)
    assert cache.key(never) is None
    cache.put(None, (torch.ones(2),))
    assert cache.get(None) is None
    assert cache.num_bytes == 0
    assert EncoderCache(0).key(call(IDS)) is None


def test_copies_go_in_and_out() -> None:
    cache = EncoderCache(1 << 20)
    mine = [torch.ones(2)]
    cache.put("k", mine)
    mine[0].zero_()
    first = cache.get("k")
    assert first[0].tolist() == [1.0, 1.0], "the first request changed its own output"
    first[0].zero_()
    assert cache.get("k")[0].tolist() == [1.0, 1.0], "another request changed what it was given"


def test_bound_in_bytes_drops_the_least_recently_used() -> None:
    cache = EncoderCache(100)
    for name in "abc":
        cache.put(name, torch.zeros(8))  # 32 bytes each
    assert cache.get("a") is not None
    cache.put("d", torch.zeros(8))
    assert cache.get("b") is None
    assert all(cache.get(name) is not None for name in "acd")
    assert cache.num_bytes == 96
    cache.put("e", torch.zeros(26))  # 104 bytes: never fits, and nothing makes way for it
    assert cache.get("e") is None
    assert cache.num_bytes == 96
    cache.put("f", torch.zeros(25))
    assert cache.num_bytes == 100
    assert [name for name in "abcdef" if cache.get(name) is not None] == ["f"]


def test_tensors_inside_distributions_count() -> None:
    cache = EncoderCache(1 << 20)
    output = AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.randn(1, 4, 2, 2)))
    cache.put("k", output)
    assert cache.num_bytes >= 16 * 4
    assert torch.equal(cache.get("k").latent_dist.mean, output.latent_dist.mean)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.int64])
def test_any_dtype_and_shape_has_a_key(dtype: torch.dtype) -> None:
    cache = EncoderCache(1 << 20)
    keys = [cache.key(call(torch.zeros(shape, dtype=dtype))) for shape in ((), (0,), (1,), (2, 3))]
    assert None not in keys
    assert len({*keys}) == 4
    assert cache.key(call(torch.zeros(3, 2, dtype=dtype).T)) == keys[-1], "strides are not content"
