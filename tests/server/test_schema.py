"""/openapi.json is true: whatever it allows, or does not, is answered as it says, never with a crash or a hang."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests import tiny
from tests.server.live import KEY, Live

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS),
    pytest.mark.filterwarnings("default"),  # of what random parameters make of a pipeline
    pytest.mark.timeout(900),
]
OPERATIONS = (
    *("POST /v1/images/generations", "POST /v1/images/edits", "POST /v1/chat/completions", "POST /v1/videos"),
    *("POST /v1/videos/sync", "POST /v1/audio/generate", "GET /v1/videos", "GET /v1/videos/{video_id}"),
    *("GET /v1/videos/{video_id}/content", "DELETE /v1/videos/{video_id}", "GET /v1/models", "GET /health"),
    *("GET /v1/models/{model}", "GET /metrics", "GET /v1/videos/{video_id}/events"),
    *("POST /v1/images/drafts", "GET /v1/images/drafts", "DELETE /v1/images/drafts/{draft_id}"),
    *("POST /v1/images/drafts/{draft_id}/continue", "GET /v1/playground"),
    *("POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"),
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# Nobody waits longer for an answer.
PATIENCE = 30


@pytest.fixture(scope="module")
def schema(shapes: Live) -> Any:
    return schemathesis.openapi.from_url(f"{shapes.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})


def test_every_route_is_in_the_list(schema: Any) -> None:
    assert sorted(OPERATIONS) == sorted(found.ok().label for found in schema.get_all_operations())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_operation_keeps_its_word(shapes: Live, schema: Any, name: str, mode: GenerationMode) -> None:
    """A few random requests that the schema allows, and a few that it does not."""
    method, _, path = name.partition(" ")
    strategy = schema[path][method].as_strategy(generation_mode=mode)
    checks = [*CHECKS, *([negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])]

    @hypothesis.settings(
        max_examples=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @hypothesis.given(strategy)
    def run(case: Case) -> None:
        if mode is GenerationMode.POSITIVE:
            _lighten(case.body)
        headers = {"Authorization": f"Bearer {KEY}"}
        response = case.call(headers=headers, timeout=PATIENCE)
        case.validate_response(response, checks=checks, headers=headers)

    try:
        run()
    except hypothesis.errors.Unsatisfiable:
        pytest.skip("the schema allows everything here" if mode is GenerationMode.NEGATIVE else "nothing to send")
    shapes.until(shapes.idle)


def _lighten(body: Any) -> None:
    """As many steps and pictures as are quickly made, and no deadline, which would be a 504 rightly."""
    if isinstance(body, dict):
        body |= {name: 2 for name in ("num_inference_steps", "n", "num_outputs_per_prompt") if body.get(name)}
        body.pop("timeout", None)
        _lighten(body.get("extra_body"))
