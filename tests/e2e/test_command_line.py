"""The commands that are not servers, as processes: what they print and the status they end with."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.conftest import OpenRoom, free_port, listed
from tests.e2e.processes import command
from tests.fakes.engine import FakeEngine
from tests.fakes.faults import Fault


async def balancer(tmp_path: Path, *words: str, **variables: str) -> tuple[int, str]:
    async with command(
        "balancer", *words, output=tmp_path / "out.txt", home=tmp_path, **variables
    ) as running:
        status = await running.ended()
        return status, running.text()


BROKEN = {
    "a missing comma": (
        '{"workers": [\n  {"host": "a"}\n  {"host": "b"}\n]}',
        ":3:3: ",
        "expected a comma",
    ),
    "an unknown key": (
        '{"workers": [{"host": "a", "prot": 1}]}',
        ':1:28: unknown key "prot"',
        'did you mean "port"?',
    ),
    "a wrong type": (
        '{"workers": [{"host": "a", "port": "x"}]}',
        ':1:36: "port" is "x"',
        "expected a whole number from 1 to 65535",
    ),
    "an id twice": (
        '{"workers": [{"id": "a", "host": "b"},\n{"id": "a", "host": "c"}]}',
        ":2:8: ",
        'the id "a" is taken by the worker of line 1',
    ),
    "a key in plain sight": (
        '{"workers": [{"host": "a", "api_key": "sk-secret"}]}',
        ":1:39: ",
        '{"env": "NAME"}',
    ),
}


@pytest.mark.parametrize(("text", "place", "expected"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(
    "words", [("config", "check"), ("serve", "--no-mdns", "--config")], ids=["check", "serve"]
)
async def test_a_broken_file_is_told_by_line_and_column(tmp_path, words, text, place, expected):
    file = tmp_path / "balancer.json"
    file.write_text(text)
    status, said = await balancer(tmp_path, *words, str(file))
    assert status == 2
    assert f"{file}{place}" in said
    assert expected in said
    assert "sk-secret" not in said
    assert "Traceback" not in said


async def test_a_file_that_is_fine_is_said_to_be(tmp_path):
    file = tmp_path / "balancer.json"
    file.write_text('{"workers": [{"host": "a"},],} // as people write it')
    assert await balancer(tmp_path, "config", "check", str(file)) == (0, f"{file}: fine, 1 worker\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HEALTH_CHECK_INTERVAL", "abc"),
        ("MAX_RETRIES", "-1"),
        ("LOG_LEVEL", "loud"),
        ("BALANCER_PORT", "0x1"),
    ],
)
async def test_a_bad_variable_is_named(tmp_path, name, value):
    status, said = await balancer(tmp_path, "serve", "--no-mdns", **{name: value})
    assert status == 2
    assert name in said
    assert value in said
    assert "expected" in said
    assert "Traceback" not in said


async def test_the_room_is_shown_for_people_and_for_scripts(open_room: OpenRoom, tmp_path):
    async with FakeEngine() as engine:
        async with open_room(listed(engine, "studio [bold]", model="fake")) as room:
            await room.ready()
            status, said = await balancer(tmp_path, "workers", "--url", room.url, COLUMNS="200")
            assert status == 0
            assert "studio [bold]" in said
            assert "0 waiting, 0 running" in said
            status, said = await balancer(tmp_path, "workers", "--json", BALANCER_URL=room.url)
            assert json.loads(said)["workers"][0]["models"] == ["fake"]


async def test_why_a_request_went_where_it_went_is_told(open_room: OpenRoom, tmp_path):
    async with FakeEngine() as bad, FakeEngine() as good, open_room(bad, good) as room:
        bad.always(Fault.status(500, "canary words"))
        ids = []
        while len(bad.requests) == 0:
            answer = await room.openai.chat.completions.with_raw_response.create(
                model="fake", messages=[{"role": "user", "content": "canary prompt"}]
            )
            ids.append(answer.headers["X-Request-ID"])
        asked = {"BALANCER_URL": room.url, "BALANCER_DATA_DIR": str(room.data_dir)}
        status, said = await balancer(tmp_path, "why", ids[-1], "--json", **asked)
        told = json.loads(said)
        assert (status, told["status"], told["model"]) == (0, 200, "fake")
        first, second = told["attempts"]
        assert (first["worker"], first["ended"]) == ("a", "erred")
        assert (second["worker"], second["ended"]) == ("b", "answered")
        assert {candidate["worker"] for candidate in first["candidates"]} == {"a", "b"}
        assert sum(candidate["share"] for candidate in first["candidates"]) == pytest.approx(1, abs=0.001)
        assert second["excluded"] == {"a": "failed this request before"}
        status, said = await balancer(tmp_path, "why", ids[-1], COLUMNS="150", **asked)
        assert status == 0
        assert "attempt 2: b, answered" in said
        assert "canary" not in said
        status, said = await balancer(tmp_path, "why", "no-such-id", **asked)
        assert status == 1
        assert "remembered" in said


async def test_a_balancer_that_does_not_run_is_said_so(tmp_path):
    status, said = await balancer(tmp_path, "workers", "--url", f"http://127.0.0.1:{free_port()}")
    assert status == 2
    assert "is it running?" in said
    assert "Traceback" not in said


async def test_log_lines_say_what_happened_once(tmp_path):
    words = ("balancer", "serve", "--no-mdns", "--host", "127.0.0.1", "--port", str(free_port()))
    for start in ("first", "second"):
        async with command(*words, output=tmp_path / start, home=tmp_path) as running:
            await running.until_it_says("listening on")
            running.send(signal.SIGTERM)
            assert await running.ended() == 0
            lines = running.text().splitlines()
        if start == "first":
            assert re.fullmatch(
                r"\S+ INFO    made new keys, for this machine's user alone: \S+/admin_key, \S+/cluster_key",
                lines.pop(0),
            )
        (line,) = lines
        assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    listening on http://127\.0\.0\.1:\d+", line)


@pytest.mark.parametrize("name", ["serve", "keep"])
@pytest.mark.parametrize("host", ["no-machine.invalid", "a..b", "192.0.2.1"])
async def test_an_address_of_no_machine_or_of_another_is_told_as_such(tmp_path, name: str, host: str):
    words = (name, "--no-mdns", "--host", host, "--port", str(free_port()))
    status, said = await balancer(tmp_path, *words)
    assert (status, f"cannot listen on {host}:" in said, "with --host" in said) == (1, True, True), said
    assert "--port" not in said
    assert "Traceback" not in said


async def test_a_class_that_a_key_cannot_have_is_told_by_its_option(tmp_path):
    status, said = await balancer(
        tmp_path, "keys", "create", "--name", "ann", "--class", "foo", COLUMNS="200"
    )
    assert (status, "'--class': " in said, "'interactive', 'batch', 'both'" in said) == (2, True, True), said


async def test_an_invitation_is_a_line_to_paste_and_alone_for_programs(open_room: OpenRoom, tmp_path):
    async with open_room() as room:
        words = ("cluster", "invite", "--url", room.url, "--data-dir", str(room.data_dir))
        status, said = await balancer(tmp_path, *words, "--json")
        told = json.loads(said)
        assert (status, told["command"].rpartition(" ")[0]) == (
            0,
            "pip install uv && uv run worker-agent join",
        )
        assert shlex.split(told["command"])[-1] == told["invitation"]
        assert told["command"] in (await balancer(tmp_path, *words))[1].splitlines()


async def test_the_version_is_printed(tmp_path):
    status, said = await balancer(tmp_path, "version")
    assert status == 0
    assert said.strip().count(".") == 2


async def test_a_log_that_nobody_reads_holds_up_nobody(tmp_path):
    """Its stderr is a pipe that is full from the start; requests are answered all the same."""
    port, (reader, writer) = free_port(), os.pipe()
    try:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balancer", "serve", "--no-mdns", "--host", "127.0.0.1"),
            *("--port", str(port), "--data-dir", str(tmp_path)),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=writer,
        )
        try:
            async with aiohttp.ClientSession() as http, asyncio.timeout(30):
                answered = 0
                while answered < 200:
                    try:
                        async with http.get(f"http://127.0.0.1:{port}/nothing") as response:
                            answered += response.status == 404
                    except aiohttp.ClientConnectionError:
                        await asyncio.sleep(0.05)
        finally:
            process.kill()
            await process.wait()
    finally:
        os.close(reader)
        os.close(writer)
