"""Watching workers, with real HTTP servers on loopback as workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web

from balancer.core.model import Condition, Endpoint, Event, Lost, ModelName, Reported, Worker, WorkerId
from balancer.meeting import NotMet
from balancer.upstream import Address, Lines, TimeoutPolicy, Upstream, Way
from balancer.watch import Watches, WatchPolicy, from_report
from worker_agent import wire

PATIENCE = 10.0
"""Seconds after which a test gives up waiting; far above what any of them takes."""
QUICK = WatchPolicy(
    interval_seconds=0.02,
    probe_timeout_seconds=0.4,
    lost_after_seconds=0.4,
    first_pause_seconds=0.01,
    longest_pause_seconds=0.04,
    report_gap_seconds=0.001,
)
READY = wire.Report(
    id="a", state=wire.EngineState.READY, engine="mlx", models=(wire.ServedModel(name="m"),), slots=2
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Met:
    """Agents that are met without a word; `refuses` are not, in turn. How that really goes: test_cluster."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._ways: dict[Worker, Way] = {}
        self.meetings = 0
        self.refuses: list[NotMet] = []

    def way(self, worker: Worker) -> Way | None:
        return self._ways.get(worker)

    async def met(self, worker: Worker, refused: Way | None = None) -> Way:
        if (known := self.way(worker)) is not None and known is not refused:
            return known
        self.meetings += 1
        if self.refuses:
            raise self.refuses.pop(0)
        session = {wire.SESSION_HEADER: f"session-{self.meetings}"}
        way = self._ways[worker] = Way(Address.of(worker.url), session)
        return way

    def drop(self, worker: Worker) -> None:
        self._ways.pop(worker, None)

    def reports(self, way: Way) -> AbstractAsyncContextManager[Lines]:
        return self._upstream.reading(
            way.address, wire.REPORT_PATH, way.headers, limit_bytes=wire.MAX_REPORT_BYTES
        )


