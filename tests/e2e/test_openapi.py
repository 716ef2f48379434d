"""The API's description: all routes that there are, and whoever asks as it says is answered as it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from schemathesis import Case
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from balancer import admin
from balancer.core.model import Endpoint
from balancer.dialects import openai
from balancer.openapi import document, published, schemas
from balancer.openapi.table import FOR_BROWSERS, OPERATIONS
from balancer.orders import Nothing
from tests.e2e.conftest import OpenRoom
from tests.e2e.rooms import ThreadedRoom, application_of, routes, threaded_room
from worker_agent.wire import TUNNEL_PATH

PUBLISHED = Path(__file__).parents[2] / "configs" / "openapi.json"


def is_api(path: str) -> bool:
    return not any(path == page or path.startswith(f"{page}/") for page in FOR_BROWSERS)


def test_the_published_document_is_that_of_the_program():
    assert PUBLISHED.read_bytes() == published(), "write it anew: python -m balancer.openapi"


async def test_every_route_is_described_and_nothing_else(open_room: OpenRoom):
    described = {(one.method, one.path) for one in OPERATIONS}
    assert len(described) == len(OPERATIONS)
    async with open_room() as room:
        found = {one for one in routes(application_of(room.balancer)) if is_api(one[1])}
        heads = {path for method, path in found if method == "HEAD"}
        assert heads == {path for method, path in found if method == "GET"} - {TUNNEL_PATH}
        assert {one for one in found if one[0] != "HEAD"} == described
        assert {("POST", endpoint.value) for endpoint in Endpoint} <= described
        async with room.http.get(f"{room.url}/openapi.json") as response:
            assert await response.read() == published()


# What is described is what the readers judge by ...

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(-3, 200) | st.sampled_from(["", "float", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["thinking", "enable_thinking", "text"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ELSEWHERE = {"messages"}
"""Judged beyond its expectation: see `test_messages_...`."""


@pytest.mark.parametrize("endpoint", Endpoint)
def test_the_fields_are_those_that_are_read(endpoint: Endpoint):
    assert schemas.FIELDS[endpoint].keys() == openai.FIELDS[endpoint].keys()
    assert schemas.FOR_US.keys() - {"metadata"} == openai.FOR_US.keys()


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [(endpoint, name) for endpoint in Endpoint for name in openai.FIELDS[endpoint] if name not in ELSEWHERE],
)
@settings(max_examples=60, derandomize=True, database=None)
@given(value=ANYTHING)
def test_a_field_is_described_as_it_is_judged(endpoint: Endpoint, name: str, value: Any):
    if value is None or (isinstance(value, float) and value.is_integer()):
        return  # left out; and 1.0, which JSON Schema takes for an integer
    if isinstance(value, list) and any(isinstance(one, float) for one in value):
        return
    expected = openai.FIELDS[endpoint][name].holds(value)
    if name in ("prompt", "input") and value in ([], [""]):
        return  # refused later, as empty
    assert jsonschema_rs.is_valid(schemas.FIELDS[endpoint][name], value) == expected, value


ROLES = st.sampled_from([*sorted(openai.ROLES), "robot", None])
CONTENTS = st.sampled_from(["text", "", None, 5, [], [{"type": "text"}], ["text"], {}])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES}, optional={"content": CONTENTS, "name": st.just("x")}), max_size=3
)


@settings(max_examples=200, derandomize=True, database=None)
@given(messages=MESSAGES)
def test_messages_are_described_as_they_are_judged(messages: list[dict[str, Any]]):
    body = {"model": "m", "messages": messages}
    try:
        openai.parse(Endpoint.CHAT, openai.orjson.dumps(body))
        right = True
    except openai.BadRequest:
        right = False
    assert jsonschema_rs.is_valid(schemas.asked(Endpoint.CHAT), body) == right


@pytest.mark.parametrize(
    ("schema", "model"),
    [
        (schemas.LOAD, admin._Load),
        (schemas.UNLOAD, admin._Unload),
        (schemas.DELETE, admin._Delete),
        (schemas.DOWNLOAD, admin._Download),
        (schemas.NOTHING, Nothing),
    ],
    ids=["load", "unload", "delete", "download", "nothing"],
)
def test_an_order_is_described_with_the_keys_that_it_may_have(
    schema: Mapping[str, Any], model: type[BaseModel]
):
    read = model.model_json_schema()
    assert schema["properties"].keys() == read.get("properties", {}).keys()
    assert set(schema["required"]) == set(read.get("required", ()))


# ... and what is answered. Every operation is asked rightly and wrongly, with what the schema makes of it.

DESCRIBED = document()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadedRoom]:
    folder = tmp_path_factory.mktemp("room")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        with threaded_room(folder, max_wait=1.0, comment_after=0) as made:
            yield made


def _schema() -> schemathesis.openapi.OpenApiSchema:
    load_all_checks()
    config = SchemathesisConfig.from_dict({"generation": {"deterministic": True, "max-examples": 12}})
    return schemathesis.openapi.from_dict(DESCRIBED, config=config)


SCHEMA = _schema()


# The room lives in a thread of this process, and throws dice while Hypothesis watches them.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@SCHEMA.parametrize()
@settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[*HealthCheck],
)
def test_the_balancer_answers_as_it_is_described(case: Case, room: ThreadedRoom):
    headers = {"X-Admin-Key": room.admin_key} if case.path.startswith("/admin") else {}
    response = case.call(base_url=room.url, headers=headers, timeout=20)
    if response.status_code != 503:  # no worker has the model: declared, and no defect
        case.validate_response(response, checks=[not_a_server_error], headers=headers)
    case.validate_response(
        response,
        headers=headers,
        checks=[
            status_code_conformance,
            content_type_conformance,
            response_headers_conformance,
            response_schema_conformance,
            negative_data_rejection,
        ],
    )


FOUND = (
    ("/v1/chat/completions", b'{"model": "fake", "messages": [{"role": {}}]}'),
    ("/v1/chat/completions", b'{"model": "fake", "messages": [{"role": [], "content": "x"}]}'),
)
"""What schemathesis has found, by requests that were answered with a 500."""


@pytest.mark.parametrize(("path", "body"), FOUND)
def test_what_was_once_a_defect_is_refused(room: ThreadedRoom, path: str, body: bytes):
    headers = {"Content-Type": "application/json"}
    told = requests.post(f"{room.url}{path}", data=body, headers=headers, timeout=20)
    assert told.status_code == 400
    assert told.json()["error"]["param"] == "messages[0].role"


def test_the_room_is_whole_after_all_that(room: ThreadedRoom):
    told = requests.get(f"{room.url}/health", timeout=20)
    assert told.status_code == 200
