"""What a client sees when workers fail: nothing, where anything could be done."""

import asyncio
import json
import random

import openai
import pytest

from balancer.core.breaker import Phase
from tests.e2e.conftest import OpenRoom, listed
from tests.fakes.engine import FakeEngine, engine_process
from tests.fakes.faults import OK, Fault, Part
from tests.fakes.speech import reference_text

MESSAGES = [{"role": "user", "content": "Name some trees."}]
TEXT = reference_text(MESSAGES, 16)

BEFORE_A_WORD = {
    "it closes before the head": Fault.close(),
    "it resets before the head": Fault.reset(),
    "it closes after the head": Fault.close(at_byte=0),
    "it resets before the first word": Fault.reset(at_token=0),
    "it ends without a word": Fault.truncate(at_token=0),
    "it answers 500": Fault.status(500),
    "it answers 503": Fault.status(503, retry_after="1"),
    "it answers 429": Fault.status(429),
    "it answers 404 for a model that it has": Fault.status(404),
    "it asks for a key": Fault.status(401),
    "it answers 200 with an error": Fault.error_in_body(),
    "its first event is an error": Fault.error_event(at_token=0),
    "its first event is no JSON": Fault.garbage(at_token=0),
    "it answers with a page": Fault.reply_with(b"<html>"),
    "it answers with nothing": Fault.reply_with(b""),
}

IN_THE_MIDDLE = {
    "it closes": Fault.close(at_token=5),
    "it resets": Fault.reset(at_token=5),
    "it ends as if that were all": Fault.truncate(at_token=5),
    "it reports an error": Fault.error_event(at_token=5),
    "it reports an error and says that it is done": Fault.error_event(at_token=5, then_done=True),
    "it forgets the end": Fault.no_end(),
    "it says that it is done and has not finished": Fault(omits=(Part.FINISH,)),
}


@pytest.mark.parametrize("fault", BEFORE_A_WORD.values(), ids=BEFORE_A_WORD)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_another_worker_answers_where(open_room: OpenRoom, fault: Fault, stream: bool):
    async with FakeEngine() as bad, FakeEngine() as good, open_room(bad, good) as room:
        bad.always(fault)
        for _ in range(4):
            assert await ask(room.openai, stream) == TEXT
        await room.idle()


@pytest.mark.parametrize("fault", IN_THE_MIDDLE.values(), ids=IN_THE_MIDDLE)
async def test_a_whole_answer_never_shows_that_in_the_middle(open_room: OpenRoom, fault: Fault):
    async with FakeEngine() as bad, FakeEngine() as good, open_room(bad, good) as room:
        bad.always(fault)
        for _ in range(4):
            assert await ask(room.openai, stream=False) == TEXT


@pytest.mark.parametrize("fault", IN_THE_MIDDLE.values(), ids=IN_THE_MIDDLE)
async def test_a_stream_goes_on_with_another_worker_when(open_room: OpenRoom, fault: Fault):
    async with FakeEngine() as bad, FakeEngine() as good:
        async with open_room(listed(bad, "a", continues=True), listed(good, "b", continues=True)) as room:
            bad.always(fault)
            for _ in range(4):
                assert await ask(room.openai, stream=True) == TEXT
            await room.idle()


@pytest.mark.parametrize("fault", IN_THE_MIDDLE.values(), ids=IN_THE_MIDDLE)
async def test_a_stream_is_never_cut_silently_when(open_room: OpenRoom, fault: Fault):
    """Where it may not go on elsewhere, the client gets an error, and no end mark."""
    async with FakeEngine() as bad, open_room(bad, continue_streams=False) as room:
        bad.script(fault)
        body = {"model": "fake", "messages": MESSAGES, "stream": True}
        async with room.http.post(f"{room.url}/v1/chat/completions", json=body) as response:
            events = [line[6:] for line in (await response.text()).split("\n") if line.startswith("data: ")]
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "stream_broken"
        words = "".join(
            json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]
        )
        assert words
        assert TEXT.startswith(words)
        with pytest.raises(openai.APIError):
            bad.script(fault)
            await ask(room.openai, stream=True)
        await room.idle()


