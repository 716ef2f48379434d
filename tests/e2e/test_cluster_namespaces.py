"""A room that assembles itself and lets no stranger in: hosts on one network, some of which mean no good.

A balancer on one host, agents with the real engine on two others, and a fourth for a client or an attacker.
Nobody types an address unless a scene says so.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
import pytest
from aiohttp import web
from zeroconf import DNSAddress, DNSOutgoing, DNSPointer, DNSService, DNSText, const

from tests.e2e.namespaces import Host, NoNamespaces, network
from tests.e2e.processes import SHARED_KEY, WAIT_SECONDS, Command, command
from tests.fakes.agent_gate import KEY
from worker_agent import certificate, handshake, wire

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.real_engine,
    # By a signal: the default way ends the process at once, and would leave the namespaces behind.
    pytest.mark.timeout(300, method="signal"),
]

MDNS = ("224.0.0.251", 5353)  # RFC 6762, 3
BALANCER_PORT = 4000
CANARY = "a-prompt-that-nobody-else-may-read"
JOIN_SECONDS = 5.0
"""From the start of an agent to its being met, as the promise has it; twice that on a busy machine."""
LOST_SECONDS = 4.0
Worker = dict[str, Any]
"""A worker as `/health` shows it."""


@dataclass
class Cluster:
    """Four hosts, and the balancer that runs on the first."""

    balancer_host: Host
    agent_hosts: tuple[Host, Host]
    other: Host
    """A client's, or somebody's who was not asked."""
    balancer: Command
    http: aiohttp.ClientSession
    folder: Path

    @property
    def url(self) -> str:
        return f"http://{self.balancer_host.address}:{BALANCER_PORT}"

    def agent(
        self, number: int, *words: str, variables: Mapping[str, str] = SHARED_KEY
    ) -> AbstractAsyncContextManager[Command]:
        """`worker-agent WORDS ...` on one of its hosts, as `one` or `two`, which keeps its data folder."""
        name = ("one", "two")[number]
        return command(
            *("worker_agent", *words, "--id", name, "--host", "0.0.0.0", "--threads", "1"),
            *("--context-tokens", "1024", "--slots", "2"),
            output=self.folder / f"{name}.txt",
            home=self.folder / name,
            within=self.agent_hosts[number].within,
            **variables,
        )

    async def balancer_says(self, *words: str) -> str:
        """What `balancer WORDS ...` prints on the balancer's host; it must succeed."""
        async with self.asked(*words) as asking:
            assert await asking.ended() == 0, asking.text()
            return asking.text()

    def asked(self, *words: str) -> AbstractAsyncContextManager[Command]:
        return command(
            *("balancer", *words),
            output=self.folder / "asked.txt",
            home=self.folder / "balancer",
            within=self.balancer_host.within,
            BALANCER_URL=f"http://127.0.0.1:{BALANCER_PORT}",
            BALANCER_DATA_DIR=str(self.folder / "balancer" / "data"),
            COLUMNS="200",
        )

    async def workers(self) -> dict[str, Worker]:
        async with self.http.get(f"{self.url}/health") as response:
            return {worker["id"]: worker for worker in (await response.json())["workers"]}

    async def until(self, holds: Callable[[dict[str, Worker]], bool], what: str) -> dict[str, Worker]:
        """The workers by their ids, once this holds of them; TimeoutError tells the whole story."""
        seen: dict[str, Worker] = {}
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not holds(seen := await self.workers()):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            texts = [path.read_text(errors="replace") for path in sorted(self.folder.glob("*.txt"))]
            story = "\n".join([self.balancer.text(), *texts])
            raise TimeoutError(f"not within {WAIT_SECONDS:g} s: {what}; {seen}\n{story}") from None
        return seen

    async def until_ready(self, *names: str) -> dict[str, Worker]:
        return await self.until(
            lambda seen: all(seen.get(name, {}).get("state") == "ready" for name in names),
            f"{', '.join(names)} ready",
        )

    async def chat(self, text: str = "Name three trees.", tokens: int = 8) -> str:
        """Asks, and gives the id of the worker that answered."""
        body = {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
        }
        async with self.http.post(f"{self.url}/v1/chat/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return response.headers["X-Balancer-Worker"]

    async def answering(self, text: str = "Name three trees.") -> set[str]:
        """Who answers when as many ask as both agents together have slots."""
        return set(await asyncio.gather(*(self.chat(f"{number}: {text}", 24) for number in range(4))))

    @asynccontextmanager
    async def streaming(self, tokens: int) -> AsyncIterator[aiohttp.ClientResponse]:
        """A long answer that has begun to come."""
        body = {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": "Write a very long story about a tree."}],
            "max_tokens": tokens,
            "stream": True,
        }
        async with self.http.post(f"{self.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            assert await response.content.readline()
            yield response


async def whole(response: aiohttp.ClientResponse) -> bool:
    """Whether a stream came to its own end."""
    return (await response.content.read()).rstrip().endswith(b"data: [DONE]")


@pytest.fixture
def hosts() -> Iterator[tuple[Host, ...]]:
    try:
        with network(4) as made:
            yield made
    except NoNamespaces as why:
        pytest.skip(str(why))


@asynccontextmanager
async def cluster_of(
    hosts: Sequence[Host], folder: Path, variables: Mapping[str, str]
) -> AsyncIterator[Cluster]:
    balancer_host, one, two, other = hosts
    for name in ("balancer", "one", "two"):
        (folder / name).mkdir()
    connector = aiohttp.TCPConnector(socket_factory=lambda _: other.open_socket(socket.SOCK_STREAM))
    timeout = aiohttp.ClientTimeout(total=2 * WAIT_SECONDS)
    async with (
        command(
            *("balancer", "serve", "--mdns", "--data-dir", str(folder / "balancer" / "data")),
            output=folder / "balancer.txt",
            home=folder / "balancer",
            within=balancer_host.within,
            **variables,
        ) as balancer,
        aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
    ):
        made = Cluster(balancer_host, (one, two), other, balancer, http, folder)
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                try:
                    assert await made.workers() == {}
                    break
                except aiohttp.ClientConnectionError:
                    assert balancer.process.returncode is None, balancer.text()
                    await asyncio.sleep(0.05)
        yield made


@pytest.fixture
async def cluster(hosts: tuple[Host, ...], tmp_path: Path) -> AsyncIterator[Cluster]:
    """All of it holds the same key."""
    async with cluster_of(hosts, tmp_path, SHARED_KEY) as made:
        yield made


@pytest.fixture
async def keyless(hosts: tuple[Host, ...], tmp_path: Path) -> AsyncIterator[Cluster]:
    """The balancer has made a key of its own; nobody else has it."""
    async with cluster_of(hosts, tmp_path, {}) as made:
        yield made


def now() -> float:
    return asyncio.get_running_loop().time()


# It assembles itself ...


async def test_two_agents_with_the_key_are_met_without_a_word_and_no_prompt_is_readable(cluster: Cluster):
    began = now()
    async with cluster.agent(0, "run"), cluster.agent(1, "run"):
        await cluster.until(lambda seen: seen.keys() == {"one", "two"}, "both are met")
        took = now() - began
        print(f"\nmet {took:.1f} s after their start")
        assert took < 2 * JOIN_SECONDS
        await cluster.until_ready("one", "two")
        with AsyncOverheard(cluster) as heard:
            assert await cluster.answering(CANARY) == {"one", "two"}
        assert heard.client_said(CANARY)  # what is looked for can be found
        assert not heard.agents_heard(CANARY)


async def test_one_that_leaves_without_a_word_is_lost_by_its_silence(cluster: Cluster):
    async with cluster.agent(0, "run"), cluster.agent(1, "run"):
        await cluster.until_ready("one", "two")
        cluster.agent_hosts[0].pull_the_cable()
        began = now()
        await cluster.until(lambda seen: seen["one"]["state"] == "lost", "it is lost")
        took = now() - began
        print(f"\nlost {took:.1f} s after its last word")
        assert took < 2 * LOST_SECONDS
        assert await cluster.answering() == {"two"}
        cluster.agent_hosts[0].plug_it_in_again()
        await cluster.until_ready("one", "two")


async def test_an_agent_that_moves_to_another_address_is_the_same_worker(cluster: Cluster):
    async with cluster.agent(0, "run") as one, cluster.agent(1, "run") as two:
        before = await cluster.until_ready("one", "two")
        for agent in (one, two):
            await agent.until_it_says("continues answers")
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(cluster.streaming(300)) for _ in range(2)]
            cluster.agent_hosts[0].gain_address("10.77.0.22")
            cluster.agent_hosts[0].lose_address(cluster.agent_hosts[0].address)
            ended = [await whole(stream) for stream in streams]
        assert ended == [True, True]
        after = await cluster.until(
            lambda seen: seen["one"]["url"].startswith("https://10.77.0.22:"), "it is known there"
        )
        assert after.keys() == before.keys()
        await cluster.until_ready("one", "two")
        assert await cluster.answering() == {"one", "two"}


async def test_where_multicast_does_not_pass_the_invitation_is_enough(keyless: Cluster):
    for host in (*keyless.agent_hosts, keyless.balancer_host):
        host.cut_off_multicast()
    invitation = await invited(keyless)
    began = now()
    async with keyless.agent(0, "join", invitation, variables={}):
        await keyless.until(lambda seen: seen.keys() == {"one"}, "it is met")
        print(f"\nmet {now() - began:.1f} s after its start")
        await keyless.until_ready("one")
        assert await keyless.chat() == "one"
    async with keyless.agent(0, "run", variables={}):  # the key is kept; so is where to go
        await keyless.until_ready("one")


async def invited(cluster: Cluster) -> str:
    """The invitation that the balancer's host shows, for this network."""
    text = await cluster.balancer_says("cluster", "invite")
    found = re.search(r"lb2\.\S+", text)
    assert found is not None, text
    assert f"@{cluster.balancer_host.address}:{BALANCER_PORT}" in found.group()
    return found.group()


# ... and lets no stranger in


async def test_an_agent_without_a_key_is_let_in_by_the_code_that_it_shows(keyless: Cluster):
    async with keyless.agent(0, "run", variables={}) as one:
        code = await shown_code(one)
        await until_pending(keyless, "one")
        assert await keyless.workers() == {}
        await keyless.balancer_says("workers", "approve", "one", code)
        await keyless.until_ready("one")
        assert await keyless.chat() == "one"
    async with keyless.agent(0, "run", variables={}):
        await keyless.until_ready("one")


async def test_wrong_codes_make_a_new_one_and_let_nobody_in(keyless: Cluster):
    async with keyless.agent(0, "run", variables={}) as one:
        code = await shown_code(one)
        await until_pending(keyless, "one")
        wrong = "2222-2222" if not code.startswith("2222") else "3333-3333"
        for _ in range(5):
            async with keyless.asked("workers", "approve", "one", wrong) as asking:
                assert await asking.ended() != 0
        fresh = await shown_code(one, but=code)
        async with keyless.asked("workers", "approve", "one", code) as asking:
            assert await asking.ended() != 0
            assert "code" in asking.text()
        assert await keyless.workers() == {}
        await keyless.balancer_says("workers", "approve", "one", fresh)
        await keyless.until_ready("one")


async def shown_code(agent: Command, but: str = "") -> str:
    """The last code that it shows."""
    await agent.until_it_says("balancer workers approve ")
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            last = re.findall(r"workers approve \S+ (\S{4}-\S{4})", agent.text())[-1]
            if last != but:
                return str(last)
            await asyncio.sleep(0.05)


async def until_pending(cluster: Cluster, name: str) -> None:
    await cluster.balancer.until_it_says(f"agent {name} at ")
    await cluster.balancer.until_it_says(f"balancer workers approve {name} CODE")


async def test_a_new_key_reaches_those_who_are_there_and_streams_go_on(keyless: Cluster):
    old = await invited(keyless)
    async with AsyncExitStack() as stack:
        for number in (0, 1):
            await stack.enter_async_context(keyless.agent(number, "join", old, variables={}))
        await keyless.until_ready("one", "two")
        streams = [await stack.enter_async_context(keyless.streaming(200)) for _ in range(2)]
        await keyless.balancer_says("cluster", "rotate-key")
        assert [await whole(stream) for stream in streams] == [True, True]
        await keyless.until_ready("one", "two")
        assert await keyless.answering() == {"one", "two"}
        # Who comes with the old key is a stranger now.
        (keyless.folder / "third").mkdir()
        third = await stack.enter_async_context(
            command(
                *("worker_agent", "join", old, "--id", "third", "--host", "0.0.0.0", "--threads", "1"),
                output=keyless.folder / "third.txt",
                home=keyless.folder / "third",
                within=keyless.other.within,
            )
        )
        await keyless.balancer.until_it_says("agent third at ")
        await keyless.balancer.until_it_says("is not let in: it holds another cluster key")
        assert "third" not in await keyless.workers()
        third.look()
        assert (await invited(keyless)) != old


# Somebody who was not asked


class AsyncOverheard:
    """What passes the cables of the agents and of the client while the block lasts."""

    def __init__(self, cluster: Cluster) -> None:
        self._stack = AsyncExitStack()
        self._cables = [host.overheard() for host in (*cluster.agent_hosts, cluster.other)]
        self._heard: list[Any] = []

    def __enter__(self) -> AsyncOverheard:
        self._heard = [cable.__enter__() for cable in self._cables]
        return self

    def __exit__(self, *why: Any) -> None:
        for cable in self._cables:
            cable.__exit__(*why)

    def client_said(self, text: str) -> bool:
        return bool(self._heard[-1].holds(text.encode()))

    def agents_heard(self, text: str) -> bool:
        return any(heard.holds(text.encode()) for heard in self._heard[:-1])


@dataclass
class Impostor:
    """Takes connections in an agent's place, speaks TLS with a certificate of its own, and notes all that it
    is told. It says hello by the agent's name, and answers everything else with nonsense."""

    agent_id: str
    connections: int = 0
    told: bytearray = field(default_factory=bytearray)

    async def meets(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        hello = wire.HelloAnswer(id=self.agent_id, nonce="n" * 32).model_dump_json().encode()
        proof = orjson.dumps({"proof": "0" * 64})
        try:
            while data := await reader.read(65536):
                self.told += data
                body = hello if b"/hello" in data else proof
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def there(self, host: Host, folder: Path) -> AsyncIterator[Impostor]:
        own = certificate.kept(folder / "impostor.pem")
        server = await asyncio.start_server(
            self._counted, sock=host.listener(wire.DEFAULT_AGENT_PORT), ssl=own.server_context()
        )
        async with server:
            yield self

    async def _counted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.meets(reader, writer)


def override(agent_id: str, address: str) -> bytes:
    """A packet that says: this agent is here now, forget where it was (RFC 6762, 10.2)."""
    flush, name = const._CLASS_IN | const._CLASS_UNIQUE, f"{agent_id}.{wire.SERVICE_TYPE}"
    record = wire.txt_record(wire.Announced(agent_id, handshake.cluster_tag(KEY), "e" * 64))
    text = b"".join(bytes([len(f"{k}={v}")]) + f"{k}={v}".encode() for k, v in record.items())
    out = DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
    for answer in (
        DNSPointer(wire.SERVICE_TYPE, const._TYPE_PTR, const._CLASS_IN, 4500, name),
        DNSService(name, const._TYPE_SRV, flush, 120, 0, 0, wire.DEFAULT_AGENT_PORT, f"{agent_id}.local."),
        DNSText(name, const._TYPE_TXT, flush, 4500, text),
        DNSAddress(f"{agent_id}.local.", const._TYPE_A, flush, 120, socket.inet_aton(address)),
    ):
        out.add_answer_at_time(answer, 0)
    [packet] = out.packets()
    return packet


@asynccontextmanager
async def shouting(host: Host, packet: bytes, times_a_second: float = 5) -> AsyncIterator[None]:
    """The packet is sent to everybody again and again while the block lasts."""

    async def shout() -> None:
        loop = asyncio.get_running_loop()
        while True:
            await loop.sock_sendto(mouth, packet, MDNS)
            await asyncio.sleep(1 / times_a_second)

    with host.member_of(*MDNS) as mouth:
        mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host.address))
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(shout())
            yield
            task.cancel()


