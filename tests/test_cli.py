"""`denoised generate` and `denoised models` as a user meets them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import denoised as package
from denoised.cli import flags
from denoised.cli.scales import Scales
from denoised.errors import InvalidRequestError
from denoised.request import OmniDiffusionSamplingParams, PromptDict
from denoised.runtime.model_info import ModelInfo
from denoised.spec import support
from tests import tiny
from tests.cli import denoised

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]

SMALL = ("--height", 64, "--width", 64, "--num-inference-steps", 2, "--seed", 7)

# The flags that a user of vLLM-Omni knows.
DOCUMENTED = re.findall(
    r"--\S+",
    """
--model --prompt --negative-prompt --image --output --seed --height --width --num-frames --fps --num-inference-steps
--num-images-per-prompt --cfg-scale --guidance-scale --guidance-scale-high --boundary-ratio --flow-shift
--cfg-parallel-size --usp --ulysses-degree --ring --ring-degree --tensor-parallel-size --pipeline-parallel-size
--vae-patch-parallel-size --text-encoder-tp-size --use-hsdp --hsdp-shard-size --hsdp-replicate-size
--enable-expert-parallel --cache-backend --cache-config --enable-cpu-offload --enable-layerwise-offload
--layerwise-num-gpu-layers --vae-use-slicing --vae-use-tiling --quantization --lora-path --lora-scale --enforce-eager
--disable-multithread-weight-load --num-weight-load-threads --default-sampling-params --dtype --attention-backend
""",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint("qwen_image", tmp_path_factory.mktemp("checkpoints"))


def test_help_names_every_documented_flag() -> None:
    shown = denoised("generate", "--help")
    assert shown.exit_code == 0
    names = set(re.findall(r"--[a-z][a-z0-9-]*", shown.stdout))
    missing = [flag for flag in DOCUMENTED if flag not in names]
    assert not missing


def test_every_field_is_a_flag_once() -> None:
    spellings = [
        s for table in (flags.ENGINE, flags.PARALLEL, flags.SAMPLING) for f in table.values() for s in f.spellings
    ]
    assert len(spellings) == len(set(spellings))
    assert not set(flags.ENGINE) & set(flags.SAMPLING)


def test_version_and_no_arguments() -> None:
    assert denoised("--version").stdout == f"denoised {package.__version__}\n"
    assert "generate" in denoised().output


def test_an_image(model: Path, tmp_path: Path) -> None:
    result = denoised("generate", "a cat", "--model", model, *SMALL, "-o", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    path, receipt = result.stdout.splitlines()
    assert path == str(tmp_path / "out.png")
    assert "2 steps (rank 0: 2 forwards)" in receipt
    assert "seed 7" in receipt
    assert "2/2" in result.stderr  # the progress bar
    with Image.open(path) as image:
        assert image.size == (64, 64)
    assert os.listdir(tmp_path) == ["out.png"]


def test_both_spellings_and_guidance_without_a_negative_prompt(model: Path, tmp_path: Path) -> None:
    common = ("generate", "--prompt", "a cat", "--model", model, "--json", "--omni", "--step-execution")
    receipts = []
    for spelled in (
        ("--num-inference-steps=2", "--cfg-scale", "4", "--num-images-per-prompt", "2"),
        ("--num_inference_steps", "2", "--cfg_scale=4", "--num_images_per_prompt=2"),
    ):
        result = denoised(*common, "--height", 64, "--width", 64, *spelled, "--output", tmp_path / "out.webp")
        assert result.exit_code == 0, result.output
        printed = json.loads(result.stdout)
        assert printed["outputs"] == [str(tmp_path / name) for name in ("out.webp", "out_1.webp")]
        receipts.append(printed["receipt"]["ranks"][0]["forwards"])
    assert receipts == [4, 4]  # two branches, two steps


def test_no_torch_in_this_process_when_ranks_are_elsewhere(model: Path, tmp_path: Path) -> None:
    arguments = [
        "generate",
        "a cat",
        "--model",
        str(model),
        *map(str, SMALL),
        "-o",
        "out.jpg",
        "--cfg_parallel_size=2",
    ]
    code = f"import sys; from denoised.cli import app\ntry: app({[*arguments, '--num-threads', '1']})\n"
    code += "finally: print({'torch', 'numpy', 'diffusers', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path, receipt, modules = done.stdout.splitlines()
    assert (path, modules) == ("out.jpg", "set()")
    assert "rank 1:" in receipt
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.format == "JPEG"


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_stops_cleanly(ranks: int, model: Path, tmp_path: Path) -> None:
    flags = ["--num-inference-steps", "5000", "--height", "64", "--width", "64", "--num-threads", "1"]
    command = [
        sys.executable,
        "-m",
        "denoised.cli",
        "generate",
        "a cat",
        "--model",
        str(model),
        "-o",
        "out.png",
        *flags,
    ]
    process = subprocess.Popen(
        [*command, "--cfg-parallel-size", str(ranks)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has them, and their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    seen = b""
    while b"/5000" not in seen:
        seen += process.stderr.read1(100)  # type: ignore[attr-defined]
        assert process.poll() is None, seen
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    assert b"Traceback" not in err
    assert err.endswith(b"Stopped.\n")
    assert not os.listdir(tmp_path)


def _info(**settings: Any) -> ModelInfo:
    """A model that takes what `settings` says; the rest does not matter here."""
    needed = (f.name for f in fields(ModelInfo) if f.default is MISSING and f.default_factory is MISSING)
    return ModelInfo(**{**dict.fromkeys(needed), "pipeline": "SomePipeline", **settings})


def _onto(scales: Scales, params: dict[str, float], *parameters: str) -> tuple[float | None, ...]:
    made = scales.onto(OmniDiffusionSamplingParams(**params), _info(parameters=frozenset(parameters)))  # type: ignore[arg-type]
    return made.guidance_scale, made.guidance_scale_2, made.true_cfg_scale


def test_cfg_scale_goes_where_the_model_takes_it() -> None:
    scale = Scales(cfg_scale=4.0)
    assert _onto(scale, {}, "guidance_scale", "negative_prompt") == (4.0, None, None)
    both = ("guidance_scale", "true_cfg_scale", "negative_prompt")
    assert _onto(scale, {}, *both) == (None, None, 4.0)
    assert _onto(scale, {"guidance_scale": 2.0}, *both) == (2.0, None, 4.0)
    assert _onto(Scales(cfg_scale=1.0), {}, *both) == (None, None, 1.0)
    with pytest.raises(InvalidRequestError, match="one scale"):
        _onto(scale, {"guidance_scale": 2.0}, "guidance_scale")


def test_guidance_without_a_negative_prompt_acts_against_the_empty_one() -> None:
    """Guidance that the request or the defaults ask for; embeddings count as a negative prompt, 1 as no guidance."""
    both = frozenset({"true_cfg_scale", "negative_prompt"})

    def negative(scale: float | None, prompt: PromptDict, *, default: float | None = None, **extra: Any) -> str | None:
        info = _info(parameters=both, defaults={} if default is None else {"true_cfg_scale": default})
        params = OmniDiffusionSamplingParams(true_cfg_scale=scale, extra_args=extra)
        return info.complete(prompt, params)[0].get("negative_prompt")

    assert negative(4.0, {"prompt": "a"}) == ""
    assert negative(None, {"prompt": "a"}, default=4.0) == ""
    assert negative(1.0, {"prompt": "a"}, default=4.0) is None
    assert negative(None, {"prompt": "a"}) is None
    assert negative(4.0, {"prompt": "a", "negative_prompt": "red"}) == "red"
    assert negative(4.0, {"prompt": "a", "negative_prompt_embeds": 1}) is None
    assert negative(4.0, {"prompt": "a"}, negative_prompt_embeds=1) is None


def test_guidance_scale_high_is_the_first_expert() -> None:
    """Wan's guidance_scale is that of its high-noise expert; scripts name the low-noise scale --guidance-scale."""
    taken = ("guidance_scale", "guidance_scale_2", "negative_prompt")
    assert _onto(Scales(guidance_scale_high=4.0), {"guidance_scale": 3.0}, *taken) == (4.0, 3.0, None)
    assert _onto(Scales(), {"guidance_scale": 3.0}, *taken) == (3.0, None, None)
    with pytest.raises(InvalidRequestError, match="needs guidance_scale"):
        _onto(Scales(guidance_scale_high=4.0), {}, *taken)


