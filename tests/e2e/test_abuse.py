"""What hostile and broken clients send (RELIABILITY, series H), to both servers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import struct
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from balancer.core.model import Endpoint
from balancer.hardened import TINY_CHUNKS
from balancer.hot_path import ServerPolicy
from balancer.inference import InferencePolicy
from tests.e2e.fronts import CLOSE, Asked, Served, answers, post, serving

MIB = 1024 * 1024
CANARY = "canary-5f1c"


@pytest.fixture(params=[True, False], ids=["hot", "aiohttp"])
def hot(request) -> bool:
    return request.param


@pytest.fixture
def served_by(hot):
    def opened(inference: InferencePolicy | None = None, body_seconds: float = 30.0, **policy):
        policy = ServerPolicy(hot_path=hot, body_seconds=body_seconds, **policy)
        return serving(policy, inference, body_seconds=body_seconds)

    return opened


def chunked(*lines: str, body: bytes = b"2\r\n{}\r\n0\r\n\r\n") -> bytes:
    return post(b"", *lines, length="Transfer-Encoding: chunked") + body


SMUGGLED = post(b'"smuggled"')

MALFORMED = {
    "length twice, the same": post(b"{}", length="Content-Length: 2\r\nContent-Length: 2"),
    "length twice, different": post(b"{}", length="Content-Length: 2\r\nContent-Length: 3"),
    "length and chunks": post(
        b"2\r\n{}\r\n0\r\n\r\n", length="Content-Length: 12\r\nTransfer-Encoding: chunked"
    ),
    "chunks and length": post(
        b"2\r\n{}\r\n0\r\n\r\n", length="Transfer-Encoding: chunked\r\nContent-Length: 2"
    ),
    "an unknown encoding": post(b"{}", length="Transfer-Encoding: xchunked"),
    "chunked, then identity": post(b"{}", length="Transfer-Encoding: chunked, identity"),
    "a tab before chunked's name": post(b"{}", length="Transfer-Encoding: \x0bchunked"),
    "a space before the colon": post(b"{}", length="Transfer-Encoding : chunked"),
    "a length with a sign": post(b"{}", length="Content-Length: +2"),
    "a negative length": post(b"{}", length="Content-Length: -1"),
    "a hexadecimal length": post(b"{}", length="Content-Length: 0x2"),
    "a length of nothing": post(b"{}", length="Content-Length: "),
    "a length of two numbers": post(b"{}", length="Content-Length: 2 2"),
    "a bare line feed in the head": post(b"{}", f"A: {CANARY}\nB: c"),
    "a bare carriage return": post(b"{}", f"A: {CANARY}\rB: c"),
    "no host": post(b"{}", host=""),
    "an empty host": post(b"{}", host="Host:"),
    "two hosts": post(b"{}", host="Host: localhost\r\nHost: localhost"),
    "a host of other characters": post(b"{}", host=f"Host: localhost/{CANARY}?a=@b"),
    "a folded line": post(b"{}", f"A: b\r\n {CANARY}"),
    "a NUL in a header": post(b"{}", f"A: {CANARY}\x00b"),
    "a header without a name": post(b"{}", f": {CANARY}"),
    "a header without a colon": post(b"{}", CANARY),
    "a space in a name": post(b"{}", f"A {CANARY}: b"),
    "a line feed in a chunk's extension": chunked(body=b"2;a\nb\r\n{}\r\n0\r\n\r\n"),
    "a chunk's size that is no number": chunked(body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "a chunk's size beyond all bounds": chunked(body=b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
    "a chunk longer than its size": chunked(body=b"1\r\n{}\r\n0\r\n\r\n"),
    "a line beyond its bound": post(b"{}", f"A: {CANARY}" + "x" * 8200),
    "more headers than there may be": post(b"{}", *(f"A{number}: b" for number in range(200))),
    "another host in the target": post(b"{}", path="http://evil.test/v1/chat/completions"),
    "HTTP/0.9": post(b"{}", version="HTTP/0.9"),
    "HTTP/2.0": post(b"{}", version="HTTP/2.0"),
    "no version": b"POST /v1/chat/completions\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
    "a method of other characters": b"P(ST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a control character in the target": post(b"{}", path="/v1/chat/completions\x01"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_h4_what_two_parsers_could_read_in_two_ways_is_refused_and_nothing_follows(
    served_by, name, caplog
):
    async with served_by() as served:
        data = await served.exchange(MALFORMED[name] + SMUGGLED)
        (answer,) = answers(data)
        assert answer.status in (400, 431)
        assert answer.headers["connection"] == "close"
        assert "message" in json.loads(answer.body)["error"]
        assert CANARY.encode() not in data
        assert not served.inference.asked
    assert CANARY not in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("name", MALFORMED)
async def test_h4_the_same_on_a_connection_that_was_good_until_then(served_by, name):
    async with served_by() as served:
        reader, writer = await served.connect_and_send(post(b'"good"'))
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.findall(rb"Content-Length: (\d+)", head)[0]))
        writer.write(MALFORMED[name] + SMUGGLED)
        (answer,) = answers(await reader.read())
        assert answer.status in (400, 431)
        assert [asked.body for asked in served.inference.asked] == [b'"good"']


@pytest.mark.parametrize("value", [CANARY, CANARY + "\xb7", "100-continue, " + CANARY])
async def test_an_expectation_that_cannot_be_met_is_not_repeated(served_by, value, caplog):
    async with served_by() as served:
        data = await served.exchange(post(b"{}", f"Expect: {value}"))
        (answer,) = answers(data)
        assert (answer.status, answer.headers["connection"]) == (417, "close")
        assert CANARY.encode() not in data
        assert not served.inference.asked
    assert "Traceback" not in caplog.text


async def test_whoever_waits_to_be_asked_for_the_body_is_asked(served_by):
    async with served_by() as served:
        reader, writer = await served.connect_and_send(
            post(b"", "Expect: 100-continue", CLOSE, length="Content-Length: 2")
        )
        assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"{}")
        (answer,) = answers(await reader.read())
        assert answer.status == 200


async def test_h1_a_head_that_does_not_come_is_not_waited_for():
    async with serving(ServerPolicy(head_seconds=0.3)) as served:
        reader, writer = await served.connect()
        dripping = asyncio.ensure_future(drip(writer, post()))
        assert await reader.read() == b""
        dripping.cancel()
        assert not served.inference.asked


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    for at in range(len(data)):
        writer.write(data[at : at + 1])
        await asyncio.sleep(0.02)


async def test_h2_a_body_that_does_not_come_is_a_408(served_by):
    async with served_by(body_seconds=0.3) as served:
        reader, writer = await served.connect_and_send(post(b"", length="Content-Length: 9000"))
        dripping = asyncio.ensure_future(drip(writer, b"x" * 9000))
        (answer,) = answers(await reader.read())
        dripping.cancel()
        assert answer.status == 408
        assert json.loads(answer.body)["error"]["code"] == "request_timeout"
        writer.close()
        await served.until(lambda: not served.server.connections.count)


async def test_h3_slow_readers_take_no_more_memory_than_their_bound():
    sizes = []

    async def pour(asked: Asked, client):
        room = asyncio.Event()
        room.set()
        client.begin(200, {}, None)
        client.on_room(room.clear, room.set)
        while True:
            await room.wait()
            client.write(b"x" * 16384)
            sizes.append(max(one._transport.get_write_buffer_size() for one in served.server.ours))
            await asyncio.sleep(0)

    async with serving(ServerPolicy(slow_reader_seconds=1.0)) as served:
        served.inference.script = pour
        for _ in range(10):
            await served.connect_and_send(post())
        await served.until(lambda: served.inference.cancelled == 10)
        assert 0 < max(sizes) <= 128 * 1024
        await served.until(lambda: not served.server.connections.count)


@pytest.mark.parametrize(
    ("head", "sent"),
    [
        (post(b"", length=f"Content-Length: {100 * MIB}"), 100 * MIB),
        (post(b"", length=f"Content-Length: {4 * MIB + 1}"), 4 * MIB + 1),
        (chunked(body=b""), 100 * MIB),
    ],
    ids=["100 MB", "a byte too long", "in chunks, without a length"],
)
async def test_h5_a_body_beyond_the_bound_is_a_413(served_by, head, sent):
    async with served_by(InferencePolicy(max_body_bytes=4 * MIB)) as served:
        before = psutil.Process().memory_info().rss
        reader, writer = await served.connect_and_send(head)
        piece = b"x" * 65536 if b"chunked" not in head else b"10000\r\n" + b"x" * 65536 + b"\r\n"
        pouring = asyncio.ensure_future(pour_in(writer, piece, sent))
        line = await reader.readline()
        assert b" 413 " in line
        assert psutil.Process().memory_info().rss - before < 24 * MIB
        pouring.cancel()
        assert not served.inference.asked


async def pour_in(writer: asyncio.StreamWriter, piece: bytes, size: int) -> None:
    try:
        for _ in range(size // 65536 + 1):
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        pass


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, identity"])
async def test_h6_a_packed_body_is_refused_before_it_is_read(served_by, coding):
    async with served_by() as served:
        data = post(b"", f"Content-Encoding: {coding}", length=f"Content-Length: {MIB}")
        (answer,) = answers(await served.exchange(data))  # and with it the connection ends
        assert answer.status == 415


@pytest.mark.parametrize("size", ["1", "1;a=b", "0001", "01 ;x"], ids=repr)
async def test_h9_a_body_in_a_million_pieces_is_not_read_to_its_end(served_by, size):
    flood = chunked(body=b"") + f"{size}\r\nx\r\n".encode() * 1_000_000
    async with served_by() as served:
        reader, writer = await served.connect()
        pouring = asyncio.ensure_future(pour_raw(writer, flood))
        with suppress(ConnectionError):  # the reset may come before the answer is read
            assert b" 400 " in await reader.read()
        pouring.cancel()
        assert not served.inference.asked


async def pour_raw(writer: asyncio.StreamWriter, data: bytes) -> None:
    try:
        for at in range(0, len(data), 65536):
            writer.write(data[at : at + 65536])
            await writer.drain()
    except ConnectionError:
        pass


async def test_h9_ordinary_chunks_are_read(served_by):
    pieces = b"".join(b"5\r\nabcde\r\n" for _ in range(TINY_CHUNKS // 4)) + b"0\r\n\r\n"
    async with served_by() as served:
        (answer,) = answers(await served.exchange(chunked(CLOSE, body=pieces)))
        assert (answer.status, json.loads(answer.body)["size"]) == (200, 5 * (TINY_CHUNKS // 4))


async def test_h12_ten_thousand_requests_sent_ahead_take_no_memory_of_their_own(served_by):
    gate = asyncio.Event()

    async def wait(asked: Asked, client):
        await gate.wait()
        client.begin(200, {}, 2)
        client.write(b"{}")
        client.end()

    async with served_by() as served:
        served.inference.script = wait
        reader, writer = await served.connect()
        sending = asyncio.ensure_future(pour_raw(writer, post(b"{}", f"X-A: {'x' * 400}") * 9_999))
        await served.until(lambda: len(served.inference.asked) == 1)
        await served.until(lambda: all(one._paused_reading for one in served.server.ours))
        # What is not read stays with the client, or with the kernel between them.
        assert all(len(one._pending) <= 512 * 1024 for one in served.server.ours)
        gate.set()
        await sending
        writer.write(post(b"{}", CLOSE))
        assert len(answers(await reader.read())) == 10_000


@pytest.mark.parametrize(
    "line",
    ["X-Request-ID: a\\r\\nX-Evil: 1", "X-Request-ID: <script>", "Origin-Agent: x", "X-Priority: \\x1b[31m"],
)
async def test_h13_nothing_of_a_request_becomes_a_header_of_the_answer(served_by, line):
    async with served_by() as served:
        data = await served.exchange(post(b"{}", line, CLOSE, kind="Content-Type: text/plain"))
        (answer,) = answers(data)
        assert answer.status in (400, 415)
        assert not {"x-evil"} & set(answer.headers)
        assert line.split(": ")[1].encode() not in data


HOSTS = ["evil.test", "localhost.evil.test", "127.0.0.1.evil.test", "evil.test:4000", "a.local.evil.test"]
FOREIGN = [
    "Origin: http://evil.test",
    "Origin: https://localhost.evil.test",
    "Origin: null",
    "Origin: http://localhost@evil.test",
    "Sec-Fetch-Site: cross-site",
    "Sec-Fetch-Site: same-site",
    "Sec-Fetch-Site: cross-site\r\nOrigin: http://evil.test",
]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def all_paths(served: Served) -> list[str]:
    """Of every route, those of applications within the application too."""
    found = {"/admin", "/admin/nothing"}
    for route in served.server._runner.app.router.routes():
        if route.resource is not None:
            found.add(re.sub(r"\{[^}]+\}", "x", route.resource.canonical))
    return sorted(found)


def asking(method: str, path: str, *lines: str) -> bytes:
    head = [f"{method} {path} HTTP/1.1", *lines, "Content-Type: application/json", "Content-Length: 2", CLOSE]
    return "\r\n".join([*head, "", "{}"]).encode()


async def test_h14_a_page_of_another_site_reaches_no_route_by_any_method(served_by):
    async with served_by() as served:
        paths = all_paths(served)
        assert {*(endpoint.value for endpoint in Endpoint), "/admin/workers/x"} < set(paths)
        for path in paths:
            for method in METHODS:
                for host in HOSTS:
                    (answer,) = head_only(await served.exchange(asking(method, path, f"Host: {host}")))
                    assert answer in (421, 404, 405), (method, path, host)
                    if answer == 404:
                        assert path not in {endpoint.value for endpoint in Endpoint}
                for line in FOREIGN:
                    (answer,) = head_only(
                        await served.exchange(asking(method, path, "Host: localhost", line))
                    )
                    assert answer in (403, 404, 405), (method, path, line)
        assert not served.inference.asked


def head_only(data: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", data)]


@pytest.mark.parametrize(
    "lines",
    [
        ["Host: localhost:4000"],
        ["Host: 192.168.1.5:4000"],
        ["Host: [fe80::1]:4000"],
        ["Host: balancer"],
        ["Host: localhost", "Origin: http://localhost:3000"],
        ["Host: 10.0.0.1:4000", "Origin: http://10.0.0.1:4000", "Sec-Fetch-Site: same-origin"],
        ["Host: localhost", "Origin: app://obsidian.md"],
        ["Host: localhost", "Origin: vscode-webview://abc", "Sec-Fetch-Site: cross-site"],
        ["Host: localhost", "Sec-Fetch-Site: none"],
    ],
)
async def test_h14_who_is_at_home_is_served(served_by, lines):
    async with served_by() as served:
        data = await served.exchange(asking("POST", "/v1/chat/completions", *lines))
        assert [answer.status for answer in answers(data)] == [200]


NOISE = {
    "TLS": bytes.fromhex("160301020001000001fc0303") + os.urandom(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(27),
    "SMB": b"\x00\x00\x00\x45\xffSMBr" + bytes(60),
    "SOCKS": b"\x05\x01\x00",
    "Redis": b"*1\r\n$4\r\nPING\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "random": os.urandom(500),
    "spaces": b" " * 2000 + b"\r\n\r\n",
    "text": CANARY.encode() + b"\r\n\r\n",
    "a very long line": CANARY.encode() * 5000,
    "line ends": b"\r\n" * 1000,
    "NUL": bytes(1000),
}


@pytest.mark.parametrize("name", NOISE)
async def test_h15_noise_is_closed_without_an_echo(served_by, name, caplog):
    caplog.set_level("DEBUG")
    async with served_by() as served:
        reader, writer = await served.connect_and_send(NOISE[name])
        writer.write_eof()
        data = await reader.read()
        alert = bytes.fromhex("15030100020246") if name == "TLS" else b""  # in the words of who asked
        assert data in (b"", alert) or all(400 <= answer.status < 500 for answer in answers(data))
        assert CANARY.encode() not in data
        await served.until(lambda: not served.server.connections.count)
    assert "Traceback" not in caplog.text
    assert not any(record.exc_info for record in caplog.records)
    assert CANARY not in caplog.text


async def test_h15_noise_fills_no_log(served_by, caplog):
    caplog.set_level("INFO")
    async with served_by() as served:
        begun = time.monotonic()
        for _ in range(20):
            for data in NOISE.values():
                reader, writer = await served.connect_and_send(data)
                writer.write_eof()
                await reader.read()
        seconds = time.monotonic() - begun
    lines = [record for record in caplog.records if record.name.startswith(("balancer", "aiohttp"))]
    lines = [record for record in lines if "files open" not in record.getMessage()]
    assert len(lines) <= seconds + 1


async def test_a_connection_that_is_reset_in_any_place_leaves_nothing(served_by):
    data = post(b'{"a": 1}')
    async with served_by() as served:
        for cut in range(0, len(data), 5):
            _, writer = await served.connect_and_send(data[:cut])
            await writer.drain()
            raw = writer.get_extra_info("socket")
            raw.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER: close with a reset
            writer.transport.abort()
        await served.until(lambda: not served.server.connections.count)
        assert not served.server.ours


FEW_FILES = """
    import asyncio, json, resource, sys
    import uvloop
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    from balancer.hot_path import ServerPolicy
    from tests.e2e.fronts import post, serving, answers, CLOSE

    async def main():
        async with serving(ServerPolicy(hot_path=sys.argv[1] == "hot")) as served:
            print(json.dumps({"port": served.port, "most": served.server.connections.policy.max_connections}))
            sys.stdout.flush()
            await asyncio.to_thread(sys.stdin.read)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
"""


async def test_h11_without_files_left_it_goes_on_and_recovers(hot, tmp_path):
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(FEW_FILES), "hot" if hot else "aiohttp"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
    )
    try:
        told = json.loads(await process.stdout.readline())
        served = Served(None, None, told["port"])  # type: ignore[arg-type]
        assert told["most"] < 128
        crowd = [await served.connect() for _ in range(300)]
        refused = 0
        for _, writer in crowd:
            writer.write(post())
        for reader, _ in crowd[-20:]:  # told so, or cut where not even that was possible
            try:
                line = await reader.readline()
            except ConnectionError:
                line = b""
            assert line == b"" or b" 503 " in line
            refused += 1
        assert refused == 20
        used = psutil.Process(process.pid).cpu_times().user
        await asyncio.sleep(0.5)
        assert psutil.Process(process.pid).cpu_times().user - used < 0.25
        for _, writer in crowd:
            writer.close()
        async with asyncio.timeout(20):
            while b" 200 " not in (await served.exchange(post(b"{}", CLOSE))):
                await asyncio.sleep(0.05)
    finally:
        process.stdin.close()
        await process.wait()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    assert process.returncode == 0
