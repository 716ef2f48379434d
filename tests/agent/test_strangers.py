"""A real agent with a real engine, and those who are not let in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import aiohttp
import psutil
import pytest

from agent.conftest import RunningAgent, end_agent, start_agent
from agent.meeting import KEY, fingerprint_at, meet_process, within_sessions
from agent.scenes import until
from worker_agent import handshake, wire
from worker_agent.handshake import Invitation
from worker_agent.settings import is_http_url
from worker_agent.where_balancers_are import MOST, keep, kept

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(300)]

CANARY = "zanzibarine"
ROUTES = (
    *(
        wire.REPORT_PATH,
        wire.MODELS_PATH,
        wire.KEY_PATH,
        *wire.INFERENCE_PATHS,
        "/metrics",
        "/v1/models",
        "/",
    ),
    *(f"{wire.MODELS_PATH}/{word}" for word in ("load", "unload", "delete", "download", "cancel")),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


async def test_a_stranger_gets_nothing_by_any_route_or_method_and_the_engine_hears_nothing(
    shared_agent: RunningAgent,
) -> None:
    async with within_sessions() as known:
        await until_ready(known, shared_agent)
        before = await asked(known, shared_agent)
        body = {"model": "smollm2-135m-instruct", "stream": True, "prompt": CANARY, "key": "x" * 20}
        sessions = ("", "0" * 64, handshake.cluster_tag(KEY), KEY)
        connector = aiohttp.TCPConnector(ssl=False)
        async with aiohttp.ClientSession(connector=connector) as stranger:
            for path in ROUTES:
                for method in METHODS:
                    for session in sessions:
                        headers = {wire.SESSION_HEADER: session, "Authorization": f"Bearer {KEY}"}
                        async with stranger.request(
                            method, shared_agent.url + path, json=body, headers=headers
                        ) as answer:
                            assert answer.status == 401, (method, path, session)
                            assert "Server" not in answer.headers
        assert await asked(known, shared_agent) == before
    assert CANARY not in "\n".join(shared_agent.log)
    assert KEY not in "\n".join(shared_agent.log)


async def asked(client: aiohttp.ClientSession, agent: RunningAgent) -> str:
    """Tokens that the engine has read, as it says itself."""
    headers = {"Authorization": f"Bearer {agent.engine_secret()}"}
    url = f"http://127.0.0.1:{agent.engine_port()}/metrics"
    async with client.get(url, headers=headers) as answer:
        found = re.search(r"^llamacpp:prompt_tokens_total (\S+)", await answer.text(), re.MULTILINE)
        assert found is not None
        return found[1]


async def until_ready(client: aiohttp.ClientSession, agent: RunningAgent) -> None:
    async with client.get(agent.url + wire.REPORT_PATH) as stream:
        async for line in stream.content:
            if any(model.continues for model in wire.Report.from_line(line).models):
                return  # it has been probed, so that nobody asks it anything any more


def test_an_agent_is_known_by_the_same_certificate_after_a_restart(tmp_path: Path) -> None:
    first = start_agent(tmp_path)
    fingerprint = fingerprint_at(first.port)
    end_agent(first)
    again = start_agent(tmp_path)
    try:
        assert fingerprint_at(again.port) == fingerprint
    finally:
        end_agent(again)


# Machines that come without a key ...


class Started:
    """`worker-agent` with these words, and what it says."""

    def __init__(self, *words: str, **more: str) -> None:
        environment = {name: value for name, value in os.environ.items() if "CLUSTER_KEY" not in name}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker_agent", *words],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **more},
        )
        self.lines: list[str] = []
        self._found: Queue[str | None] = Queue()
        self._reading = Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.lines.append(line)
                self._found.put(line)
        self._found.put(None)

    def until(self, pattern: str) -> re.Match[str]:
        """The first line from here on that this is found in."""
        try:
            while (line := self._found.get(timeout=60)) is not None:
                if match := re.search(pattern, line):
                    return match
        except Empty:
            pass
        raise AssertionError("".join(self.lines))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait(30)
        self._reading.join(30)


OPTIONS = ("--host", "127.0.0.1", "--port", "0", "--no-mdns", "--engine", "llama.cpp", "--threads", "1")


@pytest.fixture
def started() -> Iterator[list[Started]]:
    all_of_them: list[Started] = []
    yield all_of_them
    for each in all_of_them:
        each.end()


async def test_an_agent_without_a_key_shows_a_code_and_takes_the_key_from_who_types_it(
    tmp_path: Path, started: list[Started]
) -> None:
    agent = Started("run", *OPTIONS, "--data-dir", str(tmp_path))
    started.append(agent)
    port = int(agent.until(r"listening on https://127\.0\.0\.1:(\d+)")[1])
    typed = agent.until(r"balancer workers approve (\S+) ([2-9A-Z]{4}-[2-9A-Z]{4})$")
    key = handshake.key_of_code(typed[2], typed[1], fingerprint_at(port))
    meet_process(port, key)
    async with within_sessions() as balancer:
        url = f"https://127.0.0.1:{port}"
        async with balancer.post(url + wire.KEY_PATH, json={"key": KEY}) as answer:
            assert answer.status == 204
        async with balancer.get(url + "/health") as answer:
            assert (await answer.json())["id"] == typed[1]
    assert (tmp_path / "cluster_key").read_text() == f"{KEY}\n"
    agent.end()
    again = Started("run", *OPTIONS, "--data-dir", str(tmp_path))
    started.append(again)
    meet_process(int(again.until(r"listening on https://127\.0\.0\.1:(\d+)")[1]))
    assert KEY not in "".join(agent.lines + again.lines)


@pytest.mark.parametrize("way", ["word", "line", "standard input"])
async def test_a_machine_joins_with_one_word_which_nobody_can_read_afterwards(
    tmp_path: Path, started: list[Started], way: str
) -> None:
    invitation = str(Invitation(KEY, ("127.0.0.1:9", "https://127.0.0.1:10")))
    line = f"worker-agent join '{invitation}'"
    what = {"word": invitation, "line": line, "standard input": "-"}[way]
    more = ("--data-dir", str(tmp_path), "--id", "a machine", "--slots", "1")
    agent = Started("join", what, *OPTIONS, *more)
    started.append(agent)
    assert agent.process.stdin is not None
    agent.process.stdin.write(f"{line}\n")
    agent.process.stdin.flush()
    port = int(agent.until(r"listening on https://127\.0\.0\.1:(\d+)")[1])
    for url in ("http://127.0.0.1:9", "https://127.0.0.1:10"):
        await until(lambda url=url: any(f"cannot join {url}" in line for line in agent.lines))
    meet_process(port)
    words = psutil.Process(agent.process.pid).cmdline()
    words = words[words.index("run") + 1 :]
    assert sorted(words) == sorted([*OPTIONS, *more])
    assert KEY not in " ".join(words)
    assert (tmp_path / "cluster_key").stat().st_mode & 0o777 == 0o600
    assert KEY not in "".join(agent.lines)
    agent.end()
    again = Started("run", *OPTIONS, "--data-dir", str(tmp_path), "--balancer", "http://127.0.0.1:8")
    started.append(again)
    for url in ("http://127.0.0.1:8", "http://127.0.0.1:9", "https://127.0.0.1:10"):
        await until(lambda url=url: any(f"cannot join {url}" in line for line in again.lines))


def test_kept_addresses_are_dialled_too(tmp_path: Path, started: list[Started]) -> None:
    keep(tmp_path, ["http://127.0.0.1:9"])
    agent = Started("run", *OPTIONS, "--dial-out", "--data-dir", str(tmp_path))
    started.append(agent)
    agent.until(r"cannot open a tunnel to http://127\.0\.0\.1:9")


def test_an_invitation_replaces_the_addresses_of_the_one_before(tmp_path: Path) -> None:
    places = [f"http://10.0.0.{number}:4000" for number in range(12)]
    keep(tmp_path, places)
    assert kept(tmp_path, is_http_url) == tuple(places[:MOST])
    assert (tmp_path / "balancers").stat().st_mode & 0o777 == 0o600
    keep(tmp_path, places[9:10])
    assert kept(tmp_path, is_http_url) == tuple(places[9:10])
    keep(tmp_path, ())
    assert kept(tmp_path, is_http_url) == ()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["ftp://10.0.0.9\n", "http://a..b:4000\n", "http://a:4000\n" * 9, "\x00"])
def test_a_file_of_addresses_that_holds_others_is_not_used(tmp_path: Path, content: str) -> None:
    (tmp_path / "balancers").write_text(content)
    (tmp_path / "balancers").chmod(0o600)
    done = ended("run", *OPTIONS, "--data-dir", str(tmp_path))
    assert (done.returncode, "remove it, and join again" in done.stderr) == (2, True)


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "cluster_key").write_text(f"{KEY}\n")
    (tmp_path / "cluster_key").chmod(0o644)
    done = ended("run", *OPTIONS, "--data-dir", str(tmp_path))
    assert (done.returncode, "chmod 600" in done.stderr) == (2, True)
    assert KEY not in done.stderr


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("lb2.0123456789abcdef-the-cluster-key.00000000@127.0.0.1:9", "copy all of it"),
        ("lb2.0123456789abcdef-the-cl", "copy all of it"),
        ("lb2.", "copy all of it"),
        ("-", "copy all of it"),
        (str(Invitation("another-key-of-another-room", ())), "gives another cluster key than the invitation"),
    ],
)
def test_an_invitation_that_is_not_whole_or_not_for_this_machine_changes_nothing(
    tmp_path: Path, word: str, says: str
) -> None:
    done = ended("join", word, "--data-dir", str(tmp_path), WORKER_AGENT_CLUSTER_KEY=KEY)
    assert (done.returncode, says in done.stderr) == (2, True)
    assert "another-key-of-another-room" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def ended(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worker_agent", *words]
    environment = {**os.environ, **more}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, input="", env=environment
    )


def test_to_dial_out_needs_an_address() -> None:
    done = ended("run", "--dial-out", "--port", "0")
    assert (done.returncode, "--balancer" in done.stderr) == (2, True)


def test_settings_without_tls_are_the_users_choice(tmp_path: Path, started: list[Started]) -> None:
    config = tmp_path / "agent.json"
    config.write_text(json.dumps({"tls": False}))
    agent = Started("run", *OPTIONS, "--data-dir", str(tmp_path), "--config", str(config))
    started.append(agent)
    agent.until(r"listening on http://127\.0\.0\.1:(\d+)")
    assert not list(tmp_path.glob("*.pem"))
