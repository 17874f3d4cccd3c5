"""schemathesis on our own OpenAPI document: whatever is sent, the answer is one that the document announces, and none
is the server's fault."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from minilora.server.fields import REFUSED

from .conftest import MODEL

ROUTES = [
    *[
        ("POST", f"/v1/{name}")
        for name in ("chat/completions", "completions", "load_lora_adapter", "unload_lora_adapter")
    ],
    *[("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1/models"), ("GET", "/v1/models/{model}")],
    *[("GET", f"/{name}") for name in ("health", "ready", "version", "metrics")],
]
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
BOUNDS = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())


def test_the_document_names_every_route_and_field(schema):
    document = schema.raw_schema
    found = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert found >= set(ROUTES)
    for name in ("ChatRequest", "CompletionRequest"):
        fields = document["components"]["schemas"][name]
        assert fields["additionalProperties"] is False and not fields["properties"].keys() & REFUSED.keys()
    assert "/tmp" not in json.dumps(document)


PROPER, IMPROPER = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
# Nothing can be improper about a request without fields.
CASES = [(*route, PROPER) for route in ROUTES] + [(*route, IMPROPER) for route in ROUTES if route[0] == "POST"]


@pytest.mark.parametrize(("method", "path", "mode"), CASES, ids=[f"{path} {mode.value}" for _, path, mode in CASES])
def test_no_answer_is_a_server_error(server, schema, method, path, mode):
    cases, codes = schema[path][method].as_strategy(generation_mode=mode), set()

    @BOUNDS
    @given(case=cases)
    def check(case):
        if mode is PROPER and isinstance(case.body, dict):
            # A known model and a short text let a good part of the cases reach the engine.
            for field, value in (("model", MODEL), ("max_tokens", 2), ("max_completion_tokens", 2)):
                if field in case.body:
                    case.body[field] = value
        codes.add(case.call_and_validate(base_url=server.url, timeout=30, checks=CHECKS).status_code)

    check()
    assert codes <= {200, 400, 403, 404, 405, 413, 415, 431}
    # An improper request may be one that JSON can't tell from a proper one, and the other way round.
    assert codes & ({200, 403, 404} if mode is PROPER else {400, 403, 405, 415}), codes
