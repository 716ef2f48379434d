"""Workers that die, hang, refuse, flap and come back, and the network to them (RELIABILITY 7, W1 to W23).

Two workers unless a scene says otherwise. In most of them the first attempt at every request fails, whichever
worker is chosen for it (`FirstTry`): then no scene depends on who is chosen.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from tests.e2e.conftest import OpenRoom, listed
from tests.fakes.engine import (
    Continues,
    EngineProcess,
    FakeEngine,
    Request,
    Spelling,
    engine_process,
)
from tests.fakes.faults import OK, Fault
from tests.fakes.toxics import Cut, ResetPeer, ToxicProxy
from tests.faults.asking import (
    CHAT,
    COMPLETIONS,
    CONTINUES,
    TOKENS,
    Came,
    FirstTry,
    ask,
    ask_many,
    asked_for,
    attempts_at,
    broken_once,
    events_of,
    question,
    question_in,
    rows,
)

PATIENT = {"breaker_trip_after": 1000}
"""For scenes in which more goes wrong than any breaker would stand."""


def row_of(process: EngineProcess, name: str, **more) -> dict:
    host, _, port = process.url.removeprefix("http://").partition(":")
    kind = {"tls": False} if more.get("type") == "agent" else CONTINUES
    return {"id": name, "host": host, "port": int(port), **kind, **more}


# W1 to W3: killed before the head, before the first token, between two tokens


@pytest.mark.parametrize(
    "stall",
    ["stall", "stall:at_token=0", "stall:at_token=5"],
    ids=["before the head", "before the first token", "between tokens"],
)
async def test_a_process_that_is_killed_costs_nobody_an_answer(open_room: OpenRoom, stall: str):
    """W1, W2, W3: SIGKILL of a worker with streams and whole answers on it. Nobody sees it, and every
    character comes once."""
    async with engine_process("--always", stall, "--slots", "20") as doomed:
        async with FakeEngine(slots=40, token_seconds=0.002) as other:
            cap = {"max_concurrent_requests": 20}
            async with open_room(
                row_of(doomed, "doomed", **cap), listed(other, "other", **CONTINUES, **cap)
            ) as room:
                await room.ready(2)
                coming = [Came(question(), CHAT) for _ in range(20)]
                asked = [
                    asyncio.ensure_future(ask(room, into=came, stream=number % 2 == 0))
                    for number, came in enumerate(coming)
                ]
                await room.until(lambda: room.worker("doomed").running >= 4, "some run on the doomed one")
                if stall.endswith("5"):
                    await room.until(lambda: any(words(came) == 5 for came in coming), "five tokens came")
                doomed.process.send_signal(signal.SIGKILL)
                for came in await asyncio.gather(*asked):
                    came.insist_on_success()
                await room.idle()


def about(asked: str) -> Callable[[Request], bool]:
    return lambda request: question_in(request) == asked.strip()


def words(came: Came) -> int:
    return len(came.text.split())


# W3: the ways in which a stream goes on


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("token", [0, 1, 5, 15, 16])
async def test_a_stream_that_breaks_between_two_tokens_goes_on_as_one(
    open_room: OpenRoom, path: str, token: int
):
    """W3: after the first token, in the middle, before the last and after it."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), Fault.close(at_token=token))
        for _ in range(3):
            came = await ask(room, path=path)
            came.insist_on_success()
            assert came.comments.count("continued") == (1 if 0 < token < 16 else 0) or token == 16
        await room.idle()


async def test_a_stream_that_goes_on_has_one_usage_and_it_is_right(open_room: OpenRoom):
    """W3, rule 6: the first prompt's tokens, and the sum of what both said."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        wanted = {"stream_options": {"include_usage": True}}
        asked = question()
        unbroken = await ask(room, asked, **wanted)
        broken_once((one, two), Fault.close(at_token=7))
        came = await ask(room, asked, **wanted)
        came.insist_on_success()
        assert came.comments == ["continued"]
        assert came.usages == unbroken.usages
        assert len(came.usages) == 1


async def test_a_limit_of_tokens_holds_over_both_parts(open_room: OpenRoom):
    """W3, rule 3: what is left of max_tokens is what the second worker may say."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        for token in (3, 7, 8):
            broken_once((one, two), Fault.close(at_token=token))
            came = await ask(room, max_tokens=8)
            assert (came.text, came.finishes, came.done) == (came.reference(8), ["length"], 1)
            assert came.errors == []


