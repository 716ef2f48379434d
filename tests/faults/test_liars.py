"""Engines that lie: what they send is not what it says it is (RELIABILITY 7, E1 to E12).

Two workers; the first attempt at each question meets the lie, wherever it goes."""

from __future__ import annotations

import asyncio

import pytest

from tests.e2e.conftest import OpenRoom, listed
from tests.fakes.engine import OK, FakeEngine, Outcome, on
from tests.fakes.faults import Fault
from tests.fakes.toxics import Direction, Latency, ToxicProxy
from tests.faults.asking import CHAT, Came, ask, asked_for, broken_once, question, rows

CHUNK = (
    b'data: {"id":"x","object":"chat.completion.chunk",'
    b'"choices":[{"index":0,"delta":%b,"finish_reason":%b}]}\n\n'
)
FINISH = CHUNK % (b"{}", b'"stop"')
MIB = 1024 * 1024


def saying(content: str) -> bytes:
    """An event with this text as JSON has it, escapes and all."""
    return CHUNK % (b'{"content":"%b"}' % content.encode(), b"null")


ERRORS = {
    "a body": Fault.error_in_body(),
    "the first event": Fault.error_event(at_token=0),
    "an event in the middle": Fault.error_event(at_token=5),
    "an event in the middle, and then its end mark": Fault.error_event(at_token=5, then_done=True),
    "the last event": Fault.error_event(at_token=16, then_done=True),
}


@pytest.mark.parametrize("fault", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_error_with_status_200_is_a_failure_where_it_is(
    open_room: OpenRoom, fault: Fault, stream: bool
):
    """E1."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), fault)
        (await ask(room, stream=stream)).insist_on_success()
        assert {one.requests[0].outcome, two.requests[0].outcome} == {Outcome.COMPLETED}
        assert room.worker("a").success_rate + room.worker("b").success_rate < 2
        await room.idle()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_finished_answer_needs_no_end_mark_and_its_client_gets_one(open_room: OpenRoom, stream: bool):
    """E2: and nobody is asked again."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), Fault.no_done())
        (await ask(room, stream=stream)).insist_on_success()
        assert len(asked_for(one)) + len(asked_for(two)) == 1


@pytest.mark.parametrize("token", [0, 1, 5, 16])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_stream_that_just_ends_is_never_a_success(open_room: OpenRoom, token: int, stream: bool):
    """E3: neither finish_reason nor end mark. With another worker nobody sees it, alone it is an error."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), Fault.truncate(at_token=token))
        (await ask(room, stream=stream)).insist_on_success()
    async with FakeEngine() as one, open_room(*rows(one), max_retries=0) as room:
        one.always(Fault.truncate(at_token=token))
        came = await ask(room, stream=stream)
        assert came.failed_explicitly


@pytest.mark.parametrize("by", [-40, 40], ids=["short", "long"])
async def test_a_wrong_length_leaks_nothing_into_the_next_answer(open_room: OpenRoom, by: int):
    """E4: for what an engine answers in one piece: embeddings. With too short a length, the rest of the body
    stands where the next answer on the connection would."""
    async with FakeEngine(agent_id="a") as one, open_room(listed(one, "a", type="agent")) as room:
        await room.ready()
        body = {"model": "fake", "input": ["a", "b"]}
        for fault in (OK, Fault.wrong_length(by=by) & Fault.close(at_byte=300), OK):
            one.script(fault)
            async with room.http.post(f"{room.url}/v1/embeddings", json=body) as response:
                answer = await response.json()
                assert [vector["index"] for vector in answer["data"]] == [0, 1]
        for _ in range(3):
            (await ask(room)).insist_on_success()


FLOODS = {
    "words": Fault.endless(),
    "white space": Fault.flood(b" \n" * 500, at_token=3),
    "comments": Fault.flood(b": still here\n\n", at_token=3),
    "empty events": Fault.flood(b'data: {"choices":[]}\n\n', at_token=3),
}


@pytest.mark.parametrize("fault", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_what_never_ends_is_ended(open_room: OpenRoom, fault: Fault, stream: bool):
    """E5: by the time that a request may take; the engine is told, and the client too."""
    async with FakeEngine(token_seconds=0.001) as one:
        async with open_room(*rows(one), request_timeout=0.5, max_retries=0) as room:
            one.script(fault)
            came = await ask(room, stream=stream)
            assert came.failed_explicitly
            await one.idle()
            assert one.requests[0].outcome is Outcome.CLIENT_LEFT
            await room.idle()
            (await ask(room, stream=stream)).insist_on_success()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_line_without_end_is_refused_long_before_it_is_through(open_room: OpenRoom, stream: bool):
    """E6: of 200 MB, a few are read; then the worker is left and another one goes on."""
    async with FakeEngine() as one, FakeEngine() as two:
        async with ToxicProxy(one.host, one.port) as near, ToxicProxy(two.host, two.port) as far:
            workers = [
                row | {"port": proxy.port} for row, proxy in zip(rows(one, two), (near, far), strict=True)
            ]
            async with open_room(*workers) as room:
                await room.ready(2)
                broken_once((one, two), Fault.long_line(at_token=3, megabytes=200))
                (await ask(room, stream=stream)).insist_on_success()
                await one.idle()
                await two.idle()
                read = near.passed[Direction.DOWNSTREAM] + far.passed[Direction.DOWNSTREAM]
                assert read < 16 * MIB


NOT_TEXT = {
    "bytes that are not UTF-8": b'data: {"choices":[{"index":0,"delta":{"content":"\xff\xc3\x28"}}]}\n\n',
    "half of a surrogate pair": saying("\\ud83e"),
    "NUL as it is": b'data: {"choices":[{"index":0,"delta":{"content":"\x00"}}]}\n\n',
    "an event that is a list": b"data: []\n\n",
    "choices that are none": b'data: {"choices":{"index":0}}\n\n',
    "a delta that is a text": b'data: {"choices":[{"index":0,"delta":"amber"}]}\n\n',
    "a content that is a number": b'data: {"choices":[{"index":0,"delta":{"content":7}}]}\n\n',
}


@pytest.mark.parametrize("data", NOT_TEXT.values(), ids=NOT_TEXT)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_what_is_no_text_reaches_nobody(open_room: OpenRoom, data: bytes, stream: bool):
    """E7: what is not UTF-8 never reaches a client, and no event that is no chunk breaks more than its own
    answer. (One that looks like a chunk passes unread: bytes are relayed as they are.)"""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), Fault.insert(data, at_token=5))
        came = await ask(room, stream=stream)  # it decodes each event
        assert not came.broken
        assert came.succeeded or came.failed_explicitly
        for engine in (one, two):
            engine.calm()
        (await ask(room, stream=stream)).insist_on_success()
        await room.idle()


async def test_what_is_escaped_or_split_is_the_same_text(open_room: OpenRoom):
    """E7: code points split between pieces, and NUL and others as JSON escapes."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once(
            (one, two), Fault.insert(saying("\\u0000\\ud83e\\udd8a"), at_token=0) & Fault.sliced(size=1)
        )
        came = await ask(room)
        assert came.text == "\0🦊" + came.reference()
        assert came.succeeded


