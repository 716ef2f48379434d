from __future__ import annotations

import socket
from datetime import UTC, datetime

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from balancer.batch.asks import Request
from balancer.batch.client import (
    AskFault,
    Broke,
    Busy,
    ContextExceeded,
    EndpointError,
    OfferedModel,
    Patience,
    connected,
    pause_after,
    retry_after,
    root_of,
)

from .conftest import FakeEndpoint

QUICK = Patience(first_pause_seconds=0.01, longest_pause_seconds=0.02, busy_seconds=5)
HURRIED = Patience(first_pause_seconds=0.01, longest_pause_seconds=0.02, busy_seconds=0.1)


def request(user: str = "What?", max_tokens: int = 10) -> Request:
    return Request(model="tiny", system="Be kind.", user=user, max_tokens=max_tokens, temperature=0.2)


def refusal(status: int, **headers: str) -> web.Response:
    error = {"error": {"message": "no room", "code": "queue_full"}}
    return web.json_response(error, status=status, headers=headers)


def unused_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


async def test_an_answer_comes_with_its_price(endpoint: FakeEndpoint):
    async with connected(endpoint.url, api_key="secret") as to:
        reply = await to.ask(request())
    assert reply.text.startswith("answer ")
    assert (reply.prompt_tokens, reply.output_tokens, reply.cut_short) == (3, 3, False)
    assert endpoint.headers[0]["X-Priority"] == "batch"
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert endpoint.asked[0]["stream"] is False


@pytest.mark.parametrize("status", [429, 503, 500, 502, 408])
async def test_what_may_pass_is_tried_again(endpoint: FakeEndpoint, status: int):
    endpoint.refusals = [refusal(status, **{"Retry-After": "0"}), refusal(status)]
    async with connected(endpoint.url, patience=QUICK) as to:
        assert (await to.ask(request())).text
    assert len(endpoint.headers) == 3


async def test_a_wrong_request_is_not_tried_again(endpoint: FakeEndpoint):
    endpoint.refusals = [refusal(404)]
    async with connected(endpoint.url, patience=QUICK) as to:
        with pytest.raises(AskFault, match="answered 404: no room"):
            await to.ask(request())
    assert len(endpoint.headers) == 1


async def test_an_engine_that_keeps_failing_gets_three_tries(endpoint: FakeEndpoint):
    endpoint.breaks_on = "What?"
    async with connected(endpoint.url, patience=QUICK) as to:
        with pytest.raises(AskFault, match="the engine died"):
            await to.ask(request())
    assert len(endpoint.asked) == 3


async def test_waiting_for_room_uses_up_no_tries_of_an_engine_that_failed(endpoint: FakeEndpoint):
    endpoint.refusals = [refusal(503), refusal(503), refusal(503), refusal(502), refusal(503), refusal(502)]
    async with connected(endpoint.url, patience=QUICK) as to:
        assert (await to.ask(request())).text
    assert len(endpoint.headers) == 7


async def test_an_engine_that_fails_between_waits_for_room_still_gets_three_tries(endpoint: FakeEndpoint):
    endpoint.refusals = [refusal(status) for status in (502, 503, 502, 429, 502)]
    async with connected(endpoint.url, patience=QUICK) as to:
        with pytest.raises(AskFault, match="answered 502"):
            await to.ask(request())
    assert len(endpoint.headers) == 5


@pytest.mark.parametrize(
    "error", [{"code": "context_length_exceeded"}, {"code": 400, "type": "exceed_context_size_error"}]
)
async def test_too_long_a_request_is_told_apart(endpoint: FakeEndpoint, error: dict[str, object]):
    endpoint.refusals = [web.json_response({"error": error | {"message": "too long"}}, status=400)]
    async with connected(endpoint.url) as to:
        with pytest.raises(ContextExceeded, match="too long"):
            await to.ask(request())


@pytest.mark.parametrize(
    "response",
    [
        web.json_response({"choices": [{"message": {"content": ""}, "finish_reason": "length"}]}),
        web.json_response({"choices": []}),
        web.Response(text="<html>"),
    ],
)
async def test_an_answer_that_says_nothing_is_no_answer(endpoint: FakeEndpoint, response: web.Response):
    endpoint.refusals = [response]
    async with connected(endpoint.url, patience=QUICK) as to:
        assert (await to.ask(request())).text.startswith("answer")
    assert len(endpoint.headers) == 2


async def test_nobody_there_is_waited_for_and_then_told():
    async with connected(unused_url(), patience=HURRIED) as to:
        with pytest.raises(AskFault, match="no connection"):
            await to.ask(request())
        with pytest.raises(EndpointError, match="balancer up"):
            await to.models()


async def test_the_models_come_with_their_context(endpoint: FakeEndpoint):
    endpoint.models = [{"id": "b", "context_length": 2048}, {"id": "a", "owned_by": "x"}]
    async with connected(f"{endpoint.url}/v1/") as to:
        assert await to.models() == (OfferedModel("a", None), OfferedModel("b", 2048))


async def test_another_kind_of_server_is_told_apart(endpoint: FakeEndpoint):
    async with connected(f"{endpoint.url}/elsewhere") as to:
        with pytest.raises(EndpointError, match="not as an OpenAI-compatible server"):
            await to.models()


@given(
    st.builds(Busy, st.just("busy"), reachable=st.booleans(), retry_after=st.none() | st.floats(0, 1e9))
    | st.builds(Broke, st.just("broke")),
    st.integers(1, 10_000),
    st.floats(0, 1e6),
    st.floats(0, 1),
)
def test_trying_again_ends_and_honours_what_was_asked(
    failure: Exception, tries: int, seconds: float, roll: float
):
    patience = Patience()
    pause = pause_after(patience, failure, tries=tries, seconds=seconds, dice=lambda: roll)
    if isinstance(failure, Broke):
        # Its tries end it, however long each of them took.
        assert (pause is None) == (tries >= patience.broken_tries)
    elif pause is not None:
        assert seconds + pause <= patience.busy_seconds
        assert isinstance(failure, Busy)
        assert pause >= min(failure.retry_after or 0, patience.longest_retry_after_seconds)
    assert pause is None or pause > 0


def test_retry_after_is_seconds_or_a_date():
    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert retry_after("7") == 7
    assert retry_after("Tue, 01 Jan 2030 00:00:30 GMT", now) == 30
    assert retry_after("Tue, 01 Jan 2030 00:00:30 -0000", now) == 30
    assert retry_after("Mon, 31 Dec 2029 00:00:00 GMT", now) == 0
    assert retry_after("soon") is retry_after(None) is None


@pytest.mark.parametrize("url", ["http://h:4000", "http://h:4000/", "http://h:4000/v1", "http://h:4000/v1/"])
def test_an_address_may_be_given_with_or_without_v1(url: str):
    assert root_of(url) == "http://h:4000"