@pytest.mark.parametrize("swallows", [False, True], ids=["and comes again", "and does not come again"])
@pytest.mark.parametrize("spelling", list(Spelling))
async def test_the_space_at_the_seam_is_there_once_where_a_template_trims_it(
    open_room: OpenRoom, spelling: Spelling, swallows: bool
):
    """W3, rule 4. Where tokens begin with their space, no text ends with one, and nothing is swallowed."""
    ways = {"trims": True, "spelling": spelling, "swallows_space": swallows}
    if spelling is Spelling.SPACE_BEFORE:
        ways["swallows_space"] = False
    async with FakeEngine(**ways) as one, FakeEngine(**ways) as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), Fault.close(at_token=5))
        for _ in range(3):
            (await ask(room)).insist_on_success()


async def test_a_stream_may_break_twice(open_room: OpenRoom):
    """W3: up to two migrations (rule 1)."""
    async with FakeEngine() as one, FakeEngine() as two, FakeEngine() as three:
        async with open_room(*rows(one, two, three), **PATIENT) as room:
            first, second = FirstTry(), FirstTry()
            for engine in (one, two, three):
                engine.always(
                    Fault.close(at_token=4), when=lambda request: not first(request) and second(request)
                )
                engine.always(Fault.close(at_token=5), when=first)
            came = await ask(room)
            came.insist_on_success()
            assert came.comments == ["continued"] * 2


@pytest.mark.parametrize("way", list(Continues))
async def test_of_a_worker_of_which_nobody_says_whether_it_goes_on_it_is_found_out(
    open_room: OpenRoom, way: Continues
):
    """W3: one that takes the beginning for a turn that is over gives another text, or the same once more.
    What it says may not be joined to what came: the end is the right text or an error, never a mixture."""
    async with FakeEngine(continues=way) as one, FakeEngine(continues=way) as two:
        async with open_room(listed(one, "a"), listed(two, "b")) as room:
            broken_once((one, two), Fault.close(at_token=5))
            came = await ask(room)
            came.insist_on_an_honest_end()
            assert came.succeeded is (way in (Continues.ALWAYS, Continues.BY_FLAGS))
            (await ask(room, path=COMPLETIONS)).insist_on_success()  # a completion goes on anywhere


async def test_a_worker_that_the_config_calls_unable_is_not_asked(open_room: OpenRoom):
    """W3: `"continues": false`, whatever it could do."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two, continues=False)) as room:
        broken_once((one, two), Fault.close(at_token=5))
        came = await ask(room)
        came.insist_on_an_honest_end()
        assert came.failed_explicitly
        assert came.text == came.reference(5)


# W4: torn in the middle of one event, at every byte


@pytest.mark.parametrize("how", [Fault.close, Fault.reset], ids=["closed", "reset"])
async def test_an_event_may_be_torn_at_any_byte(open_room: OpenRoom, how):
    """W4: every offset of one event, and of the blank line after it: the torn event never reaches the client,
    and its token comes from the other worker."""
    asked = question()
    begin, end = await place_of_an_event(asked, token=5)
    for offsets in batched(range(begin, end + 1), 60):  # retries have a budget: a new room for each
        async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two), **PATIENT) as room:
            for offset in offsets:
                # A reset throws away what was not read yet, so it is let come first.
                broken_once((one, two), Fault.stall(at_byte=offset, seconds=0.01) & how(at_byte=offset))
                came = await ask(room, asked)
                came.insist_on_success()
                assert came.comments == ["continued"] or (came.comments == [] and how == Fault.reset)
            await room.idle()


async def place_of_an_event(asked: str, token: int) -> tuple[int, int]:
    """The bytes of the body of this answer between which the event of this token lies."""
    events = await events_of(asked)  # the role comes first
    begin = sum(map(len, events[:token]))
    return begin, begin + len(events[token])


def batched(numbers: range, size: int) -> list[range]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


# W5: what cannot go on


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "object"}},
            }
        },
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"n": 2},
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.parametrize(
    "fault", [Fault.close(at_token=5), Fault.truncate(at_token=5)], ids=["cut", "truncated"]
)
async def test_a_stream_that_cannot_go_on_ends_with_an_error(open_room: OpenRoom, more: dict, fault: Fault):
    """W5: tools, a prescribed form, probabilities, several choices: an error event and no `[DONE]`."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        broken_once((one, two), fault)
        came = await ask(room, **more)
        assert came.failed_explicitly
        assert came.text == came.reference(5)
        assert came.after_the_end == 0
        assert not came.broken
        whole = await ask(room, stream=False, **more)  # nothing of it was sent, so it can start over
        whole.insist_on_success()
        await room.idle()


