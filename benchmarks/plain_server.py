"""What people write without an engine: a diffusers pipeline behind a lock in FastAPI. Here to be compared with.

python -m benchmarks.plain_server [--model shapes] [--threads 2]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import threading
import time
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI

from denoised.runtime.load import BUILTIN
from denoised.server.run import bind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipeline = DiffusionPipeline.from_pretrained(BUILTIN.get(args.model, args.model), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    asyncio.run(_serve(application(pipeline)))


def application(pipeline: Any) -> FastAPI:
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/images/generations")
    def generate(ask: dict[str, Any]) -> dict[str, Any]:
        came = time.monotonic()
        with lock:
            queued = time.monotonic() - came
            return {"data": [{"b64_json": _picture(pipeline, ask)}], "receipt": {"queued_seconds": queued}}

    return app


def _picture(pipeline: Any, ask: dict[str, Any]) -> str:
    width, height = map(int, ask["size"].split("x"))
    named = ("prompt", "negative_prompt", "num_inference_steps", "true_cfg_scale")
    settings = {name: ask[name] for name in named if name in ask}
    generator = torch.Generator().manual_seed(ask["seed"])
    image = pipeline(**settings, height=height, width=width, generator=generator).images[0]
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


async def _serve(app: FastAPI) -> None:
    socket = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    print(f"a plain pipeline at http://127.0.0.1:{socket.getsockname()[1]}", flush=True)
    await server.serve(sockets=[socket])


if __name__ == "__main__":
    main()
