"""The fake engine tells the truth: each fault is on the wire as its name says, and so is the text.

Raw sockets where bytes matter, aiohttp for ordinary HTTP, the official SDK as an impartial judge.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from tests.fakes.engine import (
    LLAMA_CPP,
    MLX,
    OK,
    VLLM,
    Continues,
    FakeEngine,
    Fault,
    Outcome,
    Spelling,
    engine_process,
    on,
    reference_embedding,
    reference_text,
)
from tests.fakes.speech import Utterance

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
CHAT = "/v1/chat/completions"
WITHIN = 5.0


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(tokens=8) as engine:
        yield engine


@pytest.fixture
async def http(engine: FakeEngine) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(engine.url, timeout=aiohttp.ClientTimeout(total=WITHIN)) as session:
        yield session


def ask(*, stream: bool = False, usage: bool = False, **others: Any) -> dict[str, Any]:
    body = {"model": "fake", "messages": QUESTION, "stream": stream} | others
    return body | ({"stream_options": {"include_usage": True}} if usage else {})


def events(body: bytes) -> list[Any]:
    """The events of a whole stream: parsed JSON, and `[DONE]` as it is."""
    data = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    return ["[DONE]" if line == b"[DONE]" else orjson.loads(line) for line in data]


def text_of(stream: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for event in stream
        if event != "[DONE]"
        for choice in event.get("choices", ())
    )


async def streamed(http: aiohttp.ClientSession, **others: Any) -> list[Any]:
    async with http.post(CHAT, json=ask(stream=True, **others)) as response:
        return events(await response.read())


async def raw(engine: FakeEngine, body: dict[str, Any], *, requests: int = 1) -> tuple[bytes, bool]:
    """All bytes that come back on one connection until it ends, and whether a reset ended it."""
    reader, writer = await asyncio.open_connection(engine.host, engine.port)
    content = orjson.dumps(body)
    request = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
    writer.write(request % (CHAT.encode(), len(content), content) * requests)
    came = bytearray()
    try:
        async with asyncio.timeout(WITHIN):
            while data := await reader.read(65536):
                came += data
        return bytes(came), False
    except ConnectionResetError:
        return bytes(came), True
    finally:
        writer.close()


def payload(answer: bytes) -> bytes:
    """The body of a chunked answer, as far as it came."""
    _, _, chunks = answer.partition(b"\r\n\r\n")
    body = bytearray()
    while match := re.match(rb"([0-9a-f]+)\r\n", chunks):
        size, start = int(match[1], 16), match.end()
        body += chunks[start : start + size]
        chunks = chunks[start + size + 2 :]
    return bytes(body)


def without_id(body: bytes) -> bytes:
    """The body with the part of each id that differs between requests blotted out, torn ones too."""
    return re.sub(rb"(?<=chatcmpl-)\d+", lambda match: b"#" * len(match[0]), body)


# The text


@given(st.text(min_size=1), st.integers(0, 20), st.integers(0, 20))
def test_a_longer_answer_begins_with_the_shorter_one(prompt: str, some: int, more: int) -> None:
    assert reference_text(prompt, some + more).startswith(reference_text(prompt, some))


@given(st.text(), st.integers(0, 20), st.sampled_from(Spelling), st.booleans(), st.data())
def test_an_answer_cut_anywhere_continues_to_the_same_text(
    question: str, tokens: int, spelling: Spelling, trims: bool, data: st.DataObject
) -> None:
    messages = [{"role": "user", "content": question}]
    whole = reference_text(messages, tokens)
    begun = whole[: data.draw(st.integers(0, len(whole)))]
    message = {"role": "assistant", "content": begun}
    speech = Utterance.of_chat([*messages, message], True, spelling, trims)
    rest = list(speech.tokens(tokens))
    assert len(rest) == speech.left(tokens)
    if trims and rest:
        begun = begun.rstrip()
    assert begun + "".join(rest) == whole


@given(st.text(), st.integers(0, 20), st.sampled_from(Spelling), st.data())
def test_a_completion_cut_anywhere_continues_to_the_same_text(
    question: str, tokens: int, spelling: Spelling, data: st.DataObject
) -> None:
    prompt = f"{question}\n"
    whole = reference_text(prompt, tokens)
    begun = whole[: data.draw(st.integers(0, len(whole)))]
    speech = Utterance.of_completion(prompt + begun, spelling)
    assert begun + "".join(speech.tokens(tokens)) == whole


def test_both_spellings_are_one_text_and_as_many_tokens() -> None:
    before, after = (
        list(Utterance.of_completion("Once", spelling).tokens(5))
        for spelling in (Spelling.SPACE_BEFORE, Spelling.SPACE_AFTER)
    )
    assert "".join(before) == "".join(after) == reference_text("Once", 5)
    assert len(before) == len(after) == 5
    assert before != after


def test_both_forms_of_a_message_are_the_same_prompt() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Why is the sky "}, {"text": "blue?"}]}]
    assert (
        reference_text(parts, 9) == reference_text(QUESTION, 9) != reference_text("Why is the sky blue?", 9)
    )


# What a sane engine does


async def test_the_official_sdk_gets_the_reference_text_streamed_or_not(engine: FakeEngine) -> None:
    async with AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(**ask())
        assert whole.choices[0].message.content == reference_text(QUESTION, 8)
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        assert whole.usage.completion_tokens == 8

        chunks = [
            chunk async for chunk in await client.chat.completions.create(**ask(stream=True, usage=True))
        ]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == reference_text(QUESTION, 8)
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage == whole.usage

        completion = await client.completions.create(model="fake", prompt="Once", max_tokens=3)
        assert completion.choices[0].text == reference_text("Once", 3)
        assert completion.choices[0].finish_reason == "length"

        vectors = await client.embeddings.create(model="fake", input=["a", "b"])  # asks for base64
        assert [one.embedding for one in vectors.data] == [reference_embedding("a"), reference_embedding("b")]
        assert [model.id async for model in client.models.list()] == ["fake"]


async def test_a_stream_says_role_then_content_then_finish_then_usage_then_done(
    http: aiohttp.ClientSession,
) -> None:
    role, *contents, finish, usage, done = await streamed(http, usage=True)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(contents) == 8
    assert finish["choices"][0] == {"delta": {}, "index": 0, "logprobs": None, "finish_reason": "stop"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert done == "[DONE]"


async def test_a_trailing_assistant_message_is_continued(http: aiohttp.ClientSession) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": reference_text(QUESTION, 3)}]
    stream = await streamed(http, messages=begun)
    assert text_of(stream) == reference_text(QUESTION, 8).removeprefix(reference_text(QUESTION, 3))


FLAGS = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.mark.parametrize(
    ("way", "flags", "header", "goes_on"),
    [
        (Continues.ALWAYS, {}, "", True),
        (Continues.ALWAYS, FLAGS, "", True),
        (Continues.BY_FLAGS, {}, "", False),
        (Continues.BY_FLAGS, FLAGS, "", True),
        (Continues.BY_HEADER, FLAGS, "", False),
        (Continues.BY_HEADER, {}, "1", True),
        (Continues.NEVER, FLAGS, "1", False),
    ],
)
async def test_each_engine_continues_in_its_own_way_or_begins_a_new_answer(
    engine: FakeEngine,
    http: aiohttp.ClientSession,
    way: Continues,
    flags: dict[str, Any],
    header: str,
    goes_on: bool,
) -> None:
    engine.continues = way
    begun = [*QUESTION, {"role": "assistant", "content": reference_text(QUESTION, 3)}]
    body = ask(messages=begun, stream=True, usage=True, **flags)
    async with http.post(CHAT, json=body, headers={"X-LLM-Continue": header} if header else {}) as response:
        stream = events(await response.read())
    rest = reference_text(QUESTION, 8).removeprefix(reference_text(QUESTION, 3))
    assert text_of(stream) == (rest if goes_on else reference_text(begun, 8))
    assert stream[-2]["usage"]["completion_tokens"] == (5 if goes_on else 8)


async def test_vllm_refuses_half_of_the_flags() -> None:
    async with FakeEngine(**VLLM) as engine, aiohttp.ClientSession(engine.url) as http:
        async with http.post(CHAT, json=ask(continue_final_message=True)) as response:
            assert response.status == 400


async def test_what_was_said_counts_as_prompt_when_an_answer_goes_on(
    engine: FakeEngine, http: aiohttp.ClientSession
) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": reference_text(QUESTION, 3)}]
    first, second = await streamed(http, usage=True), await streamed(http, messages=begun, usage=True)
    assert second[-2]["usage"]["prompt_tokens"] == first[-2]["usage"]["prompt_tokens"] + 3


@pytest.mark.parametrize("swallows", [False, True])
async def test_a_template_trims_and_the_space_comes_again_or_not(
    engine: FakeEngine, http: aiohttp.ClientSession, swallows: bool
) -> None:
    engine.spelling, engine.trims, engine.swallows_space = Spelling.SPACE_AFTER, True, swallows
    said = reference_text(QUESTION, 3)
    stream = await streamed(http, messages=[*QUESTION, {"role": "assistant", "content": f"{said} "}])
    rest = reference_text(QUESTION, 8).removeprefix(said)
    assert text_of(stream) == (rest.lstrip() if swallows else rest)


async def test_well_known_engines_differ_in_what_they_tell() -> None:
    async with FakeEngine(**LLAMA_CPP, slots=2) as llama_cpp, FakeEngine(**VLLM) as vllm:
        async with FakeEngine(**MLX, first_token_seconds=0.2) as mlx, aiohttp.ClientSession() as http:
            owners = []
            for engine in (llama_cpp, vllm, mlx):
                async with http.get(f"{engine.url}/v1/models") as response:
                    owners.append((await response.json())["data"][0].get("owned_by"))
            assert owners == ["llamacpp", "vllm", None]
            async with http.get(f"{vllm.url}/slots") as response:
                assert response.status == 404
            came, _ = await raw(mlx, ask(stream=True))
            assert came.startswith(b"HTTP/1.0 200")
            assert came.count(b": keepalive") == 4
            assert text_of(events(came)) == reference_text(QUESTION, 16)


async def test_the_slots_of_an_engine_that_ignores_leaving_stay_taken() -> None:
    async with FakeEngine(**LLAMA_CPP, slots=2, notices_leaving=False) as engine:
        engine.script(Fault.stall(at_token=3))
        asked = asyncio.ensure_future(raw(engine, ask(stream=True)))
        await engine.stalled()
        asked.cancel()
        async with aiohttp.ClientSession(engine.url) as http:
            async with http.get("/slots") as response:
                assert [slot["is_processing"] for slot in await response.json()] == [True, False]
            engine.resume()
            await engine.idle()
            async with http.get("/slots") as response:
                assert [slot["is_processing"] for slot in await response.json()] == [False, False]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"model": "fake"}),
        (400, ask(messages=[])),
        (400, ask(max_tokens="many")),
        (404, ask(model="unheard-of")),
    ],
)
async def test_a_wrong_request_is_refused_in_openai_form(
    http: aiohttp.ClientSession, status: int, body: dict[str, Any]
) -> None:
    async with http.post(CHAT, json=body) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == status


async def test_it_can_play_an_ollama_and_a_loading_engine(
    engine: FakeEngine, http: aiohttp.ClientSession
) -> None:
    async with http.get("/api/tags") as tags, http.get("/api/version") as version:
        assert [model["name"] for model in (await tags.json())["models"]] == ["fake"]
        assert "version" in await version.json()
    engine.loading = True
    async with http.get("/health") as health, http.post(CHAT, json=ask()) as chat:
        assert (health.status, chat.status) == (503, 503)


async def test_more_requests_than_slots_wait_in_its_own_line(
    engine: FakeEngine, http: aiohttp.ClientSession
) -> None:
    engine.always(Fault.stall(at_token=1))
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(streamed(http)) for _ in range(6)]
        await engine.seen(6)
        await engine.stalled(4)
        assert (engine.running, engine.waiting, engine.peak) == (4, 2, 6)
        engine.always(OK)
        engine.resume()
        await engine.until(lambda: engine.stalling == 2)
        engine.resume()
    assert {text_of(task.result()) for task in asked} == {reference_text(QUESTION, 8)}
    await engine.idle()


async def test_its_pace_is_what_was_asked_for(engine: FakeEngine, http: aiohttp.ClientSession) -> None:
    engine.first_token_seconds, engine.token_seconds = 0.05, 0.01
    await streamed(http)
    request = await engine.seen(1)
    assert request.ended
    assert request.ended - request.started >= 0.05 + 7 * 0.01


async def test_http_1_0_ends_a_stream_with_the_connection() -> None:
    async with FakeEngine(tokens=8, http_1_0=True) as engine:
        came, reset = await raw(engine, ask(stream=True))
        head, _, body = came.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200")
        assert b"chunked" not in head
        assert b"Content-Length" not in head
        assert (text_of(events(body)), reset) == (reference_text(QUESTION, 8), False)


async def test_an_engine_like_llama_cpp_promises_keep_alive_and_closes_after_a_stream() -> None:
    async with FakeEngine(close_after_stream=True) as engine:
        came, _ = await raw(engine, ask(stream=True), requests=2)
        assert b"Keep-Alive: timeout=5" in came
        assert came.endswith(b"0\r\n\r\n")
        assert came.count(b"HTTP/1.1 200") == 1


async def test_a_connection_is_kept_for_the_next_request(engine: FakeEngine) -> None:
    engine.script(OK, OK, Fault.close())
    came, _ = await raw(engine, ask(), requests=3)
    assert came.count(b"HTTP/1.1 200") == 2
    assert [request.outcome for request in engine.requests] == [
        Outcome.COMPLETED,
        Outcome.COMPLETED,
        Outcome.BROKEN,
    ]


# What goes wrong


async def test_the_script_is_consumed_in_order_and_probes_leave_it_alone(
    engine: FakeEngine, http: aiohttp.ClientSession
) -> None:
    engine.script(Fault.status(503, retry_after="7"), Fault.error_in_body("no memory"), OK)
    engine.script(Fault.status(500), when=on("/health"))
    seen = []
    for path in ("/v1/models", CHAT, CHAT, CHAT, "/health", "/health"):
        method = "POST" if path == CHAT else "GET"
        async with http.request(method, path, json=ask()) as response:
            seen.append(
                (response.status, response.headers.get("Retry-After"), "error" in await response.json())
            )
    assert seen == [
        (200, None, False),
        (503, "7", True),
        (200, None, True),
        (200, None, False),
        (500, None, True),
        (200, None, False),
    ]
    assert [request.path for request in engine.probes] == ["/v1/models", "/health", "/health"]


async def test_a_refusing_engine_refuses_until_it_listens_again_on_the_same_port(
    engine: FakeEngine, http: aiohttp.ClientSession
) -> None:
    url = engine.url
    await streamed(http)
    engine.refuse()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(engine.host, engine.port)
    await engine.listen()
    assert engine.url == url
    assert text_of(await streamed(http)) == reference_text(QUESTION, 8)


@pytest.mark.parametrize(("fault", "reset"), [(Fault.close(), False), (Fault.reset(), True)])
async def test_before_the_head_nothing_comes(engine: FakeEngine, fault: Fault, reset: bool) -> None:
    engine.script(fault)
    assert await raw(engine, ask(stream=True)) == (b"", reset)


@pytest.mark.parametrize(("break_off", "reset"), [(Fault.close, False), (Fault.reset, True)])
async def test_a_stream_can_break_at_every_byte(engine: FakeEngine, break_off: Any, reset: bool) -> None:
    engine.tokens = 2
    async with aiohttp.ClientSession(engine.url) as http, http.post(CHAT, json=ask(stream=True)) as response:
        whole = await response.read()
    for byte in range(len(whole)):
        engine.script(break_off(at_byte=byte))
        came, was_reset = await raw(engine, ask(stream=True))
        assert was_reset is reset
        assert without_id(payload(came)) == without_id(whole[:byte])
        assert not came.endswith(b"0\r\n\r\n")


async def test_a_stream_can_break_at_a_token(engine: FakeEngine) -> None:
    for token in range(9):
        engine.script(Fault.close(at_token=token))
        came, _ = await raw(engine, ask(stream=True))
        stream = events(payload(came))
        assert text_of(stream) == reference_text(QUESTION, token)
        assert len(stream) == token + 1  # the role comes before the tokens
        assert engine.requests[-1].tokens_sent == token


async def test_an_answer_in_one_piece_breaks_too(engine: FakeEngine) -> None:
    engine.script(Fault.close(at_token=3), Fault.reset(at_byte=40))
    assert await raw(engine, ask()) == (b"", False)
    came, reset = await raw(engine, ask())
    assert (len(came.partition(b"\r\n\r\n")[2]), reset) == (40, True)


async def test_a_dead_engine_drops_everybody_and_can_be_revived(
    engine: FakeEngine, http: aiohttp.ClientSession
) -> None:
    engine.script(Fault.stall(at_token=2), Fault.die(at_token=5))
    async with http.post(CHAT, json=ask(stream=True)) as stalled:
        await engine.stalled()
        with pytest.raises(aiohttp.ClientPayloadError):
            await streamed(http)
        with pytest.raises(aiohttp.ClientPayloadError):
            await stalled.read()
    await engine.idle()
    assert [request.outcome for request in engine.requests] == [Outcome.BROKEN] * 2
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(engine.host, engine.port)
    await engine.listen()
    assert text_of(await streamed(http)) == reference_text(QUESTION, 8)


async def test_a_stalled_stream_goes_on_when_it_may(engine: FakeEngine, http: aiohttp.ClientSession) -> None:
    engine.script(Fault.stall(at_token=3), Fault.stall(at_token=3, seconds=0.01), Fault.stall(seconds=0.01))
    async with http.post(CHAT, json=ask(stream=True)) as response:
        await engine.stalled()
        begun = b""
        while text_of(events(begun)) != reference_text(QUESTION, 3):
            begun += await response.content.readuntil(b"\n\n")
        engine.resume()
        assert text_of(events(begun + await response.read())) == reference_text(QUESTION, 8)
    for _ in range(2):
        assert text_of(await streamed(http)) == reference_text(QUESTION, 8)


async def test_a_stalled_stream_can_send_signs_of_life(
    engine: FakeEngine, http: aiohttp.ClientSession
) -> None:
    engine.script(Fault.stall(at_token=0, comment_seconds=0.005))
    async with http.post(CHAT, json=ask(stream=True)) as response:
        role = await response.content.readuntil(b"\n\n")
        assert b"assistant" in role
        for _ in range(3):
            assert await response.content.readuntil(b"\n\n") == b": keepalive\n\n"
        engine.resume()
        assert text_of(events(await response.read())) == reference_text(QUESTION, 8)


@pytest.mark.parametrize(
    ("fault", "tokens", "finished", "done"),
    [
        (Fault.truncate(at_token=3), 3, False, False),
        (Fault.no_end(), 8, False, False),
        (Fault.no_done(), 8, True, False),
        (Fault.error_event(at_token=3), 3, False, False),
        (Fault.error_event(at_token=3, then_done=True), 3, False, True),
    ],
)
async def test_a_stream_ends_as_badly_as_it_was_told(
    engine: FakeEngine, http: aiohttp.ClientSession, fault: Fault, tokens: int, finished: bool, done: bool
) -> None:
    engine.script(fault)
    stream = await streamed(http)  # aiohttp raises where the HTTP answer itself is not complete
    chunks = [event for event in stream if event != "[DONE]"]
    assert text_of(chunks) == reference_text(QUESTION, tokens)
    assert any(chunk["choices"][0]["finish_reason"] for chunk in chunks if "choices" in chunk) is finished
    assert ("[DONE]" in stream) is done
    assert any("error" in chunk for chunk in chunks) is (fault.inserts != ())


async def test_what_does_not_belong_stands_between_two_events(engine: FakeEngine) -> None:
    engine.script(Fault.garbage(at_token=2), Fault.invalid_utf8(at_token=2), Fault.comments())
    async with aiohttp.ClientSession(engine.url) as http:
        bodies = []
        for _ in range(3):
            async with http.post(CHAT, json=ask(stream=True)) as response:
                bodies.append(await response.read())
    garbled, undecodable, commented = bodies
    before, _, after = garbled.partition(b"}{ no field of SSE\n\ndata: {not json\n\n")
    assert text_of(events(before)) == reference_text(QUESTION, 2)
    assert text_of(events(before + after)) == reference_text(QUESTION, 8)
    with pytest.raises(UnicodeDecodeError):
        undecodable.decode()
    assert commented.count(b": a comment\n\n") == commented.count(b"data: ")
    assert text_of(events(commented)) == reference_text(QUESTION, 8)


async def test_a_sliced_body_comes_in_chunks_of_that_size(engine: FakeEngine) -> None:
    engine.script(Fault.sliced(size=1) & Fault.close(at_byte=200))
    came, _ = await raw(engine, ask(stream=True))
    assert came.partition(b"\r\n\r\n")[2].count(b"1\r\n") >= 200
    assert len(payload(came)) == 200


async def test_a_wrong_content_length_is_sent_as_told(
    engine: FakeEngine, http: aiohttp.ClientSession
) -> None:
    engine.script(Fault.wrong_length(by=5) & Fault.close(at_byte=1), Fault.wrong_length(by=5))
    async with http.post(CHAT, json=ask(), headers={"Connection": "close"}) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    async with http.post(CHAT, json=ask(), headers={"Connection": "close"}) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_a_flood_goes_on_for_as_long_as_its_client_stays(engine: FakeEngine) -> None:
    engine.close_after_stream = True
    engine.script(Fault.flood(b": x\n\n", at_token=2, times=100), Fault.flood(b" ", at_token=2))
    came, _ = await raw(engine, ask(stream=True))
    assert payload(came).count(b": x\n\n") == 100
    assert text_of(events(payload(came))) == reference_text(QUESTION, 8)
    asked = asyncio.ensure_future(raw(engine, ask(stream=True)))
    request = await engine.seen(2)
    await engine.until(lambda: request.tokens_sent == 2)
    assert engine.running == 1
    asked.cancel()
    await engine.idle()
    assert request.outcome is Outcome.CLIENT_LEFT


async def test_a_long_line_has_no_break(engine: FakeEngine) -> None:
    engine.script(Fault.long_line(at_token=1, megabytes=2) & Fault.close(at_token=1))
    came, _ = await raw(engine, ask(stream=True))
    assert len(payload(came).rpartition(b"\n")[2]) > 2 * 1024 * 1024


async def test_events_can_come_twice_and_claim_what_is_not_so(
    engine: FakeEngine, http: aiohttp.ClientSession
) -> None:
    engine.script(Fault.doubled(), Fault.claim(model="other", usage={"prompt_tokens": -5}))
    assert len(text_of(await streamed(http))) == 2 * len(reference_text(QUESTION, 8))
    stream = await streamed(http, stream_options={"include_usage": True})
    assert {event["model"] for event in stream[:-1]} == {"other"}
    assert stream[-2]["usage"]["prompt_tokens"] == -5


def test_two_faults_that_disagree_are_no_fault() -> None:
    with pytest.raises(ValueError, match="breaks"):
        Fault.close(at_token=1) & Fault.reset(at_token=2)


def test_a_fault_can_be_written_on_a_command_line() -> None:
    assert Fault.parse("stall:at_token=3,seconds=0.5 & comments") == (
        Fault.stall(at_token=3, seconds=0.5) & Fault.comments()
    )
    for wrong in ("stal", "stall:at=3"):
        with pytest.raises(ValueError):
            Fault.parse(wrong)


# The client leaves


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "fault", [Fault.stall(), Fault.stall(at_token=0), Fault.stall(at_token=3), Fault.endless()]
)
async def test_a_client_that_leaves_is_noticed_at_once(
    engine: FakeEngine, fault: Fault, stream: bool
) -> None:
    engine.script(fault)
    engine.token_seconds = 0.001
    asked = asyncio.ensure_future(raw(engine, ask(stream=stream)))
    request = await engine.seen(1)
    await engine.until(lambda: engine.running == 1 and (engine.stalling == 1 or fault.never_stops))
    left = asyncio.get_running_loop().time()
    asked.cancel()
    await engine.idle()
    assert request.outcome is Outcome.CLIENT_LEFT
    assert request.ended
    assert request.ended - left < 0.5
    assert (engine.running, engine.stalling) == (0, 0)


async def test_a_client_that_leaves_the_engines_line_is_noticed_too(engine: FakeEngine) -> None:
    engine.always(Fault.stall(at_token=0))
    asked = []
    for number in range(1, 6):
        asked.append(asyncio.ensure_future(raw(engine, ask(stream=True))))
        await engine.seen(number)
    await engine.stalled(4)
    asked[-1].cancel()
    await engine.until(lambda: engine.waiting == 0)
    assert (engine.running, engine.requests[-1].outcome) == (4, Outcome.CLIENT_LEFT)
    for task in asked:
        task.cancel()
    await engine.idle()
    assert {request.outcome for request in engine.requests} == {Outcome.CLIENT_LEFT}


async def test_a_client_that_does_not_read_holds_its_request_up_until_it_leaves(engine: FakeEngine) -> None:
    engine.script(Fault.insert(b": " + b"x" * 64 * 1024 * 1024 + b"\n\n", at_token=2))
    reader, writer = await asyncio.open_connection(engine.host, engine.port, limit=1024)
    content = orjson.dumps(ask(stream=True))
    writer.write(b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(content), content))
    request = await engine.seen(1)
    await engine.until(lambda: request.tokens_sent == 2)
    await reader.readuntil(b"\r\n\r\n")
    assert engine.running == 1
    writer.transport.abort()
    await engine.idle()
    assert (request.outcome, request.tokens_sent) == (Outcome.CLIENT_LEFT, 2)


async def test_an_engine_that_does_not_notice_works_on_for_nobody() -> None:
    async with FakeEngine(tokens=8, notices_leaving=False) as engine:
        engine.script(Fault.stall(at_token=3))
        asked = asyncio.ensure_future(raw(engine, ask(stream=True)))
        await engine.stalled()
        asked.cancel()
        await asyncio.wait([asked])
        assert engine.running == 1
        engine.resume()
        await engine.idle()
        assert (engine.requests[0].outcome, engine.requests[0].tokens_sent) == (Outcome.CLIENT_LEFT, 8)


async def test_waiting_for_what_does_not_happen_says_so(engine: FakeEngine) -> None:
    with pytest.raises(TimeoutError, match="1 requests: 0 requests came"):
        await engine.seen(1, within=0.01)


# As a process


async def test_a_process_serves_follows_its_script_and_dies_of_a_poisonous_prompt() -> None:
    async with (
        engine_process("--tokens", "4", "--fault", "status:code=503", "--dies-of", "poison") as running,
        aiohttp.ClientSession(running.url) as http,
    ):
        async with http.post(CHAT, json=ask()) as response:
            assert response.status == 503
        assert text_of(await streamed(http)) == reference_text(QUESTION, 4)
        with pytest.raises(aiohttp.ClientError):
            await streamed(http, messages=[{"role": "user", "content": "poison"}])
        assert await asyncio.wait_for(running.process.wait(), WITHIN) == 1


async def test_a_process_can_ignore_the_polite_way_to_stop_it() -> None:
    async with engine_process("--ignore-sigterm") as running, aiohttp.ClientSession(running.url) as http:
        running.process.terminate()
        assert text_of(await streamed(http)) == reference_text(QUESTION, 16)
        assert running.process.returncode is None
    async with engine_process() as running:
        running.process.terminate()
        assert await asyncio.wait_for(running.process.wait(), WITHIN) == 0
