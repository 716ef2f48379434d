"""Which workers exist, how they are, and who may be given an ask. Pure.

The dispatcher owns one `Fleet` and is the only one to change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from balancer.core.breaker import Breaker, BreakerPolicy
from balancer.core.estimates import Window
from balancer.core.model import Condition, ModelName, ModelOffer, Needs, Ticket, Worker, WorkerId

DEFAULT_SLOTS = 4
"""Where neither the worker nor its configuration says how much it takes at once (ROUTING 2, "Limits")."""

FAILED_BEFORE = "failed this request before"


@dataclass(slots=True)
class Member:
    """One worker of the room and all that is known of it."""

    worker: Worker
    breaker: Breaker
    condition: Condition | None = None
    """As last reported; kept while the worker is lost, so that its models stay known."""
    lost: str | None = None
    """Why it does not answer; None: it does, or has not been heard of yet."""
    heard: bool = False
    """It has reported, or was found not to answer: from then on its silence about a model counts."""
    held_until: float = 0.0
    """It asked not to be asked before then (Retry-After)."""
    window: Window = field(default_factory=Window)
    running: set[Ticket] = field(default_factory=set)

    @property
    def slots(self) -> int:
        own = self.condition.slots if self.condition else None
        told = [limit for limit in (self.worker.cap, own) if limit is not None]
        return max(min(told, default=DEFAULT_SLOTS), 1)

    @property
    def room(self) -> int:
        return self.slots - len(self.running)

    @property
    def offers(self) -> tuple[ModelOffer, ...]:
        """What it serves: the models it is configured for, else all that it reports."""
        reported = self.condition.models if self.condition else ()
        if not self.worker.only:
            return reported
        known = {offer.name: offer for offer in reported}
        return tuple(known.get(name, ModelOffer(name=name)) for name in sorted(self.worker.only))

    def unfit(self, now: float) -> str | None:
        """Why it can take nothing now, its breaker and its room apart; None: it can."""
        if self.lost is not None:
            return self.lost
        if self.condition is None:
            return "not heard of yet"
        if not self.condition.ready:
            return self.condition.state
        if now < self.held_until:
            return "asked to be left alone for a while"
        return None


@dataclass(frozen=True, slots=True)
class Eligible:
    """Who may be given an ask now, and why each other one that serves the model may not."""

    members: tuple[Member, ...]
    excluded: Mapping[WorkerId, str]


class Fleet:
    def __init__(self, breaker: BreakerPolicy) -> None:
        self._breaker = breaker
        self._members: dict[WorkerId, Member] = {}
        self._by_model: dict[ModelName, dict[WorkerId, ModelOffer]] = {}
        self._departed: dict[WorkerId, set[Ticket]] = {}
        """What still runs on workers that left: should one come back, these count against its slots."""

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def get(self, worker_id: WorkerId) -> Member | None:
        return self._members.get(worker_id)

    def seen(self, worker: Worker) -> None:
        """A new worker, or a new description of one: what was learned of it stays unless it moved."""
        member = self._members.get(worker.id)
        if member is None:
            running = self._departed.pop(worker.id, set())
            self._members[worker.id] = Member(worker, Breaker(self._breaker), running=running)
        elif member.worker.url != worker.url or member.worker.type != worker.type:
            # Another address is another process, and possibly another machine: what was measured is void.
            # What it serves stays known until it is heard of again, lest those who wait for it be turned
            # away; what runs stays counted, since it is given back by worker id.
            self._members[worker.id] = Member(
                worker,
                Breaker(self._breaker),
                condition=member.condition,
                lost="not heard of yet at its new address",
                heard=member.heard,
                running=member.running,
            )
        else:
            member.worker = worker
        self._index(worker.id)

    def gone(self, worker_id: WorkerId) -> None:
        member = self._members.pop(worker_id, None)
        if member is not None:
            self._index(worker_id)
            if member.running:
                self._departed[worker_id] = member.running

    def gave_back(self, member: Member, ticket: Ticket) -> None:
        member.running.discard(ticket)
        if not member.running:
            self._departed.pop(member.worker.id, None)

    def reported(self, worker_id: WorkerId, condition: Condition, now: float) -> None:
        member = self._members.get(worker_id)
        if member is None:
            return
        if member.lost is not None:
            member.breaker = member.breaker.returned(now)
        if not condition.ready and not condition.models and member.condition is not None:
            # It loads, and says no more: what it served it will most likely serve again.
            condition = replace(condition, models=member.condition.models)
        offers_changed = member.condition is None or member.condition.models != condition.models
        member.condition, member.lost, member.heard = condition, None, True
        if offers_changed:
            self._index(worker_id)

    def lost(self, worker_id: WorkerId, reason: str) -> Member | None:
        member = self._members.get(worker_id)
        if member is not None:
            member.lost, member.heard = reason, True
        return member

    @property
    def all_heard(self) -> bool:
        """Each has reported, or was found not to answer: nobody's first word is still to be waited for."""
        return all(member.heard for member in self._members.values())

    @property
    def reticent(self) -> tuple[Member, ...]:
        """Those that do not answer, or load, and never said what they serve: it may be anything."""
        return tuple(
            member
            for member in self._members.values()
            if not member.offers
            and (member.lost is not None or member.condition is None or not member.condition.ready)
        )

    def models(self) -> dict[ModelName, tuple[ModelOffer, ...]]:
        """Each model that is served, by name, with one offer per worker that serves it."""
        return {name: tuple(offers.values()) for name, offers in sorted(self._by_model.items())}

    def serves(self, needs: Needs) -> bool:
        """Somebody in the room does what is needed, if not at this moment."""
        return any(
            needs.endpoint in offer.endpoints for offer in self._by_model.get(needs.model, {}).values()
        )

    def knows(self, model: ModelName) -> bool:
        return model in self._by_model

    def eligible(self, needs: Needs, now: float) -> Eligible:
        """The filters, in the order in which their reasons tell most."""
        excluded: dict[WorkerId, str] = {}

        def keep(members: list[Member], fault: Callable[[Member], str | None]) -> list[Member]:
            kept = []
            for member in members:
                reason = fault(member)
                if reason is None:
                    kept.append(member)
                else:
                    excluded[member.worker.id] = reason
            return kept

        alive = keep(self._able(needs), lambda member: member.unfit(now))
        # Where every breaker is open: better a doubtful worker than none (RELIABILITY D6, fail open).
        if any(member.breaker.admits(now) for member in alive):
            alive = keep(alive, lambda member: _tripped(member, now))
        # Those who failed it before are asked again only where no other is well, were it only busy.
        if any(member.worker.id not in needs.avoid for member in alive):
            alive = keep(alive, lambda member: FAILED_BEFORE if member.worker.id in needs.avoid else None)
        return Eligible(tuple(keep(alive, lambda member: None if member.room > 0 else "no room")), excluded)

    def condition_of(self, needs: Needs, now: float) -> str:
        """For people: how the workers that serve this are, `studio: loading; mini: connection refused`."""
        told = []
        for member in self._able(needs):
            reason = member.unfit(now) or ("busy" if member.room <= 0 else f"breaker {member.breaker.phase}")
            told.append(f"{member.worker.id}: {reason}")
        return "; ".join(told)

    def _able(self, needs: Needs) -> list[Member]:
        return [
            self._members[worker_id]
            for worker_id, offer in self._by_model.get(needs.model, {}).items()
            if needs.endpoint in offer.endpoints
        ]

    def _index(self, worker_id: WorkerId) -> None:
        for name in [name for name, offers in self._by_model.items() if worker_id in offers]:
            del self._by_model[name][worker_id]
            if not self._by_model[name]:
                del self._by_model[name]
        if member := self._members.get(worker_id):
            for offer in member.offers:
                self._by_model.setdefault(offer.name, {})[worker_id] = offer


def _tripped(member: Member, now: float) -> str | None:
    return None if member.breaker.admits(now) else f"breaker {member.breaker.phase}"
