"""A small OpenAI-compatible endpoint over real HTTP, and papers to ask it about."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fpdf import FPDF

MakePdf = Callable[..., Path]

MONOTONOUS = (" ", "\t", "\n", "\n\xa0", "-", "-\n", "a-\n", ".", "#", "\n#", "1.", "\u0301\u0323")
"""What a broken file may repeat without end."""
LINEAR, SQUARE = 4, 16
"""By how much longer four times the text takes."""


def growth(work: Callable[[str], object], unit: str) -> float:
    """How many times as long the work takes on 80,000 characters as on 20,000, in processor time."""

    def seconds(chars: int) -> float:
        text = unit * (chars // len(unit))
        started = time.thread_time()
        work(text)
        return time.thread_time() - started

    # The least of some: whatever else the machine does only adds.
    small = min(seconds(20_000) for _ in range(7))
    return min(seconds(80_000) for _ in range(3)) / small


class FakeEndpoint:
    """Answers each question with a text that depends on nothing but the request."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [{"id": "tiny"}]
        self.context_tokens = 10**9
        """Enforced: longer requests are refused, as llama.cpp's server does."""
        self.chars_per_token = 4.0
        self.merges_at_most = 10**9
        """Requests to merge more answers than that are refused as too long."""
        self.refusals: list[web.Response] = []
        """Given to the next requests, one each, before anything is answered."""
        self.breaks_on: str | None = None
        """Requests that hold this text get status 500."""
        self.held: str | None = None
        """Requests that hold this text wait until `release` is set."""
        self.release = asyncio.Event()
        self._news = asyncio.Condition()
        self.asked: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answering = 0
        self.alone: list[bool] = []
        """For each request, whether no other was being answered when it came."""
        self.url = ""

    async def until(self, seen: Callable[[], bool]) -> None:
        """Returns once this is true; it is looked at when a request comes and when it is answered."""
        async with asyncio.timeout(30), self._news:
            await self._news.wait_for(seen)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def list_models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self.models})

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.headers.append(dict(request.headers))
        if self.refusals:
            return self.refusals.pop(0)
        self.asked.append(body)
        self.alone.append(self.answering == 0)
        self.answering += 1
        await self._tell()
        try:
            return await self._answer(body)
        finally:
            self.answering -= 1
            await self._tell()

    async def _answer(self, body: dict[str, Any]) -> web.Response:
        text = "".join(message["content"] for message in body["messages"])
        if self.breaks_on and self.breaks_on in text:
            return web.json_response({"error": {"message": "the engine died"}}, status=500)
        tokens = int(len(text) / self.chars_per_token)
        too_many = text.count("[Answer ") > self.merges_at_most
        if too_many or tokens + body["max_tokens"] > self.context_tokens:
            error = {
                "code": 400,
                "type": "exceed_context_size_error",
                "message": f"{tokens} tokens are too many",
            }
            return web.json_response({"error": error}, status=400)
        if self.held and self.held in text:
            await self.release.wait()
        self.answered.append(body)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return web.json_response(
            {
                "choices": [
                    {"message": {"role": "assistant", "content": f"answer {digest}"}, "finish_reason": "stop"}
                ],
                "usage": {"prompt_tokens": tokens, "completion_tokens": 3},
            }
        )

    def questions(self) -> list[str]:
        """The user messages that were answered."""
        return [body["messages"][-1]["content"] for body in self.answered]


@pytest.fixture
async def endpoint() -> AsyncIterator[FakeEndpoint]:
    fake = FakeEndpoint()
    app = web.Application(client_max_size=2**26)
    app.router.add_get("/v1/models", fake.list_models)
    app.router.add_post("/v1/chat/completions", fake.chat)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    fake.url = f"http://{host}:{port}"
    yield fake
    fake.release.set()
    await runner.cleanup()


@pytest.fixture
def make_pdf(tmp_path: Path) -> MakePdf:
    def make(name: str, *pages: str, head: str = "", numbered: bool = False) -> Path:
        pdf = FPDF()
        pdf.set_font("Helvetica", size=11)
        for number, text in enumerate(pages, start=1):
            pdf.add_page()
            if head:
                pdf.cell(0, 8, head, new_x="LMARGIN", new_y="NEXT")
            pdf.multi_cell(0, 6, text, align="L", new_x="LMARGIN", new_y="NEXT")
            if numbered:
                pdf.cell(0, 8, f"- {number} -")
        path = tmp_path / name
        pdf.output(str(path))
        return path

    return make
