"""Which models are loaded and which give way, on a clock of its own: engines load and leave as told."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_agent.memory import Need, Pool
from worker_agent.residency import (
    Command,
    Load,
    Phase,
    Refuse,
    Residency,
    ResidencyPolicy,
    Terms,
    Unload,
)

GIB = 2**30
POLICY = ResidencyPolicy()


def need(gib: float, pool: Pool = Pool.RAM) -> Need:
    return Need(weights_bytes=int(gib * GIB), cache_bytes=0, overhead_bytes=0, pool=pool)


def terms(gib: float | None, **more: object) -> Terms:
    return Terms(need=None if gib is None else need(gib), **more)  # type: ignore[arg-type]


@dataclass
class Machine:
    """Performs what is decided: a model is loaded when `load_all` says so, and left when `leave_all` does."""

    budget: Mapping[Pool, int]
    residency: Residency = field(default_factory=lambda: Residency(POLICY))
    now: float = 1000.0
    waiting: dict[int, str] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)
    _keys: itertools.count[int] = field(default_factory=itertools.count)

    @classmethod
    def of(cls, gib: float, **models: Terms) -> Machine:
        machine = cls({Pool.RAM: int(gib * GIB)})
        for name, each in models.items():
            machine.residency.offer(name, each)
        return machine

    def phase(self, name: str) -> Phase:
        return self.residency.phase(name)

    def ask(self, name: str) -> int | None:
        """A request: runs at once where the model is ready, else waits (its key is returned)."""
        if self.phase(name) is Phase.READY:
            self.begin(name)
            return None
        key = next(self._keys)
        self.waiting[key] = name
        self.residency.waits(name, key, self.now)
        self.decide()
        return key

    def begin(self, name: str) -> None:
        self.residency.begins(name, self.now)
        self.running.append(name)

    def end(self, name: str) -> None:
        self.running.remove(name)
        self.residency.ends(name, self.now)
        self.decide()

    def leave(self, key: int) -> None:
        self.residency.waits_no_more(self.waiting.pop(key), key)
        self.decide()

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.decide()

    def load_all(self, seconds: float = 1.0) -> None:
        """Whatever loads is ready, and serves who waits for it."""
        self.now += seconds
        for name in self.names(Phase.LOADING):
            self.residency.loaded(name, self.now)
            self.serve(name)
        self.decide()

    def leave_all(self, seconds: float = 0.5) -> None:
        self.now += seconds
        for name in self.names(Phase.LEAVING):
            self.residency.gone(name)
        self.decide()

    def serve(self, name: str) -> None:
        for key in [key for key, model in self.waiting.items() if model == name]:
            self.residency.waits_no_more(self.waiting.pop(key), key)
            self.begin(name)

    def names(self, *phases: Phase) -> list[str]:
        return [name for name in self.residency._models if self.phase(name) in phases]

    def decide(self) -> list[Command]:
        before = {name: self.phase(name) for name in self.residency._models}
        commands = self.residency.decide(self.now, self.budget)
        for command in commands:
            match command:
                case Load(name):
                    assert before[name] is Phase.UNLOADED
                    self.loads.append(name)
                    self.insist_on_memory()
                case Unload(name):
                    assert name not in self.running, f"{name} was unloaded while it answered"
                    self.unloads.append(name)
                case Refuse(name, why):
                    self.refused.append((name, why))
                    self.waiting = {key: model for key, model in self.waiting.items() if model != name}
        for name in self.names(Phase.READY):
            self.serve(name)  # one that was closed for nothing goes on
        return commands

    def insist_on_memory(self) -> None:
        resident = self.names(Phase.LOADING, Phase.READY, Phase.CLOSING, Phase.LEAVING)
        if any(self.residency._models[name].held is None for name in resident):
            assert len(resident) == 1, (
                f"{resident} are loaded together, and what one of them takes is not known"
            )
        for pool, held in self.residency.held_bytes().items():
            assert held <= self.budget.get(pool, 0), f"{resident} take more than there is"


def test_one_that_fits_is_loaded_beside_those_that_are_there() -> None:
    machine = Machine.of(10, a=terms(4), b=terms(6))
    machine.ask("a")
    machine.load_all()
    machine.ask("b")
    machine.load_all()
    assert (machine.loads, machine.unloads) == (["a", "b"], [])
    assert sorted(machine.running) == ["a", "b"]


def test_an_idle_one_gives_way_and_only_when_it_is_gone_is_the_other_loaded() -> None:
    machine = Machine.of(10, a=terms(6), b=terms(6))
    machine.ask("a")
    machine.load_all()
    machine.end("a")
    machine.after(60)
    machine.ask("b")
    assert (machine.phase("a"), machine.loads) == (Phase.LEAVING, ["a"])
    machine.leave_all()
    assert machine.loads == ["a", "b"]


def test_as_few_as_will_do_give_way_and_of_idle_ones_the_one_that_was_used_longest_ago() -> None:
    machine = Machine.of(10, old=terms(4), new=terms(4), small=terms(2), wanted=terms(3))
    for name in ("old", "new", "small"):
        machine.ask(name)
        machine.load_all()
        machine.end(name)
        machine.after(60)
    machine.ask("old")
    machine.end("old")
    machine.after(60)
    machine.ask("wanted")
    assert machine.unloads == ["new"]


def test_a_small_one_stays_where_the_large_one_must_leave_in_any_case() -> None:
    machine = Machine.of(10, small=terms(2), large=terms(8), wanted=terms(7))
    for name in ("small", "large"):
        machine.ask(name)
        machine.load_all()
        machine.end(name)
        machine.after(60)
    machine.ask("wanted")
    assert machine.unloads == ["large"]


def test_a_pinned_one_makes_room_for_nobody_and_the_refusal_names_it_with_the_numbers() -> None:
    machine = Machine.of(7.5, x=terms(1.5, pinned=True), other=terms(3))
    big = Need(weights_bytes=int(5.1 * GIB), cache_bytes=int(3.2 * GIB), overhead_bytes=GIB, pool=Pool.RAM)
    machine.residency.offer("big", Terms(need=big))
    for name in ("x", "other"):
        machine.ask(name)
        machine.load_all()
        machine.end(name)
    machine.after(60)
    machine.ask("big")
    [(name, why)] = machine.refused
    assert name == "big"
    assert why == (
        "big needs 9.3 GiB (weights 5.1, cache 3.2, engine 1.0); 6.0 GiB are free for models, of 7.5;"
        " pinned: x 1.5"
    )
    assert machine.unloads == []  # nobody leaves for one that cannot come
    assert machine.phase("other") is Phase.READY


def test_memory_that_others_gave_back_lets_in_who_was_refused() -> None:
    machine = Machine.of(4, a=terms(6))
    machine.ask("a")
    assert len(machine.refused) == 1
    machine.budget = {Pool.RAM: 8 * GIB}
    machine.ask("a")
    assert machine.loads == ["a"]


def test_a_busy_one_has_its_turn_then_ends_what_it_has_begun_and_gives_way() -> None:
    machine = Machine.of(10, a=terms(6, load_seconds=20), b=terms(6, load_seconds=20))
    machine.ask("a")
    machine.load_all(20)
    machine.ask("b")
    machine.after(39)
    machine.ask("a")  # within its turn of two loads
    assert machine.running == ["a", "a"]
    machine.after(1)
    assert machine.phase("a") is Phase.CLOSING
    late = machine.ask("a")
    assert late is not None  # it waits for the next turn
    machine.end("a")
    assert machine.unloads == []
    machine.end("a")
    assert machine.unloads == ["a"]
    machine.leave_all()
    machine.load_all(20)
    assert machine.running == ["b"]
    machine.end("b")
    machine.after(POLICY.longest_pause_seconds)  # idle: it does not wait for its turn's end
    machine.leave_all()
    machine.load_all(20)
    assert machine.running == ["a"]
    assert machine.loads == ["a", "b", "a"]


def test_one_that_has_served_for_longer_than_a_turn_is_closed_at_once() -> None:
    machine = Machine.of(10, a=terms(6), b=terms(6))
    machine.ask("a")
    machine.load_all()
    machine.after(3600)
    machine.ask("b")
    assert machine.phase("a") is Phase.CLOSING


def test_one_that_is_closed_for_somebody_who_leaves_serves_on() -> None:
    machine = Machine.of(10, a=terms(6), b=terms(6))
    machine.ask("a")
    machine.load_all()
    machine.after(3600)
    key = machine.ask("b")
    machine.ask("a")
    assert key is not None
    machine.leave(key)
    assert machine.phase("a") is Phase.READY
    assert machine.running == ["a", "a"]


def test_one_that_was_promised_keeps_its_turn_for_those_who_were_told_to_come_back() -> None:
    machine = Machine.of(10, a=terms(6), b=terms(6))
    machine.residency.promise("a", machine.now)
    machine.decide()
    assert machine.loads == ["a"]
    machine.ask("b")
    machine.load_all()
    machine.after(9)
    assert machine.unloads == []
    machine.ask("a")
    assert machine.running == ["a"]
    machine.end("a")
    machine.after(POLICY.longest_pause_seconds)
    assert machine.unloads == ["a"]


def test_a_promise_that_could_not_be_kept_for_a_minute_is_dropped() -> None:
    machine = Machine.of(10, a=terms(6), b=terms(6))
    machine.ask("a")
    machine.load_all()
    machine.residency.promise("b", machine.now)
    machine.decide()
    machine.after(20)  # the turn of a model that takes 10 s to load
    assert machine.phase("a") is Phase.CLOSING
    machine.after(POLICY.wish_seconds)
    assert machine.phase("a") is Phase.READY
    machine.end("a")
    assert machine.loads == ["a"]


def test_a_lasting_wish_stands_until_it_is_met() -> None:
    machine = Machine.of(10, a=terms(6), b=terms(6))
    machine.ask("a")
    machine.load_all()
    machine.residency.wish("b", machine.now, lasting=True)
    machine.residency.wish("b", machine.now)
    machine.after(10 * POLICY.wish_seconds)
    machine.end("a")
    machine.leave_all()
    assert machine.loads == ["a", "b"]


def test_one_whose_need_is_not_known_is_there_alone() -> None:
    machine = Machine.of(10, known=terms(1), unknown=terms(None))
    machine.ask("unknown")
    machine.load_all()
    machine.ask("known")
    machine.after(20)
    assert machine.loads == ["unknown"]
    machine.end("unknown")
    machine.leave_all()
    machine.load_all()
    assert machine.running == ["known"]


def test_one_whose_need_is_not_known_is_refused_beside_a_pinned_one() -> None:
    machine = Machine.of(10, pinned=terms(1, pinned=True), unknown=terms(None))
    machine.ask("pinned")
    machine.load_all()
    machine.ask("unknown")
    assert "pinned is pinned" in machine.refused[0][1]
    other = Machine.of(10, unknown=terms(None, pinned=True), known=terms(1))
    other.ask("unknown")
    other.load_all()
    other.ask("known")
    assert other.refused[0][1].startswith("unknown is pinned, and what it takes is not known")


def test_pools_are_counted_apart() -> None:
    machine = Machine.of(10, ram=terms(8))
    machine.budget = {Pool.RAM: 10 * GIB, Pool.VRAM: 10 * GIB}
    machine.residency.offer("gpu", Terms(need=need(8, Pool.VRAM)))
    machine.ask("ram")
    machine.ask("gpu")
    assert machine.loads == ["ram", "gpu"]
    machine.budget = {Pool.RAM: 10 * GIB}  # the GPU's tool does not answer
    machine.residency.offer("gpu too", Terms(need=need(1, Pool.VRAM)))
    machine.ask("gpu too")
    assert "of the GPU's memory 0.0 GiB are free" in machine.refused[0][1]


def test_one_that_fits_passes_one_that_waits_for_room_unless_it_would_take_it_away() -> None:
    machine = Machine.of(10, a=terms(8), big=terms(9), one=terms(1), two=terms(2))
    machine.ask("a")
    machine.load_all()
    machine.ask("big")
    machine.ask("two")  # fits beside a, but not beside the big one
    machine.ask("one")
    assert machine.loads == ["a", "one"]


@pytest.mark.parametrize("pinned", [False, True])
def test_an_idle_one_is_unloaded_after_its_time_unless_it_is_pinned(pinned: bool) -> None:
    machine = Machine.of(10, a=terms(6, ttl_seconds=300, pinned=pinned))
    machine.ask("a")
    machine.load_all()
    machine.after(1000)
    assert machine.unloads == []  # it works
    machine.end("a")
    assert machine.residency.wake_at == (None if pinned else machine.now + 300)
    machine.after(299)
    assert machine.unloads == []
    machine.after(1)
    assert machine.unloads == ([] if pinned else ["a"])


def test_one_that_failed_is_loaded_again_only_once_it_is_forgiven() -> None:
    machine = Machine.of(10, a=terms(6), b=terms(6))
    machine.ask("a")
    machine.residency.failed("a")
    machine.decide()
    assert machine.loads == ["a"]
    machine.ask("b")
    assert machine.loads == ["a", "b"]  # what failed holds no memory
    machine.residency.forgive("a")
    machine.load_all()
    machine.end("b")
    machine.after(POLICY.longest_pause_seconds)
    machine.leave_all()
    assert machine.loads == ["a", "b", "a"]


def test_how_long_until_there_is_room_is_told() -> None:
    machine = Machine.of(10, a=terms(6, load_seconds=20), b=terms(6, load_seconds=30), c=terms(20))
    tell = machine.residency.seconds_until_room
    assert tell("b", machine.now, machine.budget) == 0
    machine.ask("a")
    machine.load_all(20)
    assert tell("b", machine.now, machine.budget) == 40
    assert tell("c", machine.now, machine.budget) is None
    assert tell("a", machine.now, machine.budget) == 0
    machine.ask("b")
    machine.after(40)
    assert machine.phase("a") is Phase.CLOSING
    assert tell("a", machine.now, machine.budget) == 60 + 30  # the other's turn, and its load
    machine.end("a")
    machine.after(0)
    machine.leave_all()
    machine.load_all(30)
    machine.end("b")
    machine.after(60)
    assert tell("a", machine.now, machine.budget) == 0


# Many clients, many turns


@dataclass
class Traffic:
    """Clients that ask one model after another, each waiting for its answer; loading takes its time."""

    machine: Machine
    answer_seconds: float
    load_seconds: float
    step: float = 0.05
    served: dict[int, int] = field(default_factory=dict)
    longest_wait: float = 0.0

    def run(self, clients: list[list[str]], pause: float, seconds: float) -> None:
        machine = self.machine
        began: dict[int, float] = {}  # when a client's request was sent
        answered_at: dict[int, float] = {}
        asks_at = dict.fromkeys(range(len(clients)), machine.now)
        keys: dict[int, int] = {}
        ready_at: dict[str, float] = {}
        end = machine.now + seconds
        while machine.now < end:
            for client, at in list(asks_at.items()):
                if at <= machine.now:
                    del asks_at[client]
                    began[client] = machine.now
                    key = machine.ask(self.model(clients, client))
                    if key is None:
                        answered_at[client] = machine.now + self.answer_seconds
                    else:
                        keys[client] = key
            for name in machine.names(Phase.LOADING):
                if ready_at.setdefault(name, machine.now + self.load_seconds) <= machine.now:
                    del ready_at[name]
                    machine.residency.loaded(name, machine.now)
            for name in machine.names(Phase.LEAVING):
                machine.residency.gone(name)
            machine.decide()
            for client, key in list(keys.items()):
                if key not in machine.waiting:
                    del keys[client]
                    self.longest_wait = max(self.longest_wait, machine.now - began[client])
                    answered_at[client] = machine.now + self.answer_seconds
            for client, at in list(answered_at.items()):
                if at <= machine.now:
                    del answered_at[client]
                    machine.end(self.model(clients, client))
                    self.served[client] = self.served.get(client, 0) + 1
                    asks_at[client] = machine.now + pause
            machine.now += self.step

    def model(self, clients: list[list[str]], client: int) -> str:
        models = clients[client]
        return models[self.served.get(client, 0) % len(models)]


def test_two_models_that_alternate_cost_a_load_per_turn_and_nobody_starves() -> None:
    machine = Machine.of(10, a=terms(6, load_seconds=5), b=terms(6, load_seconds=5))
    traffic = Traffic(machine, answer_seconds=0.5, load_seconds=5)
    traffic.run([["a"], ["b"], ["a"], ["b"]], pause=0.1, seconds=600)
    assert len(machine.loads) <= 600 / (10 + 5) + 2
    assert traffic.longest_wait < 2 * 5 + 10 + 5
    assert min(traffic.served.values()) > 0.5 * max(traffic.served.values()) > 100


def test_one_client_that_alternates_waits_for_loads_and_not_for_turns() -> None:
    machine = Machine.of(10, a=terms(6, load_seconds=5), b=terms(6, load_seconds=5))
    traffic = Traffic(machine, answer_seconds=0.5, load_seconds=5)
    traffic.run([["a", "b"]], pause=0.1, seconds=600)
    assert traffic.longest_wait < 5 + 1
    assert traffic.served[0] > 90


def test_models_that_fit_together_are_loaded_once_each() -> None:
    machine = Machine.of(12, a=terms(6, load_seconds=5), b=terms(6, load_seconds=5))
    traffic = Traffic(machine, answer_seconds=0.5, load_seconds=5)
    traffic.run([["a"], ["b"], ["a", "b"]], pause=0.1, seconds=60)
    assert sorted(machine.loads) == ["a", "b"]


@settings(max_examples=60, deadline=None)
@given(
    needs=st.lists(st.integers(1, 10), min_size=2, max_size=4),
    clients=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=6),
    load_seconds=st.sampled_from([0.5, 3.0, 20.0]),
    answer_seconds=st.sampled_from([0.2, 2.0, 30.0]),
    pause=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_whatever_is_asked_nobody_waits_longer_than_a_turn_of_each_other_model(
    needs: list[int], clients: list[list[int]], load_seconds: float, answer_seconds: float, pause: float
) -> None:
    names = [f"m{number}" for number in range(len(needs))]
    machine = Machine.of(
        10, **{name: terms(gib, load_seconds=load_seconds) for name, gib in zip(names, needs, strict=True)}
    )
    traffic = Traffic(machine, answer_seconds, load_seconds, step=0.25)
    asked = [[names[number % len(names)] for number in models] for models in clients]
    seconds = 400.0
    traffic.run(asked, pause, seconds)
    turn = max(POLICY.least_turn_seconds, 2 * load_seconds)
    bound = len(needs) * (turn + answer_seconds + load_seconds + 4 * traffic.step)
    assert traffic.longest_wait <= bound
    assert all(machine.now - at <= bound for at in waiting_since(machine)), "somebody waits for ever"
    assert len(machine.loads) <= len(needs) * (seconds / min(load_seconds + 0.01, turn) + 1)


def waiting_since(machine: Machine) -> list[float]:
    return [at for model in machine.residency._models.values() for at in model.waiters.values()]


_OPERATIONS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 4)),
    st.tuples(st.just("end"), st.integers(0, 20)),
    st.tuples(st.just("leave"), st.integers(0, 20)),
    st.tuples(st.just("loaded"), st.integers(0, 4)),
    st.tuples(st.just("failed"), st.integers(0, 4)),
    st.tuples(st.just("gone"), st.integers(0, 4)),
    st.tuples(st.just("promise"), st.integers(0, 4)),
    st.tuples(st.just("dismiss"), st.integers(0, 4)),
    st.tuples(st.just("budget"), st.integers(2, 20)),
    st.tuples(st.just("after"), st.integers(0, 40)),
)
_NEEDS = st.one_of(st.none(), st.integers(1, 12))


@settings(max_examples=400, deadline=None)
@given(
    models=st.lists(
        st.tuples(_NEEDS, st.booleans(), st.sampled_from([None, 5.0, 60.0])), min_size=1, max_size=5
    ),
    operations=st.lists(_OPERATIONS, max_size=60),
)
def test_after_any_history_memory_is_kept_nothing_busy_is_unloaded_and_all_are_served_or_refused(
    models: list[tuple[int | None, bool, float | None]], operations: list[tuple[str, int]]
) -> None:
    # One pinned model at most: two that are pinned are the user's own way to starve a third.
    pinned = next((number for number, (_, pin, _) in enumerate(models) if pin), None)
    machine = Machine.of(
        10,
        **{
            f"m{number}": terms(gib, pinned=number == pinned, ttl_seconds=ttl)
            for number, (gib, _, ttl) in enumerate(models)
        },
    )
    for what, number in operations:
        perform(machine, what, number, f"m{number % len(models)}")

    machine.budget = {Pool.RAM: 12 * GIB}
    for name in machine.names(Phase.FAILED):
        machine.residency.forgive(name)
    waited = set(machine.waiting)
    for _ in range(8 * len(models)):  # everybody's requests end, everything loads, others go on asking
        for name in machine.running[:]:
            machine.end(name)
        machine.leave_all(1)
        machine.load_all(1)
        machine.after(30)
        if not waited & set(machine.waiting):
            break
        machine.ask("m0")
    assert not waited & set(machine.waiting)


def perform(machine: Machine, what: str, number: int, name: str) -> None:
    residency = machine.residency
    match what:
        case "ask" if machine.phase(name) is not Phase.FAILED:
            machine.ask(name)
        case "end" if machine.running:
            machine.end(machine.running[number % len(machine.running)])
        case "leave" if machine.waiting:
            machine.leave(sorted(machine.waiting)[number % len(machine.waiting)])
        case "loaded" if machine.phase(name) is Phase.LOADING:
            residency.loaded(name, machine.now)
            machine.decide()
        case "failed" if machine.phase(name) in (Phase.LOADING, Phase.READY, Phase.CLOSING):
            residency.failed(name)
            for _ in range(machine.running.count(name)):
                machine.end(name)
            machine.decide()
        case "gone" if machine.phase(name) is Phase.LEAVING:
            residency.gone(name)
            machine.decide()
        case "promise" if machine.phase(name) is not Phase.FAILED:
            residency.promise(name, machine.now)
            machine.decide()
        case "dismiss":
            for _ in range(machine.running.count(name)):  # they are ended with it
                machine.running.remove(name)
                residency.ends(name, machine.now)
            residency.dismiss(name)
            machine.decide()
        case "budget":
            machine.budget = {Pool.RAM: number * GIB}
            machine.decide()
        case "after":
            machine.after(number)


def test_memory_that_a_newcomer_does_not_need_is_not_its_concern() -> None:
    machine = Machine.of(10, ram=terms(6))
    machine.budget = {Pool.RAM: 10 * GIB, Pool.VRAM: 10 * GIB}
    machine.residency.offer("gpu", Terms(need=need(4, Pool.VRAM)))
    machine.ask("ram")
    machine.load_all()
    machine.end("ram")
    machine.budget = {Pool.RAM: 5 * GIB, Pool.VRAM: 10 * GIB}  # a neighbour has taken some
    machine.residency.wish("gpu", machine.now)
    assert machine.residency.decide(machine.now, machine.budget) == [Load("gpu")]
    assert (machine.phase("ram"), machine.refused) == (Phase.READY, [])


def test_a_load_that_went_wrong_and_that_nobody_waits_for_gives_way() -> None:
    machine = Machine.of(10, hangs=terms(6), b=terms(6))
    key = machine.ask("hangs")
    assert key is not None
    machine.ask("b")
    assert machine.phase("hangs") is Phase.LOADING  # a load is not broken off for another
    machine.residency.stumbled("hangs")
    machine.decide()
    assert machine.phase("hangs") is Phase.LOADING  # somebody waits for the next try
    machine.waiting.pop(key)
    machine.residency.waits_no_more("hangs", key)
    assert machine.residency.seconds_until_room("b", machine.now, machine.budget) == 0
    assert machine.decide() == [Unload("hangs", given_up=True)]
    machine.leave_all()
    assert machine.loads == ["hangs", "b"]


def test_a_load_that_went_wrong_is_tried_again_while_nobody_wants_its_room() -> None:
    machine = Machine.of(10, a=terms(6), b=terms(4))
    key = machine.ask("a")
    assert key is not None
    machine.residency.stumbled("a")
    machine.leave(key)
    machine.ask("b")
    assert machine.phase("a") is Phase.LOADING
    machine.load_all()
    assert machine.phase("a") is Phase.READY
    machine.residency.stumbled("a")  # one that has served keeps its turn
    machine.residency.offer("c", terms(6))
    machine.ask("c")
    assert machine.unloads == []


def test_one_that_died_may_come_back_only_while_what_it_had_is_free() -> None:
    machine = Machine.of(10, a=terms(6), b=terms(4))
    for name in ("a", "b"):
        machine.ask(name)
        machine.load_all()
    assert machine.residency.why_not_again("a", machine.budget) is None
    assert machine.residency.why_not_again("a", {Pool.RAM: 9 * GIB}) == (
        "a needs 6.0 GiB (weights 6.0, cache 0.0, engine 0.0); 5.0 GiB are free for models, of 9.0;"
        " loaded: b 4.0"
    )
