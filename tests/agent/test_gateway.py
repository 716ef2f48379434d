"""The gateway between a real HTTP client and a real HTTP engine that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import orjson
import pytest
from aiohttp import web

from agent.meeting import OpenGate
from agent.scenes import OneModel, fake_plan, until
from worker_agent import wire
from worker_agent.changes import Changes
from worker_agent.exchange import ExchangePolicy
from worker_agent.gateway import Gateway, GatewayPolicy
from worker_agent.plans import Plan
from worker_agent.readiness import Address
from worker_agent.resident import Resident
from worker_agent.supervised import Serving
from worker_agent.wire import EngineState, Report

CHAT = "/v1/chat/completions"
WORD = b'data: {"n": 1}\n\n'
FINISHED = b'data: {"choices": [{"finish_reason": "stop"}]}\n\n'
ERROR = b'data: {"error": {"message": "no memory"}}\n\n'
DONE = b"data: [DONE]\n\n"


class Engine:
    """Answers as the request's `user` field says, and notes what it was sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], dict[str, object]]] = []
        self.left = 0
        self.awake = asyncio.Event()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append((dict(request.headers), body))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Engine": "secret"})
        try:
            match body.get("user"):
                case "too long":
                    return web.json_response({"error": {"message": "too long"}}, status=400)
                case "unauthorized":
                    return web.json_response({"error": {"message": "wrong key"}}, status=401)
                case "redirect":
                    return web.Response(status=307, headers={"Location": "http://127.0.0.1:1/"})
                case "die":
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                case "think":
                    await asyncio.Event().wait()
                case "plain":
                    return web.json_response({"choices": []})
                case "half plain":
                    response = web.StreamResponse(headers={"Content-Type": "application/json"})
                    await response.prepare(request)
                    await response.write(b'{"choices"')
                    assert request.transport is not None
                    request.transport.abort()
                    return response
            if body.get("user") in (
                "old",
                "nap",
            ):  # HTTP/1.0: the end of the connection is the end of the answer
                response.force_close()
            await response.prepare(request)
            await response.write(b'data: {"n": 1}\n\n')
            match body.get("user"):
                case "stall":
                    await asyncio.Event().wait()
                case "break":
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                case "torn":
                    await response.write(b'data: {"n": 2')
                    assert request.transport is not None
                    request.transport.close()
                    return response
                case "no end":
                    return response
                case "nap":
                    await self.awake.wait()
                    return response
                case "finished":
                    await response.write(FINISHED)
                    return response
                case "error":
                    await response.write(ERROR)
                    return response
                case "flood":
                    while True:
                        await response.write(b"x" * 65536)
                case "words":
                    while True:
                        await response.write(WORD * 1000)
                case "blank":
                    while True:
                        await response.write(b"\n\n" * 32768)
            await response.write(b"data: [DONE]\n\n")
            return response
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise asyncio.CancelledError from None


@dataclass
class Backend:
    """An engine's supervision as a gateway sees it."""

    plan: Plan
    serving: Serving | None
    doubts: list[Serving] = field(default_factory=list)
    stuck_because: list[str] = field(default_factory=list)
    arrivals: int = 0

    def heard(self, serving: Serving) -> None:
        assert serving is self.serving
        self.arrivals += 1

    def doubt(self, serving: Serving) -> None:
        self.doubts.append(serving)

    def stuck(self, serving: Serving, reason: str) -> None:
        self.stuck_because.append(reason)
        self.serving = None


