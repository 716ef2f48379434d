"""Requests for answers, whichever server has read them off the wire: who may ask, what is asked, the
journey, and the words of every error.

A server (`front` on aiohttp, `hot_path` on a protocol of our own) gives it heads and bodies, and a `Client`
to write the answer to.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

from balancer.access import Access, ApiKey, ApiKeyOver, ModelNotAllowed
from balancer.core.errors import (
    BadRequest,
    BodyTooLarge,
    Forbidden,
    LoopDetected,
    QueueFull,
    RequestError,
    ShuttingDown,
    UnsupportedMedia,
)
from balancer.core.model import Candidate, Choice, Endpoint, ServiceClass
from balancer.dialects import openai
from balancer.dialects.framing import event
from balancer.history import share_of
from balancer.journey import Journey, Story
from worker_agent.log_format import current_request
from worker_agent.sources import Sources
from worker_agent.wire import HOPS_HEADER, REQUEST_ID_HEADER

log = logging.getLogger(__name__)

LARGE_BODY_BYTES = 1024 * 1024
"""To read a megabyte of JSON takes about 10 ms."""

MAX_HOPS = 4
"""A balancer may well be another one's worker; more of them in a row are a circle."""

PRIORITY_HEADER = "X-Priority"
"""A request's class, by name. Goes on to the worker, which may be a balancer too; others ignore it."""

LOCAL_ONLY_HEADER = "X-Local-Only"
"""`true` or `1`: the request must not leave the room, whatever fallbacks there are. Goes on to the worker."""
FALLBACK_HEADER = "X-Balancer-Fallback"
"""`1` on an answer that came from outside of the room."""

COMMENT_GAP_SECONDS = 10.0
"""Between two comments to a client that waits; the first may come sooner."""

_REQUEST_ID, _HOPS, _PRIORITY, _LOCAL_ONLY = (
    name.lower() for name in (REQUEST_ID_HEADER, HOPS_HEADER, PRIORITY_HEADER, LOCAL_ONLY_HEADER)
)
_UNCOUNTED = nullcontext()
_NO_LIMITS: Mapping[str, str] = {}  # a plain one is put into a dictionary for nothing
_HARMLESS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

JSON_TYPE = "application/json"
STREAM_HEADERS: Mapping[str, str] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}


@dataclass(frozen=True, slots=True)
class InferencePolicy:
    max_body_bytes: int = 32 * 1024 * 1024
    max_held_bytes: int = 512 * 1024 * 1024
    """Of all requests that wait or run."""
    sources: Sources = field(default_factory=Sources)
    """Who is served at all."""
    comment_seconds: float = 5.0
    """A streaming client that has waited so long is told why, in a comment; 0: never."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request as far as its headers."""

    endpoint: Endpoint
    headers: Mapping[str, str]
    """By names in lower case. None of them came twice."""
    remote: str
    """The address at the other end of the connection."""