class Room:
    """Watches with all that they told, and servers that play the workers."""

    def __init__(self, session: aiohttp.ClientSession, upstream: Upstream) -> None:
        self.met = Met(upstream)
        self.events: list[Event] = []
        self.changed = asyncio.Event()
        self.runners: list[web.AppRunner] = []
        self.watches = Watches(
            tell=self.tell, session=session, agents=self.met, policy=QUICK, chance=lambda: 0.5
        )

    def tell(self, event: Event) -> None:
        self.events.append(event)
        self.changed.set()

    async def serve(self, handler: Handler) -> str:
        app = web.Application()
        app.router.add_get("/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.runners.append(runner)
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def follow(self, handler: Handler, type_name: str = "agent", **about: object) -> None:
        url = await self.serve(handler)
        self.watches.follow(Worker(id=WorkerId("a"), type=type_name, url=url, **about))

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not holds():
                self.changed.clear()
                await self.changed.wait()

    async def lost(self) -> Lost:
        await self.until(lambda: bool(self.losses))
        return self.losses[0]

    async def reported(self, times: int = 1) -> Condition:
        await self.until(lambda: len(self.reports) >= times)
        return self.reports[-1].condition

    @property
    def losses(self) -> list[Lost]:
        return [event for event in self.events if isinstance(event, Lost)]

    @property
    def reports(self) -> list[Reported]:
        return [event for event in self.events if isinstance(event, Reported)]


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    async with aiohttp.ClientSession() as session, Upstream(TimeoutPolicy()) as upstream:
        room = Room(session, upstream)
        yield room
        await room.watches.aclose()
        for runner in room.runners:
            await runner.cleanup()


def nobody_listens() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


async def stream_of(request: web.Request, *lines: bytes) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for line in lines:
        await response.write(line)
    return response


async def for_ever() -> None:
    await asyncio.Event().wait()


# Agents ...


async def test_an_agent_that_reports_is_reported(room):
    async def agent(request):
        assert request.path == wire.REPORT_PATH
        await stream_of(request, READY.to_line(), READY.to_line())
        await for_ever()

    await room.follow(agent)
    assert await room.reported(times=2) == from_report(READY)
    assert not room.losses


async def test_an_agent_that_falls_silent_is_lost_with_what_runs_on_it_and_comes_back(room):
    streams = 0

    async def agent(request):
        nonlocal streams
        streams += 1
        if streams == 2:
            await for_ever()  # frozen: the connection stands, nothing comes
        await stream_of(request, READY.to_line())
        await for_ever()

    await room.follow(agent)
    assert await room.lost() == Lost(WorkerId("a"), "no report for 0.4 s", abandon=True)
    await room.until(lambda: len(room.reports) == 2)
    assert [type(event) for event in room.events] == [Reported, Lost, Reported]


@pytest.mark.parametrize("torn", [True, False])
async def test_a_stream_that_breaks_is_opened_again_without_losing_the_agent(room, torn):
    async def agent(request):
        response = await stream_of(request, READY.to_line())
        if torn and request.transport is not None:
            request.transport.abort()
        return response

    await room.follow(agent)
    await room.reported(times=4)
    assert not room.losses


async def test_an_agent_that_stops_listening_is_lost_at_once(room):
    hang_up = asyncio.Event()

    async def agent(request):
        response = await stream_of(request, READY.to_line())
        await hang_up.wait()
        return response

    await room.follow(agent)
    await room.reported()
    hang_up.set()
    await room.runners[0].cleanup()
    lost = await room.lost()
    assert lost.abandon
    assert "connection refused" in lost.reason


async def test_an_agent_that_never_answered_is_lost_too_so_that_somebody_sees_why(room):
    room.watches.follow(Worker(id=WorkerId("a"), type="agent", url=nobody_listens()))
    assert "connection refused" in (await room.lost()).reason


UNKNOWN = {"error": {"code": wire.SESSION_UNKNOWN, "message": "who are you"}}


async def test_an_agent_that_has_forgotten_us_is_met_again_at_once_and_never_lost(room):
    async def agent(request):
        if request.headers[wire.SESSION_HEADER] == "session-1":
            return web.json_response(UNKNOWN, status=401)
        await stream_of(request, READY.to_line())
        await for_ever()

    await room.follow(agent)
    await room.reported()
    assert room.met.meetings == 2
    assert not room.losses


async def test_an_agent_that_never_knows_us_is_lost_and_met_after_pauses_only(room):
    async def agent(_request):
        return web.json_response(UNKNOWN, status=401)

    await room.follow(agent)
    assert "does not know us a moment after it was met" in (await room.lost()).reason
    assert len(room.losses) == 1


async def test_a_session_that_others_gave_up_is_renewed_while_reports_still_come(room):
    async def agent(request):
        response = await stream_of(request)
        while True:
            await response.write(READY.to_line())
            await asyncio.sleep(0.001)

    url = await room.serve(agent)
    followed = Worker(id=WorkerId("a"), type="agent", url=url)
    room.watches.follow(followed)
    await room.reported()
    room.met.drop(followed)
    await room.until(lambda: room.met.meetings == 2)
    assert not room.losses


async def test_nothing_is_told_of_a_guest_that_is_not_let_in_and_it_is_tried_when_there_is_reason(room):
    async def agent(request):
        await stream_of(request, READY.to_line())
        await for_ever()

    refused = NotMet("it holds another key", certain=True)
    room.met.refuses = [refused, refused]
    room.watches = Watches(
        tell=room.tell,
        session=room.watches._session,
        agents=room.met,
        policy=replace(QUICK, first_pause_seconds=PATIENCE * 2),
        chance=lambda: 0.0,
    )
    url = await room.serve(agent)
    room.watches.follow(Worker(id=WorkerId("a"), type="agent", url=url), is_guest=True)
    for meetings in (1, 2):
        async with asyncio.timeout(PATIENCE):
            while room.met.meetings < meetings:
                await asyncio.sleep(0)
        assert room.events == []
        room.watches.wake(WorkerId("a"))
    await room.reported()
    assert not room.losses


async def test_a_listed_agent_that_is_not_let_in_is_lost_with_the_reason(room):
    async def agent(request):
        await stream_of(request, READY.to_line())
        await for_ever()

    room.met.refuses = [NotMet("it holds another key", certain=True)]
    await room.follow(agent)
    assert (await room.lost()).reason == "it holds another key"
    await room.reported()


async def test_a_stream_that_ends_before_any_report_is_no_stream(room):
    await room.follow(stream_of)
    assert (await room.lost()).reason == "it ended its report stream"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (READY.model_copy(update={"id": "b"}).to_line(), 'calls itself "b", not "a"'),
        (READY.model_copy(update={"wire": 99}).to_line(), "wire version 99"),
        (b"not json\n", "not JSON"),
        (b"x" * (wire.MAX_REPORT_BYTES * 3), "a line of more than"),
    ],
)
async def test_a_report_that_is_not_usable_is_told_once_however_often_it_comes(room, line, reason):
    streams = 0

    async def agent(request):
        nonlocal streams
        streams += 1
        if streams == 5:
            room.changed.set()
        await stream_of(request, line)
        await for_ever()

    await room.follow(agent)
    assert re.search(reason, (await room.lost()).reason)
    await room.until(lambda: streams >= 5)
    assert len(room.losses) == 1
    assert not room.reports