async def test_who_announces_itself_in_an_agents_place_is_told_nothing(cluster: Cluster):
    """M3d: the attacker overrides the agent's record. While the agent lives, nothing changes; when it is
    dead the balancer does go there, and turns away. Not one byte of a prompt or of a secret gets there."""
    impostor = Impostor("one")
    async with impostor.there(cluster.other, cluster.folder):
        async with cluster.agent(0, "run") as one:
            url = (await cluster.until_ready("one"))["one"]["url"]
            with AsyncOverheard(cluster) as heard:
                async with shouting(cluster.other, override("one", cluster.other.address)):
                    for number in range(10):
                        assert await cluster.chat(f"{CANARY} {number}") == "one"
                        await asyncio.sleep(0.3)
                    one.look()
                    one.send(signal.SIGKILL)
                    await one.ended()
                    await cluster.until(lambda seen: seen["one"]["state"] == "lost", "it is dead")
                    async with asyncio.timeout(WAIT_SECONDS):
                        while not impostor.connections and "another one than when it was met" not in (
                            cluster.balancer.text()
                        ):
                            await asyncio.sleep(0.05)
                    await cluster.balancer.until_it_says(
                        "its certificate is another one than when it was met"
                    )
                    assert (await cluster.workers())["one"]["state"] == "lost"
            assert not heard.agents_heard(CANARY)
        assert impostor.told == b""  # TLS ended at the certificate: not even a hello was said
        async with cluster.agent(0, "run"):
            again = (await cluster.until_ready("one"))["one"]
            assert again["url"] == url
            assert await cluster.chat() == "one"


