"""Models over the fleet: orders to agents with proofs of the cluster key, and to Ollama over its own API."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import OpenRoom, Room, listed
from tests.e2e.processes import command
from tests.fakes.engine import FakeEngine
from tests.fakes.managed import KEY, ManagedAgent, ManagedOllama
from worker_agent.wire import DownloadState, ModelState

REPO = "mlx-community/Qwen2.5-7B-Instruct-4bit"
Json = dict[str, Any]


@pytest.fixture(autouse=True)
def cluster_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALANCER_CLUSTER_KEY", KEY)


@asynccontextmanager
async def room_of(
    open_room: OpenRoom, *workers: ManagedAgent | ManagedOllama, strangers: Sequence[ManagedAgent] = ()
) -> AsyncIterator[Room]:
    """All of them are listed; the strangers are not let in."""
    async with AsyncExitStack() as stack:
        for worker in (*workers, *strangers):
            await stack.enter_async_context(worker.running())
        async with open_room(*(worker.row for worker in (*workers, *strangers))) as room:
            await room.ready(len(workers))
            yield room


async def model(room: Room, name: str) -> Json:
    _, told = await room.admin("GET", "/models")
    return next((one for one in told["models"] if one["name"] == name), {"state": "not there"})


async def until_model(room: Room, name: str, state: str) -> Json:
    async with asyncio.timeout(20):
        while (told := await model(room, name))["state"] != state:
            await asyncio.sleep(0.02)
    return told


def results(told: Json) -> dict[str, int]:
    return {one["worker"]: one["status"] for one in told["results"]}


# Agents ...


async def test_a_model_is_loaded_where_most_memory_is_free_and_seen_on_its_way(open_room: OpenRoom, caplog):
    caplog.set_level(logging.INFO)
    small, large = ManagedAgent("small", memory_total_bytes=8), ManagedAgent("large", memory_total_bytes=16)
    for agent in (small, large):
        agent.has("qwen", ModelState.UNLOADED, size_bytes=5, memory_bytes=7, load_seconds=3.0)
    async with room_of(open_room, small, large) as room:
        assert (await model(room, "qwen"))["state"] == "unloaded"
        status, told = await room.admin("POST", "/models/load", {"model": "qwen"})
        assert (status, results(told)) == (202, {"large": 202})
        assert [(action, order.name) for action, order in large.orders] == [("load", "qwen")]
        assert small.orders == []
        seen = await until_model(room, "qwen", "loading")
        assert (seen["progress"], seen["eta_seconds"]) == (0.25, 6.0)
        status, told = await room.admin("POST", "/models/load", {"model": "qwen"})
        assert (status, results(told)) == (202, {"large": 202})
        assert len(large.orders) == 1  # it is on its way
        large.has("qwen", ModelState.LOADED)
        await until_model(room, "qwen", "loaded")
        status, told = await room.admin("POST", "/models/load", {"model": "qwen"})
        assert (status, results(told), "already" in told["results"][0]["detail"]) == (
            200,
            {"large": 200},
            True,
        )
        status, told = await room.admin("POST", "/models/load", {"model": "qwen", "worker": "small"})
        assert results(told) == {"small": 202}
    changes = [line for line in caplog.messages if line.startswith("admin 127.0.0.1: load qwen: ")]
    assert len(changes) == 4


async def test_a_draining_worker_loads_nothing_unless_it_is_named(open_room: OpenRoom):
    agent = ManagedAgent("mac")
    agent.has("qwen", ModelState.UNLOADED)
    async with room_of(open_room, agent) as room:
        await room.admin("POST", "/workers/mac/drain")
        status, told = await room.admin("POST", "/models/load", {"model": "qwen"})
        assert (status, "undrain" in told["error"]["message"]) == (409, True)
        assert (await room.admin("POST", "/models/load", {"model": "qwen", "worker": "mac"}))[0] == 202


async def test_a_model_is_unloaded_wherever_it_is_loaded(open_room: OpenRoom):
    agents = [ManagedAgent(name) for name in ("a", "b", "c")]
    for agent, state in zip(
        agents, (ModelState.LOADED, ModelState.LOADING, ModelState.UNLOADED), strict=True
    ):
        agent.has("qwen", state)
    async with room_of(open_room, *agents) as room:
        status, told = await room.admin("POST", "/models/unload", {"model": "qwen", "force": True})
        assert (status, results(told)) == (200, {"a": 200, "b": 200})
        assert [order.force for _, order in agents[0].orders] == [True]
        await until_model(room, "qwen", "unloaded")
        status, told = await room.admin("POST", "/models/unload", {"model": "qwen"})
        assert (status, "GET /admin/models" in told["error"]["message"]) == (409, True)


async def test_a_model_is_asked_for_by_its_alias(open_room: OpenRoom):
    agent = ManagedAgent("mac")
    agent.has("Qwen2.5-7B-Q4", ModelState.UNLOADED)
    async with agent.running():
        async with open_room(agent.row | {"aliases": {"qwen": "Qwen2.5-7B-Q4"}}) as room:
            await room.ready()
            assert (await model(room, "qwen"))["workers"][0]["own_name"] == "Qwen2.5-7B-Q4"
            assert (await room.admin("POST", "/models/load", {"model": "qwen"}))[0] == 202
            assert agent.orders[0][1].name == "Qwen2.5-7B-Q4"


@pytest.mark.parametrize("status", [200, 204, 205, 226, 299])
async def test_an_odd_status_of_an_agent_becomes_none_of_ours(open_room: OpenRoom, status: int):
    """As our own, 204 would take the answer its body."""
    agent = ManagedAgent("mac")
    agent.has("qwen", ModelState.UNLOADED)
    agent.refuses = (status, "done")
    async with room_of(open_room, agent) as room:
        assert await room.admin("POST", "/models/load", {"model": "qwen", "worker": "mac"}) == (
            200,
            {
                "action": "load",
                "model": "qwen",
                "results": [{"worker": "mac", "ok": True, "status": 200, "detail": "is loaded"}],
            },
        )


async def test_each_worker_answers_for_itself(open_room: OpenRoom):
    """One does it, one refuses; one has another key, one none, one is too old, and they are not even asked:
    202, and who did what."""
    agents = {name: ManagedAgent(name) for name in ("does", "refuses", "stranger", "old", "keyless")}
    agents["refuses"].refuses = (507, "1.2 GiB are free on the disk, it needs 4.0 GiB")
    agents["stranger"].key = "another-key-of-another-room"
    agents["old"].is_old = True
    agents["keyless"].key = None
    strangers = [agents[name] for name in ("stranger", "old", "keyless")]
    async with room_of(open_room, agents["does"], agents["refuses"], strangers=strangers) as room:
        status, told = await room.admin("POST", "/models/download", {"repo": REPO, "workers": list(agents)})
        assert status == 202
        assert results(told) == {"does": 202, "refuses": 507, "stranger": 409, "old": 409, "keyless": 409}
        said = {one["worker"]: one["detail"] for one in told["results"]}
        assert "4.0 GiB" in said["refuses"]
        assert "balancer cluster invite" in said["stranger"]
        assert "balancer workers approve keyless" in said["keyless"]
        assert "update" in said["old"]
        assert KEY not in json.dumps(told)
        assert agents["stranger"].proofs_refused >= 1
        assert all(not agent.orders for name, agent in agents.items() if name != "does")


async def test_where_none_does_it_the_answer_is_an_error_with_every_reason(open_room: OpenRoom):
    agent = ManagedAgent("mac", refuses=(409, "it is loaded: unload it first"))
    agent.has("qwen", ModelState.LOADED)
    async with room_of(open_room, agent) as room:
        status, told = await room.admin("POST", "/models/delete", {"model": "qwen", "worker": "mac"})
        assert (status, results(told)) == (409, {"mac": 409})
        assert "mac: it is loaded: unload it first" in told["error"]["message"]
        agent.refuses = (500, "the disk is broken")
        assert (await room.admin("POST", "/models/delete", {"model": "qwen", "worker": "mac"}))[0] == 502


async def test_a_worker_that_is_gone_is_a_502_and_says_why(open_room: OpenRoom):
    agent = ManagedAgent("mac")
    async with room_of(open_room, agent) as room:
        async with FakeEngine() as engine:
            gone = listed(engine, "gone", type="agent")
        room.config.write_text(json.dumps({"workers": [agent.row, gone]}))
        assert (await room.admin("POST", "/config/reload"))[0] == 200
        status, told = await room.admin("POST", "/models/load", {"model": "qwen", "worker": "gone"})
        assert (status, results(told)) == (502, {"gone": 502})
        assert "cannot be reached" in told["error"]["message"]


async def test_downloads_are_shown_and_cancelled(open_room: OpenRoom):
    one, other = ManagedAgent("one"), ManagedAgent("other")
    async with room_of(open_room, one, other) as room:
        order = {
            "repo": REPO,
            "workers": ["one", "one"],
            "name": "qwen",
            "file": "Q4_K_M",
            "revision": "main",
        }
        status, told = await room.admin("POST", "/models/download", order)
        assert (status, results(told)) == (202, {"one": 202})
        ((_, given),) = one.orders
        assert (given.repo, given.name, given.file, given.revision) == (REPO, "qwen", "Q4_K_M", "main")

        async def downloads() -> list[Json]:
            return list((await room.admin("GET", "/models"))[1]["downloads"])

        async with asyncio.timeout(20):
            while not (shown := await downloads()):
                await asyncio.sleep(0.02)
        assert (shown[0]["worker"], shown[0]["repo"], shown[0]["done_bytes"]) == ("one", REPO, 1)
        status, told = await room.admin("POST", "/models/cancel", {"model": REPO, "worker": "other"})
        assert status == 404
        status, told = await room.admin("POST", "/models/cancel", {"model": REPO})
        assert (status, results(told)) == (200, {"one": 200})
        assert one.orders[-1][0] == "cancel"


@pytest.mark.parametrize(
    ("path", "order", "status", "words"),
    [
        ("load", {"model": "nothing"}, 404, "/admin/models/download"),
        ("load", {"model": "nothing", "worker": "mac"}, 404, "has no model nothing"),
        ("load", {"model": "qwen", "worker": "nobody"}, 404, "'nobody'"),
        ("unload", {"model": "nothing"}, 404, "nothing"),
        ("delete", {"model": "qwen"}, 400, "`worker` is missing"),
        ("cancel", {"model": "qwen"}, 404, "No download of qwen"),
        ("download", {"repo": REPO}, 400, '"workers"'),
        ("download", {"repo": REPO, "worker": "mac", "workers": "all"}, 400, '"workers"'),
        ("download", {"repo": REPO, "workers": []}, 400, '"workers"'),
        ("download", {"repo": REPO, "workers": ["nobody"]}, 404, "'nobody'"),
        ("download", {"repo": "llama3.2:1b", "workers": "all"}, 409, "type ollama"),
    ],
)
async def test_an_order_that_nobody_can_follow_says_what_to_do(
    open_room: OpenRoom, path: str, order: Json, status: int, words: str
):
    agent = ManagedAgent("mac")
    agent.has("qwen", ModelState.UNLOADED)
    async with room_of(open_room, agent) as room:
        answered, told = await room.admin("POST", f"/models/{path}", order)
        assert (answered, words in told["error"]["message"]) == (status, True), told
        assert agent.orders == []


async def test_a_worker_without_such_an_api_says_so(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        status, told = await room.admin("POST", "/models/unload", {"model": "fake"})
        assert (status, results(told)) == (409, {"a": 409})
        assert "type openai" in told["error"]["message"]


async def test_an_admin_who_leaves_does_not_hold_the_agent_up_and_is_logged(open_room: OpenRoom, caplog):
    caplog.set_level(logging.INFO)
    agent = ManagedAgent("mac", silent=asyncio.Event())
    agent.has("qwen", ModelState.UNLOADED)
    async with room_of(open_room, agent) as room:
        asking = asyncio.ensure_future(room.admin("POST", "/models/load", {"model": "qwen"}))
        await room.until(lambda: agent.held == 1, "the agent has the order")
        asking.cancel()
        left = "admin 127.0.0.1: load qwen: left before it was known how that went"
        await room.until(lambda: left in caplog.messages, "it is logged")


# Ollama ...


async def test_ollama_loads_without_a_prompt_and_unloads_by_keeping_nothing(open_room: OpenRoom):
    ollama = ManagedOllama({"llama3.2:latest": False, "nomic:latest": False}, embeds={"nomic:latest"})
    async with room_of(open_room, ollama) as room:
        status, told = await room.admin("POST", "/models/load", {"model": "llama3.2"})
        assert (status, results(told)) == (200, {"ollama": 200})
        await until_model(room, "llama3.2", "loaded")
        status, told = await room.admin("POST", "/models/unload", {"model": "llama3.2"})
        assert (status, results(told)) == (200, {"ollama": 200})
        await until_model(room, "llama3.2", "unloaded")
        assert (await room.admin("POST", "/models/load", {"model": "nomic:latest"}))[0] == 200
        asked = [(path, order["model"], order["keep_alive"]) for path, order in ollama.asked]
        assert asked == [
            ("/api/generate", "llama3.2:latest", "30m"),
            ("/api/generate", "llama3.2:latest", 0),
            ("/api/embed", "nomic:latest", "30m"),
        ]


async def test_a_slow_load_goes_on_behind_the_answer(open_room: OpenRoom):
    ollama = ManagedOllama({"llama3.2:latest": False}, loads_slowly=asyncio.Event())
    async with room_of(open_room, ollama) as room:
        for _ in range(2):
            status, told = await room.admin("POST", "/models/load", {"model": "llama3.2", "worker": "ollama"})
            assert (status, results(told)) == (202, {"ollama": 202})
        assert (await model(room, "llama3.2"))["state"] == "loading"
        assert len(ollama.asked) == 1
        ollama.loads_slowly.set()
        await until_model(room, "llama3.2", "loaded")


async def test_a_pull_is_shown_on_its_way_and_done(open_room: OpenRoom):
    ollama = ManagedOllama(pulls_until=asyncio.Event())
    async with room_of(open_room, ollama) as room:
        order = {"repo": "llama3.2:1b", "workers": "all"}
        for _ in range(2):
            assert (await room.admin("POST", "/models/download", order))[0] == 202
        assert len(ollama.asked) == 1
        ((shown,),) = [(await room.admin("GET", "/models"))[1]["downloads"]]
        assert (shown["worker"], shown["state"]) == ("ollama", "downloading")
        assert (shown["done_bytes"], shown["total_bytes"]) == (50, 100)
        assert shown["eta_seconds"] is not None
        ollama.pulls_until.set()
        await until_model(room, "llama3.2:1b", "unloaded")
        ((shown,),) = [(await room.admin("GET", "/models"))[1]["downloads"]]
        assert (shown["state"], shown["done_bytes"]) == ("done", 100)


async def test_a_pull_that_is_cancelled_ends_at_ollama(open_room: OpenRoom):
    ollama = ManagedOllama(pulls_until=asyncio.Event())
    async with room_of(open_room, ollama) as room:
        await room.admin("POST", "/models/download", {"repo": "llama3.2:1b", "worker": "ollama"})
        status, told = await room.admin("POST", "/models/cancel", {"model": "llama3.2:1b"})
        assert (status, results(told)) == (200, {"ollama": 200})
        await room.until(lambda: ollama.broken_pulls == 1, "Ollama is told")
        ((shown,),) = [(await room.admin("GET", "/models"))[1]["downloads"]]
        assert (shown["state"], "cancelled" in shown["detail"]) == ("failed", True)


async def test_a_pull_at_who_has_left_the_room_can_be_cancelled(open_room: OpenRoom):
    ollama = ManagedOllama(pulls_until=asyncio.Event())
    async with room_of(open_room, ollama) as room:
        await room.admin("POST", "/models/download", {"repo": "llama3.2:1b", "worker": "ollama"})
        assert (await room.admin("DELETE", "/workers/ollama"))[0] == 200
        order = {"model": "llama3.2:1b", "worker": "ollama"}
        status, told = await room.admin("POST", "/models/cancel", order)
        assert (status, results(told)) == (200, {"ollama": 200})
        await room.until(lambda: ollama.broken_pulls == 1, "Ollama is told")
        assert (await room.admin("POST", "/models/cancel", order))[0] == 404


async def test_a_pull_that_fails_says_why(open_room: OpenRoom):
    async with room_of(open_room, ManagedOllama()) as room:
        status, told = await room.admin("POST", "/models/download", {"repo": "nothing", "worker": "ollama"})
        assert (status, "file does not exist" in told["error"]["message"]) == (502, True)


async def test_ollama_deletes_what_is_not_loaded(open_room: OpenRoom):
    ollama = ManagedOllama({"a:latest": True, "b:latest": False})
    async with room_of(open_room, ollama) as room:
        await until_model(room, "a:latest", "loaded")
        status, told = await room.admin("POST", "/models/delete", {"model": "a", "worker": "ollama"})
        assert (status, "unload it first" in told["error"]["message"]) == (409, True)
        for order in ({"model": "b"}, {"model": "a", "force": True}):
            assert (await room.admin("POST", "/models/delete", order | {"worker": "ollama"}))[0] == 200
        assert ollama.models == {}


async def test_a_balancer_that_stops_leaves_no_pull_behind(open_room: OpenRoom):
    ollama = ManagedOllama(pulls_until=asyncio.Event())
    async with ollama.running():
        async with open_room(ollama.row) as room:
            await room.ready()
            await room.admin("POST", "/models/download", {"repo": "llama3.2:1b", "worker": "ollama"})
        async with asyncio.timeout(20):
            while not ollama.broken_pulls:
                await asyncio.sleep(0.01)


# Commands ...


async def run(room: Room, tmp_path: Path, *words: str) -> tuple[int, str]:
    variables = {"BALANCER_URL": room.url, "BALANCER_DATA_DIR": str(room.data_dir), "COLUMNS": "200"}
    async with command(
        "balancer", *words, output=tmp_path / "out.txt", home=tmp_path, **variables
    ) as running:
        return await running.ended(), running.text()


async def test_the_commands_show_load_and_fetch_models(open_room: OpenRoom, tmp_path: Path):
    agent = ManagedAgent("mac")
    agent.has("qwen [bold]", ModelState.UNLOADED, size_bytes=5 * 2**30, detail="on its disk")
    async with room_of(open_room, agent) as room:
        status, said = await run(room, tmp_path, "models")
        assert status == 0
        for words in ("qwen [bold]", "mac", "unloaded", "5.0 GiB", "on its disk"):
            assert words in said
        status, said = await run(room, tmp_path, "models", "load", "qwen [bold]")
        assert (status, "mac: is being loaded" in said) == (0, True)
        status, said = await run(room, tmp_path, "models", "list", "--json")
        assert json.loads(said)["models"][0]["state"] == "loading"
        agent.has("qwen [bold]", ModelState.LOADED)
        status, said = await run(room, tmp_path, "models", "unload", "qwen [bold]", "--worker", "mac")
        assert (status, said) == (0, "mac: is unloaded\n")
        status, said = await run(room, tmp_path, "models", "download", REPO)
        assert (status, "--all" in said) == (2, True)
        status, said = await run(room, tmp_path, "models", "download", REPO, "--all", "--file", "Q4_K_M")
        assert (status, agent.orders[-1][1].file) == (0, "Q4_K_M")
        status, said = await run(room, tmp_path, "models", "cancel", REPO)
        assert (status, said) == (0, "mac: is cancelled\n")
        status, said = await run(room, tmp_path, "models", "delete", "qwen [bold]", "--worker", "mac")
        assert (status, said) == (0, "mac: is deleted\n")
        status, said = await run(room, tmp_path, "models", "load", "qwen")
        assert (status, "POST /admin/models/download" in said) == (1, True)


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        (ModelState.LOADED, 0, "mac: qwen is loaded"),
        (ModelState.FAILED, 1, "mac: qwen is failed: it is too large"),
        (ModelState.UNLOADED, 1, "mac: qwen is unloaded"),
    ],
)
async def test_a_load_is_watched_until_it_is_over(open_room: OpenRoom, tmp_path: Path, end, status, words):
    agent = ManagedAgent("mac")
    agent.has("qwen", ModelState.UNLOADED)
    async with room_of(open_room, agent) as room:
        running = asyncio.ensure_future(run(room, tmp_path, "models", "load", "qwen", "--watch"))
        out = tmp_path / "out.txt"
        async with asyncio.timeout(20):
            while "qwen is loading 25%, 6 s left" not in (out.read_text() if out.exists() else ""):
                await asyncio.sleep(0.02)
        agent.has("qwen", end, detail="it is too large" if end is ModelState.FAILED else "")
        ended, said = await running
        assert (ended, words in said) == (status, True), said


@pytest.mark.parametrize("end", [DownloadState.DONE, DownloadState.FAILED])
async def test_a_download_is_watched_until_it_is_over(
    open_room: OpenRoom, tmp_path: Path, end: DownloadState
):
    agent = ManagedAgent("mac")
    async with room_of(open_room, agent) as room:
        words = ("models", "download", REPO, "--worker", "mac", "--watch")
        running = asyncio.ensure_future(run(room, tmp_path, *words))
        out = tmp_path / "out.txt"
        async with asyncio.timeout(20):
            while f"mac: {REPO} downloading" not in (out.read_text() if out.exists() else ""):
                await asyncio.sleep(0.02)
        agent.fetches(REPO, end, detail="the hash is another" if end is DownloadState.FAILED else "")
        status, said = await running
        assert (status, f"mac: {REPO} {end.value}" in said) == (int(end is DownloadState.FAILED), True), said