async def test_an_agent_that_refuses_us_says_why_in_its_own_words(room):
    async def agent(request):
        return web.json_response({"error": {"message": "name it in \x1b[1mallow_networks"}}, status=403)

    await room.follow(agent)
    reason = (await room.lost()).reason
    assert "status 403: name it in" in reason
    assert "allow_networks" in reason
    assert reason.isprintable()


async def test_a_mad_agent_is_read_no_faster_than_the_policy_says(room):
    async def agent(request):
        response = await stream_of(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(READY.to_line() * 100)

    loop = asyncio.get_running_loop()
    await room.follow(agent)
    await room.reported()
    began, before = loop.time(), len(room.reports)
    await room.reported(times=before + 50)
    # 50 gaps of 1 ms; without them some thousand lines are there at once.
    assert loop.time() - began >= 50 * QUICK.report_gap_seconds * 0.9


def test_reports_are_read_faster_than_an_agent_writes_them():
    assert WatchPolicy().report_gap_seconds <= wire.REPORT_GAP_SECONDS / 2


async def test_forgetting_a_worker_hangs_up_and_nothing_more_is_told(room):
    left = asyncio.Event()

    async def agent(request):
        response = await stream_of(request)
        try:
            while True:
                await response.write(READY.to_line())
                await asyncio.sleep(0.001)
        finally:
            left.set()

    await room.follow(agent)
    await room.reported()
    room.watches.forget(WorkerId("a"))
    told = len(room.events)
    async with asyncio.timeout(PATIENCE):
        await left.wait()
    await room.watches.aclose()
    assert len(room.events) == told


async def test_following_anew_replaces_the_watch(room):
    asked = []

    def agent(name):
        async def answer(request):
            asked.append((name, request.headers[wire.SESSION_HEADER]))
            room.changed.set()
            await stream_of(request, READY.to_line())
            await for_ever()

        return answer

    await room.follow(agent("old"))
    await room.reported()
    url = await room.serve(agent("new"))
    room.watches.follow(Worker(id=WorkerId("a"), type="agent", url=url))
    await room.until(lambda: len(asked) == 2)
    await room.reported(times=2)
    assert asked == [("old", "session-1"), ("new", "session-2")]
    assert not room.losses


async def test_closing_ends_every_watch(room):
    await room.follow(stream_of)
    await room.follow(stream_of)
    await room.lost()
    await room.watches.aclose()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("watch ")]


async def test_only_changes_are_logged(room, caplog):
    caplog.set_level(logging.INFO, "balancer.watch")

    async def agent(request):
        await stream_of(request, *[READY.to_line()] * 20)
        await for_ever()

    await room.follow(agent)
    await room.reported(times=20)
    await room.lost()
    texts = [record.getMessage() for record in caplog.records if record.name == "balancer.watch"]
    assert len(texts) == 2
    assert "answers" in texts[0]
    assert "is lost: no report" in texts[1]


def test_a_report_becomes_a_condition_in_the_words_of_the_core():
    report = READY.model_copy(
        update={
            "models": (wire.ServedModel(name="m", context_tokens=9, paths=("/v1/embeddings", "/x")),),
            "detail": "d",
            "hardware": "h",
            "advice": ("more memory",),
        }
    )
    condition = from_report(report)
    assert [(m.name, m.endpoints, m.context_tokens) for m in condition.models] == [
        ("m", {Endpoint.EMBEDDINGS}, 9)
    ]
    assert (condition.slots, condition.engine, condition.state, condition.ready) == (2, "mlx", "ready", True)
    assert (condition.detail, condition.hardware, condition.advice) == ("d", "h", ("more memory",))
    assert (condition.running, condition.shares_prefixes) == (0, False)