async def test_an_id_that_nobody_has_met_is_no_way_in_either(cluster: Cluster):
    """Without a certificate to compare it with, the handshake is all; its proof is one of nothing."""
    impostor = Impostor("mallory")
    async with impostor.there(cluster.other, cluster.folder):
        async with cluster.agent(0, "run"):
            await cluster.until_ready("one")
            async with shouting(cluster.other, override("mallory", cluster.other.address)):
                await cluster.balancer.until_it_says("agent mallory at ")
                assert {await cluster.chat(CANARY) for _ in range(4)} == {"one"}
            assert (await cluster.workers()).keys() == {"one"}
        assert b"/prove" in impostor.told
        for secret in (CANARY, KEY, wire.SESSION_HEADER, wire.SESSION_HEADER.lower()):
            assert secret.encode() not in impostor.told


async def test_a_rogue_balancer_with_our_tag_gets_an_id_and_a_port(cluster: Cluster):
    """M4d: the tag is no secret, so the agent may tell it that it is there. It can do nothing with that."""
    joins: list[tuple[str, bytes]] = []

    async def anything(request: web.Request) -> web.Response:
        joins.append((request.path, await request.read()))
        return web.json_response({"joined": "x"})

    rogue = web.Application()
    rogue.router.add_route("*", "/{path:.*}", anything)
    runner = web.AppRunner(rogue)
    await runner.setup()
    try:
        await web.SockSite(runner, cluster.other.listener(BALANCER_PORT)).start()
        async with cluster.agent(0, "run") as one:
            await cluster.until_ready("one")
            async with shouting(cluster.other, balancer_record("rogue", cluster.other.address)):
                async with asyncio.timeout(WAIT_SECONDS):
                    while not joins:
                        await asyncio.sleep(0.05)
            for path, body in joins:
                assert path == wire.JOIN_PATH
                assert orjson.loads(body).keys() <= {"wire", "id", "port"}
            await insist_on_a_closed_door(cluster)
            assert KEY not in one.text()
            assert await cluster.chat() == "one"
    finally:
        await runner.cleanup()


