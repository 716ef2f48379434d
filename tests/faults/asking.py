"""A client that believes nothing: it writes down all that an answer was, and takes nothing for an end but its
own mark."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from balancer.config_file import WorkerEntry
from tests.e2e.conftest import Room, listed
from tests.fakes.engine import FakeEngine, Fault, Request
from tests.fakes.speech import flat, reference_text

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TOKENS = 16
"""Of an answer of the fake engine, if a scene does not say otherwise."""

_numbers = itertools.count(1)


@dataclass
class Came:
    """All that came of one answer, until now."""

    question: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    ids: list[str] = field(default_factory=list)
    """Each once, like the next two."""
    models: list[str] = field(default_factory=list)
    created: list[int] = field(default_factory=list)
    roles: int = 0
    finishes: list[str] = field(default_factory=list)
    usages: list[Json] = field(default_factory=list)
    errors: list[Json] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    done: int = 0
    after_the_end: int = 0
    """Events after `[DONE]` or an error."""
    no_chunks: int = 0
    """Events that a strict client cannot read."""
    broken: str = ""
    """How the connection ended, if not as HTTP would have it."""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """A word has come."""

    @property
    def prompt(self) -> Any:
        return messages_of(self.question) if self.path == CHAT else self.question

    def reference(self, tokens: int = TOKENS) -> str:
        return reference_text(self.prompt, tokens)

    @property
    def succeeded(self) -> bool:
        """The client was told that this is all."""
        return self.status == 200 and not self.broken and not self.errors and bool(self.done)

    @property
    def failed_explicitly(self) -> bool:
        """The client was told that it is not."""
        return bool(self.errors) and not self.done

    def insist_on_success(self, tokens: int = TOKENS) -> None:
        """One whole answer, as an engine that never failed would have given it."""
        assert not self.broken, f"the connection broke: {self.broken} after {self.text!r}"
        assert (self.status, self.errors) == (200, []), f"after {self.text!r}"
        assert self.text == self.reference(tokens)
        assert self.finishes == ["stop"]
        assert (len(self.ids), len(self.models), len(self.created)) == (1, 1, 1)
        assert self.roles <= 1
        assert (self.done, self.after_the_end, self.no_chunks) == (1, 0, 0)

    def insist_on_an_honest_end(self, tokens: int = TOKENS) -> None:
        """Whatever else: what came is right as far as it goes, and the client knows whether it is all."""
        assert not self.broken, f"the connection broke: {self.broken} after {self.text!r}"
        assert self.reference(tokens).startswith(self.text)
        assert self.after_the_end == 0
        if not self.errors:
            self.insist_on_success(tokens)
        assert self.succeeded or self.failed_explicitly

    def take(self, event: bytes) -> None:
        """One block of a stream."""
        data = [
            line.partition(b":")[2].removeprefix(b" ") for line in event.split(b"\n") if line[:5] == b"data:"
        ]
        self.comments += [line[1:].decode().strip() for line in event.split(b"\n") if line[:1] == b":"]
        if not data:
            return
        if self.done or self.errors:
            self.after_the_end += 1
        line = b"\n".join(data)
        if line == b"[DONE]":
            self.done += 1
            return
        line.decode()  # whatever else it is, it is UTF-8
        try:
            chunk = orjson.loads(line)
            if "error" in chunk:
                self.errors.append(chunk["error"])
            else:
                self.take_chunk(chunk)
        except (orjson.JSONDecodeError, AttributeError, TypeError):
            self.no_chunks += 1

    def take_chunk(self, chunk: Json) -> None:
        for seen, key in ((self.ids, "id"), (self.models, "model"), (self.created, "created")):
            if key in chunk and chunk[key] not in seen:
                seen.append(chunk[key])
        if chunk.get("usage"):
            self.usages.append(chunk["usage"])
        for choice in chunk.get("choices", ()):
            piece = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            self.roles += "role" in piece
            self.text += piece.get("content") or ""
            if choice.get("finish_reason"):
                self.finishes.append(choice["finish_reason"])
        if self.text:
            self.begun.set()


def question() -> str:
    """One that nobody has asked before. It ends with a line break, so that a completion can go on."""
    return f"Question {next(_numbers)}: name some trees.\n"


def messages_of(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def body_of(asked: str, path: str = CHAT, **more: Any) -> Json:
    prompt = {"messages": messages_of(asked)} if path == CHAT else {"prompt": asked}
    return {"model": "fake", "stream": True, **prompt, **more}


@dataclass(frozen=True, slots=True)
class Address:
    """As much of a room as a client needs."""

    url: str
    http: aiohttp.ClientSession


async def ask(
    room: Room | Address, asked: str | None = None, *, path: str = CHAT, into: Came | None = None, **more: Any
) -> Came:
    """The whole story of one answer. Never raises for what the balancer does. `into`: written while it comes;
    `headers=` are the request's, all else is the body's."""
    came = into or Came(asked or question(), path)
    headers = more.pop("headers", {})
    body = body_of(came.question, path, **more)
    try:
        async with room.http.post(f"{room.url}{path}", json=body, headers=headers) as response:
            came.status, came.headers = response.status, dict(response.headers)
            if response.content_type == "text/event-stream":
                await _streamed(response, came)
            else:
                _whole(await response.read(), came)
    except aiohttp.ClientError as error:
        came.broken = type(error).__name__
    return came


async def _streamed(response: aiohttp.ClientResponse, came: Came) -> None:
    held = b""
    async for data in response.content.iter_any():
        *events, held = (held + data).split(b"\n\n")
        for event in events:
            came.take(event)
    if held.strip():
        came.broken = f"a torn event of {len(held)} bytes"


def _whole(body: bytes, came: Came) -> None:
    answer = orjson.loads(body)
    if "error" in answer:
        came.errors.append(answer["error"])
    else:
        came.take_chunk(answer)
        came.done += 1


async def ask_many(room: Room, number: int, **more: Any) -> list[Came]:
    """So many at once."""
    return list(await asyncio.gather(*(ask(room, **more) for _ in range(number))))


# The room ...


CONTINUES: Json = {"continues": True} if "continues" in WorkerEntry.model_fields else {}
"""In the row of a worker that goes on with others' answers."""


