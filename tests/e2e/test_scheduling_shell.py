"""What the shell does with each command of a dispatcher, over real HTTP. The dispatcher is a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from balancer.core.dispatcher import Snapshot
from balancer.core.model import (
    Abandon,
    Arrived,
    Ask,
    Began,
    Candidate,
    Choice,
    Command,
    Ended,
    Endpoint,
    Event,
    Grant,
    Loading,
    Lost,
    ModelName,
    Probe,
    Refusal,
    Refuse,
    Served,
    ServiceClass,
    Standing,
    Tick,
    Ticket,
    Verdict,
    Worker,
    WorkerId,
)
from balancer.core.retry import RetryPolicy
from balancer.dialects.openai import parse
from balancer.front import Front, FrontPolicy
from balancer.inference import Inference, InferencePolicy
from balancer.journey import Journey, JourneyPolicy
from balancer.leases import Leases
from balancer.metrics import Metrics
from balancer.relay import Relay
from balancer.upstream import Address, TimeoutPolicy, Upstream, Way
from tests.fakes.engine import FakeEngine
from tests.fakes.engine import Outcome as Seen
from tests.fakes.faults import Fault
from tests.fakes.speech import reference_text

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name some trees. " * 20},
    {"role": "assistant", "content": "Oak."},
    {"role": "user", "content": "And now?"},
]
TEXT = reference_text(MESSAGES, 16)
WAIT_SECONDS = 20.0

Reaction = Callable[[Event], Sequence[Command]]


@dataclass
class Script:
    """A dispatcher that does what a test says, and remembers what it was told."""

    react: Reaction
    told: list[Event] = field(default_factory=list)

    def handle(self, event: Event, now: float) -> list[Command]:
        self.told.append(event)
        return list(self.react(event))

    def serves(self, model: ModelName) -> bool:
        return True

    def is_at_work(self, worker_id: WorkerId, now: float) -> bool:
        return False

    def standing(self, ticket: Ticket, now: float) -> Standing | None:
        return None

    def loading(self, ticket: Ticket, now: float) -> Loading | None:
        return None

    def snapshot(self, now: float) -> Snapshot:
        return Snapshot(workers=(), waiting=0, waiting_batch=0, running=0, models={})

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.told if isinstance(event, kind)]

    @property
    def asks(self) -> list[Ask]:
        return [event.ask for event in self.of(Arrived)]

    @property
    def verdicts(self) -> dict[int, Verdict]:
        """By ticket; fails where one has ended twice."""
        ended = self.of(Ended)
        assert len({event.ticket for event in ended}) == len(ended), "a ticket has ended twice"
        return {event.ticket: event.verdict for event in ended}


@dataclass
class Stage:
    """The whole shell around a script."""

    script: Script
    leases: Leases
    journey: Journey
    http: aiohttp.ClientSession
    url: str
    served: list[Served]
    metrics: Metrics

    async def post(
        self, path: str = "/v1/chat/completions", headers: dict[str, str] | None = None, **more: Any
    ) -> tuple[int, dict[str, str], bytes]:
        body = {"model": "m", "messages": MESSAGES} | more
        async with self.http.post(self.url + path, json=body, headers=headers) as response:
            return response.status, dict(response.headers), await response.read()

    async def text(self, **more: Any) -> str:
        status, _, body = await self.post(**more)
        assert status == 200, body
        return json.loads(body)["choices"][0]["message"]["content"]

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not holds():
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise TimeoutError(f"not within {WAIT_SECONDS:g} s: {what}; {self.script.told}") from None


async def nobody_is_met(worker: Worker, refused: Way | None) -> Way:
    raise AssertionError("a worker of another type is never met")


@asynccontextmanager
async def stage(react: Reaction) -> AsyncIterator[Stage]:
    clock = asyncio.get_running_loop().time
    script = Script(react)
    served: list[Served] = []
    async with Upstream(TimeoutPolicy()) as upstream, aiohttp.ClientSession() as http:
        relay = Relay(upstream, clock, lambda worker: Way(Address.of(worker.url), {}), nobody_is_met)
        async with Leases(script, clock, relay.probe) as leases:
            metrics = Metrics(leases.snapshot, leases.serves)
            journey = Journey(
                leases,
                relay,
                JourneyPolicy(retry=RetryPolicy(base_seconds=0.0)),
                clock=clock,
                chance=_Fair(),
                observers=[served.append, metrics.observe],
            )
            front = Front(
                Inference(journey, InferencePolicy(), secret=b"secret"),
                FrontPolicy(),
                snapshot=leases.snapshot,
                join=lambda join, address: None,
                metrics=None,
                admin=web.Application(),
            )
            runner = web.AppRunner(front.application(), handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            try:
                yield Stage(script, leases, journey, http, url, served, metrics)
            finally:
                await runner.cleanup()


class _Fair:
    def random(self) -> float:
        return 0.5


def worker(engine: FakeEngine, name: str = "a") -> Worker:
    return Worker(id=WorkerId(name), type="openai", url=engine.url)


def grant(ticket: int, engine: FakeEngine, name: str = "a", **more: Any) -> Grant:
    because = more.pop("because", "")
    candidates = more.pop("candidates", ())
    choice = Choice(worker_id=WorkerId(name), candidates=candidates, because=because)
    return Grant(Ticket(ticket), worker(engine, name), choice, **{"model": ModelName("fake")} | more)


def to(engine: FakeEngine, **more: Any) -> Reaction:
    """Every ask goes to this one."""

    def react(event: Event) -> list[Command]:
        return [grant(event.ticket, engine, **more)] if isinstance(event, Arrived) else []

    return react


# An ask says what routing needs


async def test_an_ask_says_who_asks_for_what():
    async with FakeEngine() as engine, stage(to(engine)) as on:
        await on.text(max_completion_tokens=7, max_tokens=9)
        await on.post(
            headers={"X-Priority": "batch", "Authorization": "Bearer sk-1"}, stream=True, max_tokens=9
        )
        await on.text(headers={"Authorization": "Bearer sk-1"})
        await on.text(headers={"Authorization": "Bearer sk-2"})
        plain, batch, same, other = on.script.asks
        assert (plain.service_class, batch.service_class) == (ServiceClass.INTERACTIVE, ServiceClass.BATCH)
        assert (plain.max_output, batch.max_output, same.max_output) == (7, 9, None)
        assert (plain.replayable, batch.replayable) == (True, False)
        assert plain.client == "127.0.0.1"
        assert batch.client == same.client
        assert len({plain.client, same.client, other.client}) == 3
        assert "sk-1" not in batch.client
        assert plain.prompt == other.prompt
        assert plain.prompt.chars > 300
        assert plain.prompt.continues is not None
        assert batch.deadline - plain.deadline > 3600


# Names


async def test_a_worker_is_asked_by_its_own_name_for_the_model():
    async with FakeEngine(models=("theirs",)) as engine:
        async with stage(to(engine, model=ModelName("theirs"))) as on:
            for stream in (False, True):
                status, headers, body = await on.post(stream=stream)
                assert (status, headers["X-Balancer-Model"]) == (200, "theirs")
                assert b'"model":"m"' in body
                assert b"theirs" not in body
            assert {request.body["model"] for request in engine.requests} == {"theirs"}


async def test_without_such_a_name_it_is_asked_by_the_clients():
    async with FakeEngine(models=("m",)) as engine, stage(to(engine, model=None)) as on:
        _, headers, _ = await on.post()
        assert headers["X-Balancer-Model"] == "m"


async def test_an_answer_says_why_it_came_from_there():
    candidate = Candidate(
        worker_id=WorkerId("a"), scores={}, weight=1.0, expected_seconds=1.25, cached_tokens=300
    )
    async with FakeEngine() as engine:
        async with stage(to(engine, candidates=(candidate,), because="it has the paper")) as on:
            _, headers, _ = await on.post()
        assert headers["X-Balancer-Reason"] == (
            "it has the paper; picked with a chance of 100% among 1, expected to cost 1.25 s, "
            "taken to remember 300 tokens of the prompt"
        )
        async with stage(to(engine, because="a copy")) as on:
            _, headers, _ = await on.post()
        assert headers["X-Balancer-Reason"] == "a copy"


# How an answer grows


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_first_token_is_told_once_and_then_how_the_answer_grows(stream: bool):
    async with FakeEngine() as engine, stage(to(engine)) as on:
        engine.script(Fault.stall(at_token=0) & Fault.stall(at_token=3))
        asked = asyncio.ensure_future(on.post(stream=stream))
        await engine.stalled()
        on.leases.tick()
        assert on.script.told[-1] == Tick()
        assert not on.script.of(Began)
        engine.resume()
        await on.until(lambda: on.script.of(Began) != [], "the first token is told")

        def three_are_told() -> bool:
            on.leases.tick()
            return any(tick.received == {Ticket(1): 3} for tick in on.script.of(Tick))

        await on.until(three_are_told, "three tokens are told")
        on.leases.tick()
        assert on.script.told[-1] == Tick()
        engine.resume()
        assert (await asked)[0] == 200
        assert on.script.of(Began) == [Began(Ticket(1))]
        (ended,) = on.script.of(Ended)
        assert ended.measures.output_tokens == 16
        on.leases.tick()
        assert on.script.told[-1] == Tick()


async def test_tokens_that_an_engine_remembered_are_measured_and_counted():
    usage = {"prompt_tokens": 90, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 64}}
    whole = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": usage}
    async with FakeEngine() as engine, stage(to(engine)) as on:
        engine.script(Fault.reply_with(json.dumps(whole).encode()))
        assert await on.text() == "x"
        (ended,) = on.script.of(Ended)
        assert (ended.measures.prompt_tokens, ended.measures.cached_tokens) == (90, 64)
        page = on.metrics.render().decode()
        assert 'balancer_prompt_cached_tokens_total{model="m",worker="a"} 64.0' in page
        assert 'balancer_tokens_total{direction="prompt",model="m",worker="a"} 90.0' in page


async def test_nobody_claims_to_have_seen_the_first_token_of_an_answer_in_one_piece():
    whole = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    async with FakeEngine() as engine, stage(to(engine)) as on:
        engine.script(Fault.reply_with(json.dumps(whole).encode()))
        await on.text()
        await on.post("/v1/embeddings", input="x")
        generated, embedded = on.script.of(Ended)
        assert generated.measures.first_byte is None
        assert embedded.measures.first_byte is not None
        assert on.script.of(Began) == [Began(Ticket(2))]


# Reading ahead


def warm_at_first(engine: FakeEngine, *chars: int) -> Reaction:
    """The first asks that come are granted a part, the following the whole."""
    parts = list(chars)

    def react(event: Event) -> list[Command]:
        if not isinstance(event, Arrived):
            return []
        return [grant(event.ticket, engine, warm_chars=parts.pop(0) if parts else None)]

    return react


async def test_a_part_is_read_ahead_and_then_the_request_is_asked():
    async with FakeEngine() as engine, stage(warm_at_first(engine, 50, 100)) as on:
        assert await on.text(max_tokens=16) == TEXT
        first, second, whole = engine.requests
        assert [len(request.body["messages"]) for request in engine.requests] == [2, 2, 4]
        assert first.body["max_tokens"] == second.body["max_tokens"] == 1
        assert whole.body["max_tokens"] == 16
        for earlier, later in ((first, second), (second, whole)):
            assert earlier.body["messages"][0] == MESSAGES[0]
            shorter, longer = (request.body["messages"][1]["content"] for request in (earlier, later))
            assert len(shorter) < len(longer)
            assert longer.startswith(shorter)
        assert on.script.verdicts == {1: Verdict.GOOD, 2: Verdict.GOOD, 3: Verdict.GOOD}
        assert [ask.admitted for ask in on.script.asks] == [False, True, True]
        assert len({ask.arrived for ask in on.script.asks}) == 1
        (served,) = on.served
        assert (served.warm_ups, len(served.attempts), served.status) == (2, 1, 200)
        assert 'balancer_warm_ups_total{model="m"} 2.0' in on.metrics.render().decode()


async def test_what_is_read_ahead_for_a_stream_does_not_reach_its_client():
    async with FakeEngine() as engine, stage(warm_at_first(engine, 50)) as on:
        _, headers, body = await on.post(stream=True)
        events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == TEXT
        assert headers["X-Balancer-Attempts"] == "1"


async def test_to_fail_at_a_part_is_a_failed_attempt():
    async with FakeEngine() as engine, stage(warm_at_first(engine, 50)) as on:
        engine.script(Fault.status(500))
        assert await on.text() == TEXT
        assert on.script.verdicts == {1: Verdict.BAD, 2: Verdict.GOOD}
        assert on.script.asks[1].needs.avoid == {"a"}
        (served,) = on.served
        assert [attempt.cause for attempt in served.attempts] == ["erred", None]
        assert served.warm_ups == 0


async def test_an_engine_that_does_not_take_a_part_gets_the_whole_in_the_same_slot():
    async with FakeEngine() as engine, stage(warm_at_first(engine, 50)) as on:
        engine.script(Fault.status(400, "no user query found"))
        assert await on.text() == TEXT
        assert on.script.verdicts == {1: Verdict.GOOD}
        (served,) = on.served
        assert ([attempt.cause for attempt in served.attempts], served.warm_ups) == ([None], 0)


async def test_a_client_that_leaves_while_a_part_is_read_frees_the_worker():
    async with FakeEngine() as engine, stage(warm_at_first(engine, 50)) as on:
        engine.script(Fault.stall(at_token=0))
        asked = asyncio.ensure_future(on.post())
        await engine.stalled()
        asked.cancel()
        await on.until(lambda: on.script.verdicts == {1: Verdict.UNKNOWN}, "the slot is given back")
        await engine.idle()


# Copies

COPY = Ticket(-1)


@dataclass
class Two:
    """Asks go to `a`; a tick gives a copy of the first on `b`."""

    a: FakeEngine
    b: FakeEngine
    copied: bool = False

    def __call__(self, event: Event) -> list[Command]:
        if isinstance(event, Arrived):
            return [grant(event.ticket, self.a)]
        if isinstance(event, Tick) and not self.copied:
            self.copied = True
            return [grant(COPY, self.b, "b", copy_of=Ticket(1), because="a copy")]
        return []


async def test_the_first_answer_of_two_counts_and_the_other_is_stopped():
    async with FakeEngine() as slow, FakeEngine() as quick, stage(Two(slow, quick)) as on:
        slow.script(Fault.stall(at_token=2))
        asked = asyncio.ensure_future(on.post())
        await slow.stalled()
        on.leases.tick()
        status, headers, body = await asked
        assert status == 200
        assert json.loads(body)["choices"][0]["message"]["content"] == TEXT
        assert (headers["X-Balancer-Worker"], headers["X-Balancer-Attempts"]) == ("b", "2")
        assert headers["X-Balancer-Reason"] == "a copy"
        assert on.script.verdicts == {1: Verdict.UNKNOWN, COPY: Verdict.GOOD}
        await slow.idle()
        assert slow.requests[0].outcome is Seen.CLIENT_LEFT
        (served,) = on.served
        assert {(attempt.worker_id, attempt.cause) for attempt in served.attempts} == {
            ("a", "outrun"),
            ("b", None),
        }


async def test_a_copy_that_is_slower_than_the_original_is_stopped():
    async with FakeEngine() as original, FakeEngine() as copy, stage(Two(original, copy)) as on:
        original.script(Fault.stall(at_token=2))
        copy.script(Fault.stall(at_token=2))
        asked = asyncio.ensure_future(on.post())
        await original.stalled()
        on.leases.tick()
        await copy.stalled()
        original.resume()
        _, headers, _ = await asked
        assert headers["X-Balancer-Worker"] == "a"
        assert on.script.verdicts == {1: Verdict.GOOD, COPY: Verdict.UNKNOWN}
        await copy.idle()


@pytest.mark.parametrize("failing", ["original", "copy"])
async def test_one_of_two_that_fails_leaves_it_to_the_other(failing: str):
    async with FakeEngine() as original, FakeEngine() as copy, stage(Two(original, copy)) as on:
        bad, good = (original, copy) if failing == "original" else (copy, original)
        stalls = Fault.stall(at_token=2)
        bad.script(stalls & Fault.close(at_token=2))
        good.script(stalls)
        asked = asyncio.ensure_future(on.post())
        await original.stalled()
        on.leases.tick()
        await copy.stalled()
        bad.resume()
        ticket = 1 if bad is original else COPY
        await on.until(lambda: on.script.verdicts == {ticket: Verdict.BAD}, "its slot is free at once")
        assert not asked.done()
        good.resume()
        assert (await asked)[0] == 200
        assert on.script.verdicts == {ticket: Verdict.BAD, (1 if ticket == COPY else COPY): Verdict.GOOD}
        assert len(on.script.asks) == 1


async def test_when_both_have_failed_there_is_a_retry_that_avoids_both():
    async with FakeEngine() as original, FakeEngine() as copy, stage(Two(original, copy)) as on:
        for engine in (original, copy):
            engine.script(Fault.stall(at_token=2) & Fault.close(at_token=2))
        asked = asyncio.ensure_future(on.post())
        await original.stalled()
        on.leases.tick()
        await copy.stalled()
        copy.resume()
        await on.until(lambda: COPY in on.script.verdicts, "the copy has failed")
        original.resume()
        assert (await asked)[0] == 200
        assert on.script.asks[1].needs.avoid == {"a", "b"}
        assert on.script.verdicts == {1: Verdict.BAD, COPY: Verdict.BAD, 2: Verdict.GOOD}


@pytest.mark.parametrize("begun", [False, True], ids=["as the copy starts", "in the middle of both"])
async def test_a_client_that_leaves_ends_both(begun: bool):
    async with FakeEngine() as original, FakeEngine() as copy, stage(Two(original, copy)) as on:
        for engine in (original, copy):
            engine.script(Fault.stall(at_token=2))
        asked = asyncio.ensure_future(on.post())
        await original.stalled()
        on.leases.tick()
        if begun:
            await copy.stalled()
        asked.cancel()
        await on.until(lambda: len(on.script.verdicts) == 2, "both are given back")
        assert set(on.script.verdicts.values()) == {Verdict.UNKNOWN}
        await original.idle()
        await copy.idle()
        (served,) = on.served
        assert served.status == 499
        assert {attempt.cause for attempt in served.attempts} == {"client_left"}


async def test_a_copy_that_is_cancelled_before_it_starts_ends_too():
    async with FakeEngine() as original, FakeEngine() as copy, stage(Two(original, copy)) as on:
        original.script(Fault.stall(at_token=2))
        request = parse(Endpoint.CHAT, json.dumps({"model": "m", "messages": MESSAGES}).encode())
        story = on.journey.begin("r", "", {})
        task = asyncio.ensure_future(on.journey.serve(request, story, None))
        await original.stalled()
        task.cancel()
        on.leases.tick()  # in the same step of the loop: the race ends before the copy's task runs a line
        with pytest.raises(asyncio.CancelledError):
            await task
        assert on.script.verdicts == {1: Verdict.UNKNOWN, COPY: Verdict.UNKNOWN}
        assert not copy.requests


async def test_the_worker_of_the_original_may_be_lost_while_the_copy_runs():
    async with FakeEngine() as original, FakeEngine() as copy:
        two = Two(original, copy)

        def react(event: Event) -> Sequence[Command]:
            return [Abandon(Ticket(1), "no report")] if isinstance(event, Lost) else two(event)

        async with stage(react) as on:
            for engine in (original, copy):
                engine.script(Fault.stall(at_token=2))
            asked = asyncio.ensure_future(on.post())
            await original.stalled()
            on.leases.tick()
            await copy.stalled()
            on.leases.tell(Lost(WorkerId("a"), "no report", abandon=True))
            await on.until(lambda: on.script.verdicts == {1: Verdict.BAD}, "the original has ended")
            copy.resume()
            assert (await asked)[1]["X-Balancer-Worker"] == "b"


async def test_who_has_no_use_for_a_copy_ends_it_at_once():
    async with FakeEngine() as original, FakeEngine() as copy, stage(Two(original, copy)) as on:
        original.script(Fault.stall(at_token=2))
        streaming = asyncio.ensure_future(on.post(stream=True))
        await original.stalled()
        on.leases.tick()
        assert on.script.told[-1] == Ended(COPY)
        original.resume()
        assert (await streaming)[0] == 200
        on.script.react = Two(original, copy)
        on.leases.tick()
        assert on.script.told[-1] == Ended(COPY)  # of an ask that is gone
        assert not copy.requests


# Probes


@pytest.mark.parametrize("endpoint", list(Endpoint))
async def test_a_probe_has_a_worker_generate(endpoint: Endpoint):
    async with FakeEngine(models=("theirs",)) as engine:

        def react(event: Event) -> list[Command]:
            probe = Probe(
                Ticket(-1), worker(engine), endpoint, ModelName("theirs"), prompt_tokens=50, output_tokens=4
            )
            return [probe] if isinstance(event, Tick) else []

        async with stage(react) as on:
            on.leases.tick()
            await on.until(lambda: on.script.verdicts == {-1: Verdict.GOOD}, "the probe has ended")
            (ended,) = on.script.of(Ended)
            (request,) = engine.requests
            assert request.path == endpoint.value
            assert request.body["model"] == "theirs"
            assert 50 <= ended.measures.prompt_tokens < 60
            if endpoint is not Endpoint.EMBEDDINGS:
                assert ended.measures.output_tokens == 4


async def test_no_two_probes_have_the_same_text():
    async with FakeEngine() as engine:

        def react(event: Event) -> list[Command]:
            probe = Probe(Ticket(-len(engine.requests)), worker(engine), Endpoint.CHAT, ModelName("fake"))
            return [probe] if isinstance(event, Tick) else []

        async with stage(react) as on:
            for count in (1, 2):
                on.leases.tick()
                await on.until(lambda count=count: len(on.script.verdicts) == count, "a probe has ended")
            one, two = (request.body["messages"] for request in engine.requests)
            assert one != two


@pytest.mark.parametrize("fault", [Fault.status(500), Fault.status(503), Fault.close(), Fault.no_end()])
async def test_a_probe_that_fails_says_so(fault: Fault):
    async with FakeEngine() as engine:

        def react(event: Event) -> list[Command]:
            probe = Probe(Ticket(-1), worker(engine), Endpoint.CHAT, ModelName("fake"))
            return [probe] if isinstance(event, Tick) else []

        async with stage(react) as on:
            engine.script(fault)
            on.leases.tick()
            await on.until(lambda: on.script.verdicts == {-1: Verdict.BAD}, "the probe has ended")


async def test_a_probe_ends_with_the_balancer():
    async with FakeEngine() as engine:

        def react(event: Event) -> list[Command]:
            probe = Probe(Ticket(-1), worker(engine), Endpoint.CHAT, ModelName("fake"))
            return [probe] if isinstance(event, Tick | Ended) else []

        async with stage(react) as on:
            engine.script(Fault.stall(at_token=0))
            on.leases.tick()
            await engine.stalled()
        assert on.script.verdicts == {-1: Verdict.UNKNOWN}
        await engine.idle()
        assert len(engine.requests) == 1


# Giving a worker up


@pytest.mark.parametrize(
    ("news", "cause"), [(Tick(), "silent"), (Lost(WorkerId("a"), "no report", abandon=True), "lost")]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_worker_that_is_given_up_costs_no_answer(news: Event, cause: str, stream: bool):
    async with FakeEngine() as engine:

        def react(event: Event) -> list[Command]:
            if isinstance(event, Arrived):
                return [grant(event.ticket, engine)]
            return [Abandon(Ticket(1), "nothing came for 12 s")] if event == news else []

        async with stage(react) as on:
            engine.script(Fault.stall(at_token=0))
            asked = asyncio.ensure_future(on.post(stream=stream))
            await engine.stalled()
            on.leases.tell(news)
            assert (await asked)[0] == 200
            assert on.script.verdicts == {1: Verdict.BAD, 2: Verdict.GOOD}
            assert on.script.asks[1].needs.avoid == {"a"}
            (served,) = on.served
            assert [attempt.cause for attempt in served.attempts] == [cause, None]
            assert served.attempts[0].detail == "nothing came for 12 s"


async def test_a_worker_that_is_lost_before_it_was_asked_is_not_asked():
    async with FakeEngine() as engine:

        def react(event: Event) -> list[Command]:
            if not isinstance(event, Arrived):
                return []
            lost = [Abandon(Ticket(1), "lost at once")] if event.ticket == 1 else []
            return [grant(event.ticket, engine), *lost]

        async with stage(react) as on:
            assert await on.text() == TEXT
            assert len(engine.requests) == 1
            assert on.script.verdicts == {1: Verdict.BAD, 2: Verdict.GOOD}


# Refusals


@pytest.mark.parametrize(
    ("refusal", "status", "words"),
    [
        (Refusal.WOULD_WAIT_TOO_LONG, 429, "would not come within 120 s. Try again in 42 s"),
        (Refusal.QUEUE_FULL, 429, "Try again in 42 s"),
        (Refusal.WAITED_TOO_LONG, 503, "Try again in 42 s"),
        (Refusal.ROOM_EMPTY, 503, "worker-agent run"),
        (Refusal.MODEL_AWAY, 503, "Try again in 42 s"),
    ],
)
async def test_a_refusal_says_when_to_come_back(refusal: Refusal, status: int, words: str):
    def react(event: Event) -> list[Command]:
        if not isinstance(event, Arrived):
            return []
        return [Refuse(ticket=event.ticket, refusal=refusal, retry_after=42.0)]

    async with stage(react) as on:
        answered, headers, body = await on.post()
        assert (answered, headers["Retry-After"]) == (status, "42")
        assert words in json.loads(body)["error"]["message"]