class Client(Protocol):
    """A client's connection as far as one answer needs it. Nothing here waits or raises: a client that is
    gone swallows what is written, and its server cancels whoever answers it."""

    def begin(self, status: int, headers: Mapping[str, str], length: int | None) -> None:
        """The head of the answer. `length`: of the body, in bytes; None: its end shows by its framing
        (chunks; for HTTP/1.0 by closing). Content-Length, Transfer-Encoding, Connection and Date are the
        server's to add."""
        ...

    def write(self, data: bytes) -> None:
        """A piece of the body, sent at once."""
        ...

    def end(self) -> None:
        """The body is whole."""
        ...

    def on_room(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """Whom to tell that the client reads slower than it is written to (more than 64 KiB wait), and that
        it has caught up. Told at once if it is behind already. A server drops a client that stays behind
        for longer than its policy says."""
        ...


class Holdable(Protocol):
    """What can be held up while a client reads slowly."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request whose head was found to be right; its body may be read."""

    head: Head
    request_id: str
    hops: int
    named_class: ServiceClass | None
    local_only: bool = False
    key: ApiKey | None = None
    """Whose request it is, where keys are asked for."""
    limits: Mapping[str, str] = field(default_factory=dict)
    """Headers that tell the client how much of them is left."""


class Inference:
    """What all servers of the inference routes share."""

    def __init__(
        self, journey: Journey, policy: InferencePolicy, *, secret: bytes, access: Access | None = None
    ) -> None:
        """`secret`: at most 64 bytes, for digests of prompts and keys that tell nothing to others. `access`:
        the keys of which each request has to bring one; None: keys are not looked at."""
        self.policy = policy
        self._journey = journey
        self._secret = secret
        self.ask_for_keys(access)
        self.draining = False
        """Set when the balancer is about to end: nothing new is taken, connections are not kept."""
        self._held_bytes = 0
        self._sources: dict[str, bool] = {}

    def adopt(self, policy: InferencePolicy) -> None:
        """Whoever comes from now on is served by it."""
        self.policy = policy
        self._sources.clear()

    def ask_for_keys(self, access: Access | None) -> None:
        """From now on each request has to bring one of these; None: keys are not looked at."""
        self.access = access
        if access is not None:
            access.on_over = self._turn_away

    # Before the body is read

    def insist_on_source(self, remote: str) -> None:
        """Raises `Forbidden` for who is not served at all."""
        admitted = self._sources.get(remote)
        if admitted is None:
            if len(self._sources) >= 4096:
                self._sources.clear()
            admitted = self._sources[remote] = self.policy.sources.admit(remote)
        if not admitted:
            raise Forbidden(
                f"{remote} is no private address. To have its network served, name it in the "
                "balancer's setting allow_networks."
            )

    def admit(self, head: Head) -> Admitted:
        """Raises a `RequestError` for a request that need not be read any further."""
        headers = head.headers
        self.insist_on_source(head.remote)
        hops = _hops(headers.get(_HOPS, "0"))
        if hops >= MAX_HOPS:
            raise LoopDetected(
                f"The request has passed {MAX_HOPS} balancers: some of them name each other as workers."
            )
        if self.draining:
            raise ShuttingDown("This balancer is about to stop. Try again in a moment.")
        access = self.access
        key = None if access is None else access.recognise(headers, head.remote)
        named_class = _class_in(headers.get(_PRIORITY))
        local_only = _is_local_only(headers.get(_LOCAL_ONLY))
        insist_on_plain_json(headers)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.policy.max_body_bytes:
            raise self.too_large()
        if access is None or key is None:
            return Admitted(head, request_id(headers), hops, named_class, local_only, None, _NO_LIMITS)
        limits = access.take(key)
        local_only = local_only or key.local_only
        return Admitted(head, request_id(headers), hops, named_class, local_only, key, limits)

    def readable(self, headers: Mapping[str, str], remote: str) -> Callable[[str], bool]:
        """Which models the sender of this request may know of. `headers`: by names in lower case. Raises a
        `RequestError` for who has to bring a key and has none."""
        if self.access is None:
            return lambda _: True
        return self.access.recognise(headers, remote).allows_model

    def too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"The request body is larger than {self.policy.max_body_bytes} bytes; "
            "the limit is the setting max_body_mib."
        )

    # With it

    async def answer(self, admitted: Admitted, body: bytes, client: Client) -> None:
        """Writes one answer, whatever comes of the request. Cancelled when the client left."""
        current_request.set(admitted.request_id)
        story = None
        delivery = None
        held = 0
        try:
            held = self._hold(len(body))
            with self._counted(admitted.key):
                asked = await _parsed(admitted.head.endpoint, body, self._secret)
                del body  # from here on it is held as what goes to a worker
                if admitted.local_only and not asked.local_only:
                    asked = replace(asked, local_only=True)
                if admitted.key is not None and not admitted.key.allows_model(asked.model):
                    raise ModelNotAllowed(admitted.key, asked.model)
                story = self._story(admitted, asked)
                if asked.stream:
                    delivery = _Delivery(
                        client, story, self._journey, self.policy.comment_seconds, admitted.limits
                    )
                answer = await self._journey.serve(asked, story, delivery)
            if delivery is not None:
                client.end()
            elif answer is not None:
                told = {"Content-Type": JSON_TYPE, **admitted.limits, **_answered_by(story, 0)}
                client.begin(200, told, len(answer))
                client.write(answer)
                client.end()
        except Exception as error:
            refusal = as_refusal(error)
            if story is None:  # what has a story is told by its end
                self.note(admitted.head, refusal)
            if delivery is not None and delivery.open:
                # Too late for a status: an error event and no end mark, which SDKs raise as an exception.
                client.write(event(openai.error_body(refusal)))
                client.end()
            else:
                refuse(admitted.request_id, refusal, client, admitted.limits)
        finally:
            self._held_bytes -= held
            if delivery is not None:
                delivery.close()
            current_request.set("")  # what is called soon from here on belongs to another request

    def note(self, head: Head, refusal: RequestError) -> None:
        """One line in the log for a request that was refused before it had a story."""
        log.info(
            "%s POST %s refused: %d %s",
            *(head.remote, head.endpoint.value, refusal.status, refusal.code or refusal.type),
        )

    def _story(self, admitted: Admitted, asked: openai.Request) -> Story:
        head = admitted.head
        key = admitted.key
        service_class = (
            admitted.named_class or asked.service_class
            if key is None
            else key.class_of(admitted.named_class, asked.service_class)
        )
        passed_on = {
            REQUEST_ID_HEADER: admitted.request_id,
            HOPS_HEADER: str(admitted.hops + 1),
            PRIORITY_HEADER: service_class.value,
        }
        if asked.local_only:  # a worker may be a balancer, with fallbacks of its own
            passed_on[LOCAL_ONLY_HEADER] = "1"
        asker = (
            _digest_of_key(head.headers.get("authorization"), self._secret) if key is None else _asker(key)
        )
        return self._journey.begin(admitted.request_id, head.remote, passed_on, service_class, asker)

    def _counted(self, key: ApiKey | None) -> AbstractContextManager[None]:
        """As one of those that its key may have under way."""
        if key is None or self.access is None:
            return _UNCOUNTED
        self.access.insist_on_force(key)  # its body may have been long in coming
        return self.access.holding(key)

    def _turn_away(self, key: ApiKey) -> None:
        self._journey.turn_away(_asker(key), ApiKeyOver(key.name, revoked=True))

    def _hold(self, size: int) -> int:
        """Counts the bytes of all that waits or runs: a line of a thousand long papers is bounded too."""
        if self._held_bytes + size > self.policy.max_held_bytes:
            raise QueueFull("Too many long requests are under way. Try again in 5 s.", 5.0)
        self._held_bytes += size
        return size


