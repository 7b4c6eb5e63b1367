"""What a request for media may say of adapters.

A caller names what is loaded. A path it may name only if it lies in a folder that the server was started with, links
followed; without such folders none is read, and nothing is ever fetched.
"""

from __future__ import annotations

from typing import Any

from denoised.runtime.adapters import is_within
from denoised.server.fields import LoraFields, RequestFields
from denoised.server.problems import invalid
from denoised.server.settings import ServerConfig


def check_path(path: str, config: ServerConfig) -> None:
    """Refuse what lies elsewhere, whether or not it is there."""
    if path.startswith("~") or not is_within(path, config.allowed_lora_folder):
        raise invalid(
            f"lora_path={path!r:.80} is in no folder that this server reads adapters from; name one that is loaded, "
            "or start the server with --allowed-lora-folder."
        )


def asked_for(fields: RequestFields, loaded: tuple[str, ...], config: ServerConfig) -> list[dict[str, Any]] | None:
    """The adapters of a request, as `lora_request` takes them: what it says, and one that it names as its model."""
    hidden = {"lora_request", "lora_scale"} & (fields.extra_args or {}).keys()
    if hidden:  # the engine would take it from there as well, unseen by the checks below
        name = sorted(hidden)[0]
        raise invalid(f"extra_args.{name}: give it as {name}.", param="extra_args")
    if fields.lora is not None and fields.lora_request is not None:
        raise invalid("lora and lora_request are both given; give one of them.")
    given = fields.lora if fields.lora is not None else fields.lora_request
    many = given if isinstance(given, list) else [given] if given is not None else []
    found = [_plain(one, config) for one in many]
    if fields.model in loaded:
        found.insert(0, {"lora_name": fields.model})
    return found or None


def _plain(one: LoraFields | str, config: ServerConfig) -> dict[str, Any]:
    plain = {"lora_name": one} if isinstance(one, str) else one.plain()
    if plain.get("lora_path"):
        check_path(plain["lora_path"], config)
    return plain
