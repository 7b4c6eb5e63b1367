"""The programs of docs/server.md run against a real server and do what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests import tiny
from tests.server.live import live

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]
PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
PROGRAMS = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.DOTALL)


def test_programs_of_the_page_run(tmp_path: Path) -> None:
    said = []
    with live(default_sampling_params={"num_inference_steps": 3}) as server:
        for language, program in PROGRAMS:
            program = program.replace("http://127.0.0.1:8091", server.url)
            command = [sys.executable, "-c", program] if language == "python" else ["bash", "-c", program]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
        routes = {path for path, _ in _routes(server.url)}
    assert len(list(tmp_path.glob("circle_*.png"))) == 2
    assert said[0] == "20 7\n"
    assert '"output_format":"webp"' in said[1]
    assert "3 of 3" in said[2]
    assert "preview 0" in said[2]
    assert "done 128x128" in said[2]
    assert said[3] == "data:image/png;base64,\n"
    for path in re.findall(r"127\.0\.0\.1:8091(/v1/[a-z/]*[a-z])\b(?!_)", PAGE):
        assert path in routes, path


def _routes(url: str) -> list[tuple[str, object]]:
    return list(httpx2.get(f"{url}/openapi.json").json()["paths"].items())