@dataclass
class Scene:
    engine: Engine
    backend: Backend
    gateway: Gateway
    url: str
    client: aiohttp.ClientSession

    def ask(
        self, user: str = "", **more: object
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self.client.post(
            self.url + CHAT, json={"model": "public", "stream": True, "user": user, **more}
        )


@contextlib.asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[int]:
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield site.port
    finally:
        await runner.cleanup()


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    engine = Engine()
    app = web.Application()
    app.router.add_post(CHAT, engine.chat)
    async with served(app) as engine_port:
        address = Address(port=engine_port, secret="s3cret")
        plan = fake_plan(tmp_path / "starts", "serve")
        backend = Backend(
            replace(plan, spec=replace(plan.spec, busy_path=None)),
            Serving(address=address, model="inner", context_tokens=64),
        )
        changes = Changes()

        def report() -> Report:
            state = EngineState.READY if backend.serving else EngineState.RESTING
            return Report(id="a", state=state, engine="fake", slots=2, running=gateway.running)

        policy = GatewayPolicy(
            body_bytes=10_000,
            body_seconds=0.5,
            exchange=ExchangePolicy(answer_bytes=2**22),
        )
        resident = Resident(backend, changes, connect_seconds=0.5)
        gateway = Gateway(OneModel(resident), report, changes, OpenGate(), policy)
        async with (
            resident.connected(),
            served(gateway.application()) as port,
            aiohttp.ClientSession() as client,
        ):
            yield Scene(engine, backend, gateway, f"http://127.0.0.1:{port}", client)


async def test_bytes_pass_as_they_come_and_the_model_is_rewritten(scene: Scene) -> None:
    async with scene.ask(temperature=0, headers_of_ours="x") as answer:
        assert answer.status == 200
        assert await answer.read() == b'data: {"n": 1}\n\ndata: [DONE]\n\n'
    [(_, body)] = scene.engine.requests
    assert body == {"model": "inner", "stream": True, "user": "", "temperature": 0, "headers_of_ours": "x"}


async def test_only_listed_headers_pass_in_either_direction(scene: Scene) -> None:
    headers = {
        "Authorization": "Bearer client-key",
        "Cookie": "a=b",
        "X-Request-ID": "r",
        "X-Forwarded-For": "8.8.8.8",
    }
    body = {"model": "public", "stream": True}
    async with scene.client.post(scene.url + CHAT, json=body, headers=headers) as answer:
        await answer.read()
        assert "X-Engine" not in answer.headers
        assert answer.headers["Content-Type"] == "text/event-stream"
    [(seen, _)] = scene.engine.requests
    assert seen["Authorization"] == "Bearer s3cret"
    assert not {"Cookie", "X-Request-ID", "X-Forwarded-For"} & set(seen)


async def test_the_first_bytes_arrive_before_the_answer_is_whole(scene: Scene) -> None:
    async with scene.ask("stall") as answer:
        assert await answer.content.readany() == b'data: {"n": 1}\n\n'
        assert scene.gateway.running == 1


@pytest.mark.parametrize("moment", ["stall", "think"])
async def test_a_client_that_leaves_takes_its_engine_request_along(scene: Scene, moment: str) -> None:
    asking = asyncio.ensure_future(_read(scene, moment))
    await until(lambda: scene.engine.requests)
    asking.cancel()
    await until(lambda: scene.engine.left == 1 and scene.gateway.running == 0)


async def _read(scene: Scene, user: str) -> bytes:
    async with scene.ask(user) as answer:
        return await answer.read()


@pytest.mark.parametrize("fault", ["break", "torn", "no end"])
async def test_half_an_answer_ends_with_an_error_instead_of_its_end_mark(scene: Scene, fault: str) -> None:
    """The engine lives: it has not died of the request."""
    async with scene.ask(fault) as answer:
        word, _, error = (await answer.read()).partition(b"\n\n")
    assert word + b"\n\n" == WORD
    assert error_in(error)["code"] == "stream_incomplete"
    await until(lambda: scene.gateway.running == 0)


def error_in(event: bytes) -> dict[str, str]:
    assert event.startswith(b"data: ")
    assert event.endswith(b"}\n\n")
    error: dict[str, str] = orjson.loads(event[6:])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_the_end_of_an_old_connection_is_a_death_if_the_process_is_gone(scene: Scene) -> None:
    async with scene.ask("nap") as answer:
        assert await answer.content.readany() == WORD
        scene.backend.serving = None  # its process ended, and with it its connections
        scene.engine.awake.set()
        assert error_in(await answer.read())["code"] == "engine_died"


async def test_a_finished_answer_without_its_end_mark_gets_one(scene: Scene) -> None:
    async with scene.ask("finished") as answer:
        assert await answer.read() == WORD + FINISHED + DONE


async def test_an_error_of_the_engines_own_is_the_last_event(scene: Scene) -> None:
    async with scene.ask("error") as answer:
        assert await answer.read() == WORD + ERROR


@pytest.mark.parametrize("fault", ["flood", "blank"])
async def test_an_answer_without_an_end_is_ended_and_the_engine_left(scene: Scene, fault: str) -> None:
    async with scene.ask(fault) as answer:
        end = (await answer.read())[len(WORD) :].lstrip(b"\n")
    assert error_in(end)["code"] == "stream_incomplete"
    await until(lambda: scene.engine.left == 1)


async def test_an_answer_in_one_piece_that_breaks_off_is_cut(scene: Scene) -> None:
    async with scene.ask("half plain") as answer:
        with pytest.raises(aiohttp.ClientError):
            await answer.read()


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}, {"stream": 1}])
async def test_an_answer_in_one_piece_is_not_asked_of_an_engine(
    scene: Scene, stream: dict[str, object]
) -> None:
    async with scene.client.post(scene.url + CHAT, json={"model": "public", **stream}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "stream_required")
    assert not scene.engine.requests


