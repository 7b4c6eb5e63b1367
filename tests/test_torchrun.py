"""Under torchrun the engine takes the ranks it is given; every rank's program gets the outputs, of all replicas."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from denoised import Omni, OmniDiffusionSamplingParams
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.rules import validate
from tests.contract import test_lora
from tests.contract.support import REORDERED, difference, folder, plain, reference, request_of, seed_of

SCRIPT = """
import json, os, sys, time, torch
from dataclasses import replace
from denoised import DiffusionParallelConfig, LoRARequest, Omni
from denoised.errors import InvalidRequestError
from tests.contract.support import as_omni, request_of, seed_of, media

parallel = DiffusionParallelConfig(**json.loads(sys.argv[3]))
with Omni(sys.argv[1], parallel_config=parallel, num_threads=1) as omni:
    prompt, params = as_omni(request_of("qwen_image", 0), seed_of(0), "latent")
    for _ in range(2):
        (output,) = omni.generate(prompt, params, use_tqdm=False)
    forwards = [work.forwards for work in output.receipt.ranks]
    # The second program is late: its rank has answered by then. The first one ends after it.
    second, folder, refused = os.environ["RANK"] == "1", os.path.dirname(sys.argv[2]), ""
    time.sleep(2.0 * second)
    omni.load_lora(LoRARequest("ink", lora_path=folder + "/ink.safetensors", scale=0.7))
    try:
        omni.load_lora(LoRARequest("other", lora_path=folder + "/other.safetensors"))
    except InvalidRequestError as error:
        refused = str(error)
    assert omni.loras == ["ink"]
    (inked,) = omni.generate(prompt, replace(params, lora_request="ink"), use_tqdm=False)
    omni.unload_lora("ink")
    torch.save((media(output), forwards, media(inked), refused), sys.argv[2] + os.environ["RANK"])
    while not second and not os.path.exists(sys.argv[2] + "1"):
        time.sleep(0.05)
"""


# A plugin: the second rank of the second replica fails, alone, for pictures of this height.
BREAKS = """
import functools, os
from diffusers import QwenImagePipeline

original = QwenImagePipeline.prepare_latents

@functools.wraps(original)
def prepare_latents(self, *args, **kwargs):
    if os.environ["RANK"] == "3" and args[2] == 80:
        raise RuntimeError("planted fault")
    return original(self, *args, **kwargs)

QwenImagePipeline.prepare_latents = prepare_latents
"""

REPLICAS = """
import json, os, sys, torch
from denoised import DiffusionParallelConfig, Omni
from tests.contract.support import as_omni, request_of, seed_of, media

def ask(*requests):
    prompts, params = zip(*[as_omni(request, seed_of(0), "latent") for request in requests])
    outputs = omni.generate(prompts, params, use_tqdm=False)
    return [(media(output), output.receipt.replica, output.receipt.restarts) for output in outputs]

parallel = DiffusionParallelConfig(**json.loads(sys.argv[3]))
usual, breaks = request_of("qwen_image", 0), request_of("qwen_image", 0) | {"height": 80}
with Omni(sys.argv[1], parallel_config=parallel, num_threads=1, deterministic=True, plugins=("breaks",)) as omni:
    omni.start_profile()
    dealt = ask(usual, usual, usual, usual)
    traces = omni.stop_profile(sys.argv[2] + "-traces")
    again = ask(breaks, breaks)
    torch.save((dealt, traces, again, ask(usual)), sys.argv[2] + os.environ["RANK"])
