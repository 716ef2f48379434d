"""Many models on one machine: engines are processes that do as told, memory is what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from agent.meeting import OpenGate
from agent.scenes import alive, fake_plan, pids, until
from worker_agent import wire
from worker_agent.changes import Changes
from worker_agent.engines.choice import DoesNotFit, NoChoice
from worker_agent.exchange import Refused
from worker_agent.gateway import Gateway
from worker_agent.memory import MemoryNow, Need, Pool
from worker_agent.models.local import Format, LocalModel
from worker_agent.offers import Offer, without_model
from worker_agent.plans import Plan
from worker_agent.report import detail_of, served_model, state_of
from worker_agent.residency import ResidencyPolicy
from worker_agent.resident import Resident
from worker_agent.residents import Residents, ResidentsPolicy
from worker_agent.server import ServerPolicy, listening
from worker_agent.supervision import Event, Life, State, SupervisionPolicy
from worker_agent.watch import WatchPolicy
from worker_agent.wire import EngineState, ModelState, Report, ServedModel

CHAT = "/v1/chat/completions"
GIB = 2**30
DONE = b"data: [DONE]\n\n"
POLICY = ResidentsPolicy(
    look_seconds=0.05,
    same_memory_seconds=0.0,
    preload_again_seconds=0.2,
    residency=ResidencyPolicy(least_turn_seconds=0.3, turn_loads=0.0, pause_loads=0.0),
    watch=WatchPolicy(tick_seconds=0.05),
    supervision=lambda _plan: SupervisionPolicy(
        start_limit_seconds=20, stop_grace_seconds=0.3, first_rest_seconds=0.01, faults_to_fail=2
    ),
)


@dataclass
class Machine:
    """An agent's models, and the gateway in front of them."""

    folder: Path
    policy: ResidentsPolicy
    changes: Changes = field(default_factory=Changes)
    gib: float = 10.0
    looked: list[int] = field(default_factory=list)
    offers: dict[str, Offer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.residents = Residents("studio-1", self.measure, self.changes, self.policy)
        self.gateway = Gateway(self.residents, self.report, self.changes, OpenGate())

    def measure(self, engines: Collection[int], _given: Mapping[Pool, int]) -> Mapping[Pool, MemoryNow]:
        self.looked.append(len(engines))
        size = int(self.gib * GIB)
        return {Pool.RAM: MemoryNow(total_bytes=size, available_bytes=size)}

    def report(self) -> Report:
        standings = self.residents.standings()
        return Report(
            id="studio-1",
            state=state_of(standings),
            engine="fake",
            models=tuple(map(served_model, standings)),
            slots=self.residents.slots,
            running=self.residents.taken,
            detail=detail_of(standings),
        )

    def told(self, name: str) -> ServedModel:
        [found] = [model for model in self.report().models if model.name == name]
        return found

    def offer(self, name: str, gib: float | None, mode: str = "serve", **more: object) -> None:
        """From now on it can be loaded."""
        self.made(name, gib, mode, **more)  # type: ignore[arg-type]
        self.residents.offer(tuple(self.offers.values()))

    def made(
        self, name: str, gib: float | None, mode: str = "serve", *, slots: int = 2, **more: object
    ) -> Offer:
        """Its file has a gigabyte: loading it takes 4 s, as far as is known."""
        need = None
        if gib is not None:
            need = Need(weights_bytes=int(gib * GIB), cache_bytes=0, overhead_bytes=0)
        path = f"/models/{name}.gguf"
        plan = replace(fake_plan(self.starts(name), mode, slots=slots), name=name, model=path, need=need)

        def planned(_memory: Mapping[Pool, MemoryNow]) -> Plan:
            return plan

        model = LocalModel(name=name, path=path, format=Format.GGUF, size_bytes=10**9)
        self.offers[name] = Offer(model=model, plan=planned, **more)  # type: ignore[arg-type]
        return self.offers[name]

    def starts(self, name: str) -> Path:
        return self.folder / name

    def release(self, name: str) -> None:
        """Its engine has loaded it."""
        Path(f"{self.starts(name)}.loaded").touch()

    def hold(self, name: str) -> None:
        """It takes its time from its next start on."""
        Path(f"{self.starts(name)}.loaded").unlink()

    def runs(self, name: str) -> bool:
        return any(map(alive, pids(self.starts(name))))


@dataclass
class Room:
    machine: Machine
    url: str
    client: aiohttp.ClientSession

    def ask(
        self, model: str, user: str = "", *, wait: float | None = None
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        headers = {} if wait is None else {wire.WAIT_HEADER: str(wait)}
        body = {"model": model, "stream": True, "user": user, "messages": []}
        return self.client.post(self.url + CHAT, json=body, headers=headers)

    async def served(self, model: str, *, wait: float | None = None) -> bool:
        """Whether the answer was whole."""
        async with self.ask(model, wait=wait) as answer:
            return answer.status == 200 and (await answer.read()).endswith(DONE)

    async def refusal(self, model: str, *, wait: float | None = None) -> tuple[int, dict[str, object]]:
        async with self.ask(model, wait=wait) as answer:
            return answer.status, (await answer.json())["error"]


@contextlib.asynccontextmanager
async def room_of(folder: Path, policy: ResidentsPolicy = POLICY) -> AsyncIterator[Room]:
    machine = Machine(folder, policy)
    connector = aiohttp.TCPConnector(force_close=True)
    async with (
        listening(machine.gateway.application(), "127.0.0.1", 0, ServerPolicy()) as server,
        machine.residents.running_engines(),
        aiohttp.ClientSession(connector=connector) as client,
    ):
        yield Room(machine, f"http://127.0.0.1:{server.port}", client)
    for name in machine.offers:
        assert not machine.runs(name), f"{name} is left behind"


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    async with room_of(tmp_path) as made:
        yield made


async def test_a_model_on_the_disk_is_loaded_for_whoever_asks_and_then_answers(room: Room) -> None:
    room.machine.offer("a", 4)
    told = room.machine.told("a")
    assert (told.state, told.load_seconds) == (ModelState.UNLOADED, 60)  # nothing was found out yet
    await until(lambda: room.machine.told("a").engine == "fake")
    told = room.machine.told("a")
    assert (told.identity, told.slots, told.size_bytes) == ("a.gguf", 2, 10**9)
    assert (told.memory_bytes, told.load_seconds) == (4 * GIB, 4.0)
    assert room.machine.report().state is EngineState.READY  # it would be loaded
    assert await room.served("a")
    assert room.machine.told("a").state is ModelState.LOADED
    assert len(pids(room.machine.starts("a"))) == 1


async def test_how_far_a_load_is_is_told_and_what_it_took_is_what_the_next_one_is_expected_to_take(
    room: Room,
) -> None:
    machine = room.machine
    machine.offer("a", 4, "held")
    asking = asyncio.ensure_future(room.served("a"))
    await until(lambda: (machine.told("a").progress or 0) > 0.02)
    told = machine.told("a")
    assert told.state is ModelState.LOADING
    assert told.eta_seconds is not None
    assert told.progress is not None
    assert told.eta_seconds == pytest.approx((1 - told.progress) * 4.0, abs=0.1)
    assert machine.report().state is EngineState.READY  # a machine that loads for somebody is no broken one
    machine.release("a")
    assert await asking
    told = machine.told("a")
    assert (told.progress, told.eta_seconds) == (None, None)
    assert told.load_seconds is not None
    assert 0.08 <= told.load_seconds < 4


async def test_a_load_that_takes_longer_than_was_guessed_is_told_no_end_that_does_not_come(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = room.machine
    machine.offer("a", 4, "held")
    asking = asyncio.ensure_future(room.served("a"))
    await until(lambda: machine.residents._models["a"].starting_since is not None)
    model = machine.residents._models["a"]
    began = model.starting_since
    assert began is not None
    for gone in (5.0, 20.0, 60.0):  # of 4 s that were guessed
        standing = machine.residents._standing(model, began + gone)
        assert standing.progress == pytest.approx(2 / 3)
        assert standing.eta_seconds == pytest.approx(gone / 2)
        assert standing.load_seconds == pytest.approx(gone * 1.5)
    machine.release("a")
    assert await asking


async def test_why_one_does_not_fit_is_logged_once_however_the_numbers_change(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    machine = room.machine
    machine.offer("big", 12)
    told = set()
    for machine.gib in (10.0, 9.5, 9.0):
        told.add(str((await room.refusal("big"))[1]["message"]))
    assert len(told) == 3  # who asks is told what is true now
    assert caplog.text.count("big cannot be loaded") == 1
    machine.gib = 16
    assert await room.served("big")
    await machine.residents.unload("big")
    machine.gib = 10
    await room.refusal("big")
    assert caplog.text.count("big cannot be loaded") == 2


async def test_one_who_cannot_wait_as_long_is_told_at_once_how_long_and_the_load_goes_on(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 4, "held")
    await until(lambda: machine.told("a").engine == "fake")
    async with room.ask("a", wait=1.5) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "4")
        error = (await answer.json())["error"]
    assert error["code"] == "model_loading"
    assert error["loading"] == {"worker": "studio-1", "progress": 0.0, "eta_seconds": 4.0}
    await until(lambda: machine.told("a").state is ModelState.LOADING)
    machine.release("a")
    await until(lambda: machine.told("a").state is ModelState.LOADED)
    assert await room.served("a", wait=0)


async def test_one_whose_time_is_over_while_it_waits_is_told_the_same(tmp_path: Path) -> None:
    async with room_of(tmp_path) as room:
        machine = room.machine
        machine.offer("a", 4, "held")
        machine.release("a")
        assert await room.served("a")  # it takes no time at all
        await machine.residents.unload("a")
        machine.hold("a")
        status, error = await room.refusal("a", wait=1.0)
        assert (status, error["code"]) == (503, "model_loading")
        assert machine.residents.waiting == 0
        assert machine.told("a").state is ModelState.LOADING


@pytest.mark.parametrize("wait", ["nan", "soon", ""])
async def test_a_wait_that_is_no_number_is_as_if_none_was_given(room: Room, wait: str) -> None:
    room.machine.offer("a", 4)
    body = {"model": "a", "stream": True, "messages": []}
    async with room.client.post(room.url + CHAT, json=body, headers={wire.WAIT_HEADER: wait}) as answer:
        assert answer.status == 200


async def test_one_that_cannot_fit_is_refused_with_the_numbers_and_never_started(room: Room) -> None:
    machine = room.machine
    machine.offer("small", 4)
    assert await room.served("small")
    machine.offer("big", 12)
    status, error = await room.refusal("big")
    assert (status, error["code"]) == (503, "model_does_not_fit")
    assert "big needs 12.0 GiB" in str(error["message"])
    assert "10.0 GiB are free for models" in str(error["message"])
    told = machine.told("big")
    assert (told.state, told.detail) == (ModelState.FAILED, error["message"])
    assert not pids(machine.starts("big"))
    assert machine.told("small").state is ModelState.LOADED  # nobody left for it
    machine.gib = 16  # another program has ended
    assert await room.served("big")


async def test_an_idle_one_gives_way_and_is_gone_before_the_other_is_started(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 6)
    machine.offer("b", 6)
    assert await room.served("a")
    asking = asyncio.ensure_future(room.served("b"))
    await until(lambda: pids(machine.starts("b")))
    assert not machine.runs("a")
    assert await asking
    assert machine.told("a").state is ModelState.UNLOADED
    assert await room.served("a")
    assert len(pids(machine.starts("a"))) == 2
    assert max(machine.looked) == 1


async def test_those_that_fit_together_stay_together(room: Room) -> None:
    for name, gib in (("a", 3), ("b", 3), ("c", 4)):
        room.machine.offer(name, gib, slots=3)
    for _ in range(3):
        assert all(await asyncio.gather(*(room.served(name) for name in ("a", "b", "c"))))
    assert [len(pids(room.machine.starts(name))) for name in ("a", "b", "c")] == [1, 1, 1]


async def test_many_clients_of_two_models_that_exclude_each_other_are_all_served_in_few_turns(
    room: Room,
) -> None:
    machine = room.machine
    machine.offer("a", 6)
    machine.offer("b", 6)

    async def client(names: list[str]) -> list[bool]:
        return [await room.served(name) for name in names]

    served = await asyncio.gather(*(client(["a", "b"] * 2) for _ in range(6)))
    assert all(map(all, served))
    starts = len(pids(machine.starts("a"))) + len(pids(machine.starts("b")))
    assert starts <= 8  # of 24 requests


async def test_a_busy_one_ends_what_it_has_begun_before_it_goes(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 6)
    machine.offer("b", 6)
    async with room.ask("a", "nap") as running:
        await running.content.readany()
        asking = asyncio.ensure_future(room.served("b"))
        await until(lambda: machine.told("a").state is ModelState.UNLOADED)  # closed: nobody new
        late = asyncio.ensure_future(room.served("a"))
        await until(lambda: machine.residents.waiting == 2)
        assert machine.runs("a")
        assert not pids(machine.starts("b"))
        resident = machine.residents.resident("a")
        assert resident is not None
        assert resident.serving is not None
        async with room.client.get(resident.serving.address.url + "/wake"):
            pass
        assert (await running.read()).endswith(DONE)
    assert await asking
    assert await late


async def test_a_client_that_leaves_the_line_takes_its_wish_along(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 6)
    machine.offer("b", 6)
    async with room.ask("a", "nap") as running:
        await running.content.readany()
        asking = asyncio.ensure_future(room.served("b"))
        await until(lambda: machine.told("a").state is ModelState.UNLOADED)
        asking.cancel()
        await until(lambda: machine.residents.waiting == 0)
        await until(lambda: machine.told("a").state is ModelState.LOADED)
        assert await room.served("a", wait=0)
    assert not pids(machine.starts("b"))


async def test_those_who_waited_for_the_load_are_served_as_slots_come_free(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 4, "held", slots=2)
    asking = [asyncio.ensure_future(room.served("a")) for _ in range(7)]
    await until(lambda: machine.residents.waiting == 7)
    machine.release("a")
    assert await asyncio.gather(*asking) == [True] * 7
    assert machine.residents.waiting == 0
    assert machine.residents.taken == 0


async def test_the_line_is_bounded(tmp_path: Path) -> None:
    async with room_of(tmp_path, replace(POLICY, most_waiting=2)) as room:
        room.machine.offer("a", 4, "held")
        asking = [asyncio.ensure_future(room.served("a")) for _ in range(2)]
        await until(lambda: room.machine.residents.waiting == 2)
        status, error = await room.refusal("a")
        assert (status, error["code"]) == (429, "too_many_waiting")
        room.machine.release("a")
        assert await asyncio.gather(*asking) == [True, True]


async def test_more_requests_than_the_machine_has_slots_are_told_to_come_back(tmp_path: Path) -> None:
    async with room_of(tmp_path, replace(POLICY, slots=3)) as room:
        for name in ("a", "b"):
            room.machine.offer(name, 4, slots=2)
            assert await room.served(name)
        async with room.ask("a", "stall"), room.ask("a", "stall"), room.ask("b", "stall") as third:
            await third.content.readany()
            status, error = await room.refusal("b")
            assert (status, error["code"]) == (429, "no_free_slot")
            assert "of this machine" in str(error["message"])
        assert room.machine.report().slots == 3


async def test_one_whose_engine_cannot_load_it_is_told_so_and_tried_again_by_order(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 4, "exit")
    status, error = await room.refusal("a")
    assert (status, error["code"]) == (503, "engine_not_ready")
    await until(lambda: machine.told("a").state is ModelState.FAILED)
    assert "the model file is broken" in machine.told("a").detail
    assert machine.report().state is EngineState.FAILED
    status, error = await room.refusal("a")
    assert (status, error["code"]) == (503, "engine_not_ready")
    assert len(pids(machine.starts("a"))) == 2
    assert machine.residents.memory == (10 * GIB, 0)
    machine.offer("a", 4, "serve")
    machine.residents.load("a")
    await until(lambda: machine.told("a").state is ModelState.LOADED)
    assert await room.served("a")


async def test_one_that_failed_is_tried_again_after_its_rest_for_somebody_who_asks(tmp_path: Path) -> None:
    async with room_of(tmp_path, replace(POLICY, failed_rest_seconds=0.5)) as room:
        room.machine.offer("a", 4, "exit")
        await room.refusal("a")
        await until(lambda: room.machine.told("a").state is ModelState.FAILED)
        await until(lambda: room.machine.told("a").state is ModelState.UNLOADED)
        await room.refusal("a")
        assert len(pids(room.machine.starts("a"))) > 2


async def test_what_is_loaded_at_the_start_is_there_before_anybody_asks_and_starts_as_one_model_always_did(
    room: Room,
) -> None:
    machine = room.machine
    machine.offer("a", 4, "held", preload=True)
    report = machine.report()
    assert (report.state, report.models[0].state) == (EngineState.STARTING, ModelState.LOADING)
    await until(lambda: pids(machine.starts("a")))
    assert machine.report().state is EngineState.STARTING
    assert machine.report().detail == "loading a"
    machine.release("a")
    await until(lambda: machine.report().state is EngineState.READY)
    assert machine.told("a").state is ModelState.LOADED


async def test_one_that_does_not_fit_at_the_start_is_loaded_when_there_is_room(room: Room) -> None:
    machine = room.machine
    machine.gib = 2
    machine.offer("a", 4, preload=True)
    await until(lambda: machine.report().state is EngineState.FAILED)
    assert "a needs 4.0 GiB" in machine.report().detail
    assert not pids(machine.starts("a"))
    machine.gib = 10
    await until(lambda: machine.told("a").state is ModelState.LOADED)


async def test_an_idle_one_is_unloaded_after_its_time(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 4, ttl_seconds=0.3)
    machine.offer("b", 4)
    assert await room.served("b")
    async with room.ask("a", "nap") as running:
        await running.content.readany()
        await asyncio.sleep(0.4)  # longer than its time: it works
        assert machine.runs("a")
    await until(lambda: not machine.runs("a"))
    await until(lambda: machine.told("a").state is ModelState.UNLOADED)
    assert machine.told("b").state is ModelState.LOADED
    assert await room.served("a")


async def test_the_end_turns_away_who_waits_and_leaves_no_engine(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 4)
    machine.offer("b", 4, "held")
    async with room.ask("a", "endless") as running:
        await running.content.readany()
        asking = asyncio.ensure_future(room.refusal("b"))
        await until(lambda: pids(machine.starts("b")))
        machine.gateway.drain()
        status, error = await asking
        assert (status, error["code"]) == (503, "stopping")
        await running.content.readany()  # it goes on meanwhile
        await machine.gateway.close()
        assert b'"code":"stopping"' in await running.read()
    machine.residents.unwant()
    await asyncio.wait_for(machine.residents.stopped(), 10)
    assert not machine.runs("a")
    assert not machine.runs("b")


async def test_an_order_unloads_what_is_idle_at_once_and_what_is_busy_only_by_force(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 4)
    assert await room.served("a")
    await machine.residents.unload("a")
    assert not machine.runs("a")
    async with room.ask("a", "endless") as running:
        await running.content.readany()
        with pytest.raises(Exception, match="a answers requests") as refused:
            await machine.residents.unload("a")
        assert getattr(refused.value, "status", None) == 409
        await machine.residents.unload("a", force=True)
        *_, last, nothing = (await running.read()).split(b"\n\n")
        assert nothing == b""
        assert orjson.loads(last[6:])["error"]["code"] == "model_unloaded"
    await until(lambda: not machine.runs("a"))
    assert machine.told("a").state is ModelState.UNLOADED


async def test_one_that_is_offered_no_longer_serves_nobody_new(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 4)
    machine.offer("b", 4)
    assert await room.served("a")
    del machine.offers["a"], machine.offers["b"]
    machine.offer("c", 4)
    for name in ("a", "b"):
        status, error = await room.refusal(name)
        assert (status, error["code"]) == (404, "model_not_found")
        assert error["message"] == "this machine serves c only"
    await until(lambda: not machine.runs("a"))
    await until(lambda: [model.name for model in machine.report().models] == ["c"])


async def test_one_without_a_plan_is_told_with_the_reason_and_asked_again_later(tmp_path: Path) -> None:
    again = replace(POLICY, plan_again_seconds=0.2, same_plan_seconds=0.1)
    async with room_of(tmp_path, again) as room:
        machine = room.machine
        missing = without_model("a", "no model called a was downloaded")
        machine.residents.offer((missing,))
        await until(lambda: machine.told("a").state is ModelState.FAILED)
        assert machine.told("a").detail == "no model called a was downloaded"
        status, error = await room.refusal("a")
        assert (status, error["code"]) == (503, "model_failed")
        machine.offer("a", 4)
        await until(lambda: machine.told("a").state is ModelState.UNLOADED)
        assert await room.served("a")


async def test_one_for_which_there_is_not_memory_enough_at_present_is_refused_by_its_plan_and_planned_again(
    tmp_path: Path,
) -> None:
    async with room_of(tmp_path, replace(POLICY, plan_again_seconds=0.2, same_plan_seconds=0.1)) as room:
        machine = room.machine
        whole = machine.made("a", 4)

        def planned(memory: Mapping[Pool, MemoryNow]) -> Plan:
            if memory[Pool.RAM].available_bytes < 4 * GIB:
                raise DoesNotFit("a needs 4.0 GiB at least, and 2.0 GiB are free")
            return whole.plan(memory)

        machine.gib = 2
        machine.residents.offer((replace(whole, plan=planned),))
        status, error = await room.refusal("a")
        assert (status, error["code"]) == (503, "model_does_not_fit")
        assert error["message"] == "a needs 4.0 GiB at least, and 2.0 GiB are free"
        assert machine.told("a").state is ModelState.FAILED
        machine.gib = 10
        await until(lambda: machine.told("a").state is ModelState.UNLOADED)
        assert await room.served("a")


async def test_a_plan_is_made_for_the_memory_that_pinned_models_leave(room: Room) -> None:
    machine = room.machine
    machine.offer("pinned", 4, pinned=True)
    assert await room.served("pinned")
    seen: list[int] = []

    def planned(memory: Mapping[Pool, MemoryNow]) -> Plan:
        seen.append(memory[Pool.RAM].available_bytes)
        raise NoChoice("not today")

    model = LocalModel(name="a", path="/models/a.gguf", format=Format.GGUF)
    machine.offers["a"] = Offer(model=model, plan=planned)
    machine.residents.offer(tuple(machine.offers.values()))
    await room.refusal("a")
    assert set(seen) == {6 * GIB}


async def test_a_report_of_as_many_models_as_there_may_be_is_well_below_its_limit(room: Room) -> None:
    machine = room.machine
    offers = [without_model(f"{number}" + "m" * 120, "x" * 400) for number in range(80)]
    machine.residents.offer(offers)
    assert len(machine.residents.names) == POLICY.most_models
    await until(lambda: all(model.detail for model in machine.report().models))
    assert len(machine.report().to_line()) < wire.MAX_REPORT_BYTES / 2
    Report.from_line(machine.report().to_line())


async def test_a_model_that_never_loads_makes_room_for_another_and_rests(tmp_path: Path) -> None:
    patient = SupervisionPolicy(
        start_limit_seconds=1, stop_grace_seconds=0.3, first_rest_seconds=0.2, fault_window_seconds=1
    )
    async with room_of(tmp_path, replace(POLICY, supervision=lambda _plan: patient)) as room:
        machine = room.machine
        machine.offer("hangs", 6, "mute")
        machine.offer("b", 6)
        assert (await room.refusal("hangs"))[0] == 503
        assert machine.told("hangs").state is ModelState.LOADING  # another try: nobody wants its room
        assert await room.served("b")
        told = machine.told("hangs")
        assert told.state is ModelState.FAILED
        assert told.detail.startswith("it generated nothing within 1 s")
        starts = len(pids(machine.starts("hangs")))
        assert (await room.refusal("hangs"))[1]["code"] == "engine_not_ready"
        assert len(pids(machine.starts("hangs"))) == starts
        assert machine.told("b").state is ModelState.LOADED


def test_a_load_that_hangs_to_its_limit_each_time_comes_to_an_end(tmp_path: Path) -> None:
    plan = fake_plan(tmp_path / "a", "mute")
    plan = replace(plan, spec=replace(plan.spec, start_limit_seconds=1800))
    policy = ResidentsPolicy().supervision(plan)
    life, now = Life(state=State.STARTING), 0.0
    for _ in range(policy.faults_to_fail):
        assert life.state is State.STARTING
        now += policy.start_limit_seconds
        for event in (Event.WOKE, Event.EXITED, Event.WOKE):
            life, _ = life.after(event, now, policy)
    assert life.state is State.FAILED


async def test_an_engine_that_dies_as_it_lets_somebody_in_refuses_him(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = room.machine
    machine.offer("a", 4, "held")
    asking = asyncio.ensure_future(room.refusal("a"))
    await until(lambda: machine.residents.waiting == 1)
    admit = machine.residents._admit

    def admit_and_die(model: Any) -> None:
        there = len(model.line)
        admit(model)
        if there and not model.line:
            model.engine._tell(Event.EXITED)

    monkeypatch.setattr(machine.residents, "_admit", admit_and_die)
    machine.release("a")
    status, error = await asking
    assert (status, error["code"]) == (503, "engine_not_ready")
    monkeypatch.undo()
    await until(lambda: machine.residents.taken == 0)
    assert machine.residents._residency.is_idle("a")


async def test_an_engine_is_not_started_again_into_memory_that_a_neighbour_has_taken(room: Room) -> None:
    machine = room.machine
    machine.offer("a", 6, preload=True)
    await until(lambda: machine.told("a").state is ModelState.LOADED)
    machine.gib = 2
    os.kill(pids(machine.starts("a"))[-1], signal.SIGKILL)
    await until(lambda: machine.told("a").state is ModelState.FAILED)
    assert "a needs 6.0 GiB" in machine.told("a").detail
    assert len(pids(machine.starts("a"))) == 1
    machine.gib = 10
    await until(lambda: machine.told("a").state is ModelState.LOADED)
    assert await room.served("a")


async def test_an_order_to_load_what_has_just_failed_finds_no_engine_of_before(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, may_end = room.machine, asyncio.Event()
    machine.offer("a", 4, "exit")
    connected = Resident.connected

    @contextlib.asynccontextmanager
    async def ends_slowly(resident: Resident) -> AsyncIterator[None]:
        async with connected(resident):
            yield
            await may_end.wait()

    monkeypatch.setattr(Resident, "connected", ends_slowly)
    assert (await room.refusal("a"))[0] == 503
    await until(lambda: machine.residents._models["a"].leave.is_set())
    monkeypatch.undo()
    first = machine.residents.resident("a")
    machine.residents.load("a")
    await until(lambda: machine.residents.resident("a") is not first)
    may_end.set()
    await until(lambda: machine.told("a").state is ModelState.FAILED)
    assert len(pids(machine.starts("a"))) == 4  # two tries each
    machine.offer("a", 4)
    machine.residents.load("a")
    assert await room.served("a")


async def test_one_whose_time_is_over_as_its_model_goes_is_told_that_it_has_gone(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, loop = room.machine, asyncio.get_running_loop()
    monkeypatch.setattr(machine.residents, "_step", asyncio.Event().wait)  # nothing is decided yet
    machine.offer("a", 4)
    machine.residents._models["a"].load_seconds = 0.01
    loop.call_later(0.1, time.sleep, 0.5)  # so that both of the following come in one turn of the loop
    loop.call_later(0.35, machine.residents.offer, ())
    with pytest.raises(Refused, match="a is no longer here"):
        async with machine.residents.entered("a", 0.3):
            pass
    assert (machine.residents.waiting, machine.residents.names) == (0, ())