async def test_an_answer_that_is_no_stream_needs_no_end_marker(scene: Scene) -> None:
    async with scene.ask("plain") as answer:
        assert await answer.json() == {"choices": []}


async def test_the_engines_own_refusal_passes_through(scene: Scene) -> None:
    async with scene.ask("too long") as answer:
        assert (answer.status, await answer.json()) == (400, {"error": {"message": "too long"}})


@pytest.mark.parametrize(
    ("user", "code"),
    [("unauthorized", "engine_refused"), ("redirect", "engine_refused"), ("die", "stream_incomplete")],
)
async def test_what_is_between_the_engine_and_us_is_a_502(scene: Scene, user: str, code: str) -> None:
    async with scene.ask(user) as answer:
        assert answer.status == 502
        assert (await answer.json())["error"]["code"] == code


async def test_an_engine_that_accepts_no_connection_is_doubted(scene: Scene) -> None:
    assert scene.backend.serving is not None
    gone = replace(scene.backend.serving, address=Address(port=1, secret=None))
    scene.backend.serving = gone
    async with scene.ask() as answer:
        assert answer.status == 502
    assert scene.backend.doubts == [gone]


async def test_an_engine_whose_connections_are_not_taken_is_doubted(scene: Scene) -> None:
    assert scene.backend.serving is not None
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)  # and nobody accepts: what a stopped process looks like, once its queue is full
        stuck = replace(scene.backend.serving, address=Address(port=listener.getsockname()[1], secret=None))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        scene.backend.serving = stuck
        async with scene.ask() as answer:
            assert answer.status == 502
            assert (await answer.json())["error"]["code"] == "engine_unreachable"
    assert scene.backend.doubts == [stuck]


async def test_a_full_queue_beside_a_running_answer_is_no_reason_to_doubt(scene: Scene) -> None:
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        async with scene.ask("stall"):
            assert scene.backend.serving is not None
            full = Address(port=listener.getsockname()[1], secret=None)
            scene.backend.serving = replace(scene.backend.serving, address=full)
            async with scene.ask() as answer:
                assert (await answer.json())["error"]["code"] == "engine_unreachable"
            assert scene.backend.doubts == []


async def test_a_client_that_takes_nothing_any_more_is_dropped_and_the_engine_left(scene: Scene) -> None:
    bounds = ExchangePolicy(write_seconds=0.3)
    scene.gateway._policy = replace(scene.gateway._policy, exchange=bounds)
    async with scene.ask("words") as answer:
        await until(lambda: scene.engine.left == 1 and scene.gateway.running == 0)
        with pytest.raises(aiohttp.ClientError):
            await answer.read()


