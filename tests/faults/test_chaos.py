"""Random trouble from all series at once, by a seed, and the invariants that must hold after it
(RELIABILITY 8; O13 in small). The seed is in the name of the test and in its failure."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from benchmarks.history import (
    Asked,
    AtRest,
    Began,
    Bounds,
    Delivered,
    Ended,
    Ending,
    Finished,
    Kind,
    Outcome,
    Record,
    violations,
)
from tests.e2e.conftest import OpenRoom, Room
from tests.fakes.engine import FakeEngine
from tests.fakes.engine import Outcome as Seen
from tests.fakes.faults import OK, Fault, Part
from tests.faults.asking import CHAT, COMPLETIONS, Came, ask, question, question_in, rows

TROUBLE = (
    Fault.close(),
    Fault.reset(),
    Fault.close(at_token=0),
    Fault.close(at_token=5),
    Fault.reset(at_token=9),
    Fault.close(at_byte=1500),
    Fault.truncate(at_token=7),
    Fault.no_end(),
    Fault.no_done(),
    Fault(omits=(Part.FINISH,)),
    Fault.status(500),
    Fault.status(503, retry_after="1"),
    Fault.error_in_body(),
    Fault.error_event(at_token=5),
    Fault.error_event(at_token=5, then_done=True),
    Fault.garbage(at_token=3),
    Fault.comments() & Fault.sliced(size=7),
    Fault.stall(at_token=4),
    Fault.stall(seconds=0.05),
)
SLOTS = 4
REQUESTS = 300
ENDINGS = {Seen.COMPLETED: Ending.COMPLETED, Seen.CLIENT_LEFT: Ending.LEFT, Seen.BROKEN: Ending.FAILED}


@pytest.mark.timeout(90)
@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_happens_the_invariants_hold(open_room: OpenRoom, seed: int):
    """O13: a third of all attempts meets a fault, workers die and come back, clients leave."""
    dice = random.Random(seed)
    print(f"seed {seed}")
    async with (
        FakeEngine(slots=SLOTS, token_seconds=0.001) as one,
        FakeEngine(slots=SLOTS, token_seconds=0.001) as two,
        FakeEngine(slots=SLOTS, token_seconds=0.001, http_1_0=True) as three,
    ):
        engines = dict(zip("abc", (one, two, three), strict=True))
        limits = {"read_timeout": 0.3, "breaker_rest": 0.2, "max_wait": 20}
        async with open_room(*rows(one, two, three, max_concurrent_requests=SLOTS), **limits) as room:
            for engine in engines.values():
                engine.script(*dice.choices((OK, *TROUBLE), (2 * len(TROUBLE), *[1] * len(TROUBLE)), k=300))
            log: list[Record] = []
            dying = asyncio.ensure_future(come_and_go(dice, one))
            await asyncio.gather(*(client(room, dice, log, number) for number in range(12)))
            dying.cancel()
            await asyncio.wait([dying])
            for engine in engines.values():
                engine.calm()
                engine.resume()
                await engine.idle()
            await room.idle()
            log += [*worked_on(engines), at_rest(room)]
            log.sort(key=lambda record: record.at)
            found = violations(log, Bounds(slots=dict.fromkeys(engines, SLOTS), attempts=6))
            assert not found, f"seed {seed}: " + "\n".join(map(str, found))
            assert sum(
                isinstance(record, Finished) and record.outcome is Outcome.SUCCESS for record in log
            ) > (REQUESTS // 2)


async def client(room: Room, dice: random.Random, log: list[Record], number: int) -> None:
    """Asks one after the other, and now and then leaves."""
    now = asyncio.get_running_loop().time
    for turn in range(REQUESTS // 12):
        name = f"{number}-{turn}"
        came = Came(question(), dice.choice((CHAT, CHAT, COMPLETIONS)))
        log.append(Asked(at=now(), request=name, reference=came.reference()))
        asked = asyncio.ensure_future(ask(room, into=came, path=came.path, stream=dice.random() < 0.7))
        leaves = dice.random() < 0.1
        await asyncio.wait([asked], timeout=dice.random() * 0.05 if leaves else None)
        outcome = outcome_of(came) if asked.done() else Outcome.LEFT
        asked.cancel()
        await asyncio.wait([asked])
        log.append(Delivered(at=now(), request=name, text=came.text))
        log.append(Finished(at=now(), request=name, outcome=outcome, detail=str(came.errors)))
        assert came.after_the_end == 0


def outcome_of(came: Came) -> Outcome:
    if came.broken:
        return Outcome.BROKEN
    return Outcome.SUCCESS if came.succeeded else Outcome.ERROR


async def come_and_go(dice: random.Random, engine: FakeEngine) -> None:
    while True:
        await asyncio.sleep(dice.uniform(0.3, 0.8))
        engine.die()
        await asyncio.sleep(dice.uniform(0.05, 0.3))
        await engine.listen()


def worked_on(engines: dict[str, FakeEngine]) -> list[Record]:
    """What the engines saw of it; which attempts were retries shows by their order."""
    calls = sorted(
        ((request, name) for name, engine in engines.items() for request in engine.requests),
        key=lambda call: call[0].started,
    )
    tried: set[str] = set()
    records: list[Record] = []
    for number, (request, name) in zip(itertools.count(), calls, strict=False):
        asked = question_in(request) or ""
        kind = Kind.RETRY if asked in tried else Kind.FIRST
        tried |= {asked} - {""}
        call = str(number)
        records.append(Began(at=request.started, worker=name, call=call, request=asked, kind=kind))
        assert request.ended is not None
        assert request.outcome is not None
        records.append(Ended(at=request.ended, call=call, ending=ENDINGS[request.outcome]))
    return records


def at_rest(room: Room) -> AtRest:
    now, snapshot = asyncio.get_running_loop().time(), room.balancer.snapshot()
    counters = {
        "running": snapshot.running,
        "waiting": snapshot.waiting,
        "under way": room.balancer.under_way,
    }
    return AtRest(at=now, counters=counters | {view.worker.id: view.running for view in snapshot.workers})
