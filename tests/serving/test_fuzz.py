"""Schemathesis against the server's own OpenAPI document."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from live_server import KEY, Serve  # type: ignore[import-not-found]
from schemathesis import GenerationMode

OPERATIONS = {
    ("/v1/images/generations", "POST"), ("/v1/models", "GET"), ("/v1/models/{name}", "GET"), ("/files/{name}", "GET"),
    ("/health", "GET"), ("/ready", "GET"), ("/metrics", "GET"),
}  # fmt: skip


@pytest.fixture(scope="module")
def document(serve: Serve) -> Any:
    return schemathesis.openapi.from_url(f"{serve(key=KEY)}/openapi.json")


def test_the_fuzzer_knows_every_operation(document: Any) -> None:
    paths = document.raw_schema["paths"]
    assert {(path, method.upper()) for path, methods in paths.items() for method in methods} == OPERATIONS


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        *((path, method, GenerationMode.POSITIVE) for path, method in sorted(OPERATIONS)),
        ("/v1/images/generations", "POST", GenerationMode.NEGATIVE),
    ],
)
def test_the_server_keeps_to_its_own_document(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    """No 500, only documented statuses, types and bodies; what the document allows is taken, and no more."""
    examples = 40 if method == "POST" else 3

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    fuzz()
