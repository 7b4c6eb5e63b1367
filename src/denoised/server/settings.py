"""What a server is started with, beside the engine's own settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from denoised.checks import bounded, check_fields
from denoised.server.keys import digest

MIB = 2**20


def _secret(help: str) -> Any:
    metadata = {"help": help, "minimum": None, "maximum": None, "choices": None}
    return dataclasses.field(default=(), repr=False, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens, whom it answers, and what it refuses because of its size.

    `api_key` holds digests once this is made, whatever it was made from: nobody can read keys out of a process's
    settings, its logs or its tracebacks.
    """

    host: str = bounded("127.0.0.1", help="address to listen on; 0.0.0.0 is every network, so set api_key too")
    port: int = bounded(8091, minimum=0, maximum=65_535, help="port to listen on; 0: any free one")
    served_model_name: str | None = bounded(None, help="the model's name in requests and answers; default: MODEL")
    api_key: tuple[str, ...] = _secret(
        "key that requests must carry, or sha256:<hex digest> of one; may be repeated; default: $DENOISED_API_KEY"
    )
    cors_origin: tuple[str, ...] = bounded((), help="origin whose pages may call, or *; may be repeated")
    allow_url_fetch: bool = bounded(False, help="fetch pictures that requests name by URL, from public addresses only")
    allowed_lora_folder: tuple[str, ...] = bounded(
        (), help="folder that LoRA adapters may be loaded from; may be repeated; default: none"
    )
    max_body_mb: int = bounded(64, minimum=1, maximum=4096, help="largest body of a request, uploads included")
    max_n: int = bounded(10, minimum=1, maximum=64, help="largest n of a request")
    max_priority: int = bounded(0, minimum=-100, maximum=100, help="highest priority that a request may give itself")
    max_jobs: int = bounded(256, minimum=1, help="video jobs that are kept; the oldest that are done make room")
    jobs_folder: str | None = bounded(
        None, help="folder of video jobs, which then survive a restart; default: kept as long as the server runs"
    )
    job_days: float = bounded(30.0, minimum=0, maximum=36_500, help="days that a job is kept once it is done")
    job_checkpoint_every: int = bounded(
        5, minimum=1, maximum=10_000, help="steps after which a job in jobs_folder is saved, to go on from there"
    )
    webhook_secret: str | None = dataclasses.field(
        default=None,
        repr=False,
        metadata={
            "help": "secret that webhooks are signed with; without one there are none",
            "minimum": None,
            "maximum": None,
            "choices": None,
        },
    )
    allow_private_webhooks: bool = bounded(False, help="also call webhooks at private addresses")
    max_drafts: int = bounded(64, minimum=1, maximum=10_000, help="drafts of pictures that are kept to go on from")
    max_drafts_mb: int = bounded(512, minimum=1, help="memory for drafts; the oldest of who has most make room")
    draft_minutes: float = bounded(30.0, minimum=0.01, maximum=10_080, help="minutes that a draft is kept")
    drain_timeout: float = bounded(60.0, minimum=0, maximum=86_400, help="seconds for what runs when asked to stop")
    skip_warm_up: bool = bounded(False, help="be ready without a first request of our own")

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "api_key", tuple(digest(key) for key in self.api_key))

    @property
    def max_body(self) -> int:
        """Bytes."""
        return self.max_body_mb * MIB
