"""What a batch of papers asks of a real room, and what came of it; chats beside it, where wanted.

The document comes first and the question last, so that an engine that has answered one question of a paper
need not read the paper again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from benchmarks.rooms.engines import MODEL

PAPERS = Path(__file__).parents[2] / "docs" / "papers"
LENGTHS = (0.8, 1.0, 1.2)
"""Of the papers, in turns, as shares of the length asked for."""

QUESTIONS = (
    "In one sentence, what is this text about?",
    "Which methods does it use?",
    "Who would use the software, and for what?",
    "Which numbers does it name?",
    "What does it leave open?",
)

CHAT_SECONDS, CHAT_TOKENS = 2.0, 16
CHATS = (
    "Name three trees.",
    "What is the capital of France?",
    "Write a greeting for a friend.",
    "How many days has a week?",
    "Which colours has a rainbow?",
)


def papers(count: int, chars: int, shift: int) -> list[str]:
    """So many texts that begin differently, cut from the papers in docs/papers.

    They overlap where there is less text than is asked for: engines remember prompts by their beginnings, so
    to them these are different documents. Another `shift` gives others. Raises SystemExit without papers.
    """
    files = [path for path in sorted(PAPERS.glob("*")) if path.suffix in (".md", ".txt")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if path.stem != "README")
    if not text:
        raise SystemExit(f"there are no papers in {PAPERS}: run this in a checkout of the project")
    starts = [(number * len(text) // count + shift) % len(text) for number in range(count)]
    return [
        (text[start:] + text)[: int(chars * LENGTHS[number % len(LENGTHS)])]
        for number, start in enumerate(starts)
    ]


@dataclass(slots=True)
class Outcome:
    """What came of a batch, as the client saw it."""

    seconds: float = 0.0
    """From the first request to the last answer."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    uncounted: int = 0
    """Answers whose engine did not say what it had cached."""
    by_worker: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    """For people: what was wrong instead of an answer."""
    first_token_seconds: list[float] = field(default_factory=list)
    """Of the chats."""
    chat_failures: list[str] = field(default_factory=list)


async def run(url: str, texts: Sequence[str], *, max_tokens: int, chats: bool) -> Outcome:
    """All questions on all papers at once, a paper's one after the other, as a batch client sends them."""
    outcome = Outcome()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as http:
        through = asyncio.Event()
        async with asyncio.TaskGroup() as clients:
            if chats:
                clients.create_task(_chat(http, url, through, outcome))
            begun = time.perf_counter()
            async with asyncio.TaskGroup() as asking:
                for text in texts:
                    for question in QUESTIONS:
                        asking.create_task(_ask(http, url, f"{text}\n\n{question}", max_tokens, outcome))
            outcome.seconds = time.perf_counter() - begun
            through.set()
    return outcome


async def _ask(http: aiohttp.ClientSession, url: str, prompt: str, max_tokens: int, outcome: Outcome) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    headers = {"X-Priority": "batch"}
    try:
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            if response.status != 200:
                outcome.failures.append(f"status {response.status}: {(await response.text())[:300]}")
                return
            answer = orjson.loads(await response.read())
    except aiohttp.ClientError as error:
        outcome.failures.append(f"{type(error).__name__}: {error}")
        return
    outcome.by_worker[response.headers["X-Balancer-Worker"]] += 1
    outcome.prompt_tokens += answer["usage"]["prompt_tokens"]
    cached = cached_tokens(answer)
    if cached is None:
        outcome.uncounted += 1
    else:
        outcome.cached_tokens += cached


def cached_tokens(answer: Mapping[str, Any]) -> int | None:
    """Of the prompt's tokens, those that the engine did not compute, in its own words: OpenAI's field, else
    llama.cpp's. None: it does not say."""
    told = (answer.get("usage", {}).get("prompt_tokens_details") or {}).get("cached_tokens")
    if told is None:
        told = answer.get("timings", {}).get("cache_n")
    return told if isinstance(told, int) else None


async def _chat(http: aiohttp.ClientSession, url: str, through: asyncio.Event, outcome: Outcome) -> None:
    """Somebody says something every CHAT_SECONDS, whether the last was answered or not, until the batch is
    through; and all of them are waited for, or the longest waits would be the ones that are left out."""
    async with asyncio.TaskGroup() as talking:
        for number in count():
            talking.create_task(_say(http, url, CHATS[number % len(CHATS)], outcome))
            with suppress(TimeoutError):
                await asyncio.wait_for(through.wait(), CHAT_SECONDS)
            if through.is_set():
                return


async def _say(http: aiohttp.ClientSession, url: str, text: str, outcome: Outcome) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": CHAT_TOKENS,
        "stream": True,
    }
    begun = time.perf_counter()
    try:
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                outcome.chat_failures.append(f"status {response.status}: {(await response.text())[:300]}")
                return
            waits = True
            async for line in response.content:
                if waits and _has_text(line):
                    waits = False
                    outcome.first_token_seconds.append(time.perf_counter() - begun)
    except aiohttp.ClientError as error:
        outcome.chat_failures.append(f"{type(error).__name__}: {error}")


def _has_text(line: bytes) -> bool:
    """A line of an event stream brings a piece of the answer."""
    if not line.startswith(b"data: {"):
        return False
    choices = orjson.loads(line.removeprefix(b"data: ")).get("choices")
    return bool(choices and choices[0].get("delta", {}).get("content"))