ODD_ORDERS = {
    "each event twice": Fault.doubled(),
    "a second role": Fault.insert(b'data: {"choices":[{"index":0,"delta":{"role":"user"}}]}\n\n', at_token=5),
    "an end, and then more words": Fault.insert(FINISH, at_token=5),
    "an end mark, and then more words": Fault.insert(FINISH + b"data: [DONE]\n\n", at_token=5),
    "an end mark before any end": Fault.insert(b"data: [DONE]\n\n", at_token=5),
    "a choice that nobody asked for": Fault.insert(
        b'data: {"choices":[{"index":7,"delta":{"content":"!"}}]}\n\n', at_token=5
    ),
    "usage in the middle": Fault.insert(b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n', at_token=5),
}


@pytest.mark.parametrize("fault", ODD_ORDERS.values(), ids=ODD_ORDERS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_events_out_of_order_end_an_answer_at_most_once(
    open_room: OpenRoom, fault: Fault, stream: bool
):
    """E8: whatever the order, the client has one end, nothing after it, and at most one reason for it."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), fault)
        came = await ask(room, stream=stream)
        assert not came.broken
        assert came.succeeded or came.failed_explicitly
        assert came.after_the_end == 0
        assert came.done <= 1
        assert len(came.finishes) <= 1 or fault is ODD_ORDERS["each event twice"]
        for engine in (one, two):
            engine.calm()
        (await ask(room, stream=stream)).insist_on_success()
        await room.idle()


NUMBERS = {
    "negative": {"prompt_tokens": -5, "completion_tokens": -1, "total_tokens": -6},
    "huge": {"prompt_tokens": 10**18, "completion_tokens": 10**18, "total_tokens": 10**18},
    "no numbers": {"prompt_tokens": "many", "completion_tokens": None, "total_tokens": []},
    "not even an object": {"": 1},
}


@pytest.mark.parametrize("usage", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_false_numbers_spoil_nothing(open_room: OpenRoom, usage: dict, stream: bool):
    """E9: what a worker says of tokens is not trusted with the room's own figures."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        for engine in (one, two):
            engine.always(Fault.claim(usage=usage))
        for _ in range(6):
            came = await ask(room, stream=stream, stream_options={"include_usage": True} if stream else None)
            assert came.text == came.reference()
        for engine in (one, two):
            engine.always(OK)
        for _ in range(6):
            (await ask(room, stream=stream)).insist_on_success()
        async with room.http.get(f"{room.url}/health") as response:
            assert response.status == 200
            await response.json()
        await room.metrics()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_answer_has_the_name_that_was_asked_for(open_room: OpenRoom, stream: bool):
    """E9: whatever the worker calls its model."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        for engine in (one, two):
            engine.always(Fault.claim(model="somebody-else"))
        came = await ask(room, stream=stream)
        came.insist_on_success()
        assert came.models == ["fake"]


ALLOWED_HEADERS = {
    "cache-control",
    "connection",
    "content-length",
    "content-type",
    "date",
    "keep-alive",
    "retry-after",
    "server",
    "transfer-encoding",
    "x-accel-buffering",
    "x-balancer-attempts",
    "x-balancer-worker",
    "x-content-type-options",
    "x-request-id",
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_workers_headers_are_its_own_affair(open_room: OpenRoom, stream: bool):
    """E10: cookies, redirections and what concerns its connection alone."""
    theirs = {
        "Set-Cookie": "a=b",
        "Location": "http://example.com/",
        "Proxy-Authenticate": "Basic",
        "X-Request-ID": "theirs",
        "Access-Control-Allow-Origin": "*",
        "Upgrade": "h2c",
        "X-Secret": "x",
    }
    async with FakeEngine() as one, open_room(*rows(one)) as room:
        one.always(Fault.with_headers(theirs))
        came = await ask(room, stream=stream, headers={"X-Request-ID": "mine"})
        came.insist_on_success()
        names = {name.lower() for name in came.headers}
        assert names - {name for name in names if name.startswith("x-balancer-")} <= ALLOWED_HEADERS
        assert came.headers["X-Request-ID"] == "mine"


BAD_HEADS = {
    "a redirection": Fault.status(302) & Fault.with_headers({"Location": "http://127.0.0.1:9/"}),
    "a header of 200 kB": Fault.with_headers({"X-Long": "x" * 200_000}),
    "a thousand headers": Fault.with_headers({f"X-{number}": "x" * 100 for number in range(1000)}),
    "a line break in a header": Fault.with_headers({"X-Split": "a\r\n\r\nHTTP/1.1 200 OK"}),
    "a status that there is not": Fault.reply_with(b"", status=206),
}


@pytest.mark.parametrize("fault", BAD_HEADS.values(), ids=BAD_HEADS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_head_that_is_not_to_be_trusted_is_a_failure(open_room: OpenRoom, fault: Fault, stream: bool):
    """E10: nothing is followed and nothing of it is passed on; another worker answers."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), fault)
        (await ask(room, stream=stream)).insist_on_success()
        await room.idle()


async def test_who_is_well_and_cannot_generate_is_left_alone(open_room: OpenRoom):
    """E11: its list of models always answers; what counts is whether it generates. Back once it does."""
    async with FakeEngine() as broken, FakeEngine() as other:
        async with open_room(*rows(broken, other), breaker_rest=0.3) as room:
            broken.always(Fault.error_in_body())
            for _ in range(40):
                (await ask(room, stream=False)).insist_on_success()
                if room.worker("a").breaker == "open":
                    break
            assert room.worker("a").breaker == "open"
            assert room.worker("a").state == "ready"
            assert len(asked_for(broken)) <= 4
            broken.always(OK)
            await room.until(lambda: room.worker("a").breaker == "closed", "a probe has found it well")
            await room.idle()


@pytest.mark.timeout(60)
async def test_who_is_too_busy_to_tell_that_it_is_well_stays_in(open_room: OpenRoom):
    """E12: its list of models takes longer than any probe waits, while tokens flow. Progress is a proof of
    life: two probes that fail in a row change nothing."""
    async with FakeEngine(token_seconds=0.05) as busy, open_room(*rows(busy)) as room:
        busy.script(Fault.endless())
        came = Came(question(), CHAT)
        asked = asyncio.ensure_future(ask(room, into=came))
        await asyncio.wait_for(came.begun.wait(), 10)
        probes = len(busy.probes)
        busy.always(Fault.stall(), when=on("/v1/models"))
        states = set()
        await room.until(
            lambda: states.add(room.worker("a").state) or len(busy.probes) >= probes + 3,
            "three probes failed",
        )
        assert states == {"ready"}
        assert not asked.done()
        asked.cancel()
        busy.always(OK, when=on("/v1/models"))
        busy.resume()
        await room.idle()


async def test_a_slow_network_is_no_failure(open_room: OpenRoom):
    """W13 in small: 50 ms more or less on every piece, in both directions."""
    async with FakeEngine() as one, ToxicProxy(one.host, one.port, seed=13) as proxy:
        for direction in Direction:
            proxy.add(Latency(seconds=0.05, jitter=0.05), direction)
        async with open_room(listed(one, "a") | {"port": proxy.port}) as room:
            await room.ready()
            for stream in (True, False):
                (await ask(room, stream=stream)).insist_on_success()
            assert room.worker("a").success_rate == 1.0
