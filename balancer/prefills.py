"""How a worker without an agent is asked to go on with a chat answer that another one began. Tried once,
when it first matters, and remembered.

There is no standard for it. A trailing message of the assistant is a beginning to go on from for llama.cpp
and for most of Ollama's templates, and a finished turn for vLLM unless two flags are set; others open a new
turn whatever they are told (ENGINES 8). So nothing is believed: the seam is looked at
(`worker_agent.continuation`).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson

from balancer.core.model import Endpoint, ModelName, Worker, WorkerId
from balancer.dialects.openai import Request, parse
from worker_agent import continuation as seams

log = logging.getLogger(__name__)

Way = Mapping[str, Any]
"""Fields that are added to a request whose last message is the beginning of the answer."""

FLAGS: Way = {"continue_final_message": True, "add_generation_prompt": False}
"""vLLM's, taken or ignored by others."""
WAYS: tuple[Way, ...] = (FLAGS, {})

REMEMBERED_SECONDS = 600.0
"""Then it may be another engine, or another version of it."""
MAX_REMEMBERED = 1024

Ask = Callable[[Worker, ModelName, Request], Awaitable[bytes | None]]
"""Has a worker answer in one piece; None: it says that the request is wrong. Raises `Unanswered`."""


class Unanswered(Exception):
    """A worker could not be asked: it is busy, say, or gone."""


_WORD = re.compile(r"\s*\S+")


class Prefills:
    """What was found out about each worker and model."""

    def __init__(self, ask: Ask, clock: Callable[[], float]) -> None:
        self._ask = ask
        self._clock = clock
        self._known: dict[tuple[WorkerId, str, ModelName], tuple[float, Way | None]] = {}
        self._asking: dict[tuple[WorkerId, str, ModelName], asyncio.Lock] = {}

    async def way(self, worker: Worker, model: ModelName) -> Way | None:
        """How this worker goes on with an answer of this model; None: it does not. Takes three short answers
        at most, the first time."""
        if worker.continues is not None:
            return FLAGS if worker.continues else None
        key = worker.id, worker.url, model
        async with self._asking.setdefault(key, asyncio.Lock()):
            known = self._known.get(key)
            if known is not None and self._clock() - known[0] < REMEMBERED_SECONDS:
                return known[1]
            try:
                found = await self._find(worker, model)
            except Unanswered:
                return None  # for now: it could not be asked, so nothing was found out
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
                self._asking = {key: lock for key, lock in self._asking.items() if lock.locked()}
            self._known[key] = self._clock(), found
            log.info(
                "worker %s %s with chat answers of %s that another began",
                *(worker.id, "does not go on" if found is None else "goes on", model),
            )
            return found

    async def _find(self, worker: Worker, model: ModelName) -> Way | None:
        for question in seams.QUESTIONS:
            body = seams.question_body(model, question)
            whole = await self._text(worker, model, body, {})
            pair = seams.cut(_WORD.findall(whole))
            if pair is None:
                continue
            given, rest = pair
            for way in WAYS:
                continued = await self._text(worker, model, seams.begun_body(body, given), way)
                if seams.is_clean(rest, continued):
                    return way
            return None
        return None

    async def _text(self, worker: Worker, model: ModelName, body: Mapping[str, Any], way: Way) -> str:
        """Its answer; empty where it takes no such request. Raises `Unanswered`."""
        request = parse(Endpoint.CHAT, orjson.dumps({**body, "stream": False})).with_fields(way)
        answer = await self._ask(worker, model, request)
        if answer is None:
            return ""
        text = orjson.loads(answer)["choices"][0]["message"].get("content")
        return text if isinstance(text, str) else ""
