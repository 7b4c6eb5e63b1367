"""The example scripts run as their documentation says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny

SCRIPTS = Path(__file__).parent.parent / "examples" / "offline_inference"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint("qwen_image", tmp_path_factory.mktemp("checkpoints"))


OFFLOADS = ("--enable-cpu-offload", "--enable-layerwise-offload")


def _run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=250)


def test_text_to_image(model: Path, tmp_path: Path) -> None:
    flags = """--prompt cat --negative_prompt blurry --seed 1 --cfg_scale 4.0 --num_images_per_prompt 2
        --num_inference_steps 2 --height 64 --width=64 --output cat.png --cfg_parallel_size 2 --vae_use_slicing
        --vae-use-tiling --enforce-eager"""
    done = _run("text_to_image/text_to_image.py", "--model", model, *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["Saved cat.png", "Saved cat_1.png"]
    assert "2 steps (rank 0: " in done.stdout
    assert "rank 1: " in done.stdout
    for name in ("cat.png", "cat_1.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)


def test_text_to_image_refuses_what_cannot_go_together(model: Path, tmp_path: Path) -> None:
    done = _run("text_to_image/text_to_image.py", "--model", model, *OFFLOADS, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: enable_cpu_offload moves whole components and enable_layerwise_offload ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