async def test_a_stream_that_broke_with_nobody_left_to_go_on_ends_with_an_error(open_room: OpenRoom):
    """W5 and rule 9: one worker, which is gone."""
    async with FakeEngine() as one, open_room(*rows(one), max_wait=0.5) as room:
        one.script(Fault.die(at_token=5))
        came = await ask(room)
        assert came.failed_explicitly
        assert came.text == came.reference(5)


async def test_a_room_can_be_told_not_to_continue(open_room: OpenRoom):
    """W5: `continue_streams: false`."""
    async with FakeEngine() as one, FakeEngine() as two:
        async with open_room(*rows(one, two), continue_streams=False) as room:
            broken_once((one, two), Fault.close(at_token=5))
            came = await ask(room)
            assert came.failed_explicitly
            assert came.text == came.reference(5)


# W6, W7, W9: the ways in which a stream breaks

BREAKS = {
    "it closes": Fault.close(at_token=5),
    "it resets": Fault.reset(at_token=5),
    "it ends as if that were all": Fault.truncate(at_token=5),
    "it reports an error": Fault.error_event(at_token=5),
    "it reports an error and says that it is done": Fault.error_event(at_token=5, then_done=True),
    "its agent reports the death of the engine": Fault.error_event(at_token=5, code="engine_died"),
    "its agent reports an incomplete stream": Fault.error_event(at_token=5, code="stream_incomplete"),
    "it sends what is no JSON": Fault.garbage(at_token=5),
    "it hangs": Fault.stall(at_token=5),
    "it hangs with signs of life, and then closes": Fault.stall(
        at_token=5, seconds=0.05, comment_seconds=0.01
    )
    & Fault.close(at_token=5),
}


