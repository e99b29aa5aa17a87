"""Requests that the API's description allows, and mutations of them: no 5xx, no answer it does not describe."""

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.live import Process, launched, wait_until_ready
from tests.serving.model_dir import write_model_dir

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models/{name}"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    flags = ("--mock-rate", "0", "--max-new-tokens", "8", "--max-concurrency", "64")
    directory = write_model_dir(tmp_path_factory.mktemp("model") / "tiny")
    with launched(directory, "--mock", *flags) as process:
        wait_until_ready(process)
        yield process


def explore(server: Process, method: str, path: str, num_cases: int) -> int:
    """Sends so many requests to one operation; returns how many were answered with 2xx."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]
    seen = {"ok": 0, "all": 0}

    @hypothesis.settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
    )
    @hypothesis.given(case=operation.as_strategy())
    def run(case: schemathesis.Case) -> None:
        response = case.call(base_url=server.url)
        seen["all"] += 1
        seen["ok"] += response.status_code < 300
        case.validate_response(response, checks=CHECKS)

    run()
    assert seen["all"] >= min(num_cases, 10)
    return seen["ok"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_description_allows_is_answered_as_it_says(server, method, path):
    explore(server, method, path, 10)


@pytest.mark.perf
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_two_thousand_requests_and_more_are_answered_as_described(server, method, path):
    explore(server, method, path, 260)
