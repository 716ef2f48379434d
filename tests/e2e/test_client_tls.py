"""TLS towards clients: on both servers, with a certificate of our own making and with files."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import ssl
import stat
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop

from balancer import client_tls
from balancer.app import running
from balancer.client_tls import ClientTls, Names, TlsFault
from balancer.hot_path import ServerPolicy
from balancer.inference import Client
from balancer.reached import reach
from balancer.settings import load
from tests.e2e.conftest import OpenRoom, Room
from tests.e2e.fronts import CLOSE, Asked, answers, post, serving
from tests.fakes.engine import FakeEngine
from tests.fakes.faults import Fault

BOTH = pytest.mark.parametrize("hot_path", [True, False], ids=["hot", "aiohttp"])
BODY: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Name some trees."}]}
CHAT = "/v1/chat/completions"
NAMES = Names(frozenset({"localhost"}), frozenset({"127.0.0.1", "::1"}))
NOW = datetime(2030, 1, 1, tzinfo=UTC)
WAIT_SECONDS = 20.0


def trusting(room: Room) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(room.data_dir / "tls" / "certificate.pem"))


def secure_url(room: Room, path: str = "") -> str:
    return f"https://127.0.0.1:{room.balancer.port}{path}"


@BOTH
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_with_a_certificate_of_its_own_it_is_spoken_to_by_tls(
    open_room: OpenRoom, hot_path: bool, stream: bool
):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, tls="self-signed") as room:
        trusted = trusting(room)
        for _ in range(2):  # the second time over the same connection
            async with room.http.post(
                secure_url(room, CHAT), json=BODY | {"stream": stream}, ssl=trusted
            ) as response:
                assert response.status == 200
                assert b"fake" in await response.read()
                assert "Strict-Transport-Security" not in response.headers
        async with room.http.get(secure_url(room, "/admin/workers"), ssl=trusted) as response:
            assert response.status == 401
        key = room.admin_headers["Authorization"].split()[1]
        async with room.http.post(
            secure_url(room, "/admin/session"), json={"key": key}, ssl=trusted
        ) as response:
            assert response.cookies["balancer_session"]["secure"]
        pem = (room.data_dir / "tls" / "certificate.pem").read_text()
        fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
        assert room.balancer.tls is not None
        assert room.balancer.tls.fingerprint == fingerprint
        assert stat.S_IMODE((room.data_dir / "tls" / "key.pem").stat().st_mode) == 0o600


@BOTH
async def test_plain_http_on_a_port_with_tls_ends_quietly_and_is_told_once(
    open_room: OpenRoom, hot_path: bool, caplog
):
    caplog.set_level(logging.INFO)
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, tls="self-signed") as room:
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", room.balancer.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            async with asyncio.timeout(WAIT_SECONDS):
                with suppress(ConnectionError):
                    assert b"HTTP/1.1 200" not in await reader.read()
            writer.close()
        assert caplog.text.count("clients have to use https://") == 1
        assert "Traceback" not in caplog.text
        async with room.http.post(secure_url(room, CHAT), json=BODY, ssl=trusting(room)) as response:
            assert response.status == 200


@BOTH
async def test_connections_count_before_tls_is_agreed_on_and_give_their_places_back(
    open_room: OpenRoom, hot_path: bool, caplog
):
    caplog.set_level(logging.INFO)
    async with FakeEngine() as engine:
        settings = {"hot_path": hot_path, "tls": "self-signed", "max_connections": 8}
        async with open_room(engine, **settings) as room, asyncio.timeout(2 * WAIT_SECONDS):
            counted = room.balancer._server.connections
            silent = [await asyncio.open_connection("127.0.0.1", room.balancer.port) for _ in range(8)]
            await room.until(lambda: counted.count == 8, "all of them counted")
            reader, writer = await asyncio.open_connection("127.0.0.1", room.balancer.port)
            with suppress(ConnectionError):
                assert await reader.read() == b""  # one more is ended at once
            writer.close()
            assert "no_connection_free" in caplog.text
            silent[0][1].write(b"no TLS at all")
            silent[1][1].write(b"\x16\x03\x01")
            for _, one in silent:
                await one.drain()
                one.close()
            await room.until(lambda: counted.count == 0, "their places given back")
            for _ in range(20):
                async with (
                    aiohttp.ClientSession() as http,
                    http.post(secure_url(room, CHAT), json=BODY, ssl=trusting(room)) as response,
                ):
                    assert response.status == 200
            await room.until(lambda: counted.count == 0, "theirs too")
            assert "Traceback" not in caplog.text


async def test_who_does_not_agree_on_tls_is_given_up(open_room: OpenRoom, monkeypatch):
    monkeypatch.setattr(
        "balancer.app._server_policy", lambda settings: ServerPolicy(tls_handshake_seconds=0.1)
    )
    async with FakeEngine() as engine, open_room(engine, tls="self-signed") as room:
        reader, writer = await asyncio.open_connection("127.0.0.1", room.balancer.port)
        async with asyncio.timeout(WAIT_SECONDS):
            with suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        await room.until(lambda: room.balancer._server.connections.count == 0, "its place given back")


@BOTH
async def test_tls_on_a_plain_port_gets_an_alert_and_is_told(open_room: OpenRoom, hot_path: bool, caplog):
    caplog.set_level(logging.INFO)
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path) as room:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
            await asyncio.open_connection("127.0.0.1", room.balancer.port, ssl=context)
        assert "clients have to use http://" in caplog.text
        assert (await room.http.get(f"{room.url}/health")).status == 200


@BOTH
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_who_reads_slowly_over_tls_holds_up_its_worker_and_gets_all_of_it(tmp_path: Path, hot_path, loop):
    """The answer is as long as it has to be for its writer to be told to pause; the limits of what waits are
    those of a plain connection."""
    written, paused, resumed = [0], asyncio.Event(), asyncio.Event()

    async def pour(_asked: Asked, client: Client) -> None:
        client.begin(200, {}, None)
        client.on_room(paused.set, resumed.set)
        while not paused.is_set():
            client.write(b"x" * 16384)
            written[0] += 16384
            await asyncio.sleep(0)
        await resumed.wait()
        client.write(b"the rest")
        client.end()

    async def scene() -> None:
        tls = ClientTls(*pair(tmp_path, now=datetime.now(UTC)))
        tls._load()
        async with serving(ServerPolicy(hot_path=hot_path), tls=tls.context) as served:
            served.inference.script = pour
            reader, _ = await served.connect_and_send(post(b"{}", CLOSE))
            await served.until(paused.is_set)
            assert written[0] < 64 * 1024 * 1024  # what the sockets and the client's buffer take, and no more
            async with asyncio.timeout(WAIT_SECONDS):
                (answer,) = answers(await reader.read())
            assert answer.body.endswith(b"xthe rest")
            assert len(answer.body) == written[0] + len(b"the rest")

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())


@BOTH
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_who_reads_nothing_over_tls_is_dropped_in_the_end(tmp_path: Path, hot_path, loop):
    async def pour(_asked: Asked, client: Client) -> None:
        room = asyncio.Event()
        room.set()
        client.begin(200, {}, None)
        client.on_room(room.clear, room.set)
        while True:
            await room.wait()
            client.write(b"x" * 65536)
            await asyncio.sleep(0)

    async def scene() -> None:
        tls = ClientTls(*pair(tmp_path, now=datetime.now(UTC)))
        tls._load()
        policy = ServerPolicy(hot_path=hot_path, slow_reader_seconds=0.3)
        async with serving(policy, tls=tls.context, slow_reader_seconds=0.3) as served:
            served.inference.script = pour
            await served.connect_and_send(post())
            await served.until(lambda: served.inference.cancelled == 1)
            await served.until(lambda: not served.server.connections.count)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())


@BOTH
async def test_a_client_that_leaves_over_tls_is_noticed(open_room: OpenRoom, hot_path: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, tls="self-signed") as room:
        engine.script(Fault.stall(at_token=2))
        asking = asyncio.ensure_future(room.http.post(secure_url(room, CHAT), json=BODY, ssl=trusting(room)))
        await engine.stalled()
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        await room.idle()


@BOTH
async def test_a_body_that_is_refused_over_tls_has_its_answer(open_room: OpenRoom, hot_path: bool):
    async with (
        FakeEngine() as engine,
        open_room(engine, hot_path=hot_path, tls="self-signed", max_body_mib=1) as room,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", room.balancer.port, ssl=trusting(room))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 9000000\r\n\r\n".encode() + b"x" * 1000)
        async with asyncio.timeout(WAIT_SECONDS):
            assert (await reader.read(12)) == b"HTTP/1.1 413"
        writer.close()


def pair(folder: Path, names: Names = NAMES, now: datetime = NOW) -> tuple[Path, Path]:
    """Certificate and key in PEM, as somebody else would have made them."""
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = folder / "cert.pem", folder / "key.pem"
    made, secret = client_tls._made(names, now)
    certificate.write_bytes(made)
    key.write_bytes(secret)
    return certificate, key


async def shown(port: int) -> str:
    """Fingerprint of the certificate that new connections get."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return hashlib.sha256(der).hexdigest()