@pytest.mark.parametrize("fault", BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("http_1_0", [False, True], ids=["HTTP 1.1", "HTTP 1.0"])
async def test_however_a_stream_breaks_it_goes_on(open_room: OpenRoom, fault: Fault, http_1_0: bool):
    """W6 (a body that ends with its connection, where a death looks like an end), W7 (RST), W9 (a hang)."""
    async with FakeEngine(http_1_0=http_1_0) as one, FakeEngine(http_1_0=http_1_0) as two:
        async with open_room(*rows(one, two), read_timeout=0.3) as room:
            broken_once((one, two), fault)
            for stream in (True, False):
                came = await ask(room, stream=stream)
                came.insist_on_success()
            await one.idle()  # whoever hung was told to stop
            await two.idle()
            await room.idle()


async def test_a_reset_on_the_way_is_as_good_as_one_of_the_worker(open_room: OpenRoom):
    """W7: by the network, with many streams on the connection's machine at once."""
    async with FakeEngine(slots=10) as one, FakeEngine(slots=20, token_seconds=0.002) as two:
        async with ToxicProxy(one.host, one.port) as proxy:
            near = listed(one, "near", **CONTINUES, max_concurrent_requests=10) | {"port": proxy.port}
            far = listed(two, "far", **CONTINUES, max_concurrent_requests=20)
            async with open_room(near, far) as room:
                await room.ready(2)
                one.always(Fault.stall(at_token=5))
                asked = [asyncio.ensure_future(ask(room)) for _ in range(16)]
                await one.stalled(3)
                proxy.add(ResetPeer())
                for came in await asyncio.gather(*asked):
                    came.insist_on_success()
                await one.idle()


# W8: frozen


async def test_a_frozen_worker_is_given_up_and_what_it_says_later_is_not_heard(open_room: OpenRoom):
    """W8: SIGSTOP of an agent whose connections stay open. Its silence is noticed without a word of TCP, its
    streams go on elsewhere, and what it writes after SIGCONT reaches nobody."""
    async with engine_process("--agent-id", "frozen", "--token-seconds", "0.05", "--slots", "8") as frozen:
        async with FakeEngine(slots=20) as other:
            rows_ = (row_of(frozen, "frozen", type="agent"), listed(other, "other", **CONTINUES))
            async with open_room(*rows_, max_wait=60) as room:
                await room.ready(2)
                other.always(Fault.stall(at_token=15))
                coming = [Came(question(), CHAT) for _ in range(8)]
                asked = [asyncio.ensure_future(ask(room, into=came)) for came in coming]
                await room.until(lambda: room.worker("frozen").running >= 2, "some run on the frozen one")
                await room.until(lambda: sum(came.begun.is_set() for came in coming) >= 2, "some have begun")
                frozen.process.send_signal(signal.SIGSTOP)
                try:
                    await room.until(lambda: room.worker("frozen").state == "lost", "the frozen one is lost")
                    other.always(OK)
                    other.resume()
                    for came in await asyncio.gather(*asked):
                        came.insist_on_success()
                finally:
                    frozen.process.send_signal(signal.SIGCONT)
                await room.until(lambda: room.worker("frozen").state == "ready", "it is back")
                (await ask(room)).insist_on_success()
                await room.idle()


async def test_a_cut_that_heals_soon_enough_costs_nothing(open_room: OpenRoom):
    """W14 in small: an agent's cable is out for less than its silence may last; nothing is lost or moved."""
    async with FakeEngine(agent_id="a") as one, ToxicProxy(one.host, one.port) as proxy:
        row = {"id": "a", "host": proxy.host, "port": proxy.port, "type": "agent", "tls": False}
        async with open_room(row) as room:
            await room.ready()
            one.script(Fault.stall(at_token=5))
            asked = asyncio.ensure_future(ask(room))
            await one.stalled()
            cut = proxy.add(Cut())
            one.resume()
            await one.idle()
            proxy.remove(cut)
            came = await asked
            came.insist_on_success()
            assert came.comments == []
            assert len(asked_for(one)) == 1


# W16: connections that were closed as we wrote


async def test_a_connection_that_is_closed_as_we_write_is_no_failure(open_room: OpenRoom):
    """W16: whatever was kept from an earlier request closes when the next one comes. One free retry on a
    fresh one: nobody sees it, and it is not the worker's fault."""
    async with FakeEngine(agent_id="a") as one:
        # The balancer's own trial comes first, on the connection on which it met the agent: let it pass.
        one.always(Fault.close(), when=lambda request: question_in(request) is not None and request.reused)
        async with open_room(listed(one, "a", type="agent"), max_retries=0) as room:
            await room.ready()
            for number in range(50):
                (await ask(room, stream=number % 2 == 0)).insist_on_success()
            assert any(request.reused for request in asked_for(one)), "no connection was ever kept"
            assert room.worker("a").success_rate == 1.0
            await room.idle()


# W17 to W20: those that refuse


@pytest.mark.parametrize("status", [429, 503])
async def test_a_worker_that_asks_for_rest_has_it(open_room: OpenRoom, status: int):
    """W17: the request goes elsewhere, and none comes before the time that it named."""
    async with FakeEngine() as busy, FakeEngine() as other, open_room(*rows(busy, other)) as room:
        busy.always(Fault.status(status, retry_after="30"))
        for _ in range(20):
            (await ask(room, stream=False)).insist_on_success()
        assert len(asked_for(busy)) <= 1
        (await ask(room)).insist_on_success()
        assert room.worker("a").breaker == "closed"


async def test_who_fails_at_once_does_not_swallow_the_room(open_room: OpenRoom):
    """W18: failing fast looks like being idle. At most 5 of the requests meet it."""
    async with FakeEngine() as hole, FakeEngine(first_token_seconds=0.05, slots=8) as slow:
        async with open_room(*rows(hole, slow, max_concurrent_requests=8), breaker_rest=60) as room:
            hole.always(Fault.status(500))
            for _ in range(5):
                for came in await ask_many(room, 8, stream=False):
                    came.insist_on_success()
            assert len(asked_for(hole)) <= 5 + 8, "8 at once may meet it before the first has failed"
            before = len(asked_for(hole))
            for came in await ask_many(room, 8):
                came.insist_on_success()
            assert len(asked_for(hole)) == before


async def test_with_all_workers_down_people_wait_are_told_and_are_served_again(open_room: OpenRoom):
    """W19."""
    async with FakeEngine() as one, FakeEngine() as two:
        async with open_room(*rows(one, two), max_wait=20, breaker_rest=0.2) as room:
            one.die()
            two.die()
            await room.until(
                lambda: {view.state for view in room.balancer.snapshot().workers} == {"lost"}, "all lost"
            )
            waiting = [asyncio.ensure_future(ask(room, stream=number % 2 == 0)) for number in range(10)]
            await room.until(lambda: room.balancer.snapshot().waiting == 10, "ten wait")
            await two.listen()
            for came in await asyncio.gather(*waiting):
                came.insist_on_success()
        async with FakeEngine() as three, open_room(*rows(three), max_wait=0.3) as room:
            three.die()
            came = await ask(room, stream=False)
            assert came.status == 503
            assert int(came.headers["Retry-After"]) >= 1


async def test_the_only_worker_is_never_left_alone_however_flaky(open_room: OpenRoom):
    """W20: 30 % of what it does fails (seeded). To refuse everybody would be worse, so every request is
    tried; a breaker that opened would hold them for its 60 s, far over what they may wait."""
    dice = random.Random(20)
    async with FakeEngine() as flaky, open_room(*rows(flaky), max_wait=2, breaker_rest=60) as room:
        for _ in range(40):
            while flaky_for_long(script := dice.choices((Fault.status(500), OK), (0.3, 0.7), k=4)):
                pass
            flaky.script(*script[: script.index(OK) + 1])
            (await ask(room, stream=False)).insist_on_success()
        flaky.script(*[Fault.status(500)] * 4)  # more in a row than any breaker stands
        assert (await ask(room, stream=False)).status == 502
        (await ask(room, stream=False)).insist_on_success()


def flaky_for_long(script: list[Fault]) -> bool:
    return OK not in script


# W21 to W23: those that come back, come and go, or crawl


async def test_who_comes_back_to_a_long_line_is_not_trampled(open_room: OpenRoom):
    """W21: 90 wait, and never are there more on the worker than it has slots; it does not fail again."""
    async with FakeEngine(slots=4, token_seconds=0.0005) as engine:
        async with open_room(*rows(engine, max_concurrent_requests=4), max_wait=60) as room:
            (await ask(room)).insist_on_success()
            engine.die()
            await room.until(lambda: room.worker("a").state == "lost", "it is lost")
            waiting = [asyncio.ensure_future(ask(room, stream=False)) for _ in range(90)]
            await room.until(lambda: room.balancer.snapshot().waiting == 90, "90 wait")
            engine.peak = 0
            await engine.listen()
            for came in await asyncio.gather(*waiting):
                came.insist_on_success()
            assert engine.peak <= 4
            assert room.worker("a").success_rate == 1.0


async def test_a_worker_that_comes_and_goes_costs_nobody_an_answer(open_room: OpenRoom):
    """W22: it dies under its requests five times, and is back at once."""
    async with FakeEngine(token_seconds=0.001, slots=8) as flapping, FakeEngine(slots=20) as steady:
        async with open_room(*rows(flapping, steady), breaker_rest=0.2) as room:
            for _ in range(5):
                asked = [asyncio.ensure_future(ask(room, stream=number % 2 == 0)) for number in range(12)]
                await room.until(lambda: room.balancer.snapshot().running > 0, "some run")
                flapping.die()
                for came in await asyncio.gather(*asked):
                    came.insist_on_success()
                await flapping.listen()
                await room.until(lambda: room.worker("a").state == "ready", "it is back")
            await room.idle()


async def test_a_crawling_worker_gets_little(open_room: OpenRoom):
    """W23: twenty times slower than the other; what the room has learned keeps most away from it."""
    async with FakeEngine(first_token_seconds=0.01) as quick, FakeEngine(first_token_seconds=0.2) as crawling:
        async with open_room(*rows(quick, crawling)) as room:
            for _ in range(20):
                (await ask(room, stream=False)).insist_on_success()
            known = len(asked_for(quick)), len(asked_for(crawling))
            for _ in range(40):
                (await ask(room, stream=False)).insist_on_success()
            assert (len(asked_for(crawling)) - known[1]) * 3 < len(asked_for(quick)) - known[0]


# S3: the request that kills


async def test_a_request_that_kills_engines_is_stopped_after_two_of_them(open_room: OpenRoom):
    """S3: four agents whose engines die of it: two do, then it is answered 502 `request_quarantined`, at once
    when it is asked again; all others are served."""
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(FakeEngine(agent_id=name, tokens=TOKENS)) for name in "abcd"
        ]
        agents = [listed(engine, engine.agent_id, type="agent") for engine in engines]
        room = await stack.enter_async_context(open_room(*agents))
        await room.ready(4)
        poison = question()
        for engine in engines:
            engine.always(Fault.status(502, word="engine_died"), when=about(poison))
        came = await ask(room, poison, stream=False)
        assert (came.status, came.errors[0]["code"]) == (502, "request_quarantined")
        assert sum(attempts_at(engines).values()) == 2
        again = await ask(room, poison)
        assert again.errors[0]["code"] == "request_quarantined"
        assert sum(attempts_at(engines).values()) == 2
        (await ask(room)).insist_on_success()


