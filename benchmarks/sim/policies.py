"""What is compared: the real dispatcher with its policies, and the rivals, each a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from balancer.core.choosing import Chance
from balancer.core.dispatcher import Dispatcher, DispatchPolicy
from balancer.core.model import Command, Event, Ticket
from balancer.core.placement import PlacementPolicy
from benchmarks.sim.fleets import Machine
from benchmarks.sim.prefixes import Work
from benchmarks.sim.rivals import RIVALS, Proxy

Look = Callable[[Ticket], Work]


class Router(Protocol):
    """The surface of `Dispatcher`: events in, commands out."""

    def handle(self, event: Event, now: float) -> list[Command]: ...


def _own_word(machine: Machine) -> int | None:
    return None


def _five(machine: Machine) -> int | None:
    return 5


def _ideal(machine: Machine) -> int | None:
    return machine.ideal_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    build: Callable[[Chance, Look], Router]
    cap: Callable[[Machine], int | None] = _own_word
    """The limit that the configuration names for a worker (`max_concurrent_requests`)."""
    slots_told: bool = True
    """Workers report their slots, as agents do. Of others nobody knows, and the cap alone counts."""
    batch_at_once: int | None = None
    """Requests that the batch client keeps open; None: as many as the ideal limits of all machines sum to,
    which is the best that a client of a proxy without a queue can do (so did the study)."""


def _dispatcher(policy: str) -> Callable[[Chance, Look], Router]:
    dispatching = DispatchPolicy(placement=PlacementPolicy(policy))
    return lambda chance, look: Dispatcher(dispatching, chance, started=0.0)


def _proxy(rival: str) -> Callable[[Chance, Look], Router]:
    return lambda chance, look: Proxy(RIVALS[rival](chance), look)


OWN_CLIENT_AT_ONCE = 50
"""What `balancer batch run` keeps open at once (MAX_CONCURRENT_BATCH)."""
EVERYTHING = 10_000
"""All prompts of a batch wait in the balancer at once: as many as class batch has places in line."""

POLICIES: Mapping[str, Policy] = {
    "expected_latency": Policy(build=_dispatcher("expected_latency"), batch_at_once=EVERYTHING),
    "expected_latency_50": Policy(build=_dispatcher("expected_latency"), batch_at_once=OWN_CLIENT_AT_ONCE),
    "weighted_random": Policy(build=_dispatcher("weighted_random"), batch_at_once=EVERYTHING),
    "weighted_random_cap5": Policy(
        build=_dispatcher("weighted_random"), cap=_five, slots_told=False, batch_at_once=EVERYTHING
    ),
    "least_loaded": Policy(build=_dispatcher("least_loaded"), batch_at_once=EVERYTHING),
    "round_robin": Policy(build=_proxy("round_robin")),
    "least_connections": Policy(build=_proxy("least_connections")),
    "power_of_two": Policy(build=_proxy("power_of_two")),
    "cache_aware": Policy(build=_proxy("cache_aware")),
    "maxconn_ideal": Policy(build=_proxy("central_queue"), cap=_ideal),
    "maxconn_5": Policy(build=_proxy("central_queue"), cap=_five),
}
"""The first ones are policies of the real dispatcher by their names in its settings, `expected_latency` the
default; the others are rivals."""
