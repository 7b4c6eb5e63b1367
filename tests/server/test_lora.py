"""Adapters over HTTP: vLLM's routes, requests that name one, and folders that nobody reads from."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.contract.support import folder
from tests.contract.test_lora import _pristine
from tests.server.live import Live, live
from tests.tiny import loras

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]

NAME, IMAGES, LOAD, UNLOAD = "ovis_image", "/v1/images/generations", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ASK = {"prompt": "a cat", "size": "32x32", "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """allowed/a.safetensors, allowed/b.safetensors; outside/c.safetensors, and a link to it from within."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("allowed/a", "allowed/b", "outside/c")):
        found = loras.pairs(_pristine(NAME).transformer, seed=seed, only=lambda path: "attn" in path)
        loras.write(root / f"{name}.safetensors", loras.in_diffusers(found))
    os.symlink(root / "outside" / "c.safetensors", root / "allowed" / "link.safetensors")
    return root


@pytest.fixture(scope="module")
def server(adapters: Path) -> Iterator[Live]:
    with live(folder(NAME), allowed_lora_folder=(str(adapters / "allowed"),), skip_warm_up=True) as made:
        yield made


def image(server: Live, **more: Any) -> tuple[bytes, dict[str, Any]]:
    answer = server.http.post(IMAGES, json=ASK | more)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"]), answer.json()["receipt"]


def test_load_use_and_unload(server: Live, adapters: Path) -> None:
    plain, receipt = image(server)
    assert receipt["loras"] == []
    file = str(adapters / "allowed" / "a.safetensors")
    answer = server.http.post(LOAD, json={"lora_name": "style", "lora_path": file})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'style' added successfully.")
    assert "loaded already" in server.http.post(LOAD, json={"lora_name": "style", "lora_path": file}).text
    again = server.http.post(LOAD, json={"lora_name": "style", "lora_path": file, "load_inplace": True})
    assert again.status_code == 200
    listed = server.http.get("/v1/models").json()["data"]
    assert [(each["id"], each.get("parent")) for each in listed] == [
        (server.server.serving.name, None),
        ("style", listed[0]["id"]),
    ]
    styled, receipt = image(server, lora_request="style")
    assert [(each["name"], each["scale"]) for each in receipt["loras"]] == [("style", 1.0)]
    assert styled != plain
    assert image(server, model="style")[0] == styled  # as vLLM's callers choose one
    assert (
        image(server, lora={"name": "style"})[0] == image(server, lora={"local_path": file, "int_id": 7})[0] == styled
    )
    weaker, receipt = image(server, lora_request=[{"lora_name": "style", "scale": 0.5}], lora_scale=0.5)
    assert receipt["loras"][0]["scale"] == 0.25
    assert weaker not in (styled, plain)
    assert 'denoised_replica_loras{replica="0"} 1.0' in server.http.get("/metrics").text
    answer = server.http.post(UNLOAD, json={"lora_name": "style", "lora_int_id": 1})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'style' removed successfully.")
    assert server.http.post(UNLOAD, json={"lora_name": "style"}).status_code == 404
    assert image(server)[0] == plain


def test_what_is_refused(server: Live, adapters: Path) -> None:
    """Other folders look alike whether or not a file is there; links lead nowhere else."""
    elsewhere = "is in no folder that this server reads adapters from"
    for path in ("outside/c.safetensors", "allowed/link.safetensors", "allowed/../outside/c.safetensors", "nowhere"):
        answer = server.http.post(LOAD, json={"lora_name": "x", "lora_path": str(adapters / path)})
        assert (answer.status_code, elsewhere in answer.text) == (400, True), path
        answer = server.http.post(IMAGES, json=ASK | {"lora": {"lora_path": str(adapters / path)}})
        assert (answer.status_code, elsewhere in answer.text) == (400, True), path
    for path in ("owner/name", "~/x.safetensors", "\0"):
        assert elsewhere in server.http.post(LOAD, json={"lora_name": "x", "lora_path": path}).text
    for body, status, message in (
        ({"lora_request": "nobody"}, 400, "no adapter is loaded under it"),
        ({"lora_scale": 0.5}, 400, "no lora_request for it to act on"),
        ({"lora": {"scale": 1}}, 400, "lora_name is missing"),
        ({"lora": {"name": "a", "scale": 1e9}}, 400, "at most 100"),
        ({"lora": "a", "lora_request": "b"}, 400, "both given"),
        ({"model": "nobody"}, 404, "this server serves"),
    ):
        answer = server.http.post(IMAGES, json=ASK | body)
        assert (answer.status_code, message in answer.text) == (status, True), (body, answer.text)
    gone = server.http.post(LOAD, json={"lora_name": "x", "lora_path": str(adapters / "allowed" / "gone.safetensors")})
    assert (gone.status_code, "is no file" in gone.text) == (400, True)
