"""Adapters: layouts and what is wrong with them, what is in memory, names, resuming. Rows are in tests/contract."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from denoised import AsyncOmni, LoRARequest, Omni, OmniDiffusionSamplingParams
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, InvalidRequestError
from denoised.features import lora
from denoised.features.lora import layouts
from denoised.lora_request import Lora, as_lora_requests
from denoised.outputs import Saved
from denoised.request import Service
from denoised.rules import validate
from denoised.runtime.adapters import Names, resolve
from denoised.steps.forward import _running
from tests import tiny
from tests.contract.support import as_omni, difference, folder, media, request_of, seed_of
from tests.contract.test_lora import _pristine, tensors
from tests.tiny import loras

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]
NAME, BARE = "flux_dev", "ovis_image"  # diffusers has a loader for the first, and none for the second
ATTENTION = "transformer_blocks.0.attn"


@functools.cache
def sites(name: str) -> lora.Sites:
    pipeline = _pristine(name)
    return lora.survey(pipeline, ("transformer",))


def some(name: str, seed: int = 0, only: str = ATTENTION) -> dict[str, loras.Pair]:
    return loras.pairs(_pristine(name).transformer, seed=seed, only=lambda path: path.startswith(only))


def taken(path: str, name: str, component: str | None = None) -> dict[layouts.Place, Tensor]:
    """What a file adds to each layer."""
    found = resolve(LoRARequest("x", lora_path=path))
    raw = lora.read(found.path, title="lora_request='x'")
    fitted = layouts.factors(raw, sites(name), component=component, title="lora_request='x'")
    return {place: f.up @ f.down * f.scale for place, f in fitted.items()}


def deltas(found: dict[str, loras.Pair], scale: Callable[[int], float]) -> dict[layouts.Place, Tensor]:
    return {("transformer", path): up @ down * scale(len(down)) for path, (down, up) in found.items()}


def assert_same(found: dict[layouts.Place, Tensor], expected: dict[layouts.Place, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for place, delta in expected.items():
        assert difference([delta], [found[place]]) < 1e-6, place


# ---- layouts


@pytest.mark.parametrize("name", [NAME, BARE])
def test_layouts(name: str, tmp_path: Path) -> None:
    """Diffusers, PEFT with its settings, Kohya with alphas; each layer has a rank of its own."""
    found = some(name)
    plain = loras.write(tmp_path / "plain.safetensors", loras.in_diffusers(found))
    assert_same(taken(plain, name), deltas(found, lambda rank: 1.0))
    patterns = {"alpha_pattern": {"to_k": 9}, "lora_alpha": 3}
    expected = {p: d * (3 if p[1].endswith("to_k") else 1) for p, d in deltas(found, lambda rank: 3 / rank).items()}
    assert_same(taken(loras.write_peft(tmp_path / "peft", found, **patterns), name), expected)
    rooted = loras.write_peft(tmp_path / "rooted", found, lora_alpha=3, use_rslora=True)
    assert_same(taken(rooted, name), deltas(found, lambda rank: 3 / rank**0.5))
    if name == BARE:  # of the other, Kohya's trainer knows other names: the next test
        kohya = loras.write(tmp_path / "kohya.safetensors", loras.in_kohya(found, alpha=3.0))
        assert_same(taken(kohya, name), deltas(found, lambda rank: 3 / rank))


def test_names_of_the_original_model_go_through_the_loader_of_the_class(tmp_path: Path) -> None:
    """Kohya's Flux: queries, keys and values packed. What diffusers makes of the file is what acts here."""
    pipeline = copy.deepcopy(_pristine(NAME))
    width = pipeline.transformer.inner_dim
    block = pipeline.transformer.single_transformer_blocks[0]
    packed = {"double_blocks_0_img_attn_qkv": (width, 3 * width), "double_blocks_0_img_attn_proj": (width, width)}
    packed |= {"single_blocks_0_linear2": (width + block.mlp_hidden_dim, width)}
    generator = torch.Generator().manual_seed(0)
    found = {path: loras._pair(*shape, 4, generator) for path, shape in packed.items()}
    path = loras.write(tmp_path / "kohya.safetensors", loras.in_kohya(found, alpha=2.0))
    with warnings.catch_warnings(action="ignore"):
        pipeline.load_lora_weights(path, adapter_name="a")
    layers = {n: part for n, part in pipeline.transformer.named_modules() if hasattr(part, "get_delta_weight")}
    expected = {("transformer", n): part.get_delta_weight("a").detach() for n, part in layers.items()}
    assert len(expected) == 5
    assert_same(taken(path, NAME), expected)