def balancer_record(name: str, address: str) -> bytes:
    full = f"{name}.{wire.BALANCER_SERVICE_TYPE}"
    record = wire.txt_record(wire.Announced(name, handshake.cluster_tag(KEY)))
    text = b"".join(bytes([len(f"{k}={v}")]) + f"{k}={v}".encode() for k, v in record.items())
    out = DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
    for answer in (
        DNSPointer(wire.BALANCER_SERVICE_TYPE, const._TYPE_PTR, const._CLASS_IN, 4500, full),
        DNSService(full, const._TYPE_SRV, const._CLASS_IN, 120, 0, 0, BALANCER_PORT, f"{name}.local."),
        DNSText(full, const._TYPE_TXT, const._CLASS_IN, 4500, text),
        DNSAddress(f"{name}.local.", const._TYPE_A, const._CLASS_IN, 120, socket.inet_aton(address)),
    ):
        out.add_answer_at_time(answer, 0)
    [packet] = out.packets()
    return packet


async def insist_on_a_closed_door(cluster: Cluster) -> None:
    """Whoever connects to an agent without the key is answered by nothing but the handshake."""
    agent = f"https://{cluster.agent_hosts[0].address}:{wire.DEFAULT_AGENT_PORT}"
    hello = wire.Hello(balancer="rogue", nonce="n" * 32).model_dump_json()
    async with cluster.http.post(f"{agent}{wire.HELLO_PATH}", data=hello, ssl=False) as answer:
        nonce = wire.parse_hello_answer(await answer.read()).nonce
    proof = wire.Proof(balancer="rogue", nonce="n" * 32, agent_nonce=nonce, proof="0" * 64).model_dump_json()
    async with cluster.http.post(f"{agent}{wire.PROVE_PATH}", data=proof, ssl=False) as answer:
        assert answer.status == 403
    for method, path in (
        ("GET", wire.REPORT_PATH),
        ("POST", wire.KEY_PATH),
        ("GET", wire.MODELS_PATH),
        *(("POST", path) for path in wire.INFERENCE_PATHS),
    ):
        for headers in ({}, {wire.SESSION_HEADER: "0" * 64}):
            async with cluster.http.request(method, agent + path, headers=headers, ssl=False) as answer:
                told = await answer.json()
                assert (answer.status, told["error"]["code"]) == (401, wire.SESSION_UNKNOWN), path