def test_what_an_agent_tells_of_its_model_reaches_the_core():
    model = wire.ServedModel(
        name="chat", identity="Qwen2.5-7B-Instruct-Q4_K_M.gguf", memory_tokens=8192, cache_tokens=9000
    )
    report = READY.model_copy(update={"models": (model,), "running": 3, "engine": "vllm"})
    condition = from_report(report)
    own, automatic = condition.models
    assert (own.name, own.identity) == ("chat", "qwen2.5-7b-instruct q4_k_m")
    assert (own.memory_tokens, own.cache_tokens, own.loaded) == (8192, 9000, True)
    assert (automatic.name, automatic.known_as) == ("qwen2.5-7b-instruct~q4_k_m", "chat")
    assert (condition.running, condition.shares_prefixes) == (3, True)


@pytest.mark.parametrize(
    ("told", "loaded", "loading", "seconds", "progress"),
    [
        ({}, True, False, 0.0, None),
        ({"state": "unloaded", "load_seconds": 12.0}, False, False, 12.0, None),
        ({"state": "unloaded", "load_seconds": 12.0, "eta_seconds": 30.0}, False, False, 30.0, None),
        ({"state": "unloaded", "size_bytes": 15 * 10**9}, False, False, 10.0, None),
        ({"state": "unloaded"}, False, False, 1.0, None),
        ({"state": "loading", "eta_seconds": 4.0, "progress": 0.5}, False, True, 4.0, 0.5),
        ({"state": "loading", "load_seconds": 12.0, "progress": 0.75}, False, True, 3.0, 0.75),
    ],
)
def test_how_far_a_model_is_loaded_reaches_the_core(told, loaded, loading, seconds, progress):
    model = wire.ServedModel(name="m", **told)
    condition = from_report(READY.model_copy(update={"models": (model,)}))
    (offer,) = condition.models
    assert condition.tells_loads
    assert (offer.loaded, offer.loading, offer.progress) == (loaded, loading, progress)
    assert offer.load_seconds == seconds
    assert offer.failed is None


def test_why_a_model_cannot_be_loaded_reaches_the_core():
    models = (
        wire.ServedModel(name="a", state=wire.ModelState.FAILED, detail="9.3 GiB are needed"),
        wire.ServedModel(name="b", state=wire.ModelState.FAILED, slots=3),
    )
    first, second = from_report(READY.model_copy(update={"models": models})).models
    assert (first.failed, second.failed) == ("9.3 GiB are needed", "failed")
    assert (first.slots, second.slots) == (None, 3)


@pytest.mark.parametrize("state", [state for state in wire.EngineState if state != "ready"])
def test_only_an_agent_whose_engine_is_ready_is_ready(state):
    assert not from_report(READY.model_copy(update={"state": state})).ready


# All others ...

MODELS = {"data": [{"id": "m", "max_model_len": 100}]}


async def test_a_worker_without_an_agent_is_asked_at_once_and_then_again(room):
    asked = []

    async def openai(request):
        asked.append((request.path, request.headers.get("Connection")))
        return web.json_response(MODELS)

    await room.follow(openai, "openai")
    condition = await room.reported(times=3)
    assert [(m.name, m.context_tokens) for m in condition.models] == [("m", 100)]
    assert asked[0] == ("/v1/models", "close")


async def test_the_key_of_a_worker_goes_with_the_probe(room):
    async def openai(request):
        assert request.headers["Authorization"] == "Bearer k"
        return web.json_response(MODELS)

    url = await room.serve(openai)
    room.watches.follow(Worker(id=WorkerId("a"), type="openai", url=url), {"Authorization": "Bearer k"})
    await room.reported()


async def test_a_worker_that_repeats_its_key_tells_nobody_else(room):
    async def openai(request):
        told = f"no account for {request.headers['Authorization']}"
        return web.json_response({"error": {"message": told}}, status=500)

    url = await room.serve(openai)
    headers = {"Authorization": "Bearer canary-key-0123"}
    room.watches.follow(Worker(id=WorkerId("a"), type="openai", url=url), headers)
    reason = (await room.lost()).reason
    assert "no account for Bearer ***" in reason
    assert "canary" not in reason


