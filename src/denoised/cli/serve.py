"""`denoised serve`: a model over HTTP, in the shapes of OpenAI's API."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from denoised.cli.flags import ENGINE, PARALLEL, flags, given, with_flags
from denoised.cli.generate import engine_settings
from denoised.cli.ranks import follow, leads
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.rules import validate
from denoised.server.settings import ServerConfig

SERVER = flags(ServerConfig, "Server")
KEY_VARIABLE = "DENOISED_API_KEY"
_INERT = "Accepted for scripts written for vLLM-Omni; no effect."


@with_flags(SERVER, PARALLEL, ENGINE)
def serve(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As --model.", show_default=False)
    ] = None,
    *,
    omni: Annotated[bool, typer.Option("--omni", help=_INERT, hidden=True)] = False,
    **values: Any,
) -> None:
    """Serve a model over HTTP: images, videos, sound and chat, as OpenAI's client asks for them."""
    settings = engine_settings(values | {"model": _model(model_argument, values["model"])})
    config = EngineConfig(**settings)
    validate(config)
    server = ServerConfig(**given(SERVER, values | {"api_key": _keys(values["api_key"])}))
    if not leads():
        follow(settings)
        return

    from denoised.runtime.omni import AsyncOmni
    from denoised.server.run import serve as run

    num_ranks = config.parallel_config.world_size
    run(lambda: AsyncOmni(**settings), server, num_ranks=num_ranks, say=lambda line: print(line, flush=True))


def _model(argument: str | None, flag: str | None) -> str | None:
    if argument is not None and flag is not None:
        raise InvalidConfigError("the model is given as an argument and as --model; give it once.")
    return argument if argument is not None else flag


def _keys(flag: list[str] | None) -> list[str] | None:
    """Keys of the command line, else those of the environment, with commas between them."""
    return flag or [key for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip()] or None
