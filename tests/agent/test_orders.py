"""Orders over HTTP: who may give them, and what comes of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
import pytest

from agent.scenes import until
from agent.test_residents import POLICY, Machine
from worker_agent import handshake, wire
from worker_agent.changes import Changes
from worker_agent.gateway import Gateway
from worker_agent.models.catalog import NotAModel
from worker_agent.models.downloads import DownloadRefused
from worker_agent.models.local import Format, LocalModel
from worker_agent.offers import Offer
from worker_agent.orders import Orders
from worker_agent.server import ServerPolicy, listening
from worker_agent.shelf import Shelf
from worker_agent.wire import Download, DownloadState, ModelOrder, ModelState

KEY = "0123456789abcdef-the-cluster-key"


@dataclass
class Disk:
    """A catalog and its downloads, as a shelf sees them."""

    folder: Path
    changes: Changes
    models: dict[str, LocalModel] = field(default_factory=dict)
    fetching: dict[str, Download] = field(default_factory=dict)
    scans: int = 0

    def scan(self) -> tuple[LocalModel, ...]:
        self.scans += 1
        return tuple(self.models.values())

    def delete(self, name: str) -> None:
        if name == "stuck":
            raise NotAModel("the disk does not let us")
        del self.models[name]

    def start(self, order: ModelOrder) -> Download:
        if order.repo is None:
            raise DownloadRefused("no_repo", "say which one")
        found = Download(repo=order.repo, name=order.name, state=DownloadState.DOWNLOADING)
        self.fetching[order.name] = found
        self.changes.announce()
        return found

    def finish(self, name: str) -> None:
        self.fetching[name] = self.fetching[name].model_copy(update={"state": DownloadState.DONE})
        self.models[name] = local(name)
        self.changes.announce()

    def cancel(self, name: str) -> bool:
        return self.fetching.pop(name, None) is not None

    def told(self) -> tuple[Download, ...]:
        return tuple(self.fetching.values())


def local(name: str) -> LocalModel:
    return LocalModel(
        name=name, path=f"/models/{name}/a.gguf", format=Format.GGUF, size_bytes=10**9, ours=True
    )


AGENT = "studio-3fa9"


@dataclass
class Agent:
    machine: Machine
    disk: Disk
    url: str
    client: aiohttp.ClientSession

    async def nonce(self) -> str:
        async with self.client.post(self.url + wire.CHALLENGE_PATH) as answer:
            return str((await answer.json())["nonce"])

    async def order(self, word: str, key: str = KEY, **order: object) -> tuple[int, dict[str, object]]:
        path, body = f"{wire.MODELS_PATH}/{word}", orjson.dumps(order)
        proof = handshake.prove(key, await self.nonce(), AGENT, "POST", path, body)
        return await self.send("POST", path, body, {wire.PROOF_HEADER: proof})

    async def listed(self) -> wire.ModelList:
        proof = handshake.prove(KEY, await self.nonce(), AGENT, "GET", wire.MODELS_PATH, b"")
        async with self.client.get(self.url + wire.MODELS_PATH, headers={wire.PROOF_HEADER: proof}) as answer:
            assert answer.status == 200
            return wire.parse_models(await answer.read())

    async def send(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, object]]:
        async with self.client.request(method, self.url + path, data=body, headers=headers) as answer:
            found = await answer.json()
            return answer.status, found.get("error", found)


@contextlib.asynccontextmanager
async def agent_of(folder: Path, key: str | None = KEY) -> AsyncIterator[Agent]:
    machine = Machine(folder, POLICY)
    disk = Disk(folder, machine.changes)

    def offer(model: LocalModel) -> Offer:
        return machine.made(model.name, 4)

    given = (machine.made("given", 4),)
    shelf = Shelf(given, offer, disk, machine.residents)  # type: ignore[arg-type]
    shelf.offer_the_given()
    shelf.fetched_by(disk)  # type: ignore[arg-type]
    gateway = Gateway(
        machine.residents, machine.report, machine.changes, orders=Orders(shelf, AGENT, key).routes()
    )
    async with (
        listening(gateway.application(), "127.0.0.1", 0, ServerPolicy()) as port,
        machine.residents.running_engines(),
        aiohttp.ClientSession() as client,
        asyncio.TaskGroup() as tasks,
    ):
        looking = tasks.create_task(shelf.keep_looking(machine.changes))
        yield Agent(machine, disk, f"http://127.0.0.1:{port}", client)
        looking.cancel()


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    async with agent_of(tmp_path) as made:
        yield made


async def test_a_model_is_fetched_loaded_unloaded_and_deleted_by_order(agent: Agent) -> None:
    told = agent.machine.told
    assert [model.name for model in (await agent.listed()).models] == ["given"]
    status, _ = await agent.order("download", name="a", repo="org/a")
    assert status == 202
    [download] = (await agent.listed()).downloads
    assert (download.name, download.state) == ("a", DownloadState.DOWNLOADING)
    agent.disk.finish("a")
    await until(lambda: agent.machine.residents.knows("a"))  # at once, without anybody asking for it
    assert told("a").state is ModelState.UNLOADED
    status, _ = await agent.order("load", name="a")
    assert status == 202
    await until(lambda: told("a").state is ModelState.LOADED)
    status, error = await agent.order("delete", name="a")
    assert (status, error["code"]) == (409, "model_loaded")
    status, listed = await agent.order("unload", name="a")
    assert status == 200
    assert wire.parse_models(orjson.dumps(listed)).models[1].state is ModelState.UNLOADED
    assert not agent.machine.runs("a")
    status, _ = await agent.order("delete", name="a")
    assert status == 200
    assert agent.disk.models == {}


async def test_a_loaded_one_is_deleted_by_force(agent: Agent) -> None:
    agent.disk.start(ModelOrder(name="a", repo="org/a"))
    agent.disk.finish("a")
    await until(lambda: agent.machine.residents.knows("a"))
    await agent.order("load", name="a")
    await until(lambda: agent.machine.runs("a"))
    status, _ = await agent.order("delete", name="a", force=True)
    assert status == 200
    assert not agent.machine.runs("a")


async def test_only_what_this_agent_has_fetched_is_deleted(agent: Agent) -> None:
    status, error = await agent.order("delete", name="given")
    assert (status, error["code"]) == (409, "model_not_ours")
    agent.disk.models["stuck"] = local("stuck")
    agent.disk.start(ModelOrder(name="other", repo="org/other"))
    agent.disk.finish("other")  # which has the disk looked at
    await until(lambda: agent.machine.residents.knows("stuck"))
    status, error = await agent.order("delete", name="stuck")
    assert (status, error["message"]) == (409, "the disk does not let us")


@pytest.mark.parametrize("word", ["load", "unload", "delete"])
async def test_a_model_that_is_not_here_is_named(agent: Agent, word: str) -> None:
    status, error = await agent.order(word, name="x")
    assert (status, error["code"]) == (404, "model_not_found")


async def test_what_cannot_be_fetched_or_cancelled_is_said(agent: Agent) -> None:
    status, error = await agent.order("download", name="a")
    assert (status, error["code"], error["message"]) == (409, "no_repo", "say which one")
    status, error = await agent.order("cancel", name="a")
    assert (status, error["code"]) == (404, "no_such_download")
    agent.disk.start(ModelOrder(name="a", repo="org/a"))
    status, _ = await agent.order("cancel", name="a")
    assert (status, agent.disk.fetching) == (200, {})


async def test_without_a_key_nobody_may_order_anything_and_is_told_what_to_do(tmp_path: Path) -> None:
    async with agent_of(tmp_path, key=None) as agent:
        for method, path in (
            ("POST", wire.CHALLENGE_PATH),
            ("GET", wire.MODELS_PATH),
            ("POST", f"{wire.MODELS_PATH}/load"),
        ):
            status, error = await agent.send(method, path, b"", {wire.PROOF_HEADER: "a:b"})
            assert (status, error["code"]) == (403, "cluster_key_needed")
            assert "WORKER_AGENT_CLUSTER_KEY" in str(error["message"])


LOAD = f"{wire.MODELS_PATH}/load"
BODY = b'{"name": "given"}'


@pytest.mark.parametrize(
    "proof_of",
    [
        lambda _: "",
        lambda nonce: nonce,
        lambda _: handshake.prove(KEY, "a-nonce-of-mine", AGENT, "POST", LOAD, BODY),
        lambda nonce: handshake.prove("another-cluster-key-of-16", nonce, AGENT, "POST", LOAD, BODY),
        lambda nonce: handshake.prove(KEY, nonce, AGENT, "POST", f"{wire.MODELS_PATH}/unload", BODY),
        lambda nonce: handshake.prove(KEY, nonce, AGENT, "POST", LOAD, b'{"name": "b"}'),
        lambda nonce: handshake.prove(KEY, nonce, "another-agent", "POST", LOAD, BODY),
        lambda nonce: handshake.prove(KEY, nonce, AGENT, "POST", LOAD, BODY) + "é",
    ],
    ids=[
        "none",
        "no proof",
        "a made-up nonce",
        "another key",
        "another order",
        "another body",
        "another agent",
        "not ASCII",
    ],
)
async def test_who_cannot_prove_the_key_for_this_very_order_is_refused(
    agent: Agent, proof_of: Callable[[str], str]
) -> None:
    proof = proof_of(await agent.nonce())
    status, error = await agent.send("POST", LOAD, BODY, {wire.PROOF_HEADER: proof})
    assert (status, error["code"]) == (403, "cluster_key_wrong")
    assert agent.machine.told("given").state is ModelState.UNLOADED


async def test_a_proof_is_good_once(agent: Agent) -> None:
    headers = {wire.PROOF_HEADER: handshake.prove(KEY, await agent.nonce(), AGENT, "POST", LOAD, BODY)}
    assert (await agent.send("POST", LOAD, BODY, headers))[0] == 202
    assert (await agent.send("POST", LOAD, BODY, headers))[0] == 403


async def test_orders_are_bounded_and_not_for_web_pages(agent: Agent) -> None:
    status, error = await agent.send("POST", LOAD, b" " * 65537, {})
    assert (status, error["code"]) == (413, "body_too_large")
    status, error = await agent.send("POST", wire.CHALLENGE_PATH, b"", {"Origin": "http://evil.test"})
    assert (status, error["code"]) == (403, "browser")
    status, error = await agent.send("GET", wire.MODELS_PATH, b"", {"Host": "evil.test"})
    assert (status, error["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("order", [{}, {"name": ""}, {"name": "a\nb"}, {"name": "x" * 200}])
async def test_an_order_that_is_not_understood_says_why(agent: Agent, order: dict[str, object]) -> None:
    status, error = await agent.order("load", **order)
    assert (status, error["code"]) == (400, "bad_order")
    assert "name" in str(error["message"])


def test_a_proof_of_bytes_that_are_no_text_is_none() -> None:
    nonces = handshake.Nonces()
    nonces.give("a", 0.0)
    assert not nonces.accepts(KEY, "a:\udcff", AGENT, "POST", LOAD, BODY, 1.0)  # as aiohttp hands on 0xff


async def test_what_is_fetched_or_deleted_beside_the_agent_is_noticed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, POLICY)
    disk = Disk(tmp_path, machine.changes)
    offered: list[str] = []

    def offer(model: LocalModel) -> Offer:
        offered.append(model.name)
        return machine.made(model.name, 4)

    shelf = Shelf((), offer, disk, machine.residents)  # type: ignore[arg-type]
    looking = asyncio.ensure_future(shelf.keep_looking(machine.changes, every_seconds=0.02))
    disk.models["a"] = local("a")
    await until(lambda: machine.residents.names == ("a",))
    scans = disk.scans
    await until(lambda: disk.scans > scans + 2)
    assert offered == ["a"]  # what is as it was is not planned anew
    del disk.models["a"]
    await until(lambda: not machine.residents.names)
    looking.cancel()