async def test_each_arrival_from_the_engine_is_told_to_its_supervision(scene: Scene) -> None:
    asking = asyncio.ensure_future(_read(scene, "think"))
    await until(lambda: scene.engine.requests)
    assert scene.backend.arrivals == 0
    asking.cancel()
    async with scene.ask() as answer:
        await answer.read()
    assert scene.backend.arrivals >= 2  # its head, and its text in one piece or in two


async def test_more_requests_than_slots_are_told_to_come_back(scene: Scene) -> None:
    async with scene.ask("stall"), scene.ask("stall"), scene.ask() as third:
        assert (third.status, third.headers["Retry-After"]) == (429, "1")
        assert (await third.json())["error"]["code"] == "no_free_slot"
    await until(lambda: scene.gateway.running == 0)
    async with scene.ask() as fourth:
        assert fourth.status == 200


async def test_an_engine_that_is_not_ready_is_a_503(scene: Scene) -> None:
    scene.backend.serving = None
    async with scene.ask() as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
        assert "resting" in (await answer.json())["error"]["message"]
    async with scene.client.get(scene.url + "/health") as health:
        assert health.status == 503


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"model": "public"', {}, 400),
        (b"[]", {}, 400),
        (b"[" * 5000, {}, 400),
        (b'{"model": "other"}', {}, 404),
        (b'{"model": ["public"]}', {}, 404),
        (b'{"model": "public"}', {"Content-Type": "text/plain"}, 415),
        (b'{"model": "public"}', {"Content-Encoding": "gzip"}, 415),
        (b'{"model": "public"}', {"Origin": "http://evil.test"}, 403),
        (b'{"model": "public"}', {"Sec-Fetch-Site": "cross-site"}, 403),
        (b" " * 10_001, {}, 413),
    ],
)
async def test_a_wrong_request_ends_here_in_openais_error_form(
    scene: Scene, body: bytes, headers: dict[str, str], status: int
) -> None:
    sent = {"Content-Type": "application/json", **headers}
    async with scene.client.post(scene.url + CHAT, data=body, headers=sent) as answer:
        assert answer.status == status
        assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}
    assert scene.engine.requests == []


async def test_a_body_nested_deeper_than_can_be_sent_on_is_refused_before_it_takes_a_slot(
    scene: Scene,
) -> None:
    nested = b'{"model": "public", "stream": true, "deep": ' + b"[" * 300 + b"]" * 300 + b"}"
    headers = {"Content-Type": "application/json"}
    async with (
        scene.ask("stall"),
        scene.ask("stall"),  # no slot is left
        scene.client.post(scene.url + CHAT, data=nested, headers=headers) as answer,
    ):
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "nested_too_deeply"


async def test_a_body_that_does_not_come_is_not_waited_for(scene: Scene) -> None:
    assert await raw(scene, b"Content-Length: 100\r\n\r\n{") == 408


