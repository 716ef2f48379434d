"""The hot path: what it reads itself, what it leaves to aiohttp, and a connection's life."""

from __future__ import annotations

import asyncio

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.clean_head import INCOMPLETE, UNCLEAN, CleanHead, HeadPolicy, read_head
from balancer.connections import ConnectionPolicy, Connections, NoConnectionFree, TooManyConnections
from balancer.hot_path import ServerPolicy
from balancer.inference import InferencePolicy
from tests.e2e.fronts import CLOSE, Asked, answers, post, serving

BOUNDS = HeadPolicy()
LARGE = 128 << 20
"""Bytes; more than two sockets and a StreamReader hold between them on any machine."""


# What a clean head is


def test_an_ordinary_request_is_clean():
    data = post(b"{}", "X-Priority:  batch\t") + b"more"
    found = read_head(data, BOUNDS)
    assert isinstance(found, CleanHead)
    assert (found.endpoint.value, found.length, found.keep_alive) == ("/v1/chat/completions", 2, True)
    assert found.headers["x-priority"] == "batch"
    assert data[found.size :] == b"{}more"


def test_the_beginning_of_a_clean_request_is_waited_for():
    data = post(b"")
    for size in range(1, len(data)):
        assert read_head(data[:size], BOUNDS) is INCOMPLETE


@pytest.mark.parametrize(
    "head", ["\n", "A: b\n", "A: b\rc", "A\r\n", " A", "A :", "A: \x00", "A: \xff", "A: b\r\n ", "\r\r"]
)
def test_what_can_no_longer_become_clean_is_not_waited_for(head):
    data = b"POST /v1/completions HTTP/1.1\r\n" + head.encode("latin-1")
    assert read_head(data, BOUNDS) is UNCLEAN


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01",
        b"\r\n" + post(),
        post(version="HTTP/1.0"),
        post(version="HTTP/1.2"),
        post(path="/v1/chat/completions?a=1"),
        post(path="/v1/models"),
        post(path="http://localhost/v1/chat/completions"),
        post(host=""),
        post(host="Host:"),
        post(host="Host: a b"),
        post(host="Host: a\r\nHost: a"),
        post(length=""),
        post(length="Content-Length: +2"),
        post(length="Content-Length: 0x2"),
        post(length="Content-Length: 12345678901"),
        post(length="Content-Length: 2\r\nContent-Length: 2"),
        post(length="Content-Length: 2, 2"),
        post(b"{}", "Transfer-Encoding: chunked"),
        post(b"{}", "Transfer-Encoding : chunked"),
        post(b"{}", "Expect: 100-continue"),
        post(b"{}", "Upgrade: h2c"),
        post(b"{}", "Connection: Upgrade"),
        post(b"{}", "A: b\r\n folded"),
        post(b"{}", "A: b\nC: d"),
        post(b"{}", "A: \x00"),
        post(b"{}", "A: \xff"),
        post(b"{}", "A b: c"),
        post(b"{}", ": c"),
        post(b"{}", "no colon"),
        post(b"{}", "A: " + "x" * 8190),
        post(b"{}", *(f"A{number}: b" for number in range(64))),
        post(b"{}", "A: 1", "a: 2"),
        b"POST /v1/chat/completions HTTP/1.1\r\n" + b"A: b\r\n" * 4000,
        b"POST /v1/chat/completions HTTP/1.1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\n\n",
    ],
)
def test_whatever_else_comes_is_not(data):
    assert read_head(data, BOUNDS) is UNCLEAN


class Heard:
    def __init__(self) -> None:
        self.headers: list[tuple[str, str]] = []
        self.url = self.body = b""
        self.done = 0

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.done += 1


LINES = st.lists(
    st.sampled_from(
        [
            *("Content-Length: 2", "Content-Length: 02", "content-length:2 ", "Transfer-Encoding: chunked"),
            *("Connection: keep-alive", "Connection: close", "Connection: x", "Expect: 100-continue"),
            *("Host: localhost", "Host: [::1]:80", "host:\ta", "A: b", "a:", "A :b", " A: b", "A: \x7f"),
        ]
    )
    | st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=8),
    max_size=8,
)


