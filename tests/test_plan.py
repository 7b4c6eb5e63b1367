"""`denoised plan`: its sizes against published ones, its layouts, bytes and seconds against sums made by hand."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.rules import validate
from denoised.runtime.plan import (
    HARDWARE,
    Ask,
    Layout,
    ModelFacts,
    Tokens,
    admissible,
    plan,
    plan_one,
    predict,
    problem,
    read,
)
from denoised.runtime.planning import prediction
from denoised.runtime.planning.hardware import LINK_EFFICIENCY
from tests.cli import denoised
from tests.plan_models import written

H100 = HARDWARE["h100"]


@functools.cache
def big(pipeline: str) -> ModelFacts:
    """A model of real size, from its configuration alone."""
    sizes = {"WanPipeline": {"height": 720, "width": 1280, "num_frames": 81}}
    with tempfile.TemporaryDirectory() as folder:
        ask = Ask(**sizes.get(pipeline, {"height": 1024, "width": 1024}))
        return read(str(written(pipeline, Path(folder))), ask)


PUBLISHED = [  # billions of parameters
    ("QwenImagePipeline", "transformer", 20.4),
    ("QwenImagePipeline", "text_encoder", 8.29),
    ("FluxPipeline", "transformer", 11.9),
    ("FluxPipeline", "text_encoder_2", 4.76),
    ("WanPipeline", "transformer", 14.3),
    ("WanPipeline", "transformer_2", 14.3),
    ("WanPipeline", "text_encoder", 5.68),
]


@pytest.mark.parametrize(("pipeline", "component", "billions"), PUBLISHED)
def test_parameters_are_the_published_ones(pipeline: str, component: str, billions: float) -> None:
    assert big(pipeline).bytes_of(component) / 2e9 == pytest.approx(billions, rel=0.01)


def test_tokens_and_rows_of_real_sizes() -> None:
    assert big("FluxPipeline").tokens == Tokens(image=4096, text=512)
    assert big("WanPipeline").tokens == Tokens(image=21 * 45 * 80, text=512)
    assert [big(name).num_rows for name in ("QwenImagePipeline", "FluxPipeline", "WanPipeline")] == [2, 1, 2]


@pytest.mark.parametrize("num_ranks", [1, 2, 6, 8, 16])
def test_admissible_layouts_are_all_products_that_divide(num_ranks: int) -> None:
    model = big("QwenImagePipeline")  # 24 heads, 60 blocks; the prompt is cut too, so lengths may be uneven
    found = list(admissible(model, num_ranks))
    sizes = range(1, num_ranks + 1)
    expected = {
        axes for axes in itertools.product(sizes, repeat=5) if math.prod(axes) == num_ranks and 24 % axes[-1] == 0
    }
    assert {(o.cfg, o.pipeline, o.ring, o.ulysses, o.tensor) for o in found} == expected
    assert len(set(found)) == len(found)
    assert all(o.num_ranks == num_ranks and o.uneven == (o.sequence > 1) and problem(o, model) is None for o in found)


def test_lengths_that_always_divide_need_no_mode() -> None:
    """Wan cuts the video alone: 21 x 45 x 80 tokens."""
    layouts = {o.ulysses: o.uneven for o in admissible(big("WanPipeline"), 8) if o.ulysses == o.num_ranks}
    layouts |= {o.ulysses: o.uneven for o in admissible(big("WanPipeline"), 32) if o.ulysses == o.num_ranks}
    assert layouts == {8: False, 32: True}  # 40 heads


def test_weights_of_a_rank_add_up() -> None:
    """Over the ranks of an axis, what is divided is there once, and what is copied once a rank."""
    model = big("QwenImagePipeline")
    denoiser, whole = model.denoisers[0], model.bytes_of("transformer")
    copied = (denoiser.rest.whole_params + sum(block.whole_params for block in denoiser.blocks)) * 2

    def held(**axes: Any) -> dict[str, float]:
        return predict(Layout(**axes), model, H100).memory.weights

    assert held()["transformer"] == held(ulysses=4)["transformer"] == whole
    assert 4 * held(tensor=4)["transformer"] == pytest.approx(whole + 3 * copied)
    assert 4 * held(pipeline=4)["transformer"] == pytest.approx(whole + 3 * denoiser.rest.params * 2, rel=0.01)
    hsdp = held(ulysses=4, hsdp=True)
    assert 4 * hsdp["transformer"] == pytest.approx(whole)
    assert 4 * hsdp["text_encoder"] == pytest.approx(model.bytes_of("text_encoder"))
    assert 2 * held(ulysses=4, hsdp=True, copies=2)["transformer"] == pytest.approx(whole)
    assert 4 * held(ulysses=4, text_encoder_tp=4)["text_encoder"] == model.bytes_of("text_encoder")


def test_traffic_is_what_the_exchanges_move() -> None:
    """By hand, for Qwen-Image: 60 blocks, 3072 wide, picture and text in one attention, one row, bfloat16."""
    model = replace(big("QwenImagePipeline"), num_rows=1)
    values = 60 * (4096 + 512) * 3072
    latent = 16 * 128 * 128 * 2

    def sent(**axes: Any) -> dict[str, float]:
        return {name: part.bytes for name, part in predict(Layout(**axes), model, H100).traffic.items()}

    assert sent() == {}
    assert sent(ulysses=4) == {"ulysses": pytest.approx(4 * values / 4 * 3 / 4 * 2 + latent / 4)}
    assert sent(ring=4) == {"ring": pytest.approx(2 * values / 4 * 3 * 2 + latent / 4)}
    # The sums after attention and feed-forward, of both streams, each sent twice; two modulations of six widths.
    assert sent(tensor=4) == {"tensor": pytest.approx((2 * values * 2 + 60 * 2 * 6 * 3072) * 3 / 4 * 2)}
    assert sent(pipeline=4) == {"pipeline": pytest.approx(8 * values / 60 * 2 + latent)}  # eight ranges a stage
    weights = model.bytes_of("transformer")
    assert sent(ulysses=4, hsdp=True)["hsdp"] == pytest.approx(weights * 3 / 4)
    assert predict(Layout(tensor=4), model, H100).traffic["tensor"].calls == 60 * (4 + 2)
    assert predict(Layout(ulysses=4), model, H100).traffic["ulysses"].calls == 60 * 2 + 1


def test_time_is_operations_over_speed_and_what_is_not_hidden() -> None:
    model = big("WanPipeline")
    free = replace(H100, link=math.inf, network=math.inf, latency=0.0, memory_bandwidth=math.inf)
    one = predict(Layout(), model, free)
    assert one.step == pytest.approx(2 * model.flops_per_row / (989e12 * H100.efficiency))
    assert predict(Layout(cfg=2), model, free).step == pytest.approx(one.step / 2)
    for axis in ("ring", "ulysses", "tensor"):
        assert predict(Layout(**{axis: 4}), model, free).step == pytest.approx(one.step / 4, rel=0.01)
        steps = [predict(Layout(**{axis: 4}), model, h).step for h in (free, H100, replace(H100, link=1e9))]
        assert steps[0] < steps[1] < steps[2]
    stages = predict(Layout(pipeline=4), model, free)
    rounds = prediction.num_rounds(model.denoisers[0], Layout(pipeline=4))
    # Two rows through four stages: one goes round as fast as it can, the other comes after it.
    assert stages.bubble == pytest.approx(1 - 2 * rounds / (4 * rounds + 1))
    assert stages.step == pytest.approx(one.step / 4 / (1 - stages.bubble), rel=0.01)
    hsdp = predict(Layout(pipeline=4, ulysses=2, hsdp=True), model, free)
    assert hsdp.bubble == pytest.approx(3 / 5)


def test_ranks_that_share_a_processor_gain_nothing() -> None:
    model, cpu = replace(big("FluxPipeline"), num_rows=2, itemsize=4), HARDWARE["cpu"]
    two, one = predict(Layout(cfg=2), model, cpu), predict(Layout(), model, cpu)
    assert two.compute == pytest.approx(one.compute / cpu.crowding)
    assert two.room == one.room / 2


def test_the_best_plan_fits_starts_and_is_the_fastest() -> None:
    found = plan(big("QwenImagePipeline"), H100, 8)
    best = found.best.prediction
    idle_ones = [option.idle for option in found.options]
    assert idle_ones == sorted(idle_ones)
    assert {option.prediction.layout.cfg > 2 for option in found.options if option.idle} == {True}
    validate(EngineConfig(parallel_config=best.layout.config()))
    assert best.fits
    assert best.total <= min(option.prediction.total for option in found.options if option.good) * 1.03
    assert found.why.startswith(best.layout.name())


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    model = big("QwenImagePipeline")
    with pytest.raises(InvalidConfigError) as refusal:
        plan(model, HARDWARE["4090"], 1)
    text = str(refusal.value)
    assert "transformer takes 38.1" in text
    assert "22.1 GiB are there" in text
    ranks, _, flags = text.rpartition("; ")[2].removesuffix(".").partition(" hold it with ")
    [larger] = [o for o in plan(model, HARDWARE["4090"], int(ranks)).options if o.prediction.layout.flags() == flags]
    assert larger.prediction.fits
    with pytest.raises(InvalidConfigError, match="up to 64 do not hold it either"):
        plan(replace(model, decode_bytes=1e15), HARDWARE["4090"], 1)
    limits = replace(model.denoisers[0].limits, tensor=(1,), num_blocks=0, sequence="it cannot be cut")
    with pytest.raises(
        InvalidConfigError, match="no layout that keeps 7 ranks busy with 2 rows in flight; use 1, 2 or"
    ):
        plan(replace(model, denoisers=(replace(model.denoisers[0], limits=limits),)), H100, 7)


REFUSED = [
    (Layout(tensor=5), "tensor_parallel_size=5 does not divide QwenImageTransformer2DModel; use one of 1, 2, 3, 4"),
    (Layout(ulysses=16), "ulysses_degree=16 does not divide the heads"),
    (Layout(ulysses=4, tensor=4), "use one of 1, 2, 3, 6, or ulysses_mode=advanced_uaa"),
    (Layout(pipeline=61), "pipeline_parallel_size=61 is more than the 60 blocks"),
    (Layout(tensor=2, hsdp=True), "use_hsdp=True needs ranks that hold equal weights"),
    (Layout(ulysses=4, hsdp=True, text_encoder_tp=4), "text_encoder_tp_size cannot go with use_hsdp=True"),
    (Layout(ulysses=8, text_encoder_tp=8), "text_encoder_tp_size=8 does not divide text_encoder"),
    (Layout(ulysses=2, vae_patch=4), "vae_patch_parallel_size must divide the ranks"),
    (Layout(tensor=2, experts=True), "has no mixture-of-experts blocks"),
]


@pytest.mark.parametrize(("layout", "message"), REFUSED)
def test_layouts_that_cannot_be_are_refused(layout: Layout, message: str) -> None:
    with pytest.raises(InvalidConfigError) as refusal:
        plan_one(big("QwenImagePipeline"), H100, layout)
    assert message in str(refusal.value)


def test_uneven_heads_are_admitted_where_they_are_asked_for() -> None:
    assert problem(Layout(ulysses=16, uneven=True), big("QwenImagePipeline")) is None


def test_command_line(tmp_path: Path) -> None:
    folder = written("FluxPipeline", tmp_path)
    shown = denoised("plan", folder, "--gpus", 8, "--height", 1024, "--width", 1024)
    assert shown.exit_code == 0, shown.stderr
    assert "4096 image and 512 text tokens" in shown.stdout
    assert "11.90 B" in shown.stdout
    lines = shown.stdout.splitlines()
    [star] = [line.split("  ") for line in lines if line.startswith("*")]
    name, _, *cells = [cell.strip() for cell in star if cell.strip("* ")]
    [recommended] = [line.removeprefix("Recommended: ") for line in lines if line.startswith("Recommended: ")]
    best = plan(big("FluxPipeline"), H100, 8).best.prediction
    alone = predict(Layout(), big("FluxPipeline"), H100)
    share, free = best.communication / best.step, (best.room - best.memory.total) / 2**30
    assert name == best.layout.name()
    assert recommended == (
        f"{name}: {alone.total / best.total:.1f} times as fast as one rank, {100 * share:.0f}% of a step is exchange, "
        f"{free:.1f} GiB a rank stay free."
    )
    assert f"Flags: {best.layout.flags()}" in lines
    assert {f"{100 * share:.0f}%", f"{best.sent / 2**30:.2f}"} <= set(cells), "exchange, and GiB sent a step"
    table = {line.split()[0]: line.split()[-2:] for line in lines if line.split()[1:2] and "Model" in line.split()[1]}
    assert table["transformer"] == ["22.2", "22.2"], "of all, and of a rank: ulysses divides no weights"
    own = denoised("plan", folder, "--efficiency", 0.8, "--bandwidth", 90, "--usp", 2, "--json", "--height", 256)
    hardware = json.loads(own.stdout)["hardware"]
    assert (hardware["efficiency"], hardware["link"]) == (0.8, pytest.approx(90e9 / LINK_EFFICIENCY))
    asked = denoised("plan", folder, "--usp", 4, "--use-hsdp", "--json", "--height", 1024, "--width", 1024)
    [layout] = json.loads(asked.stdout)["layouts"]
    assert layout["layout"]["ulysses"] == 4
    assert layout["flags"] == "--usp 4 --use-hsdp"
    assert layout["bytes_per_rank"] < 15 * 2**30
    held, model = layout["memory"]["weights"], big("FluxPipeline")
    assert {name: model.bytes_of(name) / held[name] for name in held} == {
        "transformer": pytest.approx(4),
        "text_encoder": pytest.approx(4),
        "text_encoder_2": pytest.approx(4),
        "vae": 1,
    }
    assert layout["bytes_per_rank"] == sum(held.values()) + layout["memory"]["working"]
    assert layout["traffic"].keys() == {"ulysses", "hsdp"}
    assert layout["traffic"]["hsdp"]["bytes"] == pytest.approx(model.bytes_of("transformer") * 3 / 4)
    assert layout["bytes_sent"] == sum(part["bytes"] for part in layout["traffic"].values())
    assert json.loads(asked.stdout)["why"].startswith("ulysses 4, hsdp: ")


def test_command_line_refuses_in_one_sentence(tmp_path: Path) -> None:
    folder = written("FluxPipeline", tmp_path)
    small = ("--height", 256, "--width", 256)
    for arguments, message in (
        (("--gpu", "4090", *small), "hold it with"),
        (("--gpu", "v100"), "must be one of h100"),
        (("--gpu", "h100", "--measure"), "cannot go with --measure"),
        (("--efficiency", 1.5, *small), "efficiency=1.5: must be above 0"),
        (("--bandwidth", 0, *small), "bandwidth=0.0: must be above 0"),
        (("--gpus", 4, "--usp", 8), "gpus=4 is not data 1"),
        (("--tensor-parallel-size", 5, *small), "does not divide FluxTransformer2DModel"),
        (("--height", 1000, "--width", 1001), "needs a multiple of 16"),
        (("--num-frames", 9), "does not take it"),
        (("--data-parallel-size", 2), "replicas share nothing"),
    ):
        result = denoised("plan", folder, *arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    shutil.rmtree(folder / "transformer")
    assert "lacks transformer/config.json" in denoised("plan", folder).stderr