def test_models_prints_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"Some-Image": {"solo": "ok", "cfg 2": "ok"}, "Other-Image": {"solo": "ok", "cfg 2": "one call a step"}}
    monkeypatch.setattr(support, "results", lambda: found)
    lines = denoised("models").stdout.splitlines()
    assert lines[0].split() == ["model", "solo", "cfg", "2"]
    assert lines[1].split() == ["Some-Image", "yes", "yes"]
    assert lines[2].split() == ["Other-Image", "yes", "no", "(1)"]
    assert lines[3] == "(1) one call a step"


def test_input_images_have_the_channels_that_the_model_reads(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("layered")
    model = tiny.checkpoint("qwen_image_layered", folder)
    Image.new("RGB", (64, 64), "red").save(folder / "in.png")
    flags = ("--layers", 2, "--num-inference-steps", 2, "--image", folder / "in.png", "-o", folder / "out.png")
    with tiny.small_images():
        result = denoised("generate", "a cat", "--model", model, *flags)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.glob("out*.png")) == ["out.png", "out_1.png"]


@pytest.mark.parametrize(("row", "suffix"), [("wan22_ti2v", ".mp4"), ("stable_audio", ".wav")])
def test_video_and_sound(row: str, suffix: str, tmp_path: Path) -> None:
    model = tiny.checkpoint(row, tmp_path)
    size = ("--num-frames", 5, "--height", 32, "--width", 32, "--fps", 8) if suffix == ".mp4" else ()
    flags = (*size, "--num-inference-steps", 2, "-o", tmp_path / f"out{suffix}")
    result = denoised("generate", "a cat", "--model", model, *flags)
    assert result.exit_code == 0, result.output
    assert (tmp_path / f"out{suffix}").stat().st_size > 0