# ... or who shouts

FLOOD_NAMES = 10_000
FLOOD_A_SECOND = 1_000
FLOOD_BYTES = 40 * 2**20
"""More than before, at most, of the memory of balancer and agent: twice what RELIABILITY allows, since
what a process holds is not the same twice."""


async def test_a_flood_of_names_and_of_nonsense_stays_within_bounds(cluster: Cluster):
    """M6d: ten thousand agents that are none, a thousand a second, with our own tag so that they are worth a
    try; every tenth packet is broken besides."""
    async with cluster.agent(0, "run") as one:
        await cluster.until_ready("one")
        assert await cluster.chat() == "one"
        processes = [psutil.Process(cluster.balancer.process.pid), psutil.Process(one.process.pid)]
        before = [process.memory_info().rss for process in processes]
        worked = [process.cpu_times() for process in processes]
        began = now()
        await flood(cluster.other)
        took = now() - began
        for process, rss, times in zip(processes, before, worked, strict=True):
            cpu = process.cpu_times()
            share = (cpu.user + cpu.system - times.user - times.system) / took
            more = process.memory_info().rss - rss
            print(f"\n{process.name()}: {more / 2**20:+.1f} MiB, {share:.0%} of a core in {took:.1f} s")
            assert more < FLOOD_BYTES
        assert (await cluster.workers()).keys() == {"one"}
        assert await cluster.chat() == "one"
        assert len(cluster.balancer.text()) < 256 * 1024
        assert "Traceback" not in cluster.balancer.text()


async def flood(host: Host) -> None:
    dice, loop = random.Random(6), asyncio.get_running_loop()
    with host.member_of(*MDNS) as mouth:
        mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host.address))
        began = now()
        for number in range(FLOOD_NAMES):
            packet = override(f"bait-{number}", host.address)
            await loop.sock_sendto(mouth, packet, MDNS)
            if number % 10 == 0:
                broken = bytearray(packet)
                for _ in range(8):
                    broken[dice.randrange(len(broken))] = dice.randrange(256)
                await loop.sock_sendto(mouth, bytes(broken), MDNS)
            ahead = number / FLOOD_A_SECOND - (now() - began)
            if ahead > 0:
                await asyncio.sleep(ahead)
