"""More than there is room for, workers that are to get nothing new, and the end of the balancer itself
(RELIABILITY 7, O4, O6, O7, O8)."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from balancer.app import Stop
from tests.e2e.conftest import OpenRoom, free_port
from tests.e2e.processes import Command, command
from tests.fakes.engine import FakeEngine, engine_process
from tests.fakes.faults import OK, Fault
from tests.faults.asking import CHAT, Address, Came, ask, asked_for, question, rows, until

BATCH = {"X-Priority": "batch"}


async def test_whoever_is_in_a_hurry_waits_for_one_that_is_not(open_room: OpenRoom):
    """O4: batch holds every slot and waits in line; the next place goes to the person."""
    async with FakeEngine(slots=2) as one, open_room(*rows(one, max_concurrent_requests=2)) as room:
        one.always(Fault.stall(at_token=1))
        items = [Came(question(), CHAT) for _ in range(8)]
        batch = [asyncio.ensure_future(ask(room, into=came, headers=BATCH)) for came in items]
        await one.stalled()
        await room.until(lambda: room.balancer.snapshot().waiting >= 6, "the rest of the batch waits")
        running = one.running
        hurried = Came(question(), CHAT)
        asked = asyncio.ensure_future(ask(room, into=hurried))
        one.always(OK)
        await until(lambda: asked.done() or one.resume() is not None or one.stalling == 0, "all go on")
        (await asked).insist_on_success()
        assert sum(bool(item.done) for item in items) <= running + 1
        for came in await asyncio.gather(*batch):
            came.insist_on_success()
        await room.idle()


async def test_a_pause_of_the_balancer_itself_is_not_taken_for_the_workers_silence(open_room: OpenRoom):
    """O6: its loop stands still for longer than an agent may be silent. The reports are there; they were only
    not read. No worker is given up, and a stream that was under way comes to its end."""
    async with engine_process("--agent-id", "a", "--token-seconds", "0.5") as agent:
        port = int(agent.url.rpartition(":")[2])
        async with open_room(
            {"id": "a", "host": "127.0.0.1", "port": port, "type": "agent", "tls": False}
        ) as room:
            await room.ready()
            came = Came(question(), CHAT)
            asked = asyncio.ensure_future(ask(room, into=came))
            await asyncio.wait_for(came.begun.wait(), 10)
            time.sleep(4)  # noqa: ASYNC251
            (await asked).insist_on_success()
            assert came.comments == []
            assert room.worker("a").state == "ready"


async def test_a_worker_that_is_drained_finishes_and_gets_nothing_new(open_room: OpenRoom):
    """O8 for one worker: `POST /admin/workers/{id}/drain`, and back again."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        for engine in (one, two):
            engine.always(Fault.stall(at_token=5))
        asked: list[asyncio.Future[Came]] = []
        while not (one.stalling and two.stalling):  # by chance, the first few may go to one of them
            asked.append(asyncio.ensure_future(ask(room)))
            await until(lambda: one.stalling + two.stalling == len(asked), "all are at it")
        drained, leaving, other = "a", one, two
        assert (await room.admin("POST", f"/workers/{drained}/drain"))[0] == 200
        assert room.worker(drained).state == "draining"
        other.calm()
        before = len(asked_for(leaving))
        for _ in range(10):
            (await ask(room)).insist_on_success()
        assert len(asked_for(leaving)) == before
        one.resume()
        two.resume()
        for came in await asyncio.gather(*asked):
            came.insist_on_success()
            assert came.comments == []


async def test_told_to_stop_it_finishes_what_it_can_and_says_what_it_cannot(open_room: OpenRoom):
    """O7, in the loop: streams that end in time are whole, those that do not end with an error event, and who
    waits in line is told to come back."""
    async with FakeEngine(slots=6) as one:
        async with open_room(*rows(one, max_concurrent_requests=6), drain_timeout=1.0) as room:
            one.script(*[Fault.stall(at_token=3)] * 3, *[Fault.stall(at_token=3, seconds=0.2)] * 3)
            asked = [asyncio.ensure_future(ask(room)) for _ in range(6)]
            await one.seen(6)
            waiting = [asyncio.ensure_future(ask(room, stream=False)) for _ in range(3)]
            await room.until(lambda: room.balancer.snapshot().waiting == 3, "three wait")
            one.always(Fault.stall(at_token=3))
            await room.balancer.drain(Stop())
            ended = await asyncio.gather(*asked, *waiting)
            for came in ended:
                came.insist_on_an_honest_end()
            assert sum(came.succeeded for came in ended[:6]) == 3
            assert sum(came.failed_explicitly for came in ended[:6]) == 3
            assert {came.status for came in ended[6:]} == {503}
            late = await ask(room, stream=False)
            assert late.status == 503
            assert "Retry-After" in late.headers


@asynccontextmanager
async def serving(folder: Path, *workers: dict, **settings) -> AsyncIterator[tuple[Command, int]]:
    """`balancer serve` as a process, which says that it listens, with all its workers ready."""
    port = free_port()
    file = folder / "balancer.json"
    own = {"host": "127.0.0.1", "port": port, "mdns": False, "data_dir": str(folder / "data")}
    file.write_text(json.dumps({"workers": list(workers), "health_check_interval": 0.2} | own | settings))
    async with command(
        "balancer", "serve", "--config", str(file), output=folder / "out.txt", home=folder
    ) as it:
        async with aiohttp.ClientSession() as http, asyncio.timeout(30):
            while True:
                assert it.process.returncode is None, it.text()
                try:
                    async with http.get(f"http://127.0.0.1:{port}/health") as response:
                        told = await response.json()
                        if sum(worker["state"] == "ready" for worker in told["workers"]) == len(workers):
                            break
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.05)
        yield it, port


@pytest.mark.timeout(90)
async def test_a_process_that_is_told_to_stop_cuts_nobody_off_before_its_time(tmp_path: Path):
    """O7: SIGTERM with 50 streams, 40 of which end within the drain; the others say that they did not."""
    async with FakeEngine(slots=50, token_seconds=0.02) as one:
        workers = rows(one, max_concurrent_requests=50)
        async with serving(tmp_path, *workers, drain_timeout=2.0) as (it, port):
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                one.script(*[Fault.stall(at_token=5)] * 10)
                coming = [Came(question(), CHAT) for _ in range(50)]
                asked = [
                    asyncio.ensure_future(ask(Address(f"http://127.0.0.1:{port}", http), into=came))
                    for came in coming
                ]
                await one.seen(50)
                await until(lambda: all(came.begun.is_set() for came in coming), "all have begun")
                it.send(signal.SIGTERM)
                ended = await asyncio.gather(*asked)
                for came in ended:
                    came.insist_on_an_honest_end()
                assert sum(came.succeeded for came in ended) == 40
                assert await it.ended() == 0, it.text()
