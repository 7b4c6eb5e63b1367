"""Telling somebody's server that a job is done: signed, tried again, and never to a private address unless allowed.

Headers and signature are those of the Standard Webhooks specification, as OpenAI's client checks them: HMAC-SHA256
over "<id>.<timestamp>.<body>".
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from denoised.server import fetch
from denoised.server.jobs import Job
from denoised.server.problems import Refusal, invalid

# Seconds before each try.
DELAYS = (0.0, 1.0, 5.0, 30.0, 120.0, 600.0)
_PREFIX = "whsec_"


class Webhooks:
    """Sends what happened to jobs. `secret`: None if this server signs none, and so sends none."""

    def __init__(self, secret: str | None, *, allow_private: bool, delays: Sequence[float] = DELAYS) -> None:
        self._secret, self._allow_private, self._delays = secret, allow_private, delays

    def check(self, url: str) -> None:
        """Refuse a webhook that would not be called.

        Raises:
            Refusal: no secret to sign with, no URL, or a private address.
        """
        if self._secret is None:
            raise invalid("webhook: this server signs none; start it with --webhook-secret.", param="webhook")
        self._target(url)

    def _target(self, url: str) -> tuple[Any, str]:
        """The parts of a URL, and the address to connect to, resolved once."""
        parts = fetch.parts_of(url, "webhook")
        return parts, fetch.address_of(parts, "webhook", public=not self._allow_private)

    async def tell(self, job: Job, clock: Callable[[], float] = time.time) -> bool:
        """Say that a job is done; False if nobody heard it in all tries."""
        assert self._secret is not None
        assert job.webhook is not None
        body = json.dumps(event_of(job)).encode()
        for delay in self._delays:
            await asyncio.sleep(delay)
            headers = signed(body, event_id=f"evt_{job.id}", at=int(clock()), secret=self._secret)
            if await asyncio.to_thread(self._post, job.webhook, body, headers):
                return True
        return False

    def _post(self, url: str, body: bytes, headers: dict[str, str]) -> bool:
        try:
            parts, address = self._target(url)
            connection = fetch.connection_to(parts, address)
        except (OSError, Refusal):
            return False
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request(
                "POST", path, body, {"Host": parts.netloc, "Content-Type": "application/json", **headers}
            )
            return 200 <= connection.getresponse().status < 300
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def event_of(job: Job) -> dict[str, Any]:
    """What is said: the shape of OpenAI's events."""
    return {
        "id": f"evt_{job.id}",
        "object": "event",
        "created_at": job.completed_at,
        "type": f"video.{job.status}",
        "data": {"id": job.id},
    }


def signed(body: bytes, *, event_id: str, at: int, secret: str) -> dict[str, str]:
    """The headers by which a receiver knows who sent a body, and when."""
    key = base64.b64decode(secret.removeprefix(_PREFIX)) if secret.startswith(_PREFIX) else secret.encode()
    mac = hmac.new(key, f"{event_id}.{at}.".encode() + body, hashlib.sha256).digest()
    signature = f"v1,{base64.b64encode(mac).decode()}"
    return {"webhook-id": event_id, "webhook-timestamp": str(at), "webhook-signature": signature}
