"""The admin plane: nothing without the key; with it the room, presets and configuration, seen and moved."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from balancer import keys
from balancer.app import running
from balancer.settings import load
from balancer.up import agent_environment
from tests.e2e.conftest import OpenRoom, Room, free_port, listed
from tests.e2e.processes import command
from tests.fakes.engine import FakeEngine
from tests.fakes.managed import ManagedAgent
from worker_agent.wire import WIRE_VERSION, ModelState

ASK = {"model": "fake", "messages": [{"role": "user", "content": "Name some trees."}], "max_tokens": 4}


@pytest.fixture(autouse=True)
def own_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody's real folder is read or written."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "llm-room-balancer" / "presets"


def routes(room: Room) -> Iterator[tuple[str, str]]:
    """Method and path of every route of the running application, those within applications too."""
    application: web.Application = room.balancer._server._runner.app
    for route in application.router.routes():
        if route.resource is not None:
            yield route.method, re.sub(r"\{[^}]+\}", "x", route.resource.canonical)


ADMIN_ROUTES = {
    ("GET", "/admin/workers"),
    ("POST", "/admin/workers/x/drain"),
    ("POST", "/admin/workers/x/undrain"),
    ("POST", "/admin/workers/x/resume"),
    ("POST", "/admin/workers/x/admit"),
    ("DELETE", "/admin/workers/x"),
    ("GET", "/admin/models"),
    ("POST", "/admin/models/load"),
    ("POST", "/admin/models/unload"),
    ("POST", "/admin/models/download"),
    ("POST", "/admin/models/delete"),
    ("POST", "/admin/models/cancel"),
    ("GET", "/admin/presets"),
    ("GET", "/admin/presets/x"),
    ("PUT", "/admin/presets/x"),
    ("DELETE", "/admin/presets/x"),
    ("GET", "/admin/config"),
    ("POST", "/admin/config/reload"),
    ("GET", "/admin/requests/x/why"),
    ("GET", "/admin/keys"),
    ("POST", "/admin/keys"),
    ("PATCH", "/admin/keys/x"),
    ("DELETE", "/admin/keys/x"),
    ("GET", "/admin/audit"),
    ("GET", "/admin/session"),
    ("DELETE", "/admin/session"),
}
LOG_IN = ("POST", "/admin/session")
"""The one whose body brings the key."""


async def test_nothing_under_admin_answers_without_the_key(open_room: OpenRoom):
    """Every route of the application, and what is none: who has no key does not even learn which exist."""
    async with FakeEngine() as engine, open_room(engine) as room:
        found = set(routes(room))
        admin = {one for one in found if one[1].startswith("/admin")}
        assert admin >= ADMIN_ROUTES
        assert LOG_IN in admin
        asked = {
            *(admin - {LOG_IN}),
            *(("GET", path) for path in ("/admin", "/admin/", "/admin/nothing", "/admin/%77orkers")),
            ("PUT", "/admin/workers"),
            ("OPTIONS", "/admin/models/load"),
            ("GET", "/admin//workers"),
            ("GET", "/v1/../admin/workers"),
        }
        key = keys.read(room.data_dir / "admin_key")
        for method, path in sorted(asked):
            for headers in (
                {},
                {"Authorization": "Bearer"},
                {"Authorization": f"Basic {key}"},
                {"Authorization": key},
                {"Cookie": f"admin_key={key}"},
            ):
                url = f"{room.url}{path}"
                async with room.http.request(method, url, json={}, headers=headers) as response:
                    assert response.status == 401, (method, path, headers)
                    assert response.headers["WWW-Authenticate"].startswith("Bearer")
                    if method != "HEAD":
                        told = (await response.json())["error"]
                        assert told["code"] == "admin_key_missing"
                        assert "admin_key" in told["message"]
            async with room.http.request(
                method, f"{room.url}{path}?key={key}&token={key}", json={}
            ) as response:
                assert response.status == 401, (method, path)
        assert room.worker("a").state == "ready"


@pytest.mark.parametrize(
    "target",
    ["//admin/workers", "/admin%2Fworkers", "/x/../admin/workers", "/%61dmin/workers", "/admin/./workers"],
)
@pytest.mark.parametrize("form", ["{target}", "http://localhost{target}"], ids=["path", "whole URL"])
async def test_no_way_to_write_a_path_leads_around_the_key(open_room: OpenRoom, target: str, form: str):
    async with open_room() as room:
        reader, writer = await asyncio.open_connection("127.0.0.1", room.balancer.port)
        line = f"GET {form.format(target=target)} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        writer.write(line.encode())
        async with asyncio.timeout(20):
            said = await reader.read()
        writer.close()
        assert int(said.split(b" ")[1]) in (400, 401, 404), said
        assert b"workers_ready" not in said
        assert b'"waiting"' not in said


async def test_no_route_beside_admin_wants_the_key_or_changes_anything(open_room: OpenRoom):
    """`/v1` is for inference alone: models are neither loaded nor deleted there."""
    async with FakeEngine() as engine, open_room(engine) as room:
        elsewhere = ("/admin", "/ui", "/openapi.json", "/cluster")
        beside = {one for one in routes(room) if not one[1].startswith(elsewhere)}
        assert beside - {(method, path) for method, path in beside if method == "HEAD"} == {
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/embeddings"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/x"),
            ("GET", "/health"),
            ("GET", "/readyz"),
            ("GET", "/metrics"),
        }
        for method in ("DELETE", "PUT", "POST"):
            async with room.http.request(method, f"{room.url}/v1/models/fake", json={}) as response:
                assert response.status == 405


async def test_a_wrong_key_is_a_403_and_many_of_them_are_a_429(open_room: OpenRoom):
    async with open_room() as room:
        statuses = []
        for number in range(12):
            wrong = {"X-Admin-Key": f"guess-{number}-{'x' * 30}"}
            async with room.http.get(f"{room.url}/admin/workers", headers=wrong) as response:
                statuses.append(response.status)
                if response.status == 429:
                    assert 1 <= int(response.headers["Retry-After"]) <= 6
        assert statuses == [403] * 10 + [429] * 2
        assert (await room.admin("GET", "/workers"))[0] == 429  # the address has used up its guesses


async def test_the_key_may_come_in_either_header(open_room: OpenRoom):
    async with open_room() as room:
        key = keys.read(room.data_dir / "admin_key")
        for headers in ({"X-Admin-Key": key}, {"Authorization": f"bearer  {key} "}):
            async with room.http.get(f"{room.url}/admin/workers", headers=headers) as response:
                assert response.status == 200


@pytest.mark.parametrize(
    "page",
    [
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "https://evil.test"},
    ],
)
async def test_a_page_of_another_site_may_not_even_with_the_key(open_room: OpenRoom, page: dict[str, str]):
    async with open_room() as room:
        for method, path in (("GET", "/workers"), ("POST", "/workers/a/drain")):
            async with room.http.request(
                method, f"{room.url}/admin{path}", json={}, headers=page | room.admin_headers
            ) as response:
                assert response.status == 403
                assert "page" in (await response.json())["error"]["message"]


async def test_a_key_from_the_environment_is_the_key_and_none_is_made(
    tmp_path: Path, monkeypatch, get_with_key
):
    monkeypatch.setenv("BALANCER_ADMIN_KEY", "a-key-that-was-given-by-hand")
    flags = {"host": "127.0.0.1", "port": free_port(), "mdns": False, "data_dir": tmp_path / "data"}
    async with running(load(None, flags)) as balancer:
        url = f"http://127.0.0.1:{balancer.port}/admin/workers"
        assert await get_with_key(url, "a-key-that-was-given-by-hand") == 200
        assert await get_with_key(url, "a-key-that-was-given-by-hanD") == 403
    assert not (tmp_path / "data" / "admin_key").exists()
    assert (tmp_path / "data" / "cluster_key").exists()


@pytest.fixture
def get_with_key():
    async def get(url: str, key: str) -> int:
        async with aiohttp.ClientSession() as http:
            async with http.get(url, headers={"Authorization": f"Bearer {key}"}) as response:
                return response.status

    return get


async def test_no_key_is_ever_logged_shown_or_measured(open_room: OpenRoom, caplog):
    caplog.set_level(logging.DEBUG)
    async with FakeEngine() as engine, open_room(engine) as room:
        secrets = [keys.read(room.data_dir / name) for name in ("admin_key", "cluster_key")]
        shown = [await room.metrics()]
        for path in ("/workers", "/models", "/presets", "/config"):
            status, told = await room.admin("GET", path)
            assert status == 200
            shown.append(json.dumps(told))
        await room.admin("POST", "/config/reload")
        async with room.http.get(f"{room.url}/admin/workers", headers={"X-Admin-Key": "canary-wrong-key"}):
            pass
        shown.append(caplog.text)
        for secret in (*secrets, "canary-wrong-key"):
            assert not any(secret in text for text in shown)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/models/load", b"not json", 400, "not JSON"),
        ("POST", "/models/load", b"[]", 400, "object"),
        ("POST", "/models/load", b"{}", 400, "`model` is missing"),
        ("POST", "/models/load", b'{"model": "m", "wroker": "a"}', 400, "`wroker` is not known here"),
        ("POST", "/models/load", b'{"model": 5}', 400, "`model`"),
        ("POST", "/models/load", b'{"model": "a\\u0007b"}', 400, "printable"),
        ("POST", "/models/load", b'{"model": "%s"}' % (b"x" * 200), 400, "`model`"),
        ("POST", "/models/load", b" " * 70_000, 413, "65536"),
        ("POST", "/workers/a/drain", b'{"on": true}', 400, "`on` is not known here"),
        ("PUT", "/presets/mine", b"x" * 300_000, 413, "262144"),
    ],
)
async def test_an_order_that_cannot_be_read_says_what_is_wrong(
    open_room: OpenRoom, method: str, path: str, body: bytes, status: int, words: str
):
    async with FakeEngine() as engine, open_room(engine) as room:
        headers = room.admin_headers | {"Content-Type": "application/json"}
        async with room.http.request(
            method, f"{room.url}/admin{path}", data=body, headers=headers
        ) as response:
            assert response.status == status
            assert words in (await response.json())["error"]["message"]


async def test_a_packed_order_is_not_unpacked(open_room: OpenRoom):
    async with open_room() as room:
        async with room.http.post(
            f"{room.url}/admin/models/load",
            data=b"x",
            headers=room.admin_headers | {"Content-Encoding": "gzip", "Content-Type": "application/json"},
        ) as response:
            assert response.status == 415


async def test_with_the_key_what_does_not_exist_is_said_to_lack(open_room: OpenRoom):
    async with open_room() as room:
        status, told = await room.admin("GET", "/nothing")
        assert (status, "docs/ADMIN.md" in told["error"]["message"]) == (404, True)
        status, told = await room.admin("PUT", "/workers")
        assert (status, told["error"]["code"]) == (405, "method_not_allowed")
        for method, path in (
            ("POST", "/workers/x/drain"),
            ("DELETE", "/workers/x"),
            ("POST", "/workers/x/admit"),
        ):
            status, told = await room.admin(method, path)
            assert (status, told["error"]["code"]) == (404, "not_found"), path


# Workers ...


async def test_the_workers_are_shown_with_their_models_and_where_they_came_from(
    open_room: OpenRoom, tmp_path: Path
):
    mac = ManagedAgent("mac", certificate=tmp_path / "mac.pem")
    async with FakeEngine() as engine, mac.running() as agent:
        agent.has("qwen", ModelState.LOADING, progress=0.5, eta_seconds=9.0, memory_bytes=123)
        async with open_room(listed(engine, "a", max_concurrent_requests=3, aliases={"f": "fake"})) as room:
            join = {"id": "mac", "port": agent.port, "wire": WIRE_VERSION}
            async with room.http.post(f"{room.url}/cluster/v1/join", json=join) as response:
                assert response.status == 200
            await room.ready(2)
            status, told = await room.admin("GET", "/workers")
            assert status == 200
            health = await (await room.http.get(f"{room.url}/health")).json()
            assert health.keys() - {"status"} < told.keys()
            rows = {row["id"]: row for row in told["workers"]}
            for row in health["workers"]:
                assert row.keys() <= rows[row["id"]].keys()
            assert (rows["a"]["source"], rows["mac"]["source"]) == ("config", "join")
            assert (rows["a"]["max_concurrent_requests"], rows["a"]["aliases"]) == (3, {"f": "fake"})
            assert rows["a"]["models"][0]["names"] == ["fake", "f"]
            (model,) = rows["mac"]["models"]
            assert (model["name"], model["state"], model["progress"]) == ("qwen", "loading", 0.5)
            assert (model["eta_seconds"], model["memory_bytes"]) == (9.0, 123)
            assert rows["mac"]["memory_total_bytes"] == agent.memory_total_bytes
            assert not rows["a"]["draining"]


@pytest.mark.parametrize("back", ["undrain", "resume"])
async def test_a_worker_is_drained_and_taken_back_and_both_are_logged(open_room: OpenRoom, caplog, back: str):
    caplog.set_level(logging.INFO)
    async with FakeEngine() as engine, open_room(engine) as room:
        assert await room.admin("POST", "/workers/a/drain") == (200, {"worker": "a", "draining": True})
        assert room.worker("a").state == "draining"
        assert (await room.admin("GET", "/workers"))[1]["workers"][0]["draining"]
        assert await room.admin("POST", f"/workers/a/{back}") == (200, {"worker": "a", "draining": False})
        assert room.worker("a").state == "ready"
    changes = [line for line in caplog.messages if line.startswith("admin 127.0.0.1: ")]
    assert [line.partition(": ")[2] for line in changes] == [
        "worker a gets nothing new",
        "worker a gets requests again",
    ]


async def test_an_id_with_signs_of_a_path_in_it_is_one_id(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(listed(engine, "room 1/studio")) as room:
        await room.ready()
        assert (await room.admin("POST", "/workers/room%201%2Fstudio/drain"))[0] == 200
        assert room.worker("room 1/studio").state == "draining"


async def test_an_agent_that_was_removed_stays_out_until_it_is_admitted(open_room: OpenRoom, tmp_path: Path):
    mac = ManagedAgent("mac", certificate=tmp_path / "mac.pem")
    async with mac.running() as agent, open_room() as room:
        join = {"id": "mac", "port": agent.port, "wire": WIRE_VERSION}

        async def asks_to_join() -> tuple[int, str]:
            async with room.http.post(f"{room.url}/cluster/v1/join", json=join) as response:
                return response.status, await response.text()

        assert (await asks_to_join())[0] == 200
        await room.ready()
        status, told = await room.admin("DELETE", "/workers/mac")
        assert (status, told["removed"], told["source"]) == (200, True, "join")
        assert "/admin/workers/mac/admit" in told["note"]
        status, said = await asks_to_join()
        assert status == 409
        assert "/admin/workers/mac/admit" in said
        _, told = await room.admin("GET", "/workers")
        assert (told["workers"], told["removed"]) == ([], ["mac"])
        status, told = await room.admin("POST", "/workers/mac/admit")
        assert (status, "announces" in told["note"]) == (200, True)
        assert (await asks_to_join())[0] == 200
        await room.ready()


async def test_a_worker_of_the_config_that_was_removed_says_until_when(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        status, told = await room.admin("DELETE", "/workers/a")
        assert (status, told["source"]) == (200, "config")
        assert "until the configuration is read again" in told["note"]
        assert not room.balancer.snapshot().workers
        assert (await room.admin("POST", "/config/reload"))[0] == 200
        await room.ready()


# Presets ...

MINE = {
    "name": "mine",
    "description": "One question.",
    "prompts": [{"name": "gist", "text": "What is it about?", "max_tokens": 12, "temperature": 0}],
}


async def test_presets_of_ones_own_are_kept_shown_replaced_and_removed(
    open_room: OpenRoom, own_presets: Path
):
    async with open_room() as room:
        assert (await room.admin("PUT", "/presets/mine", MINE))[0] == 201
        assert json.loads((own_presets / "mine.json").read_text()) == MINE
        _, told = await room.admin("GET", "/presets")
        rows = {row["name"]: row for row in told["presets"]}
        assert (rows["mine"]["own"], rows["mine"]["prompts"]) == (True, 1)
        assert not rows["summary"]["own"]
        _, told = await room.admin("GET", "/presets/mine")
        assert told["prompts"][0]["text"] == "What is it about?"
        assert await room.admin("PUT", "/presets/mine", MINE) == (200, {"preset": "mine", "created": False})
        assert (await room.admin("DELETE", "/presets/mine"))[0] == 200
        assert os.listdir(own_presets) == []
        for method in ("GET", "DELETE"):
            status, told = await room.admin(method, "/presets/mine")
            assert status == 404


@pytest.mark.parametrize(
    ("name", "body", "status", "words"),
    [
        ("mine", MINE | {"name": "other"}, 400, "'other'"),
        ("mine", MINE | {"prompts": []}, 400, "1 to 50"),
        ("mine", MINE | {"wrong": 1}, 400, "`wrong`"),
        ("summary", MINE | {"name": "summary"}, 409, "another name"),
        ("..%2F..%2Fescape", MINE, 400, "lower-case"),
        ("%2Fetc%2Fpasswd", MINE, 400, "lower-case"),
        (".hidden", MINE, 400, "lower-case"),
    ],
)
async def test_a_preset_that_cannot_be_kept_says_why_and_leaves_nothing(
    open_room: OpenRoom, own_presets: Path, tmp_path: Path, name: str, body: Any, status: int, words: str
):
    def files() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if path.name != "audit.jsonl")

    async with open_room() as room:
        before = files()
        answered, told = await room.admin("PUT", f"/presets/{name}", body)
        assert (answered, words in told["error"]["message"]) == (status, True), told
        assert files() == before
        if status == 409:
            assert (await room.admin("DELETE", f"/presets/{name}"))[0] == 409


@pytest.fixture
def file_in_its_place(own_presets: Path) -> Path:
    own_presets.parent.mkdir(parents=True)
    own_presets.write_text("a file where the folder should be")
    return own_presets


async def test_a_folder_that_cannot_be_written_to_is_said(open_room: OpenRoom, file_in_its_place: Path):
    async with open_room() as room:
        status, told = await room.admin("PUT", "/presets/mine", MINE)
        assert (status, str(file_in_its_place) in told["error"]["message"]) == (409, True)


# Configuration ...


def rewrite(room: Room, *workers: dict[str, Any], **settings: Any) -> None:
    room.config.write_text(json.dumps({"workers": workers, "health_check_interval": 0.2} | settings))


async def test_the_settings_in_force_are_shown_without_secrets(open_room: OpenRoom, monkeypatch):
    monkeypatch.setenv("STUDIO_KEY", "canary-worker-key")
    async with FakeEngine() as engine:
        async with open_room(listed(engine, "a", api_key={"env": "STUDIO_KEY"}), max_queue=7) as room:
            status, told = await room.admin("GET", "/config")
            assert status == 200
            assert told["file"] == str(room.config)
            assert (told["settings"]["max_queue"], told["settings"]["mdns"]) == (7, False)
            assert told["workers"][0]["id"] == "a"
            assert "canary" not in json.dumps(told)


async def test_a_reload_changes_the_room_and_cuts_nothing(open_room: OpenRoom):
    """One worker leaves in the middle of its answer, two come; then one of them is changed."""
    async with (
        FakeEngine(tokens=40, token_seconds=0.02) as leaves,
        FakeEngine() as stays,
        FakeEngine() as comes,
    ):
        rows = [listed(leaves, "leaves"), listed(stays, "stays"), listed(comes, "changes")]
        async with open_room(rows[0]) as room:
            await room.ready()
            stream = await room.openai.chat.completions.create(**ASK | {"max_tokens": 40}, stream=True)
            await anext(stream)
            rewrite(room, rows[1], rows[2])
            status, told = await room.admin("POST", "/config/reload")
            assert (status, told["added"], told["removed"]) == (200, ["changes", "stays"], ["leaves"])
            await room.ready(2)
            text = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            assert len(text) > 30
            assert leaves.requests[0].outcome.value == "completed"
            rewrite(room, rows[1], rows[2] | {"max_concurrent_requests": 2})
            status, told = await room.admin("POST", "/config/reload")
            assert (told["changed"], told["added"], told["removed"]) == (["changes"], [], [])
            await room.ready(2)
            assert room.worker("changes").slots == 2
            assert {view.worker.id for view in room.balancer.snapshot().workers} == {"stays", "changes"}


async def test_a_reload_takes_new_keys_of_workers(open_room: OpenRoom, monkeypatch):
    async with FakeEngine() as engine:
        row = listed(engine, "a", api_key={"env": "STUDIO_KEY"})
        monkeypatch.setenv("STUDIO_KEY", "old-key")
        async with open_room(row) as room:
            await room.ready()
            monkeypatch.setenv("STUDIO_KEY", "new-key")
            status, told = await room.admin("POST", "/config/reload")
            assert (status, told["changed"]) == (200, ["a"])
            await room.ready()
            async with room.http.post(f"{room.url}/v1/chat/completions", json=ASK) as response:
                assert response.status == 200
            assert engine.requests[-1].headers["authorization"] == "Bearer new-key"


async def test_what_only_a_restart_changes_is_listed_each_time(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, max_body_mib=7) as room:
        rewrite(room, listed(engine, "a"), max_body_mib=8, breaker_rest=1, log_level="WARNING")
        try:
            for applied in (["log_level"], []):
                _, told = await room.admin("POST", "/config/reload")
                assert told["needs_restart"] == ["max_body_mib", "breaker_rest"]
                assert told["applied"] == applied
            _, shown = await room.admin("GET", "/config")
            assert (shown["settings"]["max_body_mib"], shown["settings"]["log_level"]) == (7, "WARNING")
            assert shown["needs_restart"] == ["max_body_mib", "breaker_rest"]
            rewrite(room, listed(engine, "a"), max_body_mib=7)
            _, told = await room.admin("POST", "/config/reload")
            assert told["needs_restart"] == []
        finally:
            logging.getLogger().setLevel(logging.WARNING)


async def test_a_broken_file_changes_nothing_and_is_told_by_line_and_column(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        room.config.write_text('{"workers": [\n  {"host": "b", "prot": 1}\n]}')
        status, told = await room.admin("POST", "/config/reload")
        assert (status, told["error"]["code"]) == (422, "config_faults")
        (fault,) = told["error"]["faults"]
        assert (fault["line"], fault["column"]) == (2, 17)
        assert 'did you mean "port"' in fault["message"]
        room.config.unlink()
        status, told = await room.admin("POST", "/config/reload")
        assert (status, told["error"]["faults"][0]["line"]) == (422, None)
        rewrite(room, listed(engine, "a", api_key={"env": "NOT_SET_ANYWHERE"}))
        status, told = await room.admin("POST", "/config/reload")
        assert (status, "NOT_SET_ANYWHERE" in told["error"]["message"]) == (422, True)
        assert room.worker("a").state == "ready"
        async with room.http.post(f"{room.url}/v1/chat/completions", json=ASK) as response:
            assert response.status == 200


async def test_without_a_file_there_is_nothing_to_read_again(tmp_path: Path):
    flags = {"host": "127.0.0.1", "port": free_port(), "mdns": False, "data_dir": tmp_path}
    async with running(load(None, flags)) as balancer, aiohttp.ClientSession() as http:
        async with http.post(
            f"http://127.0.0.1:{balancer.port}/admin/config/reload",
            headers={"X-Admin-Key": keys.read(tmp_path / "admin_key")},
        ) as response:
            assert response.status == 422
            assert "--config" in (await response.json())["error"]["message"]


# Processes and commands ...


async def run(tmp_path: Path, *words: str, **variables: str) -> tuple[int, str]:
    async with command(
        "balancer", *words, output=tmp_path / "out.txt", home=tmp_path, COLUMNS="200", **variables
    ) as running_:
        return await running_.ended(), running_.text()


async def test_on_this_machine_the_commands_find_the_key_by_themselves(open_room: OpenRoom, tmp_path: Path):
    async with FakeEngine() as engine, open_room(engine) as room:
        here = {"BALANCER_URL": room.url, "BALANCER_DATA_DIR": str(room.data_dir)}
        status, said = await run(tmp_path, "drain", "a", **here)
        assert (status, said) == (0, "a gets nothing new; `balancer workers` shows what it still runs.\n")
        assert room.worker("a").state == "draining"
        assert (await run(tmp_path, "undrain", "a", **here))[0] == 0
        assert room.worker("a").state == "ready"
        assert (await run(tmp_path, "drain", "a", "--undo", **here))[0] == 0
        status, said = await run(tmp_path, "remove", "a", "--url", room.url, "--data-dir", str(room.data_dir))
        assert (status, "until the configuration is read again" in said) == (0, True)
        assert not room.balancer.snapshot().workers
        status, said = await run(tmp_path, "config", "reload", **here)
        assert (status, said) == (0, "Nothing has changed.\n")
        await room.ready()
        rewrite(room, listed(engine, "b"), max_queue=3, max_body_mib=3)
        status, said = await run(tmp_path, "config", "reload", **here)
        assert said.splitlines() == [
            "workers added: b",
            "workers removed: a",
            "settings that hold from now on: max_queue",
            "settings that hold from the next start on: max_body_mib",
        ]
        room.config.write_text("{")
        status, said = await run(tmp_path, "config", "reload", **here)
        assert (status, ":1:2: " in said) == (1, True)
        status, said = await run(tmp_path, "drain", "nobody", **here)
        assert (status, "There is no worker 'nobody'" in said) == (1, True)


async def test_a_key_is_given_by_file_or_by_variable(open_room: OpenRoom, tmp_path: Path):
    async with open_room() as room:
        key = keys.read(room.data_dir / "admin_key")
        status, said = await run(tmp_path, "models", "--json", BALANCER_URL=room.url, BALANCER_ADMIN_KEY=key)
        assert (status, json.loads(said)) == (0, {"models": [], "downloads": []})
        words = ("models", "--json", "--admin-key-file", str(room.data_dir / "admin_key"))
        assert (await run(tmp_path, *words, BALANCER_URL=room.url))[0] == 0
        status, said = await run(tmp_path, "models", BALANCER_URL=room.url, BALANCER_ADMIN_KEY="wrong" * 5)
        assert (status, "not the admin key" in said) == (1, True)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"BALANCER_URL": "http://192.0.2.1:4000"}, "is on another machine"),
        ({"BALANCER_URL": "http://balancer.lab.org:4000"}, "is on another machine"),
        ({}, "there is no admin key in"),
        ({"BALANCER_ADMIN_KEY_FILE": "/nowhere/key"}, "/nowhere/key"),
    ],
)
async def test_without_a_key_a_command_says_where_there_is_one(tmp_path: Path, variables, words):
    status, said = await run(tmp_path, "drain", "a", **variables)
    assert status == 2
    assert words in said.replace("\n", " ")
    assert "Traceback" not in said


async def test_a_key_of_this_machine_is_not_sent_to_another(tmp_path: Path):
    """Whatever answers at a foreign address would have it then."""
    folder = tmp_path / "data"
    keys.found(folder, admin=None, cluster=None)
    status, said = await run(
        tmp_path, "models", BALANCER_URL="http://192.0.2.1:4000", BALANCER_DATA_DIR=str(folder)
    )
    assert (status, "is on another machine" in said.replace("\n", " ")) == (2, True)


async def test_a_key_that_others_can_read_ends_the_start_with_a_sentence(tmp_path: Path):
    keys.found(tmp_path / "data", admin=None, cluster=None)
    (tmp_path / "data" / "admin_key").chmod(0o644)
    words = ("serve", "--no-mdns", "--host", "127.0.0.1", "--port", str(free_port()))
    status, said = await run(tmp_path, *words, "--data-dir", str(tmp_path / "data"))
    assert (status, "chmod 600" in said, "Traceback" in said) == (1, True, False)


async def test_sighup_has_the_file_read_again(tmp_path: Path):
    file, port = tmp_path / "balancer.json", free_port()
    file.write_text('{"workers": []}')
    words = ("balancer", "serve", "--no-mdns", "--host", "127.0.0.1", "--port", str(port))
    more = ("--config", str(file), "--data-dir", str(tmp_path / "data"))
    async with command(*words, *more, output=tmp_path / "out.txt", home=tmp_path) as running_:
        await running_.until_it_says("listening on")
        file.write_text('{"workers": [{"id": "new", "host": "127.0.0.1", "port": 9}]}')
        running_.send(signal.SIGHUP)
        await running_.until_it_says("SIGHUP: the configuration was read again (workers added: new)")
        file.write_text('{"workers": [')
        running_.send(signal.SIGHUP)
        await running_.until_it_says("SIGHUP: the configuration stays as it is: ")
        running_.send(signal.SIGTERM)
        assert await running_.ended() == 0


def test_the_agent_of_up_has_the_cluster_key_and_nothing_of_the_admins():
    own = {
        "PATH": os.environ["PATH"],
        "BALANCER_ADMIN_KEY": "a",
        "BALANCER_CLUSTER_KEY": "b",
        "WORKER_AGENT_CLUSTER_KEY_FILE": "c",
        "WORKER_AGENT_THREADS": "2",
    }
    assert agent_environment(own, "the-key") == {
        "PATH": os.environ["PATH"],
        "WORKER_AGENT_THREADS": "2",
        "WORKER_AGENT_CLUSTER_KEY": "the-key",
    }