@given(LINES, st.sampled_from(["\r\n", "\r\n", "\r\n", "\n", "\r"]), st.binary(max_size=6))
def test_llhttp_reads_a_clean_request_in_the_same_way(lines, ending, body):
    head = ending.join(["POST /v1/completions HTTP/1.1", *lines, "", ""])
    data = head.encode("latin-1") + body
    found = read_head(data, BOUNDS)
    if isinstance(found, CleanHead) and found.length <= len(data) - found.size:
        heard = Heard()
        parser = httptools.HttpRequestParser(heard)
        parser.feed_data(data[: found.size + found.length])
        assert (heard.done, parser.get_method(), parser.get_http_version()) == (1, b"POST", "1.1")
        assert heard.url.decode() == found.endpoint.value
        assert dict(heard.headers) == {name: value for name, value in found.headers.items()}
        assert heard.body == data[found.size : found.size + found.length]
        assert parser.should_keep_alive() == found.keep_alive


# A connection's life


@pytest.fixture(params=[True, False], ids=["hot", "aiohttp"])
def hot(request) -> bool:
    return request.param


async def test_an_answer_has_the_head_that_it_needs(hot):
    async with serving(ServerPolicy(hot_path=hot)) as served:
        (answer,) = answers(await served.exchange(post(b"{}", CLOSE)))
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert answer.headers["date"].endswith("GMT")
        assert "server" not in answer.headers
        assert served.inference.asked[0].body == b"{}"


async def test_only_clean_requests_stay_on_the_hot_path():
    async with serving(ServerPolicy()) as served:
        reader, writer = await served.connect()
        writer.write(post())
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        assert len(served.server.ours) == 1
        writer.write(post(b"{}", "X-A: 1", "X-A: 2"))
        await served.until(lambda: len(served.inference.asked) == 2)
        assert not served.server.ours
        writer.write(post())
        await served.until(lambda: len(served.inference.asked) == 3)


