"""Orders over HTTP: who may give them, and what comes of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
import pytest

from agent.meeting import Met, gate_with, met
from agent.scenes import until
from agent.test_residents import POLICY, Machine
from worker_agent import wire
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


@dataclass
class Agent:
    machine: Machine
    disk: Disk
    url: str
    client: aiohttp.ClientSession
    balancer: Met

    async def order(self, word: str, **order: object) -> tuple[int, dict[str, object]]:
        return await self.send(
            "POST", f"{wire.MODELS_PATH}/{word}", orjson.dumps(order), self.balancer.headers
        )

    async def listed(self) -> wire.ModelList:
        async with self.client.get(self.url + wire.MODELS_PATH, headers=self.balancer.headers) as answer:
            assert answer.status == 200
            return wire.parse_models(await answer.read())

    async def send(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, object]]:
        async with self.client.request(method, self.url + path, data=body, headers=headers) as answer:
            found = await answer.json()
            return answer.status, found.get("error", found)


@contextlib.asynccontextmanager
async def agent_of(folder: Path) -> AsyncIterator[Agent]:
    machine = Machine(folder, POLICY)
    disk = Disk(folder, machine.changes)

    def offer(model: LocalModel) -> Offer:
        return machine.made(model.name, 4)

    given = (machine.made("given", 4),)
    shelf = Shelf(given, offer, disk, machine.residents)  # type: ignore[arg-type]
    shelf.offer_the_given()
    shelf.fetched_by(disk)  # type: ignore[arg-type]
    gateway = Gateway(
        machine.residents, machine.report, machine.changes, gate_with(), orders=Orders(shelf).routes()
    )
    async with (
        listening(gateway.application(), "127.0.0.1", 0, ServerPolicy()) as server,
        machine.residents.running_engines(),
        aiohttp.ClientSession() as client,
        asyncio.TaskGroup() as tasks,
    ):
        looking = tasks.create_task(shelf.keep_looking(machine.changes))
        url = f"http://127.0.0.1:{server.port}"
        yield Agent(machine, disk, url, client, await met(client, url))
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


LOAD = f"{wire.MODELS_PATH}/load"


@pytest.mark.parametrize("session", ["", "x", "0" * 64, "é"])
@pytest.mark.parametrize("word", ["load", "unload", "delete", "download", "cancel"])
async def test_a_stranger_orders_nothing(agent: Agent, word: str, session: str) -> None:
    path, headers = f"{wire.MODELS_PATH}/{word}", {wire.SESSION_HEADER: session}
    status, error = await agent.send("POST", path, b'{"name": "given"}', headers)
    assert (status, error["code"]) == (401, wire.SESSION_UNKNOWN)
    assert agent.machine.told("given").state is ModelState.UNLOADED


async def test_orders_are_bounded_and_not_for_web_pages(agent: Agent) -> None:
    known = agent.balancer.headers
    status, error = await agent.send("POST", LOAD, b" " * 65537, known)
    assert (status, error["code"]) == (413, "body_too_large")
    status, error = await agent.send("POST", LOAD, b"", {**known, "Origin": "http://evil.test"})
    assert (status, error["code"]) == (403, "browser")
    status, error = await agent.send("GET", wire.MODELS_PATH, b"", {**known, "Host": "evil.test"})
    assert (status, error["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("order", [{}, {"name": ""}, {"name": "a\nb"}, {"name": "x" * 200}])
async def test_an_order_that_is_not_understood_says_why(agent: Agent, order: dict[str, object]) -> None:
    status, error = await agent.order("load", **order)
    assert (status, error["code"]) == (400, "bad_order")
    assert "name" in str(error["message"])


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
