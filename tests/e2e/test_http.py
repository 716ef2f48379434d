"""The HTTP front: wrong requests, limits, the routes beside inference."""

import asyncio
import functools
import io
import json
import socket

import openai
import pytest

from balancer import app
from balancer.settings import load
from tests.e2e.conftest import OpenRoom, Room
from tests.fakes.engine import FakeEngine
from tests.fakes.faults import Fault
from worker_agent.sources import Sources

BODY = {"model": "fake", "messages": [{"role": "user", "content": "Name some trees."}]}
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


async def post(room: Room, data: bytes, headers: dict[str, str] = JSON, path: str = CHAT) -> tuple[int, dict]:
    async with room.http.post(room.url + path, data=io.BytesIO(data), headers=headers) as response:
        assert "X-Request-ID" in response.headers
        return response.status, json.loads(await response.read())["error"]


async def test_a_wrong_field_is_a_400_that_names_it(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        with pytest.raises(openai.BadRequestError) as caught:
            await room.openai.chat.completions.create(**BODY, temperature="hot")
        assert caught.value.param == "temperature"
        assert "a number from 0 to 100" in caught.value.message
        assert not engine.requests


async def test_an_unknown_model_is_a_404_that_lists_what_there_is(open_room: OpenRoom):
    async with FakeEngine(models=("m", "n")) as engine, open_room(engine) as room:
        with pytest.raises(openai.NotFoundError, match="m, n") as caught:
            await room.openai.chat.completions.create(**BODY | {"model": "gpt-4"})
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("data", "headers", "status", "code"),
    [
        (b"{", JSON, 400, None),
        (b"", JSON, 400, None),
        (b"[" * 100_000, JSON, 400, None),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"x", {**JSON, "Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        (b'"' + b"x" * (1024 * 1024), JSON, 413, "request_too_large"),
    ],
    ids=["torn JSON", "nothing", "deep JSON", "not JSON", "compressed", "too large"],
)
async def test_a_body_that_is_no_request(open_room: OpenRoom, data, headers, status, code):
    async with FakeEngine() as engine, open_room(engine, max_body_mib=1) as room:
        got, error = await post(room, data, headers)
        assert (got, error["code"], error["type"]) == (status, code, "invalid_request_error")
        assert not engine.requests


async def test_paths_and_methods_that_do_not_exist_are_answered_in_the_same_form(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        assert (await post(room, b"{}", path="/v1/nothing"))[0] == 404
        async with room.http.get(room.url + CHAT) as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
            assert (await response.json())["error"]["code"] == "method_not_allowed"


async def test_a_strange_request_id_is_replaced(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        headers = {"X-Request-ID": "a b<script>"}
        async with room.http.post(room.url + CHAT, json=BODY, headers=headers) as response:
            assert response.headers["X-Request-ID"].startswith("req_")
        assert engine.requests[0].headers["x-request-id"] == response.headers["X-Request-ID"]


async def test_health_says_how_the_room_is(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        async with room.http.get(f"{room.url}/health") as response:
            body = await response.json()
        (worker,) = body["workers"]
        assert (response.status, body["status"]) == (200, "ok")
        assert (worker["id"], worker["state"], worker["models"]) == ("a", "ready", ["fake"])


async def test_it_is_ready_once_a_worker_is(open_room: OpenRoom):
    async with FakeEngine() as engine:
        engine.refuse()
        async with open_room({"host": "127.0.0.1", "port": engine.port or 1, "type": "openai"}) as room:
            async with room.http.get(f"{room.url}/readyz") as response:
                assert response.status == 503
        await engine.listen()
        async with open_room(engine) as room:
            async with room.http.get(f"{room.url}/readyz") as response:
                assert response.status == 200


async def test_an_empty_room_says_what_to_do(open_room: OpenRoom):
    async with open_room() as room:
        with pytest.raises(openai.InternalServerError, match="worker-agent run") as caught:
            await room.openai.chat.completions.create(**BODY)
        assert caught.value.status_code == 503


async def test_metrics_count_requests_attempts_and_tokens(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        engine.script(Fault.status(500))
        await room.openai.chat.completions.create(**BODY)
        page = await room.metrics()
        assert (
            'balancer_requests_total{endpoint="/v1/chat/completions",error="",model="fake",status="200"} 1.0'
            in page
        )
        assert 'balancer_attempts_total{cause="erred",worker="a"} 1.0' in page
        assert 'balancer_attempts_total{cause="answered",worker="a"} 1.0' in page
        assert 'balancer_tokens_total{direction="output",model="fake",worker="a"} 16.0' in page
        assert 'balancer_worker_ready{worker="a"} 1.0' in page


async def test_a_model_that_nobody_serves_makes_no_series_of_its_own(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        for number in range(3):
            with pytest.raises(openai.NotFoundError):
                await room.openai.chat.completions.create(**BODY | {"model": f"invented-{number}"})
        page = await room.metrics()
        assert "invented" not in page
        assert 'model="unknown",status="404"} 3.0' in page


async def test_metrics_can_be_switched_off(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, enable_metrics=False) as room:
        async with room.http.get(f"{room.url}/metrics") as response:
            assert response.status == 404


async def test_no_prompt_and_no_answer_is_logged_or_measured(open_room: OpenRoom, caplog):
    caplog.set_level("DEBUG")
    canary = "canary-7f3a"
    async with FakeEngine() as engine, open_room(engine) as room:
        messages = [{"role": "user", "content": canary}]
        engine.script(Fault.status(500), Fault.close(at_token=3))
        await room.openai.chat.completions.create(model="fake", messages=messages)
        engine.script(Fault.status(400, f"cannot parse {canary}"))
        with pytest.raises(openai.BadRequestError, match=canary):
            await room.openai.chat.completions.create(model="fake", messages=messages)
        engine.always(Fault.status(500, f"choked on {canary}"))
        with pytest.raises(openai.InternalServerError, match=canary):
            await room.openai.chat.completions.create(model="fake", messages=messages)
        engine.always(Fault.error_event(at_token=2, message=f"choked on {canary}"))
        with pytest.raises(openai.InternalServerError, match=canary):
            await room.openai.chat.completions.create(model="fake", messages=messages)
        with pytest.raises(openai.BadRequestError):
            await room.openai.chat.completions.create(
                model="fake", messages=[{"role": canary, "content": ""}]
            )
        page = await room.metrics()
    assert canary not in page
    ours = [record for record in caplog.records if record.name.startswith(("balancer", "aiohttp", "worker"))]
    assert ours
    assert not any(canary in record.getMessage() for record in ours)


@pytest.mark.parametrize("hot_path", [True, False], ids=["hot", "aiohttp"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_both_servers_give_the_same_answer(open_room: OpenRoom, hot_path: bool, stream: bool):
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path) as room:
        for _ in range(3):
            asking = room.http.post(room.url + CHAT, json=BODY | {"stream": stream})
            async with asking as response:
                data = await response.read()
                assert (response.status, response.headers["X-Balancer-Worker"]) == (200, "a")
                assert response.headers["Date"].endswith("GMT")
                if stream:
                    assert response.content_type == "text/event-stream"
                    assert data.endswith(b"data: [DONE]\n\n")
                else:
                    assert json.loads(data)["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("hot_path", [True, False], ids=["hot", "aiohttp"])
async def test_names_and_pages_that_are_listed_are_served(open_room: OpenRoom, hot_path: bool):
    settings = {"allow_hosts": ["llm.lab.org"], "cors_origins": ["https://chat.lab.org"]}
    async with FakeEngine() as engine, open_room(engine, hot_path=hot_path, **settings) as room:
        headers = {"Host": "llm.lab.org:4000", "Origin": "https://chat.lab.org"}
        async with room.http.post(room.url + CHAT, json=BODY, headers=headers) as response:
            assert response.status == 200
        data = json.dumps(BODY).encode()
        status, error = await post(room, data, JSON | {"Host": "other.lab.org"})
        assert (status, error["code"], "allow_hosts" in error["message"]) == (421, "host_not_allowed", True)
        status, error = await post(room, data, JSON | {"Origin": "https://evil.test"})
        assert (status, error["code"], "cors_origins" in error["message"]) == (
            403,
            "origin_not_allowed",
            True,
        )


async def test_before_it_stops_it_finishes_what_is_under_way_and_takes_nothing_new(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        engine.script(Fault.stall(at_token=3))
        running = asyncio.ensure_future(room.openai.chat.completions.create(**BODY))
        await engine.stalled()
        draining = asyncio.ensure_future(room.balancer.drain(app.Stop()))
        status, error = 0, {}
        while status != 503:
            status, error = await post(room, json.dumps(BODY).encode())
        assert error["code"] == "shutting_down"
        async with room.http.get(f"{room.url}/readyz") as response:
            assert response.status == 503
        assert not draining.done()
        engine.resume()
        await draining
        assert (await running).choices[0].finish_reason == "stop"


async def test_asked_to_hurry_it_waits_for_nothing(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        engine.script(Fault.stall(at_token=3))
        running = asyncio.ensure_future(room.openai.chat.completions.create(**BODY))
        await engine.stalled()
        stop = app.Stop()
        draining = asyncio.ensure_future(room.balancer.drain(stop))
        stop.signal()
        assert not draining.done()
        stop.signal()
        await asyncio.wait_for(draining, 5)
        running.cancel()


async def test_more_than_can_be_held_at_once_is_refused(open_room: OpenRoom, monkeypatch):
    monkeypatch.setattr(app, "InferencePolicy", functools.partial(app.InferencePolicy, max_held_bytes=300))
    async with FakeEngine() as engine, open_room(engine) as room:
        engine.script(Fault.stall(at_token=0))
        first = asyncio.ensure_future(room.openai.chat.completions.create(**BODY))
        await engine.stalled()
        long = BODY | {"messages": [{"role": "user", "content": "x" * 280}]}
        status, error = await post(room, json.dumps(long).encode())
        assert (status, error["code"]) == (429, "queue_full")
        engine.resume()
        await first


@pytest.mark.parametrize("hot_path", [True, False], ids=["hot", "aiohttp"])
async def test_a_body_that_does_not_come_is_not_waited_for_forever(open_room: OpenRoom, hot_path: bool):
    async with FakeEngine() as engine, open_room(engine, body_timeout=0.2, hot_path=hot_path) as room:
        reader, writer = await asyncio.open_connection("127.0.0.1", room.balancer.port)
        head = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
        writer.write("\r\n".join([*head, "Content-Length: 9", "", "{"]).encode())
        status = await asyncio.wait_for(reader.readline(), 10)
        assert b" 408 " in status
        writer.close()


async def test_a_port_that_is_taken_is_said_plainly(open_room: OpenRoom, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = {"host": "127.0.0.1", "port": taken.getsockname()[1], "mdns": False, "data_dir": tmp_path}
        with pytest.raises(app.PortTaken, match="--port"):
            async with app.running(load(None, flags)):
                pass


async def test_an_agents_join_is_checked(open_room: OpenRoom):
    async with open_room() as room:
        status, error = await post(room, b'{"id": "x"}', path="/cluster/v1/join")
        assert (status, "port" in error["message"]) == (400, True)


async def test_public_addresses_are_turned_away(open_room: OpenRoom, monkeypatch):
    monkeypatch.setattr(Sources, "admit", lambda self, address: False)
    async with FakeEngine() as engine, open_room(engine) as room:
        status, error = await post(room, json.dumps(BODY).encode())
        assert (status, error["code"]) == (403, "source_not_allowed")
        assert not engine.requests