async def test_it_does_not_matter_where_a_request_is_cut(hot):
    data = post(b'{"a": 1}') + post(b"second", CLOSE)
    async with serving(ServerPolicy(hot_path=hot)) as served:
        for cut in range(1, len(data), 7):
            assert len(answers(await served.exchange(data[:cut], data[cut:]))) == 2
        bodies = [asked.body for asked in served.inference.asked]
        assert bodies == [b'{"a": 1}', b"second"] * (len(bodies) // 2)


async def test_requests_sent_ahead_are_answered_in_their_order(hot):
    async with serving(ServerPolicy(hot_path=hot)) as served:
        ahead = b"".join(post(f"{number}".encode()) for number in range(50)) + post(b"50", CLOSE)
        got = answers(await served.exchange(ahead))
        assert [answer.status for answer in got] == [200] * 51
        assert [asked.body for asked in served.inference.asked] == [b"%d" % n for n in range(51)]


async def test_a_stream_is_framed_piece_by_piece(hot):
    async def stream(asked: Asked, client):
        client.begin(200, {"Content-Type": "text/event-stream"}, None)
        for number in range(3):
            client.write(b"data: %d\n\n" % number)
            client.write(b"")
            await asyncio.sleep(0)
        client.end()

    async with serving(ServerPolicy(hot_path=hot)) as served:
        served.inference.script = stream
        (first, second) = answers(await served.exchange(post() + post(b"{}", CLOSE)))
        assert first.body == second.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"


async def test_an_answer_that_does_not_become_whole_ends_the_connection():
    async def torn(asked: Asked, client):
        client.begin(200, {}, None)
        client.write(b"a part")
        raise RuntimeError("a defect, for the test")

    async with serving(ServerPolicy()) as served:
        served.inference.script = torn
        data = await served.exchange(post())
        assert b"a part" in data
        assert b"0\r\n\r\n" not in data


@pytest.mark.parametrize("leave", ["closes", "closes its half", "resets"])
async def test_who_leaves_is_not_worked_for_any_more(hot, leave):
    begun = asyncio.Event()

    async def wait(asked: Asked, client):
        begun.set()
        await asyncio.sleep(3600)

    async with serving(ServerPolicy(hot_path=hot)) as served:
        served.inference.script = wait
        _, writer = await served.connect()
        writer.write(post())
        await begun.wait()
        if leave == "closes":
            writer.close()
        elif leave == "resets":
            writer.transport.abort()
        else:
            writer.write_eof()
        await served.until(lambda: served.inference.cancelled == 1)
        await served.until(lambda: not served.server.connections.count)


async def test_a_client_that_reads_slowly_holds_its_answer_up_and_is_dropped_in_the_end():
    """While its sockets still take some it is only held up; it is dropped where they take no more."""
    room = asyncio.Event()
    room.set()
    held_up = 0

    def pause():
        nonlocal held_up
        held_up += 1
        room.clear()

    async def pour(asked: Asked, client):
        client.begin(200, {}, None)
        client.on_room(pause, room.set)
        while True:
            await room.wait()
            client.write(b"x" * 65536)
            await asyncio.sleep(0)

    async with serving(ServerPolicy(slow_reader_seconds=0.3)) as served:
        served.inference.script = pour
        await served.connect_and_send(post())
        await served.until(lambda: served.inference.cancelled == 1)
        await served.until(lambda: not served.server.connections.count)
        assert held_up


async def test_a_client_that_catches_up_gets_the_rest():
    told = []
    room = asyncio.Event()

    async def pour(asked: Asked, client):
        client.begin(200, {}, None)
        client.on_room(lambda: told.append("pause"), room.set)
        while not told:
            client.write(b"x" * 65536)
            await asyncio.sleep(0)
        await room.wait()
        client.write(b"the rest")
        client.end()

    async with serving(ServerPolicy()) as served:
        served.inference.script = pour
        reader, _ = await served.connect_and_send(post(b"{}", CLOSE))
        await served.until(lambda: told == ["pause"])
        (answer,) = answers(await reader.read())
        assert answer.body.endswith(b"xthe rest")


async def test_who_reads_nothing_gets_no_second_answer_begun(hot):
    async def large(asked: Asked, client):
        client.begin(200, {}, LARGE)
        client.write(b"x" * LARGE)
        client.end()

    async with serving(ServerPolicy(hot_path=hot)) as served:
        served.inference.script = large
        reader, _ = await served.connect_and_send(post() * 20)
        await served.until(lambda: len(served.inference.asked) == 1)
        await reader.readexactly(1000)
        assert len(served.inference.asked) == 1


async def test_a_header_value_cannot_begin_another_header():
    async def evil(asked: Asked, client):
        client.begin(200, {"X-A": "b\r\nX-Evil: 1", "X-B": "\u0436\x00"}, 0)
        client.end()

    async with serving(ServerPolicy()) as served:
        served.inference.script = evil
        (answer,) = answers(await served.exchange(post(b"{}", CLOSE)))
        assert "x-evil" not in answer.headers
        assert answer.headers["x-a"] == "b??X-Evil: 1"


async def test_an_answer_of_another_length_than_announced_is_the_last():
    async def short(asked: Asked, client):
        client.begin(200, {}, 5)
        client.write(b"abc")
        client.end()

    async with serving(ServerPolicy()) as served:
        served.inference.script = short
        data = await served.exchange(post() + post())
        assert data.count(b"HTTP/1.1 200") == 1
        with pytest.raises(ValueError, match="shorter"):
            answers(data)


async def test_while_it_drains_connections_are_not_kept(hot):
    async with serving(ServerPolicy(hot_path=hot)) as served:
        served.inference.draining = True
        (answer,) = answers(await served.exchange(post()))
        assert (answer.status, answer.headers["connection"]) == (503, "close")


async def test_what_is_refused_by_its_head_does_not_end_the_connection_if_its_body_is_there():
    async with serving(ServerPolicy()) as served:
        wrong = post(b"{}", kind="Content-Type: text/plain")
        statuses = [answer.status for answer in answers(await served.exchange(wrong + post(b"{}", CLOSE)))]
        assert statuses == [415, 200]


async def test_a_large_body_in_many_pieces_arrives_whole(hot):
    body = bytes(range(256)) * 8192
    async with serving(ServerPolicy(hot_path=hot)) as served:
        data = post(body, CLOSE)
        pieces = [data[at : at + 100_000] for at in range(0, len(data), 100_000)]
        assert len(answers(await served.exchange(*pieces))) == 1
        assert served.inference.asked[0].body == body


# When connections end


async def test_an_idle_connection_is_closed():
    async with serving(ServerPolicy(hot_path=True, head_seconds=0.2)) as served:
        assert await served.exchange(post())  # and no more after the answer
        assert await served.exchange(b"POST /v1/chat/comp") == b""


async def test_connections_of_a_server_that_retires_end_with_their_next_answer(hot):
    async with serving(ServerPolicy(hot_path=hot, retiring_idle_seconds=10)) as served:
        reader, writer = await served.connect_and_send(post())
        await reader.readuntil(b"\r\n\r\n")
        served.server.retire()
        assert not served.server.emptied.is_set()
        writer.write(post(b"the last"))
        await asyncio.wait_for(served.server.emptied.wait(), 20)
        got = await reader.read()
        assert b"Connection: close" in got
        assert served.inference.asked[-1].body == b"the last"
        with pytest.raises(OSError):
            await served.connect()


async def test_a_connection_that_was_promised_to_be_kept_is_kept_while_the_server_retires(hot):
    gate, begun = asyncio.Event(), asyncio.Event()

    async def wait(asked: Asked, client):
        client.begin(200, {}, None)
        client.write(b"a")
        begun.set()
        await gate.wait()
        client.end()

    async with serving(ServerPolicy(hot_path=hot, retiring_idle_seconds=10)) as served:
        served.inference.script = wait
        reader, writer = await served.connect_and_send(post())
        await reader.readuntil(b"\r\n\r\n")
        served.server.retire()
        gate.set()
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(post(b"the last"))
        (answer,) = answers(await reader.read())
        assert answer.headers["connection"] == "close"
        await asyncio.wait_for(served.server.emptied.wait(), 20)


async def test_idle_connections_of_a_server_that_retires_are_not_waited_for(hot):
    async with serving(ServerPolicy(hot_path=hot, retiring_idle_seconds=0.1)) as served:
        reader, _ = await served.connect_and_send(post())
        await reader.readuntil(b"\r\n\r\n")
        other, _ = await served.connect()
        await served.until(lambda: served.server.connections.count == 2)
        served.server.retire()
        await asyncio.wait_for(served.server.emptied.wait(), 20)
        assert await other.read() == b""


async def test_ending_the_server_ends_what_is_under_way(hot):
    begun = asyncio.Event()

    async def wait(asked: Asked, client):
        begun.set()
        await asyncio.sleep(3600)

    async with serving(ServerPolicy(hot_path=hot)) as served:
        served.inference.script = wait
        reader, _ = await served.connect_and_send(post())
        await begun.wait()
    assert served.inference.cancelled == 1
    assert await reader.read() == b""


# How many there may be


async def test_one_connection_too_many_is_told_and_closed(hot):
    policy = ServerPolicy(hot_path=hot, connections=ConnectionPolicy(max_connections=2))
    async with serving(policy) as served:
        first, _ = await served.connect_and_send(post())
        second, writer = await served.connect_and_send(post())
        assert b" 200 " in await first.readline()
        assert b" 200 " in await second.readline()
        (answer,) = answers(await served.exchange(post()))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert b"no_connection_free" in answer.body
        writer.close()
        await served.until(lambda: served.server.connections.count == 1)
        assert answers(await served.exchange(post(b"{}", CLOSE)))[0].status == 200


def test_an_address_has_only_so_many_connections_and_its_count_is_forgotten():
    open_now = Connections(ConnectionPolicy(max_connections=8, max_connections_per_address=2))
    for _ in range(2):
        open_now.open("10.0.0.1")
    with pytest.raises(TooManyConnections, match="max_connections_per_address"):
        open_now.open("10.0.0.1")
    open_now.open("10.0.0.2")
    open_now.close("10.0.0.1")
    open_now.open("10.0.0.1")
    for own in ("127.0.0.1", "::1", "::ffff:127.0.0.1", ""):  # programs of this machine are not held to it
        open_now.open(own)
    open_now.open("127.0.0.1")
    with pytest.raises(NoConnectionFree):
        open_now.open("10.0.0.3")
    for address in ("10.0.0.1", "10.0.0.1", "10.0.0.2", "127.0.0.1", "::1", "::ffff:127.0.0.1", ""):
        open_now.close(address)
    assert (open_now.count, open_now._by_address) == (1, {"127.0.0.1": 1})


async def test_the_body_limit_holds_before_the_body_comes(hot):
    limits = InferencePolicy(max_body_bytes=1000)
    async with serving(ServerPolicy(hot_path=hot), limits) as served:
        (answer,) = answers(await served.exchange(post(b"", length="Content-Length: 1001")))
        assert (answer.status, served.inference.asked) == (413, [])
