"""What a client sees when nothing goes wrong, with the official SDK."""

import asyncio
import threading

import openai
import pytest

from tests.e2e.conftest import OpenRoom, free_port, listed
from tests.fakes.engine import FakeEngine
from tests.fakes.speech import reference_embedding, reference_text

MESSAGES = [{"role": "user", "content": "Name some trees."}]


async def test_a_chat_is_answered(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        answer = await room.openai.chat.completions.create(model="fake", messages=MESSAGES)
        assert answer.choices[0].message.content == reference_text(MESSAGES, 16)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.object == "chat.completion"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16


async def test_a_chat_is_streamed_as_it_comes(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        stream = await room.openai.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == reference_text(MESSAGES, 16)
        assert chunks[-1].usage is not None
        assert chunks[-1].choices == []


async def test_a_client_that_did_not_ask_for_usage_gets_no_event_without_choices(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        stream = await room.openai.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        assert all([chunk.choices async for chunk in stream])


async def test_the_first_words_arrive_before_the_last_are_spoken(open_room: OpenRoom):
    from tests.fakes.faults import Fault

    async with FakeEngine() as engine, open_room(engine) as room:
        engine.script(Fault.stall(at_token=3))
        stream = await room.openai.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        text = ""
        while text != reference_text(MESSAGES, 3):
            text += (await anext(stream)).choices[0].delta.content or ""
        await engine.stalled()
        engine.resume()
        text += "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == reference_text(MESSAGES, 16)


async def test_a_completion_is_answered_and_streamed(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        answer = await room.openai.completions.create(model="fake", prompt="Trees:", max_tokens=5)
        assert answer.choices[0].text == reference_text("Trees:", 5)
        assert answer.choices[0].finish_reason == "length"
        stream = await room.openai.completions.create(model="fake", prompt="Trees:", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == reference_text("Trees:", 16)


async def test_embeddings_come_in_both_encodings(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        for encoding in ("float", "base64"):
            answer = await room.openai.embeddings.create(
                model="fake", input=["a", "b"], encoding_format=encoding
            )
            assert answer.data[1].index == 1
            if encoding == "float":
                assert answer.data[1].embedding == reference_embedding("b")


def test_the_synchronous_sdk_works_unchanged(open_room: OpenRoom):
    ready, done = threading.Event(), threading.Event()
    ports: list[str] = []

    async def serve() -> None:
        async with FakeEngine() as engine, open_room(engine) as room:
            ports.append(room.url)
            ready.set()
            await asyncio.to_thread(done.wait)

    server = threading.Thread(target=lambda: asyncio.run(serve()))
    server.start()
    try:
        assert ready.wait(20)
        with openai.OpenAI(base_url=f"{ports[0]}/v1", api_key="none") as client:
            answer = client.chat.completions.create(model="fake", messages=MESSAGES)
            assert answer.choices[0].message.content == reference_text(MESSAGES, 16)
            pieces = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == reference_text(
                MESSAGES, 16
            )
    finally:
        done.set()
        server.join()


async def test_models_are_merged_over_the_workers(open_room: OpenRoom):
    async with (
        FakeEngine(models=("m", "n"), context_tokens=8192) as one,
        FakeEngine(models=("m",), context_tokens=4096) as two,
        open_room(one, two) as room,
    ):
        models = {model.id: model.model_dump() for model in (await room.openai.models.list()).data}
        assert sorted(models) == ["m", "n"]
        assert (models["m"]["workers"], models["m"]["context_length"]) == (2, 4096)
        assert (await room.openai.models.retrieve("n")).id == "n"
        with pytest.raises(openai.NotFoundError, match="m, n"):
            await room.openai.models.retrieve("nothing")


async def test_a_request_goes_only_where_its_model_is(open_room: OpenRoom):
    async with (
        FakeEngine(models=("m",)) as one,
        FakeEngine(models=("n",)) as two,
        open_room(one, two) as room,
    ):
        for _ in range(5):
            await room.openai.chat.completions.create(model="n", messages=MESSAGES)
        assert (len(one.requests), len(two.requests)) == (0, 5)


async def test_an_ollama_worker_serves_too(open_room: OpenRoom):
    async with FakeEngine(models=("llama3:8b",)) as engine:
        async with open_room(listed(engine, "box", type="ollama")) as room:
            await room.ready()
            answer = await room.openai.chat.completions.create(model="llama3:8b", messages=MESSAGES)
            assert answer.choices[0].message.content == reference_text(MESSAGES, 16)
        assert "/api/tags" in {probe.path for probe in engine.probes}
        assert all(probe.path.startswith("/api/") for probe in engine.probes)


async def test_an_lm_studio_worker_serves_the_model_that_it_is_configured_for(open_room: OpenRoom):
    async with FakeEngine(models=("qwen", "other")) as engine:
        async with open_room(listed(engine, "mac", type="lm_studio", model="qwen")) as room:
            await room.ready()
            assert [model.id for model in (await room.openai.models.list()).data] == ["qwen"]
            answer = await room.openai.chat.completions.create(model="qwen", messages=MESSAGES)
            assert answer.choices[0].message.content == reference_text(MESSAGES, 16)


async def test_no_worker_is_given_more_than_it_is_configured_for(open_room: OpenRoom):
    async with FakeEngine(slots=50, token_seconds=0.002) as engine:
        async with open_room(listed(engine, "a", max_concurrent_requests=3)) as room:
            await room.ready()
            asked = [room.openai.chat.completions.create(model="fake", messages=MESSAGES) for _ in range(20)]
            answers = await asyncio.gather(*asked)
            assert len(answers) == 20
            assert engine.peak == 3
            await room.idle()


async def test_an_answer_says_where_it_comes_from(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        answer = await room.openai.chat.completions.with_raw_response.create(
            model="fake", messages=MESSAGES, extra_headers={"X-Request-ID": "mine-1"}
        )
        assert answer.headers["X-Request-ID"] == "mine-1"
        assert answer.headers["X-Balancer-Worker"] == "a"
        assert answer.headers["X-Balancer-Attempts"] == "1"
        assert answer.headers["X-Balancer-Model"] == "fake"
        assert answer.headers["X-Balancer-Reason"].startswith("picked with a chance of 100% among 1")
        assert int(answer.headers["X-Balancer-Queue-Ms"]) >= 0
        assert engine.requests[0].headers["x-request-id"] == "mine-1"


async def test_a_balancer_that_is_its_own_worker_does_not_go_round_for_ever(open_room: OpenRoom):
    port = free_port()
    own = {"id": "me", "host": "127.0.0.1", "port": port, "model": "fake"}
    async with open_room(own, max_retries=0, port=port) as room:
        await room.ready()
        with pytest.raises(openai.InternalServerError, match="name each other") as caught:
            await room.openai.chat.completions.create(model="fake", messages=MESSAGES)
        assert caught.value.status_code == 502
        await room.idle()


async def test_only_what_is_meant_for_a_worker_reaches_it(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        await room.openai.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            temperature=0.5,
            extra_headers={"Authorization": "Bearer secret", "Cookie": "a=b", "X-Forwarded-For": "1.2.3.4"},
            extra_body={"draft_model": "evil", "chat_parser": "{{ x }}"},
        )
        (request,) = engine.requests
        assert request.body["temperature"] == 0.5
        assert not {"draft_model", "chat_parser"} & set(request.body)
        assert not {"authorization", "cookie", "x-forwarded-for"} & set(request.headers)


@pytest.mark.parametrize(
    ("header", "tier", "expected"),
    [
        (None, None, "interactive"),
        (None, "auto", "interactive"),
        (None, "flex", "batch"),
        ("Batch", None, "batch"),
        ("INTERACTIVE", "flex", "interactive"),
        ("batch", "priority", "batch"),
    ],
)
async def test_a_request_names_its_class_and_the_header_wins(
    open_room: OpenRoom, header: str | None, tier: str | None, expected: str
):
    async with FakeEngine() as engine, open_room(engine) as room:
        answer = await room.openai.chat.completions.with_raw_response.create(
            model="fake",
            messages=MESSAGES,
            extra_headers={"X-Priority": header} if header else {},
            extra_body={"service_tier": tier, "prompt_cache_key": "mine"},
        )
        (request,) = engine.requests
        assert request.headers["x-priority"] == expected  # a balancer behind this one must know it too
        assert not {"service_tier", "prompt_cache_key"} & set(request.body)
        _, why = await room.admin("GET", f"/requests/{answer.headers['X-Request-ID']}/why")
        assert why["service_class"] == expected
        assert f'balancer_queue_seconds_count{{class="{expected}"' in await room.metrics()


async def test_a_class_that_does_not_exist_is_the_clients_fault(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        for more in (
            {"extra_headers": {"X-Priority": "urgent"}},
            {"extra_body": {"service_tier": "urgent"}},
            {"extra_body": {"prompt_cache_key": 5}},
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await room.openai.chat.completions.create(model="fake", messages=MESSAGES, **more)
            if "extra_headers" in more:
                assert "'interactive' or 'batch'" in str(caught.value)
        assert not engine.requests


async def test_a_long_paper_passes_as_it_is(open_room: OpenRoom):
    paper = [{"role": "user", "content": "word " * 600_000}]
    async with FakeEngine() as engine, open_room(engine) as room:
        answer = await room.openai.chat.completions.create(model="fake", messages=paper)
        assert answer.choices[0].message.content == reference_text(paper, 16)
        assert engine.requests[0].body["messages"] == paper


async def test_a_worker_that_keeps_connections_is_asked_over_one_of_them(open_room: OpenRoom):
    async with FakeEngine() as engine:
        async with open_room(listed(engine, "box", type="ollama")) as room:
            await room.ready()
            for stream in (False, True):
                before = engine.connections
                for _ in range(5):
                    answer = await room.openai.chat.completions.create(
                        model="fake", messages=MESSAGES, stream=stream
                    )
                    if stream:
                        assert len([chunk async for chunk in answer]) > 16
                assert engine.connections - before <= 2  # one of them may be a probe's