async def test_files_that_change_hold_for_new_connections_and_broken_ones_change_nothing(
    open_room: OpenRoom, tmp_path: Path, monkeypatch, caplog
):
    monkeypatch.setattr(client_tls, "LOOK_SECONDS", 0.05)
    certificate, key = pair(tmp_path / "files", now=datetime.now(UTC))
    files = {"tls_cert_file": str(certificate), "tls_key_file": str(key)}
    async with FakeEngine() as engine, open_room(engine, tls="files", **files) as room:
        before = await shown(room.balancer.port)
        certificate.write_bytes(pair(tmp_path / "others")[0].read_bytes())  # of another key
        await room.until(lambda: "do not belong together" in caplog.text, "the fault told")
        assert await shown(room.balancer.port) == before
        assert caplog.text.count("do not belong together") == 1
        pair(tmp_path / "files", now=datetime.now(UTC))
        async with asyncio.timeout(WAIT_SECONDS):
            while await shown(room.balancer.port) == before:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "tls_cert_file"),
        ({"tls_cert_file": "/nonexistent/c.pem", "tls_key_file": "/nonexistent/k.pem"}, "No such file"),
        ({"tls_cert_file": __file__, "tls_key_file": __file__}, "PEM form"),
    ],
)
async def test_what_cannot_be_used_is_said_before_anything_listens(
    tmp_path: Path, files: dict[str, str], words: str
):
    flags = {"port": 1, "mdns": False, "data_dir": tmp_path, "tls": "files"} | files
    with pytest.raises(TlsFault, match=words):
        async with running(load(None, flags)):
            pass


