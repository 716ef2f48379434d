"""A client that writes down all that it was told, and takes only the protocol's own end for success."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import orjson

from benchmarks.history import Outcome

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
ANSWER_SECONDS = 300.0


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of one request; times are the loop's."""

    sent: float
    status: int = 0
    pieces: list[tuple[float, str]] = field(default_factory=list)
    """When each part of the text came."""
    finished: float = 0.0
    """When it was told of the end, or saw it; parts of the text may wrongly come later."""
    outcome: Outcome = Outcome.BROKEN
    detail: str = ""
    """Of an outcome that is no success."""

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    def longest_gap(self) -> float:
        """Seconds between two parts of its text, at most; 0 where there are fewer."""
        times = [at for at, _ in self.pieces]
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


def chat(model: str, question: str, *, stream: bool, max_tokens: int | None = None, **more: Any) -> Json:
    """The body of a chat with one message."""
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "stream": stream} | limit | more


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    body: Json,
    *,
    path: str = CHAT,
    headers: Mapping[str, str] | None = None,
    leave_after: int | None = None,
    into: Answer | None = None,
) -> Answer:
    """Asks and reads to the end, whatever that is.

    `leave_after`: so many parts of the text, then it goes. `into`: what is to be filled, to be looked at
    meanwhile.
    """
    loop = asyncio.get_running_loop()
    answer = Answer(sent=loop.time()) if into is None else into
    try:
        async with (
            asyncio.timeout(ANSWER_SECONDS),
            http.post(url + path, json=body, headers=headers) as response,
        ):
            answer.status = response.status
            if response.status != 200:
                answer.outcome, answer.detail = Outcome.ERROR, (await response.text())[:300]
            elif body.get("stream"):
                await _read_events(response, answer, leave_after)
            else:
                _read_whole(await response.json(), answer, path)
    except TimeoutError:
        answer.outcome, answer.detail = Outcome.BROKEN, f"no end within {ANSWER_SECONDS:g} s"
    except (aiohttp.ClientError, ValueError) as error:
        answer.outcome, answer.detail = Outcome.BROKEN, type(error).__name__
    answer.finished = answer.finished or loop.time()
    return answer


def _read_whole(whole: Json, answer: Answer, path: str) -> None:
    now = asyncio.get_running_loop().time()
    if path == EMBEDDINGS:
        text = str([one["embedding"] for one in whole["data"]])
    else:
        text = whole["choices"][0]["message"]["content"]
    answer.pieces.append((now, text))
    answer.outcome = Outcome.SUCCESS


async def _read_events(response: aiohttp.ClientResponse, answer: Answer, leave_after: int | None) -> None:
    loop = asyncio.get_running_loop()
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            if answer.outcome is not Outcome.ERROR:
                answer.outcome, answer.finished = Outcome.SUCCESS, loop.time()
            continue
        event = orjson.loads(data)
        if "error" in event:
            answer.outcome, answer.detail = Outcome.ERROR, str(event["error"])[:300]
            answer.finished = answer.finished or loop.time()
            continue
        for choice in event.get("choices", ()):
            text = choice.get("delta", {}).get("content")
            if text:  # after the end too: the checker is to see it
                answer.pieces.append((loop.time(), text))
        if leave_after is not None and len(answer.pieces) >= leave_after:
            answer.outcome = Outcome.LEFT
            response.close()
            return
