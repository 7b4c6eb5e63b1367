"""From the fields of a body to what the engine takes: a prompt, sampling parameters, and how it is to be served."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from denoised.request import OmniDiffusionSamplingParams, PromptDict, Service
from denoised.runtime.model_info import ModelInfo
from denoised.server import loras
from denoised.server.bodies import AudioRequest, VideoRequest
from denoised.server.fields import RequestFields
from denoised.server.problems import Refusal, invalid
from denoised.server.settings import ServerConfig
from denoised.spec.model_spec import Kind

# The keyword of pipelines that make sound, for how long it lasts.
_LENGTH_OF_SOUND = "audio_end_in_s"
DEFAULT_FPS = 24.0
_ROUTES: dict[Kind, str] = {
    "image": "/v1/images/generations",
    "video": "/v1/videos",
    "audio": "/v1/audio/generate",
}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one HTTP request wants of the engine."""

    request_id: str
    prompt: PromptDict
    params: OmniDiffusionSamplingParams
    service: Service


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where requests are translated for: the model, the adapters that are loaded, the server's limits, who asks."""

    info: ModelInfo
    name: str
    config: ServerConfig
    tenant: str
    loras: tuple[str, ...] = ()

    def check_kind(self, kind: Kind) -> None:
        """Refuse a route that makes something else than the model."""
        if self.info.kind != kind:
            own = _ROUTES[self.info.kind]
            raise invalid(f"{self.name} makes {_plural(self.info.kind)}; use {own}.", param="model")

    def check_model(self, asked: str | None) -> None:
        if asked not in (None, self.name, self.info.model, *self.loras):
            raise Refusal(
                404,
                f"model={asked!r:.80}: this server serves {self.name}; leave it out, or give that.",
                param="model",
                code="model_not_found",
            )

    def ask(
        self,
        body: RequestFields,
        *,
        text: str,
        prefix: str,
        n: int | None = None,
        size: str | None = None,
        media: dict[str, Any] | None = None,
        num_previews: int = 0,
        **more: Any,
    ) -> Ask:
        """The request as the engine takes it. `media` are decoded pictures, `more` further sampling parameters."""
        self.check_model(body.model)
        given = body.sampling()
        _add(given, "lora_request", loras.asked_for(body, self.loras, self.config), "lora_request")
        _add(given, "num_outputs_per_prompt", self._count(n, body), "n")
        _add_size(given, size)
        for name, value in more.items():
            _add(given, name, value, name)
        _refuse_media(given.get("extra_args") or {})
        prompt: PromptDict = {"prompt": text}
        if body.negative_prompt is not None:
            prompt["negative_prompt"] = body.negative_prompt
        if media:
            prompt["multi_modal_data"] = media  # type: ignore[typeddict-item]
        return Ask(
            request_id=f"{prefix}{secrets.token_hex(12)}",
            prompt=prompt,
            params=OmniDiffusionSamplingParams(**given, output_type="pil"),
            service=self._service(body, num_previews),
        )

    def _count(self, n: int | None, body: RequestFields) -> int | None:
        for name, count in (("n", n), ("num_outputs_per_prompt", body.num_outputs_per_prompt)):
            if count is not None and count > self.config.max_n:
                raise invalid(f"{name}={count}: must be at most {self.config.max_n}; send several requests.")
        return n

    def _service(self, body: RequestFields, num_previews: int) -> Service:
        priority = body.priority or 0
        if priority > self.config.max_priority:
            most = self.config.max_priority
            raise invalid(f"priority={priority}: must be at most {most} here; lower it, or start with --max-priority.")
        return Service(priority=priority, tenant=self.tenant, timeout=body.timeout, num_previews=num_previews)

    # ---- videos and sound

    def one_output(self, body: RequestFields) -> None:
        """One file answers the request."""
        if (body.num_outputs_per_prompt or 1) > 1:
            count = body.num_outputs_per_prompt
            raise invalid(f"num_outputs_per_prompt={count}: this route gives one; send several requests.")

    def fps(self, body: RequestFields) -> float:
        """Frames a second of the file."""
        return float(body.fps or self.info.defaults.get("fps") or DEFAULT_FPS)

    def num_frames(self, body: VideoRequest) -> int | None:
        """Frames that last as long as was asked, as near as the model can."""
        if body.seconds is None:
            return None
        if "num_frames" not in self.info.parameters:
            raise invalid(f"seconds={body.seconds}: {self.info.pipeline} takes no length; leave it out.")
        multiple = self.info.frame_multiple
        return max(0, round((float(body.seconds) * self.fps(body) - 1) / multiple)) * multiple + 1

    def extra_args(self, body: AudioRequest) -> dict[str, Any] | None:
        """With the length of the sound in it, if one was asked for."""
        if body.audio_length is None:
            return body.extra_args
        if _LENGTH_OF_SOUND not in self.info.parameters:
            raise invalid(f"audio_length={body.audio_length}: {self.info.pipeline} takes no length; leave it out.")
        if _LENGTH_OF_SOUND in (body.extra_args or {}):
            raise invalid(f"audio_length={body.audio_length} and extra_args.{_LENGTH_OF_SOUND} are both given.")
        return {**(body.extra_args or {}), _LENGTH_OF_SOUND: body.audio_length}


def _add(given: dict[str, Any], name: str, value: Any, said: str) -> None:
    """One parameter under OpenAI's name, which may be given under ours as well if they agree."""
    if value is None:
        return
    if given.get(name, value) != value and name != "extra_args":
        raise invalid(f"{said}={value} and {name}={given[name]} are both given; give one of them.")
    given[name] = value


def _add_size(given: dict[str, Any], size: str | None) -> None:
    if size is not None and size != "auto":
        for name, value in zip(("width", "height"), size.split("x"), strict=True):
            _add(given, name, int(value), "size")


def _refuse_media(extra_args: dict[str, Any]) -> None:
    """Pipelines open paths and URLs that they find where pictures belong; requests bring pictures in other ways."""
    for name, value in extra_args.items():
        if isinstance(value, str) and any(word in name for word in ("image", "video", "audio", "path", "url", "file")):
            raise invalid(f"extra_args.{name:.40} must not name a file; upload pictures instead.", param="extra_args")


def _plural(kind: Kind) -> str:
    return "sound" if kind == "audio" else f"{kind}s"
