"""Requests that the API's description allows, and mutations of them: no 5xx, no answer it does not describe."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
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


def apt(value: Any, key: str = "") -> Any:
    """A body nearer to what is answered: of the model that is served, and with integers plain.

    A schema cannot say which model there is, and takes 2.0 for an integer, which the server does not.
    """
    if key == "model":
        return "tiny"
    if isinstance(value, dict):
        return {key: apt(entry, key) for key, entry in value.items()}
    if isinstance(value, list):
        return [apt(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def explore(server: Process, method: str, path: str, num_cases: int) -> None:
    """Sends so many requests to one operation, every second one made apt."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]
    statuses: Counter[int] = Counter()

    @hypothesis.settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # to make a failing case smaller takes longer than to read it
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
    )
    @hypothesis.given(case=operation.as_strategy())
    def run(case: schemathesis.Case) -> None:
        if statuses.total() % 2 and isinstance(case.body, dict):
            case.body = apt(case.body)
        response = case.call(base_url=server.url, timeout=30)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    run()
    print(f"{method} {path}: {dict(sorted(statuses.items()))}")
    # Of a few operations there are fewer cases than were asked for.
    assert statuses.total() >= 0.9 * num_cases, statuses
    assert statuses[200] or "{" in path, statuses


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_description_allows_is_answered_as_it_says(server, method, path):
    explore(server, method, path, 20)


@pytest.mark.perf
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_two_thousand_requests_and_more_are_answered_as_described(server, method, path):
    explore(server, method, path, 300)