class _Delivery:
    """A client's stream of events: begun with the first piece of the answer, or when the client has waited
    long enough to be told why; until then an error keeps its status."""

    def __init__(
        self,
        client: Client,
        story: Story,
        journey: Journey,
        comment_seconds: float,
        limits: Mapping[str, str],
    ) -> None:
        self._client = client
        self._limits = limits
        self._story = story
        self._journey = journey
        self._comment_seconds = comment_seconds
        self._exchange: Holdable | None = None
        self._behind = False
        self.open = False
        """The head was sent."""
        self._comments: asyncio.TimerHandle | None = None
        self._wait()

    def send(self, data: bytes) -> None:
        if self._comments is not None:
            self._comments.cancel()
            self._comments = None
        if not self.open:
            self._begin(_answered_by(self._story, 1))
        self._client.write(data)

    def comes_from(self, exchange: Holdable) -> None:
        self._exchange = exchange
        if self._behind:
            exchange.pause()

    def let_go(self, exchange: Holdable) -> None:
        if self._exchange is exchange:
            self._exchange = None
            self._wait()  # for whoever goes on, if it is to go on

    def _wait(self) -> None:
        if self._comment_seconds and self._comments is None:
            self._comments = asyncio.get_running_loop().call_later(self._comment_seconds, self._comment)

    def close(self) -> None:
        if self._comments is not None:
            self._comments.cancel()

    def _begin(self, answered_by: Mapping[str, str]) -> None:
        self.open = True
        self._client.begin(200, {**STREAM_HEADERS, **self._limits, **answered_by}, None)
        self._client.on_room(self._pause, self._resume)

    def _comment(self) -> None:
        if not self.open:
            self._begin({REQUEST_ID_HEADER: self._story.request_id})
        self._client.write(f": {self._journey.whereabouts(self._story)}\n\n".encode())
        self._comments = asyncio.get_running_loop().call_later(
            max(self._comment_seconds, COMMENT_GAP_SECONDS), self._comment
        )

    def _pause(self) -> None:
        self._behind = True
        if self._exchange is not None:
            self._exchange.pause()

    def _resume(self) -> None:
        self._behind = False
        if self._exchange is not None:
            self._exchange.resume()


async def _parsed(endpoint: Endpoint, body: bytes, secret: bytes) -> openai.Request:
    """Off the loop where it takes long enough to be felt by others."""
    if len(body) <= LARGE_BODY_BYTES:
        return openai.parse(endpoint, body, secret)
    return await asyncio.to_thread(openai.parse, endpoint, body, secret)