def test_a_file_may_be_for_another_denoiser_and_for_text_encoders(tmp_path: Path) -> None:
    encoder = _pristine(NAME).text_encoder
    found = loras.pairs(encoder, seed=1, only=lambda path: path.endswith("q_proj"))
    both = loras.in_diffusers(found, "text_encoder") | loras.in_diffusers(some(NAME))
    got = taken(loras.write(tmp_path / "both.safetensors", both), NAME)
    assert {component for component, _ in got} == {"transformer", "text_encoder"}
    kohya = loras.in_kohya(found, alpha=4.0, prefix="lora_te1_")
    got = taken(loras.write(tmp_path / "kohya.safetensors", kohya), NAME)
    assert got.keys() == {("text_encoder", path) for path in found}
    with pytest.raises(InvalidRequestError, match="component='transformer_2' is no denoiser here; there are: transf"):
        taken(str(tmp_path / "both.safetensors"), NAME, component="transformer_2")


def test_a_file_for_the_other_expert(tmp_path: Path) -> None:
    """Names that say which expert they are for, and names that the request says it of."""
    pipeline = _pristine("wan22_t2v")
    two = lora.survey(pipeline, ("transformer", "transformer_2"))
    found = loras.pairs(pipeline.transformer_2, seed=1, only=lambda path: path.startswith("blocks.0.attn1"))
    said = loras.write(tmp_path / "said.safetensors", loras.in_diffusers(found, "transformer_2"))
    meant = loras.write(tmp_path / "meant.safetensors", loras.in_diffusers(found))
    for path, component, place in ((said, None, 1), (meant, "transformer_2", 1), (meant, None, 0)):
        raw = lora.read(path, title="x")
        fitted = layouts.factors(raw, two, component=component, title="x")
        assert {name for name, _ in fitted} == {two.denoisers[place]}
        assert len(fitted) == len(found)


