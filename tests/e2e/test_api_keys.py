"""API keys in front of a room: on both servers, from the first key to the last request with it."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any

import aiohttp
import openai
import pytest

from tests.e2e.conftest import OpenRoom, Room, listed
from tests.fakes.engine import FakeEngine
from tests.fakes.faults import Fault
from worker_agent.sources import Sources

BOTH = pytest.mark.parametrize("hot_path", [True, False], ids=["hot", "aiohttp"])
BODY: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Name some trees."}]}
CHAT = "/v1/chat/completions"


async def made(room: Room, **fields: Any) -> dict[str, Any]:
    status, told = await room.admin("POST", "/keys", {"name": "ann"} | fields)
    assert status == 201, told
    return told


async def ask(
    room: Room, key: str | None, body: dict[str, Any] = BODY, **headers: str
) -> tuple[int, dict[str, Any], Any]:
    """Status, JSON, headers."""
    given = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with room.http.post(room.url + CHAT, json=body, headers=given | headers) as response:
        return response.status, await response.json(), response.headers


async def models(room: Room, key: str) -> tuple[int, list[str]]:
    async with room.http.get(f"{room.url}/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
        told = await response.json()
        return response.status, [one["id"] for one in told.get("data", [])]


@BOTH
async def test_without_the_setting_keys_are_not_looked_at(open_room: OpenRoom, hot_path: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path) as room:
        await made(room, max_concurrent=1, requests_per_minute=1)
        for key in (None, "sk-lb-unknown222.x", "anything"):
            status, _, headers = await ask(room, key)
            assert status == 200
            assert "x-ratelimit-limit-requests" not in headers


@BOTH
async def test_with_it_only_who_brings_a_key_is_answered(open_room: OpenRoom, hot_path: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, auth="keys") as room:
        key = (await made(room))["key"]
        for given, code in ((None, "api_key_missing"), ("sk-lb-x.y", "invalid_api_key")):
            status, told, headers = await ask(room, given)
            assert (status, told["error"]["code"]) == (401, code)
            assert headers["WWW-Authenticate"].startswith("Bearer")
            async with room.http.get(f"{room.url}/v1/models/fake") as response:
                assert response.status == 401
        assert not engine.requests
        assert (await ask(room, key))[0] == 200
        for name in ("x-api-key", "api-key"):
            assert (await ask(room, None, **{name: key}))[0] == 200
        assert await models(room, key) == (200, ["fake"])
        # Nobody needs one to see whether it lives.
        async with room.http.get(f"{room.url}/readyz") as response:
            assert response.status == 200


@BOTH
async def test_a_key_opens_what_it_is_for_and_nothing_else(open_room: OpenRoom, hot_path: bool):
    async with FakeEngine(models=("m", "n")) as engine:
        async with open_room(engine, hot_path=hot_path, auth="keys") as room:
            key = (await made(room, models=["m"], **{"class": "batch"}))["key"]
            assert await models(room, key) == (200, ["m"])
            async with room.http.get(f"{room.url}/v1/models/n", headers={"x-api-key": key}) as response:
                assert response.status == 404
            status, told, _ = await ask(room, key, BODY | {"model": "n"})
            assert (status, told["error"]["code"]) == (403, "model_not_allowed")
            headers = {"X-Priority": "interactive"}
            status, told, _ = await ask(room, key, BODY | {"model": "m"}, **headers)
            assert (status, told["error"]["code"]) == (403, "class_not_allowed")
            assert not engine.requests
            assert (await ask(room, key, BODY | {"model": "m"}))[0] == 200
            assert engine.requests[0].headers["x-priority"] == "batch"
            # Neither is it one for the admin plane, nor the other way round.
            async with room.http.get(f"{room.url}/admin/keys", headers={"x-admin-key": key}) as response:
                assert response.status == 403
            admin_key = room.admin_headers["Authorization"].split()[1]
            assert (await ask(room, admin_key))[0] == 401


@BOTH
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_what_is_left_is_told_and_more_is_refused(open_room: OpenRoom, hot_path: bool, stream: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, auth="keys") as room:
        key = (await made(room, requests_per_minute=2))["key"]
        for left in ("1", "0"):
            headers = {"Authorization": f"Bearer {key}"}
            async with room.http.post(
                room.url + CHAT, json=BODY | {"stream": stream}, headers=headers
            ) as got:
                assert got.status == 200
                await got.read()
                assert got.headers["x-ratelimit-limit-requests"] == "2"
                assert got.headers["x-ratelimit-remaining-requests"] == left
        status, told, headers = await ask(room, key)
        assert (status, told["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 0 < int(headers["Retry-After"]) <= 30
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert len(engine.requests) == 2


@BOTH
async def test_however_requests_end_their_places_are_given_back(open_room: OpenRoom, hot_path: bool):
    """Answered, refused by the worker, left by the client in line, in prefill and in the middle."""
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, auth="keys") as room:
        told = await made(room, max_concurrent=2)
        key, access = told["key"], room.balancer._inference.access

        async def leave(body: dict[str, Any], fault: Fault | None) -> None:
            if fault is not None:
                engine.script(fault)
            asking = asyncio.ensure_future(ask(room, key, body))
            await room.until(lambda: access.under_way(told["id"]) == 1, "one under way")
            if fault is not None:
                await engine.stalled()
            asking.cancel()
            with suppress(asyncio.CancelledError):
                await asking
            await room.until(lambda: access.under_way(told["id"]) == 0, "its place given back")
            engine.resume()

        assert (await ask(room, key))[0] == 200
        assert (await ask(room, key, {"model": "fake"}))[0] == 400
        assert (await ask(room, key, BODY | {"model": "unknown"}))[0] == 404
        await leave(BODY, Fault.stall(at_token=0))
        await leave(BODY | {"stream": True}, Fault.stall(at_token=2))
        await room.idle()
        assert access.under_way(told["id"]) == 0


@BOTH
async def test_more_at_once_than_a_key_may_have_are_refused(open_room: OpenRoom, hot_path: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, auth="keys") as room:
        key = (await made(room, max_concurrent=1))["key"]
        other = (await made(room, name="bob"))["key"]
        engine.script(Fault.stall(at_token=1))
        first = asyncio.ensure_future(ask(room, key))
        await engine.stalled()
        status, told, headers = await ask(room, key)
        assert (status, told["error"]["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
        assert (await ask(room, other))[0] == 200  # it is nobody else's limit
        engine.resume()
        assert (await first)[0] == 200
        assert (await ask(room, key))[0] == 200


@BOTH
async def test_a_key_that_is_revoked_is_refused_with_the_next_request(open_room: OpenRoom, hot_path: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, auth="keys") as room:
        told = await made(room)
        engine.script(Fault.stall(at_token=1))
        running = asyncio.ensure_future(ask(room, told["key"]))
        await engine.stalled()
        assert (await room.admin("DELETE", f"/keys/{told['id']}"))[0] == 200
        status, answer, _ = await ask(room, told["key"])
        assert (status, answer["error"]["code"]) == (401, "api_key_revoked")
        engine.resume()
        assert (await running)[0] == 200  # what was under way may finish


@BOTH
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_what_waits_with_a_key_that_is_revoked_is_refused(
    open_room: OpenRoom, hot_path: bool, stream: bool
):
    async with FakeEngine() as engine:
        row = listed(engine, "a", max_concurrent_requests=1)
        async with open_room(row, hot_path=hot_path, auth="keys") as room:
            await room.ready()
            told, other = await made(room), await made(room, name="bob")
            engine.script(Fault.stall(at_token=1))
            running = asyncio.ensure_future(ask(room, told["key"]))
            await engine.stalled()
            waits = [
                asyncio.ensure_future(ask(room, key, BODY | {"stream": stream and key == told["key"]}))
                for key in (told["key"], other["key"])
            ]
            await room.until(lambda: room.balancer.snapshot().waiting == 2, "two in line")
            assert (await room.admin("DELETE", f"/keys/{told['id']}"))[0] == 200
            status, answer, _ = await waits[0]
            assert (status, answer["error"]["code"]) == (401, "api_key_revoked")
            engine.resume()
            assert [(await one)[0] for one in (running, waits[1])] == [200, 200]
            assert len(engine.requests) == 2


@BOTH
async def test_a_body_that_comes_after_its_key_was_revoked_is_not_read(open_room: OpenRoom, hot_path: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, auth="keys") as room:
        told = await made(room)
        body = json.dumps(BODY).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", room.balancer.port)
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {told['key']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body[:9]
        )
        taken = room.balancer._inference.access
        assert taken is not None
        recognised = asyncio.Event()
        taken.take = lambda _key: recognised.set() or {}  # type: ignore[method-assign, func-returns-value]
        async with asyncio.timeout(20):
            await recognised.wait()
        assert (await room.admin("DELETE", f"/keys/{told['id']}"))[0] == 200
        writer.write(body[9:])
        async with asyncio.timeout(20):
            assert b" 401 " in await reader.readline()
        writer.close()
        assert not engine.requests


async def test_a_key_that_is_revoked_in_the_file_is_refused_soon(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, auth="keys") as room:
        told = await made(room)
        file = room.data_dir / "api_keys.json"
        kept = json.loads(file.read_text())
        kept["keys"][0]["revoked"] = "2020-01-01T00:00:00Z"
        file.write_text(json.dumps(kept))
        async with asyncio.timeout(20):
            while (await ask(room, told["key"]))[0] != 401:
                await asyncio.sleep(0.02)


async def test_limits_are_changed_while_a_key_is_in_use(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, auth="keys") as room:
        told = await made(room, requests_per_minute=1)
        assert [(await ask(room, told["key"]))[0] for _ in range(2)] == [200, 429]
        status, changed = await room.admin("PATCH", f"/keys/{told['id']}", {"requests_per_minute": None})
        assert (status, changed["requests_per_minute"]) == (200, None)
        assert (await ask(room, told["key"]))[0] == 200
        for body, words in (({"name": None}, "cannot be null"), ({"expires": "2030-01-01T00:00:00"}, "zone")):
            status, answer = await room.admin("PATCH", f"/keys/{told['id']}", body)
            assert (status, words in answer["error"]["message"]) == (400, True)
        assert (await room.admin("PATCH", "/keys/nobodys222", {"name": "x"}))[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "a\nb"},
        {"name": "ann", "requests_per_minute": 0},
        {"name": "ann", "max_concurrent": -1},
        {"name": "ann", "class": "fast"},
        {"name": "ann", "expires": "soon"},
        {"name": "ann", "digest": "0" * 64},
        {"name": "ann", "models": "m"},
    ],
)
async def test_a_key_that_cannot_be_made_says_why(open_room: OpenRoom, body: dict[str, Any]):
    async with open_room() as room:
        status, told = await room.admin("POST", "/keys", body)
        assert status == 400, told
        assert (await room.admin("GET", "/keys"))[1] == {"keys": []}


@BOTH
async def test_the_clients_key_goes_to_no_worker_no_log_and_no_metric(
    open_room: OpenRoom, hot_path: bool, caplog
):
    caplog.set_level(logging.DEBUG)
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, auth="keys") as room:
        key = (await made(room))["key"]
        await ask(room, key)
        await ask(room, f"{key}canary-wrong")
        await ask(room, None, **{"x-api-key": key})
        page = await room.metrics()
        _, listed = await room.admin("GET", "/keys")
        _, audited = await room.admin("GET", "/audit")
        for request in engine.requests:
            assert key.partition(".")[2] not in json.dumps(dict(request.headers))
            assert "api-key" not in {name.lower() for name in request.headers}
    ours = [one.getMessage() for one in caplog.records if one.name.startswith(("balancer", "aiohttp"))]
    assert ours
    for text in (page, json.dumps(listed), json.dumps(audited), *ours):
        assert key.partition(".")[2] not in text


async def test_keys_are_switched_on_and_off_without_a_restart(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, watch_config=False) as room:
        config = json.loads(room.config.read_text())
        for auth, status in (("keys", 401), ("lan", 200)):
            room.config.write_text(json.dumps(config | {"auth": auth}))
            assert (await room.admin("POST", "/config/reload"))[1]["applied"] == ["auth"]
            assert (await ask(room, None))[0] == status


async def test_an_sdk_gets_the_exceptions_that_it_knows(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, auth="keys") as room:
        key = (await made(room, models=["other"]))["key"]
        client = room.openai.with_options(api_key="sk-wrong")
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(**BODY)
        with pytest.raises(openai.PermissionDeniedError):
            await client.with_options(api_key=key).chat.completions.create(**BODY)


async def test_a_public_source_is_turned_away_whatever_it_says_of_itself(open_room: OpenRoom, monkeypatch):
    monkeypatch.setattr(Sources, "admit", lambda self, address: False)
    async with FakeEngine() as engine, open_room(engine) as room:
        for name in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP", "True-Client-IP"):
            value = "for=192.168.1.5" if name == "Forwarded" else "192.168.1.5"
            status, told, _ = await ask(room, None, **{name: value})
            assert (status, told["error"]["code"]) == (403, "source_not_allowed")
        assert not engine.requests


async def test_many_wrong_keys_from_one_address_are_slowed_down(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, auth="keys") as room:
        key = (await made(room))["key"]
        statuses = [(await ask(room, f"sk-lb-x.{number}"))[0] for number in range(14)]
        assert statuses == [401] * 10 + [429] * 4
        assert (await ask(room, key))[0] == 200
        assert len(engine.requests) == 1
        async with aiohttp.ClientSession() as other:
            async with other.get(f"{room.url}/v1/models") as response:
                assert response.status == 401
