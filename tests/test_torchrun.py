"""Under torchrun the engine takes the ranks it is given; every rank's program gets the outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.support import REORDERED, difference, folder, reference

SCRIPT = """
import json, os, sys, torch
from denoised import DiffusionParallelConfig, Omni
from tests.contract.support import as_omni, request_of, seed_of, media

parallel = DiffusionParallelConfig(**json.loads(sys.argv[3]))
with Omni(sys.argv[1], parallel_config=parallel, num_threads=1) as omni:
    prompt, params = as_omni(request_of("qwen_image", 0), seed_of(0), "latent")
    for _ in range(2):
        (output,) = omni.generate(prompt, params, use_tqdm=False)
    forwards = [work.forwards for work in output.receipt.ranks]
    torch.save((media(output), forwards), sys.argv[2] + os.environ["RANK"])
"""


def torchrun(tmp_path: Path, **degrees: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    arguments = [folder("qwen_image"), str(tmp_path / "out"), json.dumps(degrees)]
    return subprocess.run(
        command + arguments, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.parametrize(("axis", "forwards_each"), [("cfg_parallel_size", 3), ("tensor_parallel_size", 6)])
def test_both_ranks_get_the_output(tmp_path: Path, axis: str, forwards_each: int) -> None:
    result = torchrun(tmp_path, **{axis: 2})
    assert result.returncode == 0, result.stderr[-2000:]
    for rank in range(2):
        got, forwards = torch.load(tmp_path / f"out{rank}")
        assert difference(reference("qwen_image", 0, "latent"), got) <= (0 if axis.startswith("cfg") else REORDERED)
        assert forwards == [forwards_each] * 2


def test_wrong_number_of_ranks_is_refused_with_the_formula(tmp_path: Path) -> None:
    result = torchrun(tmp_path, cfg_parallel_size=3)
    assert result.returncode != 0
    assert "torchrun gave 2 ranks" in result.stderr
    assert "cfg 3" in result.stderr
