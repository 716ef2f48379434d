"""Where one worker's answer ends and another's goes on, in the less simple cases (RELIABILITY 5.2)."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.e2e.conftest import OpenRoom, listed
from tests.fakes.engine import CONTINUE_HEADER, LLAMA_CPP, MLX, VLLM, Continues, FakeEngine
from tests.fakes.faults import Fault, Part
from tests.fakes.toxics import Cut, ToxicProxy
from tests.faults.asking import (
    CHAT,
    COMPLETIONS,
    TOKENS,
    Came,
    FirstTry,
    ask,
    asked_for,
    attempts_at,
    broken_once,
    events_of,
    messages_of,
    question,
    rows,
    until,
)

USAGE = {"stream_options": {"include_usage": True}}


async def test_an_answer_may_break_at_any_byte_of_its_end(open_room: OpenRoom):
    """W4 for what comes after the last word: finish_reason, usage and end mark. Nobody has one of them twice,
    and where there are numbers they are all there and those of an answer that did not break."""
    asked = question()
    sent = await events_of(asked, **USAGE)
    end = sum(map(len, sent))
    begin = end - sum(map(len, sent[-3:]))
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two), **PATIENT) as room:
        unbroken = await ask(room, asked, **USAGE)
    for offsets in (range(begin, begin + (end - begin) // 2, 3), range(begin + (end - begin) // 2, end, 3)):
        async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two), **PATIENT) as room:
            for offset in offsets:
                broken_once((one, two), Fault.close(at_byte=offset))
                came = await ask(room, asked, **USAGE)
                came.insist_on_success()
                assert came.usages in ([], unbroken.usages), f"broken at byte {offset} of {end}"


PATIENT = {"breaker_trip_after": 1000}


@pytest.mark.parametrize(
    "fault",
    [
        Fault.sliced(size=1) & Fault.close(at_token=5),
        Fault.sliced(size=7) & Fault.truncate(at_token=5),
        Fault.comments() & Fault.sliced(size=11) & Fault.error_event(at_token=5),
        Fault.comments() & Fault.close(at_token=5),
    ],
    ids=["byte by byte", "in sevens", "with comments, and an error", "with comments"],
)
async def test_how_the_pieces_came_does_not_matter(open_room: OpenRoom, fault: Fault):
    """Rule 2."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), fault)
        for stream in (True, False):
            (await ask(room, stream=stream)).insist_on_success()


@pytest.mark.parametrize(
    "fault",
    [Fault.error_event(at_token=5), Fault.garbage(at_token=5), Fault.truncate(at_token=5), Fault.no_end()],
    ids=["an error", "garbage", "no end", "all but the end"],
)
async def test_all_in_one_piece_with_what_is_wrong_does_not_matter(open_room: OpenRoom, fault: Fault):
    """Rule 2: the network hands over everything at once, good events and the bad one together."""
    async with FakeEngine() as one, FakeEngine() as two:
        async with ToxicProxy(one.host, one.port) as near, ToxicProxy(two.host, two.port) as far:
            proxies = (near, far)
            workers = [row | {"port": proxy.port} for row, proxy in zip(rows(one, two), proxies, strict=True)]
            async with open_room(*workers, health_check_interval=60) as room:
                await room.ready(2)
                broken_once((one, two), fault)
                cuts = [proxy.add(Cut()) for proxy in proxies]
                asked = asyncio.ensure_future(ask(room))
                await until(
                    lambda: any(request.ended for request in asked_for(one) + asked_for(two)), "all is said"
                )
                for proxy, cut in zip(proxies, cuts, strict=True):
                    proxy.remove(cut)
                (await asked).insist_on_success()


KINDS = {"llama.cpp": (LLAMA_CPP, True), "vLLM": (VLLM, True), "mlx_lm": (MLX, False)}


@pytest.mark.parametrize(("options", "in_chat"), KINDS.values(), ids=KINDS)
async def test_engines_without_an_agent_go_on_in_their_own_ways(
    open_room: OpenRoom, options: dict[str, object], in_chat: bool
):
    """5.1: nobody says what they are. What can go on does; what cannot, in chat, ends with an error."""
    async with FakeEngine(**options) as one, FakeEngine(**options) as two:
        async with open_room(listed(one, "a"), listed(two, "b")) as room:
            broken_once((one, two), Fault.close(at_token=5))
            for _ in range(2):
                came = await ask(room)
                came.insist_on_an_honest_end()
                assert came.succeeded is in_chat
                assert came.text == came.reference(TOKENS if in_chat else 5)
            (await ask(room, path=COMPLETIONS)).insist_on_success()
            (await ask(room, stream=False)).insist_on_success()
            await room.idle()


# Agents ...


async def test_an_agent_is_told_to_go_on_by_its_header(open_room: OpenRoom):
    """5.1: the agent knows its engine's way; the balancer says only what is wanted."""
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(FakeEngine(agent_id=name, continues=Continues.BY_HEADER))
            for name in "ab"
        ]
        agents = [listed(engine, engine.agent_id, type="agent") for engine in engines]
        room = await stack.enter_async_context(open_room(*agents))
        await room.ready(2)
        broken_once(engines, Fault.error_event(at_token=5, code="stream_incomplete"))
        came = await ask(room)
        came.insist_on_success()
        assert came.comments == ["continued"]
        told = [request.headers.get(CONTINUE_HEADER) for engine in engines for request in asked_for(engine)]
        assert sorted(told, key=str) == ["1", None]