# The certificate of our own ...


def fingerprint_after(folder: Path, names: Names, now: datetime) -> str:
    tls = client_tls.self_signed(folder, lambda: names, lambda: now)
    tls._load()
    return tls.fingerprint


def test_our_own_certificate_stays_while_it_will_do(tmp_path: Path):
    first = fingerprint_after(tmp_path, NAMES, NOW)
    assert fingerprint_after(tmp_path, NAMES, NOW + timedelta(days=700)) == first
    fewer = Names(NAMES.hosts, frozenset({"127.0.0.1"}))
    assert fingerprint_after(tmp_path, fewer, NOW) == first
    assert fingerprint_after(tmp_path, NAMES, NOW + timedelta(days=800)) != first


def test_an_address_that_was_covered_once_stays_covered(tmp_path: Path):
    home = Names(NAMES.hosts, NAMES.addresses | {"192.168.1.5"})
    lab = Names(NAMES.hosts, NAMES.addresses | {"10.0.0.7"})
    first = fingerprint_after(tmp_path, home, NOW)
    second = fingerprint_after(tmp_path, lab, NOW)
    assert second != first
    assert fingerprint_after(tmp_path, home, NOW) == second


def test_a_key_that_others_may_have_read_is_not_used(tmp_path: Path):
    fingerprint_after(tmp_path, NAMES, NOW)
    os.chmod(tmp_path / "tls" / "key.pem", 0o644)
    with pytest.raises(TlsFault, match="chmod 600"):
        fingerprint_after(tmp_path, NAMES, NOW)


