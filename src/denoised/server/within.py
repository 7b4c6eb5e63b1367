"""What a route finds out about the server that it is part of, and about who asks."""

from __future__ import annotations

from fastapi import Request

from denoised.server.asks import Place
from denoised.server.metrics import HttpMetrics
from denoised.server.middleware import tenant_of
from denoised.server.serving import Serving
from denoised.server.working import Jobs


def serving_of(request: Request) -> Serving:
    found: Serving = request.app.state.serving
    return found


def jobs_of(request: Request) -> Jobs:
    found: Jobs = request.app.state.jobs
    return found


def metrics_of(request: Request) -> HttpMetrics:
    found: HttpMetrics = request.app.state.metrics
    return found


def place_of(request: Request) -> Place:
    """Where the request's fields are translated for.

    Raises:
        Refusal: 503, the engine takes none.
    """
    return serving_of(request).place(tenant_of(request.scope))
