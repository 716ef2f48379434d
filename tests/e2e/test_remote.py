"""Remote APIs as the last resort: asked in their own words over TLS, told nothing of the room, and with a
certificate that is looked at."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import trustme

from balancer import app, relay
from balancer.settings import SettingsError
from balancer.upstream import Address
from tests.e2e.conftest import OpenRoom, Room
from tests.fakes.engine import FakeEngine
from tests.fakes.faults import Fault
from tests.fakes.remote import KEY, WORDS, Answer, Anthropic, Authority, Azure, OpenAiLike, RemoteApi
from tests.fakes.speech import reference_text

MESSAGES = [{"role": "user", "content": "Name a tree."}]
TEXT = "".join(WORDS)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def tls(authority: Authority) -> ssl.SSLContext:
    return authority.serves("127.0.0.1")


@pytest.fixture
def key(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "key").write_text(f"{KEY}\n")
    return {"file": "key"}


Listed = Callable[..., dict[str, Any]]


@pytest.fixture
def listed(key: dict[str, str]) -> Listed:
    """The entry of a remote API in the JSON file."""

    def entry(api: RemoteApi, type_name: str, **more: Any) -> dict[str, Any]:
        offered = {"id": "far", "type": type_name, "url": api.url, "api_key": key, "ca_file": "ca.pem"}
        return offered | {"models": {"fake": "their-model"}} | more

    return entry


async def ask(room: Room, **fields: Any) -> Any:
    given = {"model": "fake", "messages": MESSAGES} | fields
    return await room.openai.chat.completions.create(**given)


async def streamed(room: Room, **fields: Any) -> list[Any]:
    stream = await ask(room, stream=True, stream_options={"include_usage": True}, **fields)
    return [chunk async for chunk in stream]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# Anthropic's API ...


async def test_an_answer_of_anthropics_is_openais(open_room: OpenRoom, listed: Listed, tls):
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic")) as room:
        await room.ready()
        answer = await ask(room, max_tokens=9, temperature=1.5, stop=["END"])
        assert answer.choices[0].message.content == TEXT
        assert (answer.choices[0].finish_reason, answer.model) == ("stop", "fake")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (16, 5)
        assert api.told[0].path == "/v1/messages"
        assert api.told[0].body == {
            "model": "their-model",
            "max_tokens": 9,
            "stream": True,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Name a tree."}]}],
            "temperature": 1,
            "stop_sequences": ["END"],
        }


@pytest.mark.parametrize("size", [None, 1, 700])
async def test_a_stream_of_anthropics_is_openais_in_any_cut(
    open_room: OpenRoom, listed: Listed, tls, size: int | None
):
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic")) as room:
        await room.ready()
        api.script.append(Answer(piece_bytes=size))
        chunks = await streamed(room)
        assert text_of(chunks) == TEXT
        assert {chunk.model for chunk in chunks} == {"fake"}
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
        assert chunks[-1].usage.completion_tokens == 5
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 4


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_tool_is_called_through_both_apis(open_room: OpenRoom, listed: Listed, tls, stream: bool):
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic")) as room:
        await room.ready()
        if stream:
            deltas = [
                chunk.choices[0].delta for chunk in await streamed(room, tools=[weather]) if chunk.choices
            ]
            calls = [call for delta in deltas for call in delta.tool_calls or []]
            name, arguments = calls[0].function.name, "".join(call.function.arguments for call in calls)
        else:
            (call,) = (await ask(room, tools=[weather])).choices[0].message.tool_calls
            name, arguments = call.function.name, call.function.arguments
        assert (name, arguments) == ("weather", '{"city": "Bonn"}')


async def test_a_remote_api_is_told_nothing_of_the_room(open_room: OpenRoom, listed: Listed, tls):
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic")) as room:
        await room.ready()
        body = {"model": "fake", "messages": MESSAGES, "user": "me", "metadata": {"project": "x"}}
        headers = {"Authorization": "Bearer of-the-client", "X-Request-ID": "mine", "X-Priority": "batch"}
        async with room.http.post(f"{room.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200
            assert response.headers["X-Balancer-Fallback"] == "1"
        told = api.told[0]
        assert told.headers.keys() == {
            *("host", "x-api-key", "anthropic-version", "content-type", "content-length"),
            *("accept", "accept-encoding", "user-agent"),
        }
        assert told.headers["host"] == f"127.0.0.1:{api.port}"
        assert told.body.keys() == {"model", "max_tokens", "stream", "messages"}
        assert {"x-api-key", "anthropic-version"} <= api.looked_in[0].headers.keys()


async def test_what_cannot_be_asked_there_is_refused_before_anything_is_sent(
    open_room: OpenRoom, listed: Listed, tls
):
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic")) as room:
        await room.ready()
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(room, n=2)
        assert "one answer at a time" in caught.value.message
        assert caught.value.param == "n"
        with pytest.raises(openai.BadRequestError):
            await room.openai.embeddings.create(model="fake", input="x")
        assert not api.told


async def test_what_the_api_finds_wrong_reaches_the_client(open_room: OpenRoom, listed: Listed, tls):
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic")) as room:
        await room.ready()
        api.script.append(api.error(400, "invalid_request_error", "prompt is too long"))
        with pytest.raises(openai.BadRequestError, match="prompt is too long"):
            await ask(room)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "busy",
    [
        Answer(
            status=529, body={"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
        ),
        Answer(
            status=429,
            body={
                "type": "error",
                "error": {"type": "rate_limit_error", "message": "org-1 is over its limit"},
            },
            headers={"Retry-After": "1"},
        ),
        Answer(events=({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},)),
    ],
    ids=["529", "429", "in the stream"],
)
async def test_an_api_that_is_busy_is_asked_again(
    open_room: OpenRoom, listed: Listed, tls, busy: Answer, stream: bool
):
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic")) as room:
        await room.ready()
        api.script.append(busy)
        answer = text_of(await streamed(room)) if stream else (await ask(room)).choices[0].message.content
        assert answer == TEXT
        assert len(api.told) == 2
        assert room.worker("far").state == "ready"


async def test_a_stream_without_its_stop_is_not_whole(open_room: OpenRoom, listed: Listed, tls):
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic")) as room:
        await room.ready()
        api.script.append(Answer(ends_early=True))
        with pytest.raises(openai.APIError, match="failed in the middle"):
            await streamed(room)
        api.script.append(Answer(ends_early=True))
        assert (await ask(room)).choices[0].message.content == TEXT  # nobody has seen the torn one


async def test_a_key_that_is_refused_is_never_shown(open_room: OpenRoom, listed: Listed, tls, caplog):
    caplog.set_level(logging.INFO)
    async with OpenAiLike(tls) as api, open_room(listed(api, "openai", fallback=True)) as room:
        await room.ready()
        api.key = "another"
        with pytest.raises(openai.APIStatusError) as caught:
            await ask(room)
        assert "api_key" in caught.value.message
        assert caught.value.status_code == 502
        assert "***" not in caught.value.message
    assert KEY not in caplog.text


async def test_a_key_that_is_wrong_from_the_start_is_told_in_the_log(
    open_room: OpenRoom, listed: Listed, tls, caplog
):
    async with Anthropic(tls) as api:
        api.key = "another"
        async with open_room(listed(api, "anthropic")) as room:
            await room.until(lambda: room.worker("far").state == "lost", "it is lost")
            assert "api_key" in str(room.worker("far").detail)
    assert 'check "api_key" of this worker' in caplog.text


# Azure's and OpenAI's own ...


@pytest.mark.parametrize("version", [None, "2024-10-21"])
async def test_azure_is_asked_by_its_deployment(
    open_room: OpenRoom, listed: Listed, tls, version: str | None
):
    async with Azure(tls, "their-model", version) as api:
        more = {} if version is None else {"api_version": version}
        async with open_room(listed(api, "azure", **more)) as room:
            await room.ready()
            chunks = await streamed(room, max_tokens=9)
            assert text_of(chunks) == TEXT
            # Its first event, about the prompt, names no model; nobody is shown what it calls it.
            assert {chunk.model for chunk in chunks} - {""} == {"fake"}
            embedded = await room.openai.embeddings.create(model="fake", input="x")
            assert embedded.data[0].embedding == [0.25, 0.5]
        told = api.told[0]
        limit = "max_completion_tokens" if version is None else "max_tokens"
        assert told.body[limit] == 9
        assert told.headers["api-key"] == KEY
        assert "authorization" not in told.headers
        assert told.path == (
            "/openai/v1/chat/completions"
            if version is None
            else "/openai/deployments/their-model/chat/completions?api-version=2024-10-21"
        )


async def test_another_openai_is_not_asked_in_engines_own_words(open_room: OpenRoom, listed: Listed, tls):
    async with OpenAiLike(tls) as api, open_room(listed(api, "openai", fallback=True)) as room:
        await room.ready()
        chunks = await streamed(room, extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1})
        assert text_of(chunks) == TEXT
        assert api.told[0].body.keys() == {"model", "messages", "stream", "stream_options"}


async def test_only_what_is_named_is_offered(open_room: OpenRoom, listed: Listed, tls):
    async with OpenAiLike(tls) as api, open_room(listed(api, "openai", fallback=True)) as room:
        await room.ready()
        assert [model.id async for model in room.openai.models.list()] == ["fake"]
        with pytest.raises(openai.NotFoundError):
            await ask(room, model="their-model")


# The last resort ...


async def test_the_room_comes_first_and_the_api_last(open_room: OpenRoom, listed: Listed, tls):
    async with FakeEngine(tokens=8) as engine, OpenAiLike(tls) as api:
        row = {"id": "near", "url": engine.url}
        async with open_room(row, listed(api, "openai", fallback=True)) as room:
            await room.ready(2)
            answer = await ask(room)
            assert answer.choices[0].message.content == reference_text(MESSAGES, 8)
            assert not api.told
            engine.always(Fault.status(500))
            answer = await ask(room)
            assert answer.choices[0].message.content == TEXT
            await room.idle()


async def test_a_request_that_is_to_stay_local_does(open_room: OpenRoom, listed: Listed, tls):
    async with OpenAiLike(tls) as api, open_room(listed(api, "openai", fallback=True)) as room:
        await room.ready()
        with pytest.raises(openai.APIStatusError, match="local"):
            await ask(room, extra_headers={"X-Local-Only": "true"})
        assert not api.told


@pytest.mark.parametrize("order", [("true", "false"), ("false", "true")])
async def test_a_request_whose_headers_contradict_each_other_does_not_leave(
    open_room: OpenRoom, listed: Listed, tls, order: tuple[str, str]
):
    """Whichever of them counts: who has said it once must not find their prompts elsewhere."""
    async with OpenAiLike(tls) as api, open_room(listed(api, "openai", fallback=True)) as room:
        await room.ready()
        body = {"model": "fake", "messages": MESSAGES}
        headers = [("X-Local-Only", value) for value in order]
        async with room.http.post(f"{room.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 400
            assert "X-Local-Only" in await response.text()
        twice = [("X-Local-Only", "true"), ("x-local-ONLY", "true")]
        async with room.http.post(f"{room.url}/v1/chat/completions", json=body, headers=twice) as response:
            assert (await response.json())["error"]["code"] == "model_not_local"
        assert not api.told


async def test_what_one_fallback_cannot_be_asked_another_is(open_room: OpenRoom, listed: Listed, tls):
    async with Anthropic(tls) as claude, OpenAiLike(tls) as api:
        rows = listed(claude, "anthropic", id="claude"), listed(api, "openai", fallback=True)
        async with open_room(*rows) as room:
            await room.ready(2)
            for _ in range(8):
                assert (await ask(room, n=2)).choices[0].message.content == TEXT
            assert len(api.told) == 8
            assert not claude.told
            assert room.worker("claude").success_rate == 1


# What goes wrong there ...


async def test_an_error_whose_words_do_not_come_is_judged_by_its_status(
    open_room: OpenRoom, listed: Listed, tls, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(relay, "ERROR_BODY_SECONDS", 0.1)
    async with OpenAiLike(tls) as api, open_room(listed(api, "openai", fallback=True)) as room:
        await room.ready()
        api.script.append(Answer(status=503, stalls=True))
        assert (await ask(room)).choices[0].message.content == TEXT
        api.script.append(Answer(status=400, stalls=True))
        with pytest.raises(openai.BadRequestError):
            await ask(room)


async def test_an_answer_in_one_piece_that_stops_in_the_middle_is_had_again(
    open_room: OpenRoom, listed: Listed, tls
):
    async with OpenAiLike(tls) as api:
        async with open_room(listed(api, "openai", fallback=True), read_timeout=0.2) as room:
            await room.ready()
            api.script.append(Answer(stalls=True))
            embedded = await room.openai.embeddings.create(model="fake", input="x")
            assert embedded.data[0].embedding == [0.25, 0.5]
            assert len(api.told) == 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_where_an_api_sends_us_to_nobody_goes(open_room: OpenRoom, listed: Listed, tls, stream: bool):
    async with OpenAiLike(tls) as other, OpenAiLike(tls) as api:
        async with open_room(listed(api, "openai", fallback=True)) as room:
            await room.ready()
            elsewhere = {"Location": f"{other.url}/v1/chat/completions"}
            for status in (301, 307):
                api.script.append(Answer(status=status, body={}, headers=elsewhere))
            answer = text_of(await streamed(room)) if stream else (await ask(room)).choices[0].message.content
            assert (answer, len(api.told)) == (TEXT, 3)
            assert not other.told
            assert not other.looked_in


async def test_a_key_that_a_worker_of_the_room_repeats_is_not_shown(
    open_room: OpenRoom, tls, key: dict[str, str], caplog
):
    caplog.set_level(logging.INFO)
    async with OpenAiLike(tls) as api:
        row = {"id": "near", "url": api.url, "ca_file": "ca.pem", "api_key": key, "model": "fake"}
        async with open_room(row) as room:
            await room.ready()
            for status in (400, 401, 403, 500):
                # Masked as OpenAI does it, and plainly.
                words = f"Incorrect API key provided: {KEY[:8]}***{KEY[-4:]}" if status in (401, 403) else KEY
                api.script.extend([api.error(status, KEY, words)] * 4)
                with pytest.raises(openai.APIStatusError) as caught:
                    await ask(room)
                assert KEY not in str(caught.value.body)
                assert KEY[:8] not in str(caught.value.body)
                api.script.clear()
            assert KEY not in await room.metrics()
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("invalid_api_key", "No such key"),
        ("invalid_request", f"Incorrect API key provided: {KEY[:6]}***."),
        ("400", "API key not valid. Please pass a valid API key."),
    ],
)
async def test_a_wrong_key_is_not_the_clients_doing_whatever_the_status(
    open_room: OpenRoom, listed: Listed, tls, code: str, words: str
):
    """xAI and Google say it with 400."""
    async with OpenAiLike(tls) as api, open_room(listed(api, "openai", fallback=True)) as room:
        await room.ready()
        api.script.extend([api.error(400, code, words)] * 4)
        with pytest.raises(openai.APIStatusError) as caught:
            await ask(room)
        assert caught.value.status_code != 400
        assert KEY[:6] not in caught.value.message


async def test_a_code_that_is_none_reaches_no_log_and_no_metric(
    open_room: OpenRoom, listed: Listed, tls, caplog
):
    caplog.set_level(logging.INFO)
    async with OpenAiLike(tls) as api, open_room(listed(api, "openai", fallback=True)) as room:
        await room.ready()
        api.script.append(api.error(400, "x\nINFO a line of its own", "too long"))
        with pytest.raises(openai.BadRequestError, match="too long"):
            await ask(room)
        api.script.append(api.error(400, "context_length_exceeded", "too long"))
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(room)
        assert caught.value.code == "context_length_exceeded"
        assert "of its own" not in await room.metrics()
    assert "of its own" not in caplog.text


# Reloads ...


def one_at_a_time(engine: FakeEngine, name: str) -> dict[str, Any]:
    return {"id": name, "url": engine.url, "max_concurrent_requests": 1}


async def reloaded(room: Room, **members: Any) -> int:
    """The status of a reload with other members in the first worker's entry."""
    config = json.loads(room.config.read_text())
    config["workers"][0] |= members
    room.config.write_text(json.dumps(config))
    return (await room.admin("POST", "/config/reload"))[0]