async def test_an_end_without_its_mark_is_an_end(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        engine.script(Fault.no_done(), Fault.no_done())
        assert await ask(room.openai, stream=True) == TEXT
        assert await ask(room.openai, stream=False) == TEXT


@pytest.mark.parametrize("manners", ["http_1_0", "close_after_stream"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_engine_with_old_manners_serves_many_in_a_row(
    open_room: OpenRoom, manners: str, stream: bool
):
    """llama.cpp promises to keep connections and does not; mlx_lm speaks HTTP/1.0. No request may show it."""
    async with FakeEngine(**{manners: True}) as engine, open_room(engine) as room:
        for _ in range(20):
            assert await ask(room.openai, stream) == TEXT
        assert len(engine.requests) == 20


@pytest.mark.parametrize(
    "oddity",
    [Fault.comments(), Fault.sliced(size=1), Fault.comments() & Fault.sliced(size=3)],
    ids=["comments", "one byte at a time", "both"],
)
async def test_odd_but_right_streams_are_read(open_room: OpenRoom, oddity: Fault):
    async with FakeEngine() as engine, open_room(engine) as room:
        engine.always(oddity)
        assert await ask(room.openai, stream=True) == TEXT
        assert await ask(room.openai, stream=False) == TEXT


async def test_one_healthy_worker_keeps_the_room_going(open_room: OpenRoom):
    async with FakeEngine() as one, FakeEngine() as two, FakeEngine() as three:
        async with open_room(one, two, three) as room:
            one.die()
            two.always(Fault.status(500))
            assert set(await asyncio.gather(*[ask(room.openai, stream=False) for _ in range(30)])) == {TEXT}
            await room.idle()


async def test_a_worker_that_comes_back_is_used_again(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        assert await ask(room.openai, stream=False) == TEXT
        engine.die()
        await room.until(lambda: room.worker("a").state == "lost", "the worker is noticed to be gone")
        waiting = asyncio.ensure_future(ask(room.openai, stream=False))
        await room.until(lambda: room.balancer.snapshot().waiting == 1, "the request waits")
        await engine.listen()
        assert await waiting == TEXT


async def test_an_agent_that_has_forgotten_whom_it_met_costs_no_answer_and_is_blamed_for_nothing(
    open_room: OpenRoom,
):
    """It was started again, say, faster than anybody noticed."""
    async with FakeEngine(agent_id="a", slots=8) as engine:
        async with open_room(listed(engine, "a", type="agent")) as room:
            await room.ready()
            for _ in range(3):
                engine.gate.forget()
                answers = await asyncio.gather(
                    *(room.openai.chat.completions.create(model="fake", messages=MESSAGES) for _ in range(8))
                )
                assert all(answer.choices[0].finish_reason == "stop" for answer in answers)
                assert room.worker("a").breaker is Phase.CLOSED
            assert 'cause="unreachable"' not in await room.metrics()


async def test_a_worker_that_fails_again_and_again_is_left_alone_and_probed_later(open_room: OpenRoom):
    async with FakeEngine() as bad, FakeEngine() as good:
        async with open_room(bad, good, breaker_rest=0.3) as room:
            bad.always(Fault.status(500))
            for _ in range(40):
                await ask(room.openai, stream=False)
                if room.worker("a").breaker == "open":
                    break
            assert room.worker("a").breaker == "open"
            assert len(bad.requests) == 3
            bad.always(OK)
            await room.until(lambda: room.worker("a").breaker == "open", "still open")
            while room.worker("a").breaker != "closed":
                assert await ask(room.openai, stream=False) == TEXT


async def test_after_three_retries_the_client_is_told(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        engine.always(Fault.status(500, "out of memory"))
        with pytest.raises(openai.InternalServerError, match="out of memory") as caught:
            await ask(room.openai, stream=False)
        assert caught.value.status_code == 502
        assert len(engine.requests) == 4
        await room.idle()


async def test_a_request_that_is_wrong_is_not_tried_again(open_room: OpenRoom):
    async with FakeEngine(context_tokens=4) as one, FakeEngine(context_tokens=4) as two:
        async with open_room(one, two) as room:
            with pytest.raises(openai.BadRequestError):
                await ask(room.openai, stream=False, messages=[{"role": "user", "content": "a b c d e f g"}])
            assert len(one.requests) + len(two.requests) == 1
            assert {view.success_rate for view in room.balancer.snapshot().workers} == {1.0}


async def test_silence_in_the_middle_of_an_answer_ends_the_attempt(open_room: OpenRoom):
    async with FakeEngine() as mute, FakeEngine() as good:
        async with open_room(mute, good, read_timeout=0.2) as room:
            mute.always(Fault.stall(at_token=3))
            for _ in range(4):
                assert await ask(room.openai, stream=False) == TEXT
            await mute.idle()


async def test_a_long_silence_before_the_first_word_is_work(open_room: OpenRoom):
    async with FakeEngine(first_token_seconds=0.6) as engine, open_room(engine, read_timeout=0.1) as room:
        assert await ask(room.openai, stream=True) == TEXT


async def test_a_request_has_its_time_and_no_more(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, request_timeout=0.3) as room:
        engine.script(Fault.stall(at_token=0))
        with pytest.raises(openai.APIStatusError, match="REQUEST_TIMEOUT") as caught:
            await ask(room.openai, stream=False)
        assert caught.value.status_code == 504
        await engine.idle()
        await room.idle()


async def test_a_worker_that_never_says_a_word_is_found_out(open_room: OpenRoom):
    async with FakeEngine() as mute, FakeEngine() as good:
        async with open_room(mute, good, request_timeout=0.2, breaker_rest=60) as room:
            mute.always(Fault.stall(at_token=0))
            overdue = 0
            for _ in range(40):
                try:
                    assert await ask(room.openai, stream=False) == TEXT
                except openai.APIStatusError as error:
                    assert error.status_code == 504
                    overdue += 1
            assert overdue == 3
            assert room.worker("a").breaker == "open"
            assert 'balancer_attempts_total{cause="overdue",worker="a"} 3.0' in await room.metrics()


async def test_a_retry_goes_back_where_nobody_else_is_well(open_room: OpenRoom):
    async with FakeEngine() as one, FakeEngine() as dead:
        async with open_room(one, dead, max_wait=20) as room:
            dead.die()
            await room.until(lambda: room.worker("b").state == "lost", "the other is noticed to be gone")
            one.script(Fault.status(500))
            assert await ask(room.openai, stream=False) == TEXT
            assert len(one.requests) == 2


async def test_a_full_line_answers_429_and_says_when_to_come_back(open_room: OpenRoom):
    async with FakeEngine() as engine:
        async with open_room(listed(engine, "a", max_concurrent_requests=1), max_queue=1) as room:
            await room.ready()
            engine.script(Fault.stall(at_token=0))
            first = asyncio.ensure_future(ask(room.openai, stream=False))
            await engine.stalled()
            second = asyncio.ensure_future(ask(room.openai, stream=False))
            await room.until(lambda: room.balancer.snapshot().waiting == 1, "one waits")
            with pytest.raises(openai.RateLimitError) as caught:
                await ask(room.openai, stream=False)
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            engine.resume()
            assert await asyncio.gather(first, second) == [TEXT, TEXT]


async def test_who_waits_too_long_is_told_503_and_why(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, max_wait=0.3) as room:
        engine.die()
        await room.until(lambda: room.worker("a").state == "lost", "the worker is noticed to be gone")
        with pytest.raises(openai.InternalServerError, match="a: connection refused") as caught:
            await ask(room.openai, stream=False)
        assert caught.value.status_code == 503
        assert "Retry-After" in caught.value.response.headers


async def test_the_sdks_own_retries_carry_a_client_over_a_refusal(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, max_retries=0) as room:
        engine.script(Fault.status(500), Fault.status(500))
        client = room.openai.with_options(max_retries=3)
        assert await ask(client, stream=False) == TEXT


async def test_a_worker_process_that_is_killed_costs_no_answer(open_room: OpenRoom):
    async with (
        engine_process("--token-seconds", "0.05", "--slots", "20") as doomed,
        FakeEngine(slots=20, token_seconds=0.01) as other,
    ):
        port = int(doomed.url.rsplit(":", 1)[1])
        rows = (
            {"id": "doomed", "host": "127.0.0.1", "port": port, "max_concurrent_requests": 20},
            listed(other, "other", max_concurrent_requests=20),
        )
        async with open_room(*rows) as room:
            await room.ready(2)
            asked = [asyncio.ensure_future(ask(room.openai, stream=False)) for _ in range(20)]
            await room.until(lambda: room.worker("doomed").running >= 3, "some run on the doomed one")
            doomed.process.kill()
            assert await asyncio.gather(*asked) == [TEXT] * 20
            await room.idle()


async def test_any_mixture_of_faults_leaves_every_slot_free(open_room: OpenRoom):
    """Which request meets which fault is seeded; every answer must be right, and nothing may stay taken."""
    dice = random.Random(7)
    faults = [OK, *BEFORE_A_WORD.values(), *IN_THE_MIDDLE.values()]
    async with FakeEngine() as one, FakeEngine() as two, FakeEngine() as sound:
        async with open_room(one, two, sound) as room:
            for engine in (one, two):
                engine.script(*dice.choices(faults, k=60))
            answers = await asyncio.gather(
                *[ask(room.openai, stream=dice.random() < 0.5) for _ in range(80)], return_exceptions=True
            )
            for answer in answers:
                assert answer == TEXT or isinstance(answer, openai.APIError)
            await room.idle()


async def ask(client: openai.AsyncOpenAI, stream: bool, messages=MESSAGES) -> str:
    if not stream:
        answer = await client.chat.completions.create(model="fake", messages=messages)
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content or ""
    chunks = await client.chat.completions.create(model="fake", messages=messages, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
