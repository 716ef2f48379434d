"""What pages in browsers may do: those that are listed may ask for answers and read them, our own may be let
in under /admin by a cookie, and all others may do nothing."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import OpenRoom, Room
from tests.fakes.engine import FakeEngine

BOTH = pytest.mark.parametrize("hot_path", [True, False], ids=["hot", "aiohttp"])
BODY: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Name some trees."}]}
CHAT = "/v1/chat/completions"
LISTED, OTHER = "https://chat.lab.org", "https://evil.test"
PAGE = {"Origin": LISTED, "Sec-Fetch-Site": "cross-site"}
PREFLIGHT = {
    **PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os,anthropic-version,x-evil",
}


def cors(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower().startswith("access-control-")}


@BOTH
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_listed_page_may_read_its_answers(open_room: OpenRoom, hot_path: bool, stream: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, cors_origins=[LISTED]) as room:
        async with room.http.options(room.url + CHAT, headers=PREFLIGHT) as response:
            assert response.status == 204
            told = cors(response.headers)
            assert told["Access-Control-Allow-Origin"] == LISTED
            assert "POST" in told["Access-Control-Allow-Methods"]
            allowed = told["Access-Control-Allow-Headers"].split(", ")
            assert allowed == ["authorization", "content-type", "x-stainless-os", "anthropic-version"]
            assert response.headers["Vary"] == "Origin"
            assert "Access-Control-Allow-Credentials" not in told
        body = BODY | {"stream": stream}
        async with room.http.post(room.url + CHAT, json=body, headers=PAGE) as response:
            assert response.status == 200
            assert await response.read()
            assert cors(response.headers)["Access-Control-Allow-Origin"] == LISTED
            assert "X-Balancer-Worker" in cors(response.headers)["Access-Control-Expose-Headers"]
            assert response.headers["Vary"] == "Origin"
        async with room.http.get(f"{room.url}/v1/models", headers=PAGE) as response:
            assert (response.status, "Access-Control-Allow-Origin" in response.headers) == (200, True)


@BOTH
async def test_a_listed_page_may_read_its_errors_too(open_room: OpenRoom, hot_path: bool):
    settings: dict[str, Any] = {"cors_origins": [LISTED], "auth": "keys"}
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, **settings) as room:
        _, told = await room.admin("POST", "/keys", {"name": "page"})
        key = {"Authorization": f"Bearer {told['key']}"}
        for headers, body, status in (
            ({}, BODY, 401),
            (key, {"model": "fake"}, 400),
            (key, BODY | {"model": "none"}, 404),
            (key, BODY, 200),
        ):
            async with room.http.post(room.url + CHAT, json=body, headers=PAGE | headers) as response:
                assert (response.status, cors(response.headers).get("Access-Control-Allow-Origin")) == (
                    status,
                    LISTED,
                )
        # The browser's question comes without a key, and is answered.
        async with room.http.options(room.url + CHAT, headers=PREFLIGHT) as response:
            assert response.status == 204


@BOTH
async def test_no_other_page_is_ever_told_that_it_may(open_room: OpenRoom, hot_path: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, cors_origins=[LISTED]) as room:
        others = (OTHER, "null", f"{LISTED}.evil.test", "http://chat.lab.org", "http://localhost:3000", "")
        for origin in others:
            for method, path in (
                ("OPTIONS", CHAT),
                ("POST", CHAT),
                ("GET", "/v1/models"),
                ("GET", "/health"),
            ):
                headers = PREFLIGHT | {"Origin": origin}
                async with room.http.request(method, room.url + path, json=BODY, headers=headers) as response:
                    assert not cors(response.headers), (origin, method, path)
        for path in ("/health", "/metrics", "/admin/workers", "/admin/session", "/cluster/v1/join"):
            for method in ("GET", "POST", "OPTIONS", "DELETE"):
                headers = PREFLIGHT | room.admin_headers
                async with room.http.request(method, room.url + path, json={}, headers=headers) as response:
                    assert response.status == 403, (method, path)
                    assert not cors(response.headers)


# The page of our own ...


def own_page(room: Room) -> dict[str, str]:
    return {"Origin": room.url, "Sec-Fetch-Site": "same-origin"}


async def logged_in(room: Room) -> str:
    """The cookie's value."""
    key = room.admin_headers["Authorization"].split()[1]
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as page:
        async with page.post(
            f"{room.url}/admin/session", json={"key": key}, headers=own_page(room)
        ) as response:
            assert response.status == 200, await response.text()
            cookie = response.cookies["balancer_session"]
            assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "Strict", "/")
            assert not cookie["secure"]
            assert key not in await response.text()
            return cookie.value


