"""Clients that read slowly, and clients that wait in the middle of an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.e2e.conftest import OpenRoom
from tests.fakes.engine import FakeEngine, Fault
from tests.faults.asking import CHAT, Came, ask, body_of, question, rows
from tests.faults.test_borderline import (
    DONE,
    FINISH,
    HEAD,
    chunk,
    holds_little,
    raw_worker,
    said,
    slow_client,
)


@pytest.mark.parametrize("hot_path", [True, False])
async def test_a_client_that_reads_slowly_and_steadily_is_not_dropped(open_room: OpenRoom, hot_path: bool):
    """`slow_reader_timeout` is for a client that reads nothing."""
    event = chunk(said("x" * 1000) * 10)

    async def answer(_body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + event * 60 + chunk(FINISH) + chunk(DONE) + b"0\r\n\r\n")

    async with raw_worker(answer) as row:
        async with open_room(row, slow_reader_timeout=1, hot_path=hot_path) as room:
            await room.ready()
            holds_little(room)
            async with slow_client(room, body_of(question())) as reader:
                tail = b""
                while not tail.endswith(b"0\r\n\r\n"):
                    piece = await reader.read(4096)
                    assert piece, "dropped in the middle"
                    tail = (tail + piece)[-300:]
                    await asyncio.sleep(0.04)  # 100 KB/s: what waits for it takes longer than the timeout
                assert b"[DONE]" in tail


async def test_a_client_is_told_why_it_waits_in_the_middle_of_an_answer(open_room: OpenRoom):
    """Its worker broke, and the other one has no room: comments, as before the first word."""
    async with FakeEngine() as one, FakeEngine(slots=1) as two:
        full = rows(one, two, max_concurrent_requests=1)
        async with open_room(*full, comment_after=0.2) as room:
            await room.ready(2)
            for engine in (one, two):
                engine.always(Fault.stall(at_token=5))
            coming = [Came(question(), CHAT) for _ in range(2)]
            asked = [asyncio.ensure_future(ask(room, into=came)) for came in coming]
            await one.stalled()
            await two.stalled()
            two.calm()
            one.die()
            await room.until(lambda: room.balancer.snapshot().waiting == 1, "one waits")
            await room.until(
                lambda: any("queued" in word for came in coming for word in came.comments), "it is told"
            )
            two.resume()
            await asyncio.gather(*asked)