async def test_one_failed_probe_is_forgiven_two_in_a_row_are_not(room):
    answers = iter([200, 500, 200, 500, 500, 200])

    async def openai(request):
        return web.json_response(MODELS, status=next(answers, 200))

    await room.follow(openai, "openai")
    await room.reported(times=3)
    assert [type(event) for event in room.events[:4]] == [Reported, Reported, Lost, Reported]
    assert room.losses == [Lost(WorkerId("a"), "it answered /v1/models with status 500", abandon=False)]


async def test_a_refused_connection_needs_no_second_probe(room):
    room.watches.follow(Worker(id=WorkerId("a"), type="ollama", url=nobody_listens()))
    lost = await room.lost()
    assert (lost.reason, lost.abandon) == ("connection refused: nothing listens there", False)


async def test_a_probe_has_a_time_limit_over_all_of_its_answer(room):
    async def trickling(request):
        response = await stream_of(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)

    await room.follow(trickling, "ollama")
    assert (await room.lost()).reason == "no answer to /api/tags within 0.4 s"


async def test_an_endless_answer_is_cut_off(room):
    async def endless(request):
        response = await stream_of(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" " * 65536)

    await room.follow(endless, "openai")
    assert "longer than" in (await room.lost()).reason


async def test_a_redirect_is_not_followed(room):
    async def elsewhere(request):
        assert request.path == "/v1/models"
        raise web.HTTPFound("/evil")

    await room.follow(elsewhere, "openai")
    assert "status 302" in (await room.lost()).reason


async def test_a_worker_that_loads_its_model_is_alive(room):
    async def llama_cpp(request):
        return web.json_response({"error": {"message": "Loading model"}}, status=503)

    await room.follow(llama_cpp, "openai")
    condition = await room.reported(times=2)
    assert (condition.ready, condition.state) == (False, "loading")


async def test_a_worker_that_lists_nothing_offers_the_model_it_is_configured_for(room):
    async def mlx(request):
        return web.Response()

    await room.follow(mlx, "openai", only=frozenset({ModelName("mlx-model")}))
    assert [model.name for model in (await room.reported()).models] == ["mlx-model"]
    assert not (await room.reported()).shares_prefixes


async def test_a_vllm_without_an_agent_shares_prefixes_too(room):
    async def vllm(request):
        return web.json_response({"data": [{"id": "m", "owned_by": "vllm"}]})

    await room.follow(vllm, "openai")
    assert (await room.reported()).shares_prefixes


# What is in memory ...

TAGS = {"models": [{"name": name, "size": 3_000_000_000} for name in ("a:latest", "b:latest")]}


class Ollama:
    """Answers `/api/ps` as it is told, and notes who asks what."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        if request.path == "/api/tags":
            return web.json_response(TAGS)
        status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.json_response({"models": [{"name": "a:latest"}]}, status=status)


def loaded(condition: Condition) -> dict[str, bool]:
    return {offer.name: offer.loaded for offer in condition.models}


async def test_which_models_are_loaded_is_asked_with_each_probe(room):
    ollama = Ollama(200)
    await room.follow(ollama.answer, "ollama")
    condition = await room.reported(times=2)
    assert loaded(condition) == {"a:latest": True, "a": True, "b:latest": False, "b": False}
    assert {offer.load_seconds for offer in condition.models} == {2.0}
    assert ollama.asked[:4] == ["/api/tags", "/api/ps"] * 2


async def test_a_worker_that_does_not_tell_what_is_loaded_is_asked_once_and_used_all_the_same(room):
    ollama = Ollama(404)
    await room.follow(ollama.answer, "ollama")
    condition = await room.reported(times=3)
    assert all(loaded(condition).values())
    assert ollama.asked[:4] == ["/api/tags", "/api/ps", "/api/tags", "/api/tags"]


async def test_a_worker_that_fails_to_tell_it_once_is_asked_again(room):
    await room.follow(Ollama(500, 200).answer, "ollama")
    await room.reported(times=2)
    assert [all(loaded(report.condition).values()) for report in room.reports[:2]] == [True, False]
    assert not room.losses


async def test_a_worker_that_never_answers_it_is_well(room):
    async def ollama(request):
        if request.path == "/api/ps":
            await for_ever()
        return web.json_response(TAGS)

    await room.follow(ollama, "ollama")
    await room.reported(times=2)
    assert not room.losses


# Pages besides ...


class LlamaCpp:
    """Answers as llama.cpp's server does, started with or without its further pages."""

    def __init__(self, *, slots: int = 200, metrics: int = 200) -> None:
        self.statuses = {"/slots": slots, "/metrics": metrics}
        self.asked: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        status = self.statuses.get(request.path, 200)
        match request.path:
            case "/v1/models":
                return web.json_response({"data": [{"id": "m", "owned_by": "llamacpp"}]})
            case "/props":
                return web.json_response({"total_slots": 2})
            case "/slots":
                slot = {"id": 0, "is_processing": True}
                return web.json_response([slot, slot] if status == 200 else {"error": {}}, status=status)
        held = "llamacpp:requests_processing 2\nllamacpp:requests_deferred 3\n"
        return web.Response(text=held if status == 200 else "", status=status)