async def test_a_stream_that_kills_in_the_middle_is_stopped_too(open_room: OpenRoom):
    """S3: the engines die of it after some words; the client has an explicit error."""
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(FakeEngine(agent_id=name, tokens=TOKENS)) for name in "abcd"
        ]
        agents = [listed(engine, engine.agent_id, type="agent") for engine in engines]
        room = await stack.enter_async_context(open_room(*agents))
        await room.ready(4)
        poison = question()
        died = Fault.error_event(at_token=3, code="engine_died")
        for engine in engines:
            engine.always(died, when=about(poison))
        came = await ask(room, poison)
        assert came.failed_explicitly
        assert came.reference().startswith(came.text)
        assert sum(attempts_at(engines).values()) <= 2


# S8: work for nobody


async def test_an_engine_that_works_on_for_nobody_is_not_overrun(open_room: OpenRoom):
    """S8: it does not notice that its client left. What the room sends it must not come on top of that for
    long: at no moment does the engine hold more than its slots and those that it works on in vain."""
    async with FakeEngine(slots=2, notices_leaving=False, shows_slots=True) as deaf:
        async with open_room(listed(deaf, "a", max_concurrent_requests=2)) as room:
            await room.ready()
            deaf.script(Fault.stall(at_token=3), Fault.stall(at_token=3))
            leaving = [asyncio.ensure_future(ask(room)) for _ in range(2)]
            await deaf.stalled(2)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            await room.idle()
            staying = [asyncio.ensure_future(ask(room)) for _ in range(4)]
            await deaf.until(lambda: deaf.waiting == 2)
            assert deaf.peak <= 4
            deaf.resume()
            for came in await asyncio.gather(*staying):
                came.insist_on_success()