def _wrong(found: dict[str, loras.Pair]) -> dict[str, tuple[dict[str, Tensor], str]]:
    plain = loras.in_diffusers(found)
    other = {key.replace("attn", "nowhere"): value for key, value in plain.items()}
    path = f"transformer.{ATTENTION}.to_q"
    return {
        "none": (other, r"none of its layers is in OvisImagePipeline: transformer\.transformer_blocks\.0\.nowhere"),
        "some": (
            plain | other,
            r"8 of its 16 layers are not in OvisImagePipeline: (.*nowhere.*, ){7}[^,]*; give",
        ),
        "shape": (plain | {f"{path}.lora_A.weight": torch.zeros(2, 7)}, r"to_q has lora_down \(2, 7\) and lora_up"),
        "lacks": ({k: v for k, v in plain.items() if k != f"{path}.lora_B.weight"}, "to_q lacks its lora_up"),
        "dora": (plain | {f"{path}.lora_magnitude_vector": torch.zeros(4)}, "is a DoRA adapter"),
        "loha": ({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, "is a LoHa adapter"),
        "more": (plain | {f"{path}.diff": torch.zeros(4)}, r"1 of its 9 layers are not in .*to_q\.diff"),
        "empty": ({"weight": torch.zeros(2)}, "holds no LoRA, but weight"),
    }


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    for label, (held, message) in _wrong(some(BARE)).items():
        path = loras.write(tmp_path / f"{label}.safetensors", held)
        with pytest.raises(InvalidRequestError, match=message):
            taken(path, BARE)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "shape.safetensors").read_bytes()[:500])
    (tmp_path / "old.bin").write_bytes(b"\x80\x04")
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins" / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04")
    for name, message in (
        ("cut.safetensors", "cannot be read"),
        ("old.bin", r"is no \.safetensors file, and no others are read"),
        ("bins", r"holds no \.safetensors file, and no others are read"),
        (".", "holds several adapters"),
        ("nowhere.safetensors", "is no file, no folder and no hub id"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            taken(str(tmp_path / name), BARE)


def test_all_layers_that_are_not_there_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A few in the error, all of them in the log."""
    names = [f"transformer_blocks.{number}.nowhere.to_q" for number in range(20)]
    held = {f"transformer.{name}.lora_{part}.weight": torch.zeros(2, 2) for name in names for part in "AB"}
    path = loras.write(tmp_path / "other.safetensors", loras.in_diffusers(some(BARE)) | held)
    with pytest.raises(InvalidRequestError, match=r"20 of its 28 layers .* and 12 more, which the log lists; give"):
        taken(path, BARE)
    assert all(name in caplog.text for name in names)


# ---- what a request says


def test_what_a_request_says(tmp_path: Path) -> None:
    path = loras.write(tmp_path / "a.safetensors", loras.in_diffusers(some(BARE)))
    told = {"name": "a", "local_path": path, "scale": 0.5, "int_id": 3}
    assert as_lora_requests([told, path, "b"]) == (
        LoRARequest("a", 3, path, 0.5),
        LoRARequest(path, lora_path=path),
        LoRARequest("b"),
    )
    for wrong, message in (
        (3, "must be a LoRARequest"),
        ({"lora_nam": "a"}, "did you mean .lora_name."),
        ({"name": "a", "scale": True}, "scale=True: must be a number"),
        ({"name": "a", "scale": 1e9}, "between -100 and 100"),
        ({"name": "a", "lora_name": "b"}, "under two names"),
        ("", "names neither"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            OmniDiffusionSamplingParams(lora_request=wrong)
    with pytest.raises(InvalidRequestError, match="no adapter is loaded under it"):
        Names()._found(LoRARequest("b"), 1.0)
    with pytest.raises(InvalidConfigError, match="lora_scale acts with lora_path only"):
        validate(EngineConfig(lora_scale=0.5))
    with pytest.raises(InvalidConfigError, match="is no file, no folder"):
        Omni(folder(BARE), lora_path="./nowhere.safetensors")
    with pytest.raises(InvalidConfigError, match=r"lora_path=.* none of its layers is in OvisImagePipeline"):
        Omni(folder(BARE), lora_path=loras.write(tmp_path / "b.safetensors", _wrong(some(BARE))["none"][0]))


# ---- in memory


def test_memory_is_bounded_and_what_is_used_stays(tmp_path: Path) -> None:
    where = lora.survey(copy.deepcopy(_pristine(BARE)), ("transformer",))
    where.prepare()
    found = [
        resolve(LoRARequest(str(n), lora_path=loras.write(tmp_path / f"{n}.safetensors", loras.in_diffusers(pairs))))
        for n, pairs in enumerate(some(BARE, seed) for seed in range(4))
    ]
    each = sum(down.nbytes + up.nbytes for down, up in some(BARE).values())
    adapters = lora.Adapters(where, device=torch.device("cpu"), max_adapters=2)
    adapters.start_with(found[3])
    adapters.take("first", [found[0]])
    adapters.take("second", [found[1]])
    assert adapters.num_bytes == 3 * each
    with pytest.raises(InvalidRequestError, match="max_loras=2 .* used up by requests in flight"):
        adapters.take("third", [found[2]])
    adapters.release("first")
    adapters.take("third", [found[2]])  # in the place of the first
    assert _beside(where) == 3
    assert adapters.num_loaded == 3
    adapters.unload(found[1])
    assert adapters.num_loaded == 3  # its request goes on
    adapters.release("second")
    assert adapters.num_loaded == _beside(where) == 2
    with pytest.raises(InvalidRequestError, match="active in this request already"):
        adapters.take("fourth", [found[3]])
    copied = dataclasses.replace(found[2], name="again", stamp=(found[2].stamp[0], 0))
    adapters.take("fifth", [copied])  # the same content in another place is there already
    assert adapters.num_loaded == 2
    assert adapters.fingerprint([copied]) == adapters.fingerprint([found[2]]) != adapters.fingerprint([])
    small = lora.Adapters(where, device=torch.device("cpu"), max_adapters=9, max_bytes=each - 1)
    with pytest.raises(InvalidRequestError, match="more than max_lora_mb="):
        small.take("x", [found[0]])


def _beside(where: lora.Sites) -> int:
    """Adapters beside a layer."""
    beside = where.by_component["transformer"][f"{ATTENTION}.to_q"].beside
    assert beside is not None
    return len(beside.weights)


def test_ranks_that_read_different_files_say_so(tmp_path: Path) -> None:
    path = loras.write(tmp_path / "a.safetensors", loras.in_diffusers(some(BARE)))
    where = lora.survey(copy.deepcopy(_pristine(BARE)), ("transformer",))

    def others(word: Any) -> list[Any]:
        return [word, ("", "of another file")]

    adapters = lora.Adapters(where, device=torch.device("cpu"), max_adapters=2, gather=others)
    with pytest.raises(InvalidRequestError, match="not the same file for all ranks"):
        adapters.take("x", [resolve(LoRARequest("a", lora_path=path))])
    with pytest.raises(InvalidRequestError, match="has changed since it was asked for"):
        adapters.take("x", [Lora(name="a", path=path, stamp=(0, 0))])
    assert adapters.num_loaded == 0


@torch.no_grad()
def test_layers_whose_forward_is_not_called_are_told(tmp_path: Path) -> None:
    """A model that reads a layer's weight and never calls it loses what is beside: its receipt says so by name."""
    transformer = copy.deepcopy(_pristine(BARE).transformer)
    where = lora.survey(types.SimpleNamespace(components={"transformer": transformer}), ("transformer",))
    where.prepare()
    path = loras.write(tmp_path / "a.safetensors", loras.in_diffusers(some(BARE)))
    found = resolve(LoRARequest("a", lora_path=path))
    adapters = lora.Adapters(where, device=torch.device("cpu"), max_adapters=2)
    adapters.take("x", [found])
    (places,) = adapters.places([found])
    assert len(places) == adapters.told([found])[0]["layers"] == len(some(BARE))
    assert adapters.acted("x", denoised=False) == [(0, 0)], "nothing ran, so nothing is known"
    bypassed = "attn.to_q"
    call = types.SimpleNamespace(adapters=adapters.active([found])["transformer"])
    with _running(((call, (0,)),)):  # type: ignore[arg-type]
        for _, layer in places:
            part = transformer.get_submodule(layer)
            x = torch.zeros(1, part.in_features)
            if layer.endswith(bypassed):
                torch.nn.functional.linear(x, part.weight)
            else:
                part(x)
    one = adapters.acted("x", denoised=True)
    problem = lora.problem("a", places, one)
    assert problem is not None
    assert f"did not act in 1 of its {len(places)} layers" in problem
    assert f"transformer.{ATTENTION}.to_q" in problem
    everything = (1 << len(places)) - 1
    assert lora.problem("a", places, [*one, (everything, everything)]) is None, "another rank ran it"
    adapters.release("x")


# ---- through the engine


def test_text_encoders_and_names_at_run_time(tmp_path: Path) -> None:
    """The encoder cache tells prompts under an adapter from the same prompts without; names come and go."""
    prompt, params = as_omni(request_of(NAME, 0), seed_of(0), "latent")
    pipeline = copy.deepcopy(_pristine(NAME))
    found = loras.pairs(pipeline.text_encoder, seed=1, only=lambda path: path.endswith(("q_proj", "fc1")))
    path = loras.write(tmp_path / "te.safetensors", loras.in_diffusers(found, "text_encoder"))
    loras.fuse(pipeline.text_encoder, found, 0.5)
    expected = _plain(pipeline)
    with Omni(folder(NAME), num_threads=1) as omni:

        def ask(**more: Any) -> Any:
            return omni.generate(prompt, dataclasses.replace(params, **more), use_tqdm=False)[0]

        before = ask()
        omni.load_lora(LoRARequest("words", lora_path=path, scale=0.5))
        assert omni.loras == ["words"]
        loaded = omni.stats().replicas[0]
        assert (loaded.loras, loaded.lora_mb > 0) == (1, True)
        under = ask(lora_request="words")
        assert under.receipt.loras == [{"name": "words", "scale": 0.5, "layers": len(found)}]
        assert difference(expected, media(under)) < 1e-5
        assert difference(media(before), media(under)) > 1e-4
        assert difference(media(before), media(ask())) == 0
        assert ask(lora_request="words").receipt.encoder_cache_hits == before.receipt.encoder_cache_misses
        assert "loaded: words" in ask(lora_request="wrods").error
        assert "no lora_request for it to act on" in ask(lora_scale=0.5).error
        omni.unload_lora("words")
        assert omni.stats().replicas[0].loras == 0
        assert "no adapter is loaded under it" in ask(lora_request="words").error
        with pytest.raises(InvalidRequestError, match="is no file"):
            omni.load_lora(LoRARequest("words", lora_path=str(tmp_path / "gone.safetensors")))


class _Bypassed(torch.nn.Linear):
    """Its weight is used, its forward is not called."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def test_a_receipt_names_the_layers_that_an_adapter_did_not_act_in(tmp_path: Path) -> None:
    path = loras.write(tmp_path / "a.safetensors", loras.in_diffusers(some(BARE)))
    prompt, params = as_omni(request_of(BARE, 0), seed_of(0), "latent")
    params, notes = dataclasses.replace(params, lora_request=path), []
    for bypassed in (False, True):
        pipeline = copy.deepcopy(_pristine(BARE))
        if bypassed:
            pipeline.transformer.get_submodule(f"{ATTENTION}.to_q").__class__ = _Bypassed
        with Omni(pipeline, num_threads=1, max_loras=1, max_lora_mb=1) as omni:
            (output,) = omni.generate(prompt, params, use_tqdm=False)
            if not bypassed:
                _is_bounded(omni, prompt, params, tmp_path)
        assert output.error is None, output.error
        notes.append([note for note in output.receipt.notes if "did not act in" in note])
    assert notes[0] == []
    assert f"1 of its {len(some(BARE))} layers" in notes[1][0]
    assert f"transformer.{ATTENTION}.to_q" in notes[1][0]


def _is_bounded(omni: Omni, prompt: Any, params: OmniDiffusionSamplingParams, folder: Path) -> None:
    """By the engine's own max_loras=1 and max_lora_mb=1."""
    other, large = some(BARE, 1), loras.pairs(_pristine(BARE).transformer, seed=1, rank=500)
    paths = [
        loras.write(folder / f"{number}.safetensors", loras.in_diffusers(found))
        for number, found in enumerate((other, large))
    ]
    asked = [dataclasses.replace(params, lora_request=[path]) for path in paths]
    first, second = omni.generate([prompt, prompt], [params, asked[0]], use_tqdm=False)
    assert first.error is None, first.error
    assert "finds no room: max_loras=1" in second.error
    (alone,), (too_large,) = (omni.generate(prompt, each, use_tqdm=False) for each in asked)
    assert alone.error is None, alone.error  # in the place of the first
    assert "more than max_lora_mb=1" in too_large.error
    assert omni.stats().replicas[0].loras == 1


def _plain(pipeline: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed_of(0))
    return tensors(pipeline(**request_of(NAME, 0), generator=generator, output_type="latent").images)


def test_convolutions_and_biases(tmp_path: Path) -> None:
    """Beside a convolution the same window slides; a bias of the second matrix is scaled with it."""
    pipeline = copy.deepcopy(_pristine("sdxl"))
    generator = torch.Generator().manual_seed(3)
    held = {}
    for path in ("conv_in", "down_blocks.0.downsamplers.0.conv"):
        layer = pipeline.unet.get_submodule(path)
        down = torch.randn(2, *layer.weight.shape[1:], generator=generator) * 0.2
        up, bias = torch.randn(len(layer.weight), 2, 1, 1, generator=generator), torch.randn(len(layer.weight))
        held |= {
            f"unet.{path}.lora_A.weight": down,
            f"unet.{path}.lora_B.weight": up,
            f"unet.{path}.lora_B.bias": bias,
        }
        with torch.no_grad():
            layer.weight += 0.5 * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
            layer.bias += 0.5 * bias
    prompt, params = as_omni(request_of("sdxl", 0), seed_of(0), "latent")
    generator = torch.Generator().manual_seed(seed_of(0))
    expected = tensors(pipeline(**request_of("sdxl", 0), generator=generator, output_type="latent").images)
    asked = {"lora_path": loras.write(tmp_path / "conv.safetensors", held), "scale": 0.5}
    with Omni(folder("sdxl"), num_threads=1) as omni:
        without, output = omni.generate(
            [prompt, prompt], [params, dataclasses.replace(params, lora_request=asked)], use_tqdm=False
        )
    assert difference(expected, media(output)) < 2e-5
    assert difference(expected, media(without)) > 0.01


def test_a_resumed_request_has_the_same_adapter(tmp_path: Path) -> None:
    """From a checkpoint with the adapter under the same or another path; refused with another one, or with none."""
    file = tmp_path / "a.safetensors"
    loras.write(file, loras.in_diffusers(some(NAME)))
    prompt, params = as_omni(request_of(NAME, 0), seed_of(0), "latent")
    params = dataclasses.replace(params, lora_request=str(file))

    async def main() -> None:
        async with AsyncOmni(folder(NAME), num_threads=1) as omni:
            events = [e async for e in omni.generate(prompt, params, service=Service(checkpoint_every=1))]
            saved = next(e.checkpoint for e in events if isinstance(e, Saved))
            *_, again = [e async for e in omni.resume(saved)]
            assert again.receipt.resumed_from_step == 1
            assert difference(media(events[-1]), media(again)) == 0
            loras.write(file, loras.in_diffusers(some(NAME, seed=9)))
            *_, other = [e async for e in omni.resume(saved)]
            assert "made with other adapters" in other.error
            file.unlink()
            with pytest.raises(InvalidRequestError, match="is no file"):
                [e async for e in omni.resume(saved)]

    asyncio.run(main())