async def test_an_agent_that_cannot_go_on_after_all_is_passed_over(open_room: OpenRoom):
    """409 `cannot_continue`: the next one is asked, and it is nobody's fault."""
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(FakeEngine(agent_id=name, continues=Continues.BY_HEADER))
            for name in "abc"
        ]
        agents = [listed(engine, engine.agent_id, type="agent") for engine in engines]
        room = await stack.enter_async_context(open_room(*agents))
        await room.ready(3)
        first, going_on = FirstTry(), FirstTry()
        for engine in engines:
            refuses = Fault.status(409, word="cannot_continue")
            engine.always(
                refuses, when=lambda request: CONTINUE_HEADER in request.headers and going_on(request)
            )
            engine.always(Fault.close(at_token=5), when=first)
        (await ask(room)).insist_on_success()
        assert list(attempts_at(engines).values()) == [3]


async def test_an_agent_that_does_not_go_on_is_not_asked_to(open_room: OpenRoom):
    """5.1: MLX in chat. With nobody else there the client has an explicit error."""
    async with FakeEngine(agent_id="a", continues=Continues.NEVER) as one:
        async with FakeEngine(agent_id="b", continues=Continues.NEVER) as two:
            agents = (listed(one, "a", type="agent"), listed(two, "b", type="agent"))
            async with open_room(*agents) as room:
                await room.ready(2)
                broken_once((one, two), Fault.close(at_token=5))
                came = await ask(room)
                assert came.failed_explicitly
                assert came.text == came.reference(5)
                assert list(attempts_at((one, two)).values()) == [1]


# Who may go on ...


async def test_another_quantisation_does_not_go_on(open_room: OpenRoom):
    """Rule 1: two workers serve one name with different models. The other one's rest is another answer's."""
    async with FakeEngine(models=("fake-q4",)) as one, FakeEngine(models=("fake-q8",)) as two:
        workers = [
            row | {"aliases": {"big": model}}
            for row, model in zip(rows(one, two), ("fake-q4", "fake-q8"), strict=True)
        ]
        async with open_room(*workers, max_wait=0.5) as room:
            await room.ready(2)
            broken_once((one, two), Fault.die(at_token=5))
            came = await ask(room, model="big")
            assert came.failed_explicitly
            assert came.text == came.reference(5)
            assert list(attempts_at((one, two)).values()) == [1]


async def test_whoever_is_found_out_while_somebody_leaves_is_found_out_later(open_room: OpenRoom):
    """The client leaves while the other worker is being tried out: nothing stays behind, and the next client
    is served."""
    async with FakeEngine() as one, FakeEngine() as two:
        async with open_room(listed(one, "a"), listed(two, "b")) as room:
            first = FirstTry()
            for engine in (one, two):
                engine.always(Fault.stall())  # what is tried out
                engine.always(Fault.close(at_token=5), when=first)
            asked = asyncio.ensure_future(ask(room))
            await until(lambda: one.stalling + two.stalling == 1, "somebody is tried out")
            asked.cancel()
            await asyncio.wait([asked])
            await one.idle()
            await two.idle()
            await room.idle()
            broken_once((one, two), Fault.close(at_token=5))
            (await ask(room)).insist_on_success()


async def test_a_worker_that_is_found_out_while_it_is_busy_is_not_given_up_for_good(open_room: OpenRoom):
    """It had no room for the questions by which it is found out. The next broken stream goes on there."""
    async with FakeEngine() as one, FakeEngine() as two:
        async with open_room(listed(one, "a"), listed(two, "b")) as room:
            first = FirstTry()
            for engine in (one, two):
                engine.always(Fault.status(503))  # what is tried out
                engine.always(Fault.close(at_token=5), when=first)
            (await ask(room)).insist_on_an_honest_end()
            broken_once((one, two), Fault.close(at_token=5))
            for _ in range(6):
                (await ask(room)).insist_on_success()


async def test_a_stream_that_goes_on_waits_its_turn_where_there_is_no_room(open_room: OpenRoom):
    """The only other worker is full; the client waits with half an answer, and has the rest later."""
    async with FakeEngine() as one, FakeEngine(slots=1) as two:
        full = rows(one, two, max_concurrent_requests=1)
        async with open_room(*full) as room:
            await room.ready(2)
            for engine in (one, two):
                engine.always(Fault.stall(at_token=5))
            coming = [Came(question(), CHAT) for _ in range(2)]
            asked = [asyncio.ensure_future(ask(room, into=came)) for came in coming]
            await one.stalled()
            await two.stalled()
            two.calm()
            one.die()
            await room.until(lambda: room.balancer.snapshot().waiting == 1, "one waits")
            two.resume()
            for came in await asyncio.gather(*asked):
                came.insist_on_success()


async def test_a_client_that_brought_a_beginning_of_its_own_has_it_continued_too(open_room: OpenRoom):
    """The last message is the assistant's: what has come is appended to it."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        came = Came(question(), CHAT)
        begun = came.reference(4)
        first = iter((True, False))
        for engine in (one, two):
            engine.always(Fault.close(at_token=5), when=lambda request: request.is_inference and next(first))
        messages = [*messages_of(came.question), {"role": "assistant", "content": begun}]
        await ask(room, into=came, messages=messages)
        assert begun + came.text == came.reference()
        assert came.succeeded
        assert came.comments == ["continued"]


async def test_parts_of_the_end_may_be_missing(open_room: OpenRoom):
    """Finished, and then neither usage nor end mark: that is no reason to ask anybody else."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), Fault(omits=(Part.USAGE, Part.DONE)))
        came = await ask(room, **USAGE)
        came.insist_on_success()
        assert came.usages == []
        assert list(attempts_at((one, two)).values()) == [1]