async def test_a_certificate_that_cannot_be_read_again_leaves_the_one_in_use(
    open_room: OpenRoom, listed: Listed, tls, authority: Authority
):
    async with OpenAiLike(tls) as api, open_room(listed(api, "openai", fallback=True)) as room:
        await room.ready()
        pem = authority.file.read_text()
        authority.file.write_text("half of a certificate")
        assert await reloaded(room) == 422
        api.script.append(Answer(status=500, body={}, headers={"Connection": "close"}))  # so it connects anew
        assert (await ask(room)).choices[0].message.content == TEXT
        assert len({told.peer for told in api.told}) == 2
        authority.file.write_text(pem)
        assert await reloaded(room) == 200


async def test_a_new_key_does_not_go_to_the_address_of_before(
    open_room: OpenRoom, listed: Listed, tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The worker moves in the moment between a request's grant and its sending."""
    (tmp_path / "new-key").write_text("secret-of-the-new-address")
    async with OpenAiLike(tls) as before, OpenAiLike(tls) as after:
        after.key = "secret-of-the-new-address"
        async with open_room(listed(before, "openai", fallback=True)) as room:
            await room.ready()
            translated, moves = relay._translated, [True]

            async def moving(*about: Any) -> bytes:
                if moves:
                    moves.clear()
                    assert await reloaded(room, url=after.url, api_key={"file": "new-key"}) == 200
                return await translated(*about)

            monkeypatch.setattr(relay, "_translated", moving)
            assert (await ask(room)).choices[0].message.content == TEXT
            assert ["authorization" in told.headers for told in before.told] == [False]
            assert len(after.told) == 1


async def test_who_waits_while_all_workers_are_renamed_is_served(
    open_room: OpenRoom, monkeypatch: pytest.MonkeyPatch
):
    policy = app._dispatch_policy
    monkeypatch.setattr(app, "_dispatch_policy", lambda given: replace(policy(given), settle_seconds=0.0))
    async with FakeEngine() as engine, open_room(one_at_a_time(engine, "a")) as room:
        await room.ready()
        engine.always(Fault.stall(at_token=2))
        first = asyncio.ensure_future(ask(room, max_tokens=4))
        await room.until(lambda: room.worker("a").running > 0, "it runs")
        rest = [asyncio.ensure_future(ask(room, max_tokens=4)) for _ in range(8)]
        await room.until(lambda: room.balancer.snapshot().waiting > 0, "some wait")
        engine.always(Fault())
        assert await reloaded(room, id="renamed") == 200
        assert [view.worker.id for view in room.balancer.snapshot().workers] == ["renamed"]
        for answer in await asyncio.gather(*rest):
            assert answer.choices[0].message.content
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


# Certificates ...


async def test_a_worker_of_the_room_may_speak_tls_with_a_certificate_of_ones_own(
    open_room: OpenRoom, tls, key: dict[str, str]
):
    async with OpenAiLike(tls) as api:
        row = {"id": "near", "url": api.url, "ca_file": "ca.pem", "api_key": key}
        async with open_room(row) as room:
            await room.ready()
            answer = await ask(room, model="gpt-4o-mini")
            assert answer.choices[0].message.content == TEXT
            assert "x-request-id" in api.told[0].headers


async def test_a_connection_over_tls_is_used_again(open_room: OpenRoom, listed: Listed, tls):
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic")) as room:
        await room.ready()
        for _ in range(3):
            await ask(room)
        assert len({told.peer for told in api.told}) == 1


def test_no_connection_is_shared_by_those_who_trust_differently():
    url = "https://h:1/v1"
    assert Address.of(url, "a.pem") != Address.of(url, "b.pem") != Address.of(url)
    assert Address.of("http://h:1", "a.pem") == Address.of("http://h:1")


def expired(authority: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority._ca.issue_cert(
        "127.0.0.1", not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    ).configure_cert(context)
    return context


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda authority, folder: Authority(folder, "other").serves("127.0.0.1"),
            "signed by nobody who is trusted",
        ),
        (lambda authority, folder: authority.serves("balancer.example"), "is for another host"),
        (lambda authority, folder: expired(authority), "has expired"),
        (lambda authority, folder: None, "does not speak TLS there"),
    ],
    ids=["of an unknown CA", "for another name", "expired", "none at all"],
)
async def test_a_certificate_that_does_not_hold_is_named_and_nothing_is_sent(
    open_room: OpenRoom, listed: Listed, authority: Authority, tmp_path: Path, make, words: str
):
    async with Anthropic(make(authority, tmp_path)) as api:
        row = listed(api, "anthropic", url=api.url.replace("http:", "https:"))
        async with open_room(row) as room:
            await room.until(lambda: room.worker("far").state == "lost", "it is lost")
            assert words in str(room.worker("far").detail)
        assert not api.looked_in
        assert not api.told


async def test_no_ca_is_trusted_beside_the_one_that_is_named(
    open_room: OpenRoom, listed: Listed, tls, tmp_path: Path
):
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "mine.pem"))
    async with Anthropic(tls) as api, open_room(listed(api, "anthropic", ca_file="mine.pem")) as room:
        await room.until(lambda: room.worker("far").state == "lost", "it is lost")
        assert "ca_file" in str(room.worker("far").detail)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), ("not a certificate", "it holds no certificate")]
)
async def test_a_ca_file_that_cannot_be_used_is_told_at_the_start(
    open_room: OpenRoom, listed: Listed, tls, tmp_path: Path, content: str | None, words: str
):
    if content is not None:
        (tmp_path / "mine.pem").write_text(content)
    async with Anthropic(tls) as api:
        with pytest.raises(SettingsError, match=words):
            async with open_room(listed(api, "anthropic", ca_file="mine.pem")):
                pass