async def as_page(
    room: Room, method: str, path: str, cookie: str, headers: dict[str, str] | None = None, **more: Any
) -> tuple[int, Any]:
    sent = own_page(room) if headers is None else headers
    sent = sent | {"Cookie": f"balancer_session={cookie}"}
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as page:
        async with page.request(method, f"{room.url}/admin{path}", headers=sent, **more) as response:
            return response.status, await response.json()


async def test_the_page_gives_the_key_once_and_is_let_in_by_its_cookie(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        cookie = await logged_in(room)
        assert (await as_page(room, "GET", "/workers", cookie))[0] == 200
        status, told = await as_page(room, "GET", "/session", cookie)
        assert (status, 0 < told["seconds_left"] <= 12 * 3600) == (200, True)
        assert (await as_page(room, "POST", "/workers/a/drain", cookie, json={}))[0] == 200
        assert room.worker("a").state == "draining"
        assert (await as_page(room, "DELETE", "/session", cookie, json={}))[0] == 200
        status, told = await as_page(room, "GET", "/workers", cookie)
        assert (status, told["error"]["code"]) == (401, "session_over")


async def test_a_cookie_alone_does_nothing_for_another_site_or_a_form(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, cors_origins=[LISTED]) as room:
        cookie = await logged_in(room)
        foreign: list[dict[str, str]] = [
            {"Origin": OTHER, "Sec-Fetch-Site": "cross-site"},
            {"Origin": LISTED},
            {"Origin": LISTED, "Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "none"},
            {"Origin": "null"},
            {"Origin": f"http://127.0.0.1:{room.balancer.port + 1}"},
        ]
        for headers in foreign:
            for method, path in (("GET", "/workers"), ("POST", "/workers/a/drain"), ("DELETE", "/session")):
                status, _ = await as_page(room, method, path, cookie, headers, json={})
                assert status == 403, (headers, method, path)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        for headers in (form, {"Content-Type": "text/plain"}):
            status, _ = await as_page(
                room, "POST", "/workers/a/drain", cookie, own_page(room) | headers, data=b"{}"
            )
            assert status == 415
        assert (await as_page(room, "POST", "/workers/a/drain", cookie, {}))[0] == 415
        assert room.worker("a").state == "ready"


@pytest.mark.parametrize("cookie", ["", "x", "' OR 1=1", "a" * 5000, "balancer_session"])
async def test_no_invented_cookie_is_a_session(open_room: OpenRoom, cookie: str):
    async with open_room() as room:
        await logged_in(room)
        assert (await as_page(room, "GET", "/workers", cookie))[0] == 401


async def test_to_begin_a_session_is_no_way_to_guess_keys_faster(open_room: OpenRoom):
    async with open_room() as room:
        statuses = []
        for number in range(12):
            async with room.http.post(
                f"{room.url}/admin/session", json={"key": f"guess {number}"}, headers=own_page(room)
            ) as response:
                statuses.append(response.status)
                assert "Set-Cookie" not in response.headers
        assert statuses == [403] * 10 + [429] * 2
        async with room.http.post(f"{room.url}/admin/session", data=b"key=x") as response:
            assert response.status == 415


# Audit ...


async def records(room: Room) -> list[dict[str, Any]]:
    """Oldest first, of changes alone."""
    _, told = await room.admin("GET", "/audit?limit=1000")
    return told["records"][::-1]


async def test_each_change_leaves_one_record_and_no_secret(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, watch_config=False) as room:
        cookie = await logged_in(room)
        _, key = await room.admin("POST", "/keys", {"name": "ann"})
        await room.admin("POST", "/workers/a/drain")
        await as_page(room, "POST", "/workers/a/undrain", cookie, json={})
        await room.admin("POST", "/models/load", {"model": "fake", "worker": "nobody"})
        await room.admin("POST", "/models/load", {"model": 5})
        await room.admin("PUT", "/workers")
        await room.admin("POST", "/nothing")
        await room.admin("GET", "/workers")
        room.config.write_text(json.dumps(json.loads(room.config.read_text()) | {"log_level": "WARNING"}))
        await room.admin("POST", "/config/reload")
        found = await records(room)
        assert [(one["method"], one["route"], one["status"]) for one in found] == [
            ("POST", "/admin/session", 200),
            ("POST", "/admin/keys", 201),
            ("POST", "/admin/workers/{id}/drain", 200),
            ("POST", "/admin/workers/{id}/undrain", 200),
            ("POST", "/admin/models/load", found[4]["status"]),
            ("POST", "/admin/models/load", 400),
            ("PUT", "none", 405),
            ("POST", "none", 404),
            ("POST", "/admin/config/reload", 200),
        ]
        assert found[2]["targets"] == {"id": "a"}
        assert (found[2]["who"], found[2]["from"]) == ("admin key", "127.0.0.1")
        assert found[3]["who"].startswith("session ")
        assert found[4]["targets"] == {"model": "fake", "worker": "nobody"}
        assert found[8]["before"] != found[8]["after"]
        kept = (room.data_dir / "audit.jsonl").read_text()
        for secret in (cookie, key["key"], room.admin_headers["Authorization"].split()[1]):
            assert secret not in kept


async def test_who_is_refused_is_recorded_but_not_without_end(open_room: OpenRoom):
    async with open_room() as room:
        for number in range(8):
            headers = {"X-Admin-Key": f"canary-guess-{number}"}
            async with room.http.delete(f"{room.url}/admin/workers/x", headers=headers) as response:
                assert response.status == 403
        found = await records(room)
        assert 1 <= len(found) <= 4
        assert found[0]["refused"] == "admin_key_wrong"
        assert "canary" not in json.dumps(found)


async def test_who_guesses_at_the_sign_in_cannot_push_the_records_out(open_room: OpenRoom):
    async with open_room() as room:
        for number in range(40):
            sent: dict[str, Any] = (
                {"data": b"{"} if number % 2 else {"json": {"key": f"canary-guess-{number}"}}
            )
            headers = own_page(room) | {"Content-Type": "application/json"}
            async with room.http.post(f"{room.url}/admin/session", headers=headers, **sent) as response:
                assert response.status in (400, 403, 429)
    found = [json.loads(line) for line in (room.data_dir / "audit.jsonl").read_text().splitlines()]
    assert 1 <= len(found) <= 4
    assert (found[0]["who"], found[0]["refused"]) == ("nobody yet", "admin_key_wrong")
    assert "canary" not in json.dumps(found)


async def test_an_audit_log_that_cannot_be_read_is_said(open_room: OpenRoom):
    async with open_room() as room:
        file = room.data_dir / "audit.jsonl"
        file.unlink(missing_ok=True)
        os.mkfifo(file)
        async with asyncio.timeout(20):
            assert (await room.admin("POST", "/nothing", {}))[0] == 404
            status, told = await room.admin("GET", "/audit")
        assert (status, "no plain file" in told["error"]["message"]) == (409, True)


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1001", "99999999999", "\u0661", "000001" + "9" * 5000])
async def test_a_limit_that_is_none_is_said(open_room: OpenRoom, limit: str):
    async with open_room() as room:
        assert (await room.admin("GET", f"/audit?limit={limit}"))[0] == 400