def rows(*engines: FakeEngine, **more: Any) -> list[Json]:
    """Workers a, b, c ... for the JSON file, which go on with each other's answers."""
    return [
        listed(engine, chr(ord("a") + number), **(CONTINUES | more)) for number, engine in enumerate(engines)
    ]


class FirstTry:
    """A condition for `always`: the first attempt at each of our questions, at whichever engine it arrives.

    With one of these at all engines of a room, every request meets its fault once, whoever is chosen."""

    def __init__(self) -> None:
        self.tried: set[str] = set()

    def __call__(self, request: Request) -> bool:
        asked = question_in(request)
        if asked is None or asked in self.tried:
            return False
        self.tried.add(asked)
        return True


def broken_once(engines: Sequence[FakeEngine], fault: Fault) -> None:
    """From now on the first attempt at each question of ours meets this, at whichever of them."""
    first = FirstTry()
    for engine in engines:
        engine.calm()
        engine.always(fault, when=first)


def question_in(request: Request) -> str | None:
    """Which of our questions this request is about; None: somebody else's, a probe's say."""
    prompt = request.body.get("prompt")
    messages = request.body.get("messages")
    if isinstance(messages, list) and messages:
        prompt = flat(messages[:1]).partition(": ")[2]
    if not isinstance(prompt, str) or not prompt.startswith("Question "):
        return None
    return prompt.partition("\n")[0]


def asked_for(engine: FakeEngine) -> list[Request]:
    """The requests of ours that it got."""
    return [request for request in engine.requests if question_in(request) is not None]


def attempts_at(engines: Sequence[FakeEngine]) -> dict[str, int]:
    """How often each question came to any of them."""
    counted: dict[str, int] = {}
    for request in itertools.chain.from_iterable(map(asked_for, engines)):
        asked = question_in(request) or ""
        counted[asked] = counted.get(asked, 0) + 1
    return counted


async def events_of(asked: str, **more: Any) -> list[bytes]:
    """The events of the whole answer of an engine that is well, as they are sent."""
    async with FakeEngine(tokens=TOKENS) as engine, aiohttp.ClientSession(engine.url) as http:
        async with http.post(CHAT, json=body_of(asked, **more)) as response:
            return [event + b"\n\n" for event in (await response.read()).split(b"\n\n")[:-1]]


async def until(holds: Callable[[], bool], what: str, within: float = 20.0) -> None:
    """Waits for a condition. TimeoutError says what did not come."""
    try:
        async with asyncio.timeout(within):
            while not holds():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise TimeoutError(f"not within {within:g} s: {what}") from None