def test_a_pair_that_was_renewed_by_half_is_made_anew(tmp_path: Path):
    fingerprint_after(tmp_path, NAMES, NOW)
    (tmp_path / "tls" / "key.pem").write_bytes(pair(tmp_path / "others")[1].read_bytes())
    assert fingerprint_after(tmp_path, NAMES, NOW)


@pytest.mark.parametrize("which", ["cert.pem", "key.pem"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, which: str):
    tls = ClientTls(*pair(tmp_path))
    (tmp_path / which).unlink()
    os.mkfifo(tmp_path / which)
    with pytest.raises(TlsFault, match="no plain file"):
        tls._load()
    pair(tmp_path / "whole")
    (tmp_path / "whole" / "cert.pem").replace(tmp_path / "cert.pem")
    (tmp_path / "whole" / "key.pem").replace(tmp_path / "key.pem")
    assert tls._load()


def test_addresses_that_change_every_day_are_no_part_of_it():
    names = client_tls.covering(
        ("Studio", "studio.local"), ("192.168.1.5", "2001:db8::1", "fe80::1%eth0", "169.254.1.1", "::1")
    )
    assert names.addresses == {"127.0.0.1", "::1", "192.168.1.5"}


def test_nothing_is_loaded_twice(tmp_path: Path):
    certificate, key = pair(tmp_path)
    tls = ClientTls(certificate, key)
    assert tls._load()
    assert not tls._load()


# The commands of this machine ...


async def test_commands_on_this_machine_trust_it_without_a_word(open_room: OpenRoom, tmp_path: Path):
    async with FakeEngine() as engine, open_room(engine, tls="self-signed") as room:
        data_dir = ("--data-dir", str(room.data_dir))
        for url in (f"http://127.0.0.1:{room.balancer.port}", f"https://localhost:{room.balancer.port}/v1"):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "balancer", "keys", "list", "--json", "--url", url, *data_dir),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, error = await process.communicate()
            assert (process.returncode, json.loads(out)) == (0, {"keys": []}), error
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "balancer",
                "workers",
                "--url",
                f"https://127.0.0.1:{room.balancer.port}",
            ),
            env=os.environ | {"BALANCER_DATA_DIR": str(tmp_path / "nothing here")},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _, error = await process.communicate()
        assert (process.returncode, b"--ca-file" in error) == (2, True), error


async def test_the_address_of_the_page_is_one_that_answers(open_room: OpenRoom):
    async with open_room(tls="self-signed") as room:
        url = f"http://127.0.0.1:{room.balancer.port}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balancer", "ui", "--url", url, "--data-dir", str(room.data_dir)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await process.communicate()
        assert out.decode().startswith(secure_url(room, "/ui#token=")), error


async def test_a_certificate_is_left_over_and_the_balancer_speaks_plainly(open_room: OpenRoom, monkeypatch):
    async with FakeEngine() as engine:
        async with open_room(engine, tls="self-signed") as room:
            assert (room.data_dir / "tls" / "certificate.pem").exists()
        async with open_room(engine) as room:
            monkeypatch.setenv("BALANCER_DATA_DIR", str(room.data_dir))
            reached = await asyncio.to_thread(reach, room.url)
            assert reached.root == room.url
            async with aiohttp.ClientSession() as http, http.get(f"{reached.root}/health") as response:
                assert response.status == 200