async def test_a_llama_cpp_tells_slots_and_requests(room):
    await room.follow(LlamaCpp().answer, "llama_cpp")
    condition = await room.reported(times=2)
    assert (condition.slots, condition.running, condition.engine) == (2, 5, "llama.cpp")


async def test_a_page_that_it_was_started_without_is_asked_for_seldom(room):
    llama_cpp = LlamaCpp(metrics=501)
    await room.follow(llama_cpp.answer, "llama_cpp")
    condition = await room.reported(times=4)
    assert (condition.slots, condition.running) == (2, 2)
    assert llama_cpp.asked.count("/metrics") == 1
    assert llama_cpp.asked.count("/slots") >= 3
    assert not room.losses


async def test_a_page_that_is_asked_for_seldom_is_asked_for_again(room):
    room.watches = Watches(
        tell=room.tell,
        session=room.watches._session,
        agents=room.met,
        policy=replace(QUICK, seldom_seconds=0.0),
        chance=lambda: 0.5,
    )
    llama_cpp = LlamaCpp(slots=404)
    await room.follow(llama_cpp.answer, "llama_cpp")
    await room.until(lambda: llama_cpp.asked.count("/slots") >= 2)


async def test_a_page_that_is_slow_costs_the_others_nothing(room):
    llama_cpp = LlamaCpp()

    async def answer(request):
        if request.path == "/slots":
            await for_ever()
        return await llama_cpp.answer(request)

    await room.follow(answer, "llama_cpp")
    assert (await room.reported()).running == 5
    assert not room.losses


async def test_a_wrong_key_needs_no_second_probe(room):
    asked = []

    async def vllm(request):
        asked.append(request.path)
        return web.json_response({"error": "Unauthorized"}, status=401)

    await room.follow(vllm, "vllm")
    lost = await room.lost()
    assert "api_key" in lost.reason
    assert len(asked) == 1


async def test_a_worker_may_lie_below_a_path(room):
    async def openai(request):
        assert request.path == "/llm/v1/models"
        return web.json_response(MODELS)

    url = await room.serve(openai)
    room.watches.follow(Worker(id=WorkerId("a"), type="openai", url=f"{url}/llm/v1"))
    assert [model.name for model in (await room.reported()).models] == ["m"]


# APIs that others run ...


def remote(url: str) -> Worker:
    names = ((ModelName("ours"), ModelName("theirs")),)
    return Worker(id=WorkerId("a"), type="openai", url=url, fallback=True, aliases=names)


async def test_a_remote_api_is_looked_at_seldom_while_it_is_well(room):
    asked = []

    async def openai(request):
        asked.append(request.headers["User-Agent"])
        return web.json_response({"data": []})

    room.watches.follow(remote(await room.serve(openai)))
    assert [model.name for model in (await room.reported()).models] == ["theirs"]
    other = LlamaCpp()
    room.watches.follow(Worker(id=WorkerId("b"), type="llama_cpp", url=await room.serve(other.answer)))
    await room.until(lambda: other.asked.count("/v1/models") >= 5)
    assert asked == ["llm-room-balancer"]


async def test_a_remote_api_that_fails_is_looked_for_sooner(room):
    answers = iter([500, 500, 200])

    async def openai(request):
        return web.json_response({"data": []}, status=next(answers, 200))

    room.watches.follow(remote(await room.serve(openai)))
    await room.reported()
    assert room.losses == [Lost(WorkerId("a"), "it answers with status 500", abandon=False)]