"""


def torchrun(
    tmp_path: Path, script_text: str = SCRIPT, num_ranks: int = 2, **degrees: int
) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(script_text)
    for adapter, row in (("ink", "qwen_image"), ("other", "sdxl")):
        shutil.copy(test_lora.adapter(row, 1)[0], tmp_path / f"{adapter}.safetensors")
    command = _command(str(script), folder("qwen_image"), tmp_path / "out", json.dumps(degrees), num_ranks=num_ranks)
    return subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=280, check=False)


def _command(*arguments: object, num_ranks: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return launcher + [str(argument) for argument in arguments]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


ULYSSES = ("shapes", "--ulysses-degree", 2, "--ulysses-mode", "advanced_uaa", "--num-threads", 1)


def test_generate_writes_one_file_and_speaks_once(tmp_path: Path) -> None:
    """From the command line, on two ranks that share each forward."""
    asked = ("--model", *ULYSSES, "--num-inference-steps", 2, "--seed", 3, "--json", "-o", tmp_path / "out.png")
    command = _command("-m", "denoised.cli", "generate", "a red circle", *asked)
    result = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    said = json.loads(result.stdout)
    assert said["outputs"] == [str(tmp_path / "out.png")]
    assert [work["counts"]["all_to_all"] > 0 for work in said["receipt"]["ranks"]] == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    with Omni("shapes", num_threads=1) as alone:
        params = OmniDiffusionSamplingParams(num_inference_steps=2, seed=3)
        (expected,) = alone.generate("a red circle", params, use_tqdm=False)
    picture = np.asarray(Image.open(tmp_path / "out.png"), dtype=int)
    assert np.abs(picture - np.asarray(expected.images[0], dtype=int)).max() <= 1


@pytest.mark.slow
def test_serve_is_one_server_and_ends_on_a_signal(tmp_path: Path) -> None:
    """Rank 0 serves what both ranks compute; the other holds no port, keeps nothing, and ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = _command("-m", "denoised.cli", "serve", *ULYSSES, "--port", port)
    with subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert "2 ranks on cpu, ready after" in (line := server.stdout.readline()), (line, server.communicate())
            body = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 3}
            answer = httpx2.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body, timeout=60).json()
            assert [work["counts"]["all_to_all"] > 0 for work in answer["receipt"]["ranks"]] == [True, True]
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            said, _ = server.communicate(timeout=60)
        finally:
            server.kill()
    assert said == "", "the other rank says nothing"
    assert time.monotonic() - began < 25, "torchrun had to kill a rank"


@pytest.mark.parametrize(("axis", "forwards_each"), [("cfg_parallel_size", 3), ("tensor_parallel_size", 6)])
def test_both_ranks_get_the_output(tmp_path: Path, axis: str, forwards_each: int) -> None:
    result = torchrun(tmp_path, **{axis: 2})
    assert result.returncode == 0, result.stderr[-2000:]
    for rank in range(2):
        got, forwards, inked, refused = torch.load(tmp_path / f"out{rank}")
        assert difference(reference("qwen_image", 0, "latent"), got) <= (0 if axis.startswith("cfg") else REORDERED)
        assert forwards == [forwards_each] * 2
        assert difference(test_lora.reference("qwen_image", 0, 1), inked) <= REORDERED
        assert "none of its layers" in refused


def test_replicas_share_the_ranks_and_every_program_gets_all_outputs(tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS)
    result = torchrun(tmp_path, REPLICAS, 4, data_parallel_size=2, cfg_parallel_size=2)
    assert result.returncode == 0, result.stderr[-4000:]
    usual = reference("qwen_image", 0, "latent")
    tall = plain("qwen_image", request_of("qwen_image", 0) | {"height": 80}, seed_of(0), "latent")
    for rank in range(4):
        dealt, traces, again, last = torch.load(tmp_path / f"out{rank}")
        assert [difference(usual, got) for got, *_ in dealt] == [0] * 4
        assert sorted(replica for _, replica, _ in dealt) == [0, 0, 1, 1]
        assert len({Path(trace) for trace in traces if Path(trace).exists()}) == 4
        # The second replica is lost; what it had is run by the first, which goes on.
        assert [difference(tall, got) for got, *_ in again] == [0, 0]
        assert sorted((replica, restarts) for _, replica, restarts in again) == [(0, 0), (0, 1)]
        assert difference(usual, last[0][0]) == 0
        assert last[0][1:] == (0, 0)
    assert "replica 1 cannot run any more" in result.stderr


def test_wrong_number_of_ranks_is_refused_with_the_formula(tmp_path: Path) -> None:
    result = torchrun(tmp_path, cfg_parallel_size=3)
    assert result.returncode != 0
    assert "torchrun gave 2 ranks" in result.stderr
    assert "cfg 3" in result.stderr


def test_what_only_a_client_of_its_own_ranks_does_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    validate(EngineConfig())
    for settings in ({"hang_timeout": 30.0}, {"max_queue_len": 5}, {"max_queue_seconds": 60.0}):
        with pytest.raises(InvalidConfigError, match="not under torchrun.*leave them out"):
            validate(EngineConfig(**settings))
