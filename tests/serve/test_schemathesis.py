"""Whatever the document of the server allows, and what it does not: never an error of the server, always as it says."""

from dataclasses import replace

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
OPERATIONS = {
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/messages", "POST /v1/messages/count_tokens",
    "POST /v1/responses", "GET /v1/responses/{id}", "POST /v1/responses/{id}/cancel", "DELETE /v1/responses/{id}",
    "GET /v1/models", "GET /v1/models/{name}", "GET /health", "GET /metrics", "POST /tokenize", "POST /detokenize",
}  # fmt: skip
SETTINGS = settings(
    max_examples=6, deadline=None, derandomize=True, database=None, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture
def described(served, monkeypatch):
    service, url = served()
    stream = service.engine.stream

    def short(prompt, sampling, **given):  # requests may ask for all the context has
        return stream(prompt, replace(sampling, max_tokens=min(sampling.max_tokens, 3)), **given)

    monkeypatch.setattr(service.engine, "stream", short)
    return schemathesis.openapi.from_url(url + "/openapi.json"), service, url


def test_the_document_has_every_path_and_no_status_that_is_never_used(described):
    document, _, _ = described
    assert {operation.ok().label for operation in document.get_all_operations()} == OPERATIONS
    for path in document.raw_schema["paths"].values():
        for operation in path.values():
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}


def statuses(operation, mode, url):
    """The statuses of what is sent to an operation, all of which answer as the document says."""
    found = set()

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers(case):
        found.add(case.call_and_validate(base_url=url, checks=CHECKS, timeout=60).status_code)

    answers()
    return found


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_the_document_says(described, mode):
    document, service, url = described
    seen = {}
    for label in sorted(OPERATIONS):
        method, path = label.split()
        operation = document[path][method]
        if mode is GenerationMode.POSITIVE or operation.body or operation.query:  # else nothing can be wrong
            seen[label] = statuses(operation, mode, url)
    assert service.admission.num_now == 0
    assert len(seen) >= 7
    assert 400 in set().union(*seen.values())
    assert (200 in set().union(*seen.values())) or mode is GenerationMode.NEGATIVE