def insist_on_plain_json(headers: Mapping[str, str]) -> None:
    """Raises `UnsupportedMedia`."""
    if headers.get("content-encoding", "identity").lower() != "identity":
        # Unpacked before it could be measured, a megabyte can become hundreds (RELIABILITY D14).
        raise UnsupportedMedia("Compressed request bodies are not accepted: leave out Content-Encoding.")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != JSON_TYPE:
        raise UnsupportedMedia("Send the request as JSON, with 'Content-Type: application/json'.")


def request_id(headers: Mapping[str, str]) -> str:
    """The client's own id where it is harmless in a log and a header, else one of ours."""
    theirs = headers.get(_REQUEST_ID, "")
    return theirs if _HARMLESS_ID.fullmatch(theirs) else f"req_{os.urandom(16).hex()}"


def _hops(value: str) -> int:
    return int(value) if value.isascii() and value.isdigit() and len(value) <= 4 else 0


def _class_in(name: str | None) -> ServiceClass | None:
    """As the header names it; None: it does not."""
    if name is None:
        return None
    try:
        return ServiceClass(name.strip().lower())
    except ValueError:
        names = " or ".join(repr(known.value) for known in ServiceClass)
        raise BadRequest(f"The header {PRIORITY_HEADER} must be {names}, or left out.") from None


def _is_local_only(value: str | None) -> bool:
    if value is None:
        return False
    meant = openai.read_flag(value)
    if meant is None:
        raise BadRequest(f"The header {LOCAL_ONLY_HEADER} must be 'true' or 'false', or left out.")
    return meant


def _asker(key: ApiKey) -> str:
    return f"key {key.id}"


def _digest_of_key(authorization: str | None, secret: bytes) -> str:
    """What tells clients with different API keys apart; empty: it came without one."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return ""
    digest = hashlib.blake2b(key.strip().encode("utf-8", "surrogateescape"), digest_size=8, key=secret)
    return f"key {digest.hexdigest()}"


# What is answered


def as_refusal(error: Exception) -> RequestError:
    """Any error as one that has a form for clients."""
    if isinstance(error, RequestError):
        return error
    log.error("a defect of the balancer, in answering a request", exc_info=error)
    return RequestError("The balancer failed; its log says where.")


def refuse(
    request_id: str, error: RequestError, client: Client, limits: Mapping[str, str] = _NO_LIMITS
) -> None:
    """An error as the whole answer. `limits`: headers that tell how much is left."""
    body = openai.error_body(error)
    client.begin(error.status, {**limits, **refusal_headers(request_id, error)}, len(body))
    client.write(body)
    client.end()


def refusal_headers(request_id: str, error: RequestError) -> dict[str, str]:
    headers = {"Content-Type": JSON_TYPE, REQUEST_ID_HEADER: request_id}
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="balancer"'
    if error.headers:
        headers.update(error.headers)
    return headers


def _answered_by(story: Story, under_way: int) -> dict[str, str]:
    """Where the answer comes from, and why. `under_way`: attempts that have not ended yet."""
    outside = {FALLBACK_HEADER: "1"} if story.fallback else {}
    return {
        **outside,
        REQUEST_ID_HEADER: story.request_id,
        "X-Balancer-Worker": story.worker.id if story.worker else "",
        "X-Balancer-Model": story.model or "",
        "X-Balancer-Attempts": str(len(story.attempts) + under_way),
        "X-Balancer-Reason": _reason(story.choice) if story.choice else "",
        "X-Balancer-Queue-Ms": str(round(story.queue_seconds * 1000)),
    }


def _reason(choice: Choice) -> str:
    """A decision in a line, for people."""
    if not choice.candidates:
        return choice.because
    share = share_of(choice, choice.worker_id)
    reason = f"picked with a chance of {share:.0%} among {len(choice.candidates)}"
    picked = next((one for one in choice.candidates if one.worker_id == choice.worker_id), None)
    if picked is not None:
        reason += _expectation(picked)
    return f"{choice.because}; {reason}" if choice.because else reason


def _expectation(picked: Candidate) -> str:
    words = ""
    if picked.expected_seconds is not None:
        words += f", expected to cost {picked.expected_seconds:.3g} s"
    if picked.cached_tokens:
        words += f", taken to remember {picked.cached_tokens} tokens of the prompt"
    return words
