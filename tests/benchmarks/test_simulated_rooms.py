"""What holds in every simulated room: the bound, that each request ends once, and that chance is seeded."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sim.bound import least_prefill, makespan_bound
from benchmarks.sim.clients import BatchClient, ChatClients
from benchmarks.sim.engine import EngineSpec
from benchmarks.sim.fleets import FLEETS, Fleet, Machine
from benchmarks.sim.policies import POLICIES
from benchmarks.sim.prefixes import Work
from benchmarks.sim.room import Room
from benchmarks.sim.scene import CALIBRATING_SECONDS, play, simulate
from benchmarks.sim.virtual_time import VirtualTime
from benchmarks.sim.workloads import (
    WORKLOADS,
    Fault,
    Paper,
    Request,
    Workload,
    papers,
    sessions,
)

policy_names = st.sampled_from(list(POLICIES))
specs = st.builds(
    EngineSpec,
    kind=st.sampled_from(["vllm", "mlx", "llama.cpp"]),
    prefill_tokens_per_second=st.floats(500, 5000),
    step_seconds=st.floats(0.005, 0.05),
    stream_seconds=st.floats(0, 0.01),
    context_seconds=st.floats(0, 1e-5),
    attention=st.floats(0, 1e-4),
    slots=st.integers(1, 8),
    cache_tokens=st.integers(0, 20_000),
)
rooms = st.lists(specs, min_size=1, max_size=4).map(
    lambda each: [
        Machine(name=f"machine{number}", engine=engine, ideal_limit=engine.slots)
        for number, engine in enumerate(each)
    ]
)
sizes = st.tuples(
    st.integers(0, 4000),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=5),
)
batches = st.lists(sizes, min_size=1, max_size=6).map(
    lambda each: tuple(paper(f"p{number}", *sized) for number, sized in enumerate(each))
)


def paper(key, prefix, prompts):
    works = [
        Work(key=key, prefix=prefix, prompt=prefix + own, output=output, kept=prefix)
        for own, output in prompts
    ]
    requests = [Request(name=f"{key}.{number}", kind="batch", work=work) for number, work in enumerate(works)]
    return Paper(prefix=prefix, requests=tuple(requests))


def small_engine(**more):
    rates = {"prefill_tokens_per_second": 1000, "step_seconds": 0.01, "stream_seconds": 0.001}
    return EngineSpec(kind="mlx", **{**rates, "slots": 4, "cache_tokens": 100_000, **more})


@settings(max_examples=35, deadline=None)
@given(rooms, batches, policy_names, st.integers(0, 3), st.integers(1, 40))
def test_no_policy_beats_the_bound(machines, batch, policy, seed, at_once):
    time = VirtualTime()
    room = Room(time, machines, POLICIES[policy], Random(seed))
    client = BatchClient(room, batch, at_once=at_once, limit_seconds=None, dice=Random(seed))
    time.run(1e6, lambda: client.is_through)
    assert client.is_through
    bound = makespan_bound(tuple(machine.engine for machine in machines), batch)
    assert max(one.ended for one in client.outcomes) >= bound * (1 - 1e-6)
    assert sum(engine.prefilled_tokens for engine in room.engines) >= least_prefill(batch)


def test_the_bound_of_one_machine_with_one_request_is_its_time():
    machine = Machine(name="one", engine=small_engine(slots=1, attention=0.0), ideal_limit=1)
    batch = (paper("p", 1000, [(500, 101)]),)
    assert makespan_bound((machine.engine,), batch) == pytest.approx(1.5 + 100 * 0.011)


def test_a_machine_that_hangs_from_the_start_adds_nothing_to_the_bound():
    fast, slow = small_engine(), small_engine(prefill_tokens_per_second=100)
    batch = papers(1, 5, 5)
    hang = Fault(at=0.0, machine=0, what="hang")
    bound = makespan_bound((fast, slow), batch, (hang,))
    assert bound == pytest.approx(makespan_bound((slow,), batch), rel=1e-3)
    assert makespan_bound((fast, slow), batch) < makespan_bound((fast,), batch)


faults = st.lists(
    st.builds(
        Fault,
        at=st.floats(0, 60),
        machine=st.integers(0, 1),
        what=st.sampled_from(["hang", "crash", "slow", "return"]),
        factor=st.floats(1, 10),
    ),
    max_size=6,
)


@settings(max_examples=15, deadline=None)
@given(faults, policy_names, st.integers(0, 3))
def test_every_request_ends_exactly_once_whatever_happens_to_the_machines(faults, policy, seed):
    machines = Fleet(machines=(Machine(name="box", engine=small_engine(), ideal_limit=4, count=2),)).each()
    batch = papers(seed, 4, 3)
    time = VirtualTime()
    room = Room(time, machines, POLICIES[policy], Random(seed))
    for fault in [*faults, *(Fault(at=70.0, machine=number, what="return") for number in (0, 1))]:
        time.at(fault.at, lambda fault=fault: room.suffer(fault))
    people = ChatClients(room, sessions(seed, 0.2, 60.0), patience_seconds=40.0)
    client = BatchClient(room, batch, at_once=6, limit_seconds=90.0, dice=Random(seed))
    time.run(3000.0)
    assert sorted(one.request.name for one in client.outcomes) == sorted(
        request.name for each in batch for request in each.requests
    )
    names = [one.request.name for one in people.outcomes]
    assert len(names) == people.asked == len(set(names))
    assert all(one.ended - one.asked <= 40.0 + 1e-6 for one in people.outcomes)


def test_a_crash_loses_no_paper():
    machines = (Machine(name="box", engine=small_engine(), ideal_limit=4, count=3),)
    crash = (Fault(at=0.3, machine=0, what="crash"),)
    workload = Workload(papers=6, faults=crash, batch_limit_seconds=600.0)
    figures = play(Fleet(machines=machines), workload, "expected_latency", 1)
    assert (figures.lost, figures.batch_done) == (0, 1.0)
    assert figures.prefill_over_min > 1.0


def test_a_chat_that_is_cut_in_the_middle_of_its_answer_is_lost():
    machines = Fleet(machines=(Machine(name="box", engine=small_engine(), ideal_limit=4),)).each()
    time = VirtualTime(-CALIBRATING_SECONDS)
    room = Room(time, machines, POLICIES["expected_latency"], Random(1))
    time.run(0.0)
    session = replace(sessions(1, 1.0, 100.0)[0], start=0.0)
    first = session.request(0).work
    people = ChatClients(room, [session], patience_seconds=120.0)
    begins = first.prompt / 1000
    time.at(begins + 0.3, lambda: room.suffer(Fault(at=0.0, machine=0, what="crash")))
    time.run(300.0)
    (lost,) = people.outcomes
    assert not lost.answered
    assert lost.first is not None
    assert lost.ended == pytest.approx(begins + 0.3)


def test_a_machine_that_never_answers_costs_the_people_on_it_their_patience():
    machines = Fleet(machines=(Machine(name="box", engine=small_engine(), ideal_limit=4),)).each()
    time = VirtualTime()
    room = Room(time, machines, POLICIES["expected_latency"], Random(1))
    room.suffer(Fault(at=0.0, machine=0, what="hang"))
    people = ChatClients(room, sessions(1, 0.05, 100.0), patience_seconds=120.0)
    time.run(400.0)
    assert people.outcomes
    assert all(one.first is None and one.ended - one.asked == pytest.approx(120.0) for one in people.outcomes)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_row_and_another_one_another(policy):
    fleet = FLEETS["mixed7"]()
    faults = WORKLOADS["chat30+faults"].faults
    workload = Workload(chat_share=0.4, chat_seconds=60.0, warm_seconds=0.0, drain_seconds=0.0, faults=faults)

    def row(seed):
        return simulate("mixed7", fleet, "some", workload, policy, seed)

    assert row(1) == row(1)
    assert {**row(1), "seed": 2} != row(2)


def test_a_light_chat_on_a_fast_room_is_all_good():
    fleet = FLEETS["equal8"]()
    figures = play(
        fleet, Workload(chat_share=0.05, chat_seconds=120.0, warm_seconds=0.0), "expected_latency", 1
    )
    assert (figures.goodput, figures.lost) == (1.0, 0)
    assert 0 < figures.ttft_p50 <= figures.ttft_p99 < 5
    assert (figures.makespan_over_bound, figures.prefill_over_min, figures.batch_done) == (None, None, None)


def test_a_fault_of_a_machine_that_is_not_there_is_named():
    workload = Workload(papers=1, faults=(Fault(at=0.1, machine=7, what="hang"),))
    with pytest.raises(ValueError, match="this fleet has 7"):
        play(FLEETS["mixed7"](), workload, "expected_latency", 1)


def test_a_batch_that_can_never_be_done_is_refused():
    workload = Workload(papers=1, faults=(Fault(at=0.0, machine=0, what="hang"),))
    machines = (Machine(name="box", engine=small_engine(), ideal_limit=4),)
    with pytest.raises(ValueError, match="never be done"):
        play(Fleet(machines=machines), workload, "expected_latency", 1)


def test_twice_as_many_machines_halve_the_bound():
    batch = papers(1, 20, 5)
    one, two = makespan_bound((small_engine(),), batch), makespan_bound((small_engine(),) * 2, batch)
    assert two == pytest.approx(one / 2)


# What the default policy is for, on small rooms

TINY = Fleet(
    machines=(
        FLEETS["mixed7"]().machines[0],  # a fast card with vLLM
        FLEETS["mixed7"]().machines[1],  # two large Macs
        replace(FLEETS["mixed7"]().machines[2], count=1),
    )
)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_batch_on_a_mixed_room_is_done_long_before_round_robin_has_it_and_reads_each_paper_once(seed):
    workload = Workload(papers=60)
    ours = play(TINY, workload, "expected_latency", seed)
    theirs = play(TINY, workload, "round_robin", seed)
    assert (ours.lost, ours.batch_done) == (0, 1.0)
    assert 2 * ours.makespan_over_bound < theirs.makespan_over_bound
    assert ours.prefill_over_min <= 1.05


def test_people_beside_a_batch_hardly_notice_it_and_it_is_done():
    workload = Workload(chat_share=0.3, chat_seconds=240.0, papers=24)
    figures = play(TINY, workload, "expected_latency", 1)
    assert figures.goodput >= 0.95
    assert (figures.lost, figures.batch_done) == (0, 1.0)


def test_a_batch_loses_nothing_to_a_hang_and_a_crash():
    faults = (
        Fault(at=0.2, machine=1, what="hang"),
        Fault(at=0.4, machine=0, what="crash"),
        Fault(at=0.6, machine=0, what="return"),
    )
    workload = Workload(papers=60, faults=faults, batch_limit_seconds=600.0)
    figures = play(TINY, workload, "expected_latency", 1)
    assert (figures.lost, figures.batch_done) == (0, 1.0)
    assert figures.makespan_over_bound < 1.6


def test_short_prompts_without_anything_in_common_are_a_batch_too():
    batch = tuple(paper(f"p{number}", 0, [(60, 5)]) for number in range(40))
    time = VirtualTime(-CALIBRATING_SECONDS)
    room = Room(time, TINY.each(), POLICIES["expected_latency"], Random(1))
    time.run(0.0)
    client = BatchClient(room, batch, at_once=100, limit_seconds=None, dice=Random(1))
    time.run(600.0, lambda: client.is_through)
    assert client.is_through
    assert all(one.answered for one in client.outcomes)
