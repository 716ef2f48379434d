"""One simulation from its beginning to its row of figures.

Definitions are the routing study's: TTFT counts from the client's first asking, and of a client that left
without a token it is the time it waited; goodput is the share of chats whose first token came within 5 s
and whose others came at 150 ms or less on average; lost are requests that ended without their answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from random import Random

from benchmarks.sim.bound import chat_turns_per_second, fluid_bound, least_prefill, makespan_bound
from benchmarks.sim.clients import BatchClient, ChatClients, Outcome
from benchmarks.sim.fleets import Fleet
from benchmarks.sim.policies import POLICIES
from benchmarks.sim.room import Room
from benchmarks.sim.virtual_time import VirtualTime
from benchmarks.sim.workloads import Session, Workload, mean_turn, papers, sessions
from benchmarks.tables import Row

GOOD_TTFT_SECONDS, GOOD_TOKEN_SECONDS = 5.0, 0.150
BESIDE_BATCH_FROM_SECONDS = 20.0
"""Chats beside a batch are measured from then on, until the batch could be done."""
CALIBRATING_SECONDS = 60.0
"""So long the machines are in the room before anybody asks: each has been measured."""
LONGEST_BATCH = 300.0
"""In bounds. A batch that takes longer has no makespan; the worst rivals of the study took some 160."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """None: there is no such figure in this workload, or the batch was not through in time."""

    makespan_over_bound: float | None
    """Over the study's fluid bound, with what the faults leave of the machines."""
    makespan_over_least: float | None
    """Over what no policy can beat."""
    prefill_over_min: float | None
    """Only of a batch alone: what chats have computed cannot be told apart."""
    ttft_p50: float | None
    """Seconds, as ttft_p99."""
    ttft_p99: float | None
    goodput: float | None
    lost: int
    batch_done: float | None
    """The share of the batch that was answered."""


def simulate(
    fleet_name: str, fleet: Fleet, workload_name: str, workload: Workload, policy: str, seed: int
) -> Row:
    """The same arguments, the same row."""
    figures = play(fleet, workload, policy, seed)
    about = {"fleet": fleet_name, "workload": workload_name, "policy": policy, "seed": seed}
    return {**about, **asdict(figures)}


def play(fleet: Fleet, workload: Workload, policy_name: str, seed: int) -> Figures:
    machines = fleet.each()
    if any(fault.machine >= len(machines) for fault in workload.faults):
        raise ValueError(f"a fault of a machine that is not there: this fleet has {len(machines)}")
    engines = tuple(machine.engine for machine in machines)
    policy = POLICIES[policy_name]
    time = VirtualTime(-CALIBRATING_SECONDS)
    room = Room(time, machines, policy, Random(f"room {seed}"))
    time.run(0.0)
    calibrating = sum(engine.prefilled_tokens for engine in room.engines)
    batch = papers(seed, workload.papers, workload.prompts_per_paper)
    has_chats, has_batch = workload.chat_share > 0, bool(batch)

    span = workload.chat_seconds if has_chats else fluid_bound(engines, batch)
    faults = tuple(replace(fault, at=fault.at * span) for fault in workload.faults)
    bound = fluid_bound(engines, batch, faults) if has_batch else math.nan
    least = makespan_bound(engines, batch, faults) if has_batch else math.nan
    for fault in faults:
        time.at(fault.at, partial(room.suffer, fault))

    people = ChatClients(
        room,
        _sessions(fleet, workload, seed) if has_chats else (),
        patience_seconds=workload.chat_patience_seconds,
    )
    client = BatchClient(
        room,
        batch,
        at_once=policy.batch_at_once or sum(machine.ideal_limit for machine in machines),
        limit_seconds=workload.batch_limit_seconds,
        dice=Random(f"batch client {seed}"),
    )
    if has_chats:
        time.run(workload.chat_seconds + max(workload.drain_seconds, workload.chat_patience_seconds))
        since = BESIDE_BATCH_FROM_SECONDS if has_batch else workload.warm_seconds
        until = min(bound, workload.chat_seconds) if has_batch else workload.chat_seconds
        chats = [one for one in people.outcomes if since <= one.asked <= until]
    else:
        time.run(LONGEST_BATCH * bound, lambda: client.is_through)
        chats = []

    prefilled = sum(engine.prefilled_tokens for engine in room.engines) - calibrating
    through = has_batch and client.is_through
    answered = sum(one.answered for one in client.outcomes)
    ttft = sorted((one.first or one.ended) - one.asked for one in chats)
    makespan = max(one.ended for one in client.outcomes) if through else math.nan
    return Figures(
        makespan_over_bound=makespan / bound if through else None,
        makespan_over_least=makespan / least if through else None,
        prefill_over_min=prefilled / least_prefill(batch) if through and not has_chats else None,
        ttft_p50=_at_share(ttft, 0.50),
        ttft_p99=_at_share(ttft, 0.99),
        goodput=sum(map(_is_good, chats)) / len(chats) if chats else None,
        lost=sum(not one.answered for one in (*chats, *client.outcomes)),
        batch_done=answered / sum(len(paper.requests) for paper in batch) if has_batch else None,
    )


def _sessions(fleet: Fleet, workload: Workload, seed: int) -> Sequence[Session]:
    turn = mean_turn()
    turns = chat_turns_per_second([machine.engine for machine in fleet.each()], turn)
    per_second = workload.chat_share * fleet.sustained_share * turns / turn.turns_per_session
    return sessions(seed, per_second, workload.chat_seconds)


def _is_good(chat: Outcome) -> bool:
    if not chat.answered or chat.first is None:
        return False
    per_token = (chat.ended - chat.first) / max(chat.request.work.output - 1, 1)
    return chat.first - chat.asked <= GOOD_TTFT_SECONDS and per_token <= GOOD_TOKEN_SECONDS


def _at_share(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