async def test_a_body_of_no_known_length_is_refused_before_its_chunks_are_read(scene: Scene) -> None:
    assert await raw(scene, b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n") == 411


async def raw(scene: Scene, rest: bytes) -> int:
    """The status of the answer to a request with this end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(scene.url.rpartition(":")[2]))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode()
    writer.write(head + rest)
    status = int((await asyncio.wait_for(reader.readline(), 5)).split()[1])
    writer.close()
    return status


@pytest.mark.parametrize(
    "path", ["/", "/slots", "/v1/models", "/metrics", "/v1/embeddings", "/props", "/v1/chat"]
)
async def test_nothing_else_of_the_engine_is_reachable(scene: Scene, path: str) -> None:
    async with scene.client.post(scene.url + path, json={"model": "public"}) as answer:
        assert answer.status in (404, 405)
        assert "error" in await answer.json()


async def test_a_public_source_is_refused_before_anything_is_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.BaseRequest, "remote", "8.8.8.8")
    async with scene.ask() as answer:
        assert answer.status == 403
    assert scene.engine.requests == []


async def test_reports_come_at_once_on_every_change_and_each_second(scene: Scene) -> None:
    async with scene.client.get(scene.url + wire.REPORT_PATH) as stream:
        assert Report.from_line(await stream.content.readline()).running == 0
        async with scene.ask("stall"):
            running = Report.from_line(await asyncio.wait_for(stream.content.readline(), 0.9))
            assert running.running == 1
        assert Report.from_line(await asyncio.wait_for(stream.content.readline(), 0.9)).running == 0
        await asyncio.wait_for(stream.content.readline(), wire.REPORT_INTERVAL_SECONDS + 1)  # nothing changed


async def test_a_busy_agent_reports_no_faster_than_a_balancer_reads_and_the_last_word_is_true(
    scene: Scene,
) -> None:
    loop = asyncio.get_running_loop()
    reports: list[Report] = []
    busy = True
    async with scene.client.get(scene.url + wire.REPORT_PATH) as stream:

        async def read() -> None:
            while busy or reports[-1].running:
                reports.append(Report.from_line(await stream.content.readline()))

        began = loop.time()
        reading = asyncio.ensure_future(read())
        for _ in range(60):  # two changes each
            async with scene.ask("plain") as answer:
                await answer.read()
        async with scene.ask("stall"):
            await until(lambda: reports[-1].running == 1, seconds=wire.REPORT_INTERVAL_SECONDS)
        busy = False
        await asyncio.wait_for(reading, 5)
        gaps = (loop.time() - began) / wire.REPORT_GAP_SECONDS
    assert len(reports) <= gaps + 1


async def test_the_end_is_announced_then_what_runs_ends_well_then_the_streams_end(scene: Scene) -> None:
    async with scene.client.get(scene.url + wire.REPORT_PATH) as stream, scene.ask("stall") as running:
        scene.gateway.drain()
        async with scene.ask() as refused:
            assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
            assert (await refused.json())["error"]["code"] == "stopping"
        assert await running.content.readany() == b'data: {"n": 1}\n\n'
        closing = asyncio.ensure_future(scene.gateway.close())
        assert error_in(await running.read())["code"] == "stopping"
        await asyncio.wait_for(stream.read(), 5)
        await closing
    await asyncio.wait_for(scene.gateway.drained(), 5)


async def test_watchers_are_bounded(scene: Scene) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(GatewayPolicy().report_streams):
            await stack.enter_async_context(scene.client.get(scene.url + wire.REPORT_PATH))
        async with scene.client.get(scene.url + wire.REPORT_PATH) as one_too_many:
            assert one_too_many.status == 503


async def test_one_who_goes_on_only_if_the_engine_has_shown_that_it_can(scene: Scene) -> None:
    headers = {wire.CONTINUE_HEADER: "1"}
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for messages, status, code in ((begun, 409, "cannot_continue"), (begun[:1], 400, "nothing_to_continue")):
        body = {"model": "public", "stream": True, "messages": messages}
        async with scene.client.post(scene.url + CHAT, json=body, headers=headers) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (status, code)
    assert not scene.engine.requests


async def test_one_who_sends_words_of_the_assistants_without_the_header_gets_what_the_engine_makes_of_them(
    scene: Scene,
) -> None:
    messages = [{"role": "assistant", "content": "b"}]
    async with scene.ask(messages=messages) as answer:
        assert answer.status == 200
    assert scene.engine.requests[0][1]["messages"] == messages


async def test_a_body_that_is_too_large_is_refused_for_its_length_alone(scene: Scene) -> None:
    assert await raw(scene, b"Content-Length: 100000000\r\n\r\n{") == 413


async def test_bodies_are_bounded_together_too(scene: Scene) -> None:
    scene.gateway._policy = replace(scene.gateway._policy, held_bytes=300)
    async with scene.ask("stall", more="x" * 150):
        async with scene.ask(more="x" * 150) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "too_much_at_once")
    await until(lambda: scene.gateway.running == 0)
    async with scene.ask(more="x" * 150) as answer:
        assert answer.status == 200
