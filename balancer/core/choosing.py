"""Which worker should get an ask, of those that may: by scores, or by what it will cost on each. Pure.

`placement` has the formulae; this applies them to the fleet, in a room of hundreds without looking at all of
it for each ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from typing import Protocol

from balancer.core.batches import Planner, Service
from balancer.core.fleet import Fleet, Line, Member
from balancer.core.forecast import Forecast
from balancer.core.model import Ask, Candidate, Choice, ModelOffer, ServiceClass, WorkerId
from balancer.core.placement import PlacementPolicy, candidate, draw, expected_seconds, pick, rate
from balancer.core.scorers import Standing

SHORTLIST, SHORTLISTED = 64, 24
"""In a room of more workers than the first, an ask is compared with the best so many of them only ..."""
SHORTLIST_SECONDS = 0.1
"""... as they were at most so long ago."""
RIVALS = 3
"""With so many of the best it is found out cheaply that an ask will prefer to wait."""
EXPLORED_WITH_TOKENS = 2000.0
"""A worker of which little is known is tried with prompts no longer than this."""


class Chance(Protocol):
    """A seeded source of chance, such as `random.Random`."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Chosen:
    member: Member
    choice: Choice
    uncached: float
    """Tokens of the prompt that the worker has to compute."""


class Chooser:
    def __init__(
        self,
        fleet: Fleet,
        forecast: Forecast,
        planner: Planner,
        placing: PlacementPolicy,
        chance: Chance,
    ) -> None:
        self._fleet = fleet
        self._forecast = forecast
        self._planner = planner
        self._placing = placing
        self._weights = placing.effective_weights()
        self._chance = chance
        self._shortlists: dict[tuple[Service, str | None], tuple[float, int, tuple[Member, ...]]] = {}
        """When they were made, at which version of the fleet, and who is on them."""

    def choose(self, ask: Ask, now: float, also: Iterable[Member]) -> Chosen | None:
        """Who gets it; None: nobody who should take it has room. `also`: workers where something has just
        changed."""
        if self._placing.policy.estimates:
            return self._choose_by_estimate(ask, now, also)
        return self._choose_by_scores(ask, now)

    def forget_shortlists(self) -> None:
        self._shortlists.clear()

    def _choose_by_scores(self, ask: Ask, now: float) -> Chosen | None:
        members, excluded = self._fleet.allowed(ask.needs, now)
        # An answer that is to go on has a client that reads it, whatever its class.
        is_batch = ask.service_class is ServiceClass.BATCH and ask.needs.kin is None
        reasons = dict(excluded)
        standings: dict[WorkerId, Standing] = {}
        with_room = []
        for member in members:
            has_room = self._planner.has_room(member, now) if is_batch else member.room > 0
            if has_room:
                with_room.append(member)
            else:
                reasons[member.worker.id] = "no room"
        if not with_room:
            return None
        for member in with_room:
            member.window.fade(now)
        averages = [seconds for member in with_room if (seconds := member.window.average_seconds) is not None]
        least_load = min(member.load / member.slots for member in with_room)
        longest_rest = max(now - member.last_picked for member in with_room)
        for member in with_room:
            standings[member.worker.id] = Standing(
                running=member.load,
                slots=member.slots,
                success_rate=member.window.success_rate,
                average_seconds=member.window.average_seconds,
                best_average_seconds=min(averages, default=None),
                reliability=member.reliability,
                least_load=least_load,
                rested_seconds=now - member.last_picked,
                longest_rest_seconds=longest_rest,
            )
        candidates = rate(standings, self._weights, self._placing.policy.combine)
        picked = pick(candidates, self._chance.random())
        member = next(one for one in with_room if one.worker.id == picked.worker_id)
        choice = Choice(worker_id=picked.worker_id, candidates=candidates, excluded=reasons)
        tokens = self._forecast.prompt_tokens(ask)
        return Chosen(member, choice, tokens)

    def prefers_waiting(self, ask: Ask, changed: Sequence[Member], now: float) -> bool:
        """A cheap first look at one of many: whatever `changed` has to offer, there surely is better to wait
        for. Only where little has changed, and the line was looked at before that."""
        needs, placing, forecast = ask.needs, self._placing, self._forecast
        able = self._fleet.able(needs.model, needs.endpoint, now)
        if needs.avoid or needs.kin is not None or not able.members:
            return False
        home = forecast.home(ask)
        rivals = self._shortlist(ask, able.members, now, ())[:RIVALS]
        if home is not None and (member := self._fleet.get(home.worker_id)) is not None:
            rivals.append(member)
        offers = self._fleet.offers_of(needs.model)
        tokens, output = forecast.prompt_tokens(ask), forecast.answer_tokens(ask)

        def seconds(member: Member, offer: ModelOffer) -> float:
            line = member.line(offer, placing.social, placing.kappa)
            uncached = tokens - forecast.cached(ask, member, offer, home)
            cost = expected_seconds(line, uncached, output, now, full=line.full)
            return cost if home is None or home.worker_id == member.worker.id else placing.stick * cost

        best = min(
            (
                seconds(rival, offers[rival.worker.id])
                for rival in rivals
                if rival not in changed and rival.worker.id in offers and rival.unfit(now) is None
            ),
            default=inf,
        )
        limit = placing.cut * best + placing.cut_seconds + placing.patience * max(now - ask.arrived, 0.0)
        return all(
            (offer := offers.get(member.worker.id)) is not None
            and member.line(offer, placing.social, placing.kappa).explored
            and seconds(member, offer) > limit
            for member in changed
        )

    def _choose_by_estimate(self, ask: Ask, now: float, also: Iterable[Member]) -> Chosen | None:
        """ROUTING 2, "Pick": by what the ask will cost on each worker. None: nobody who should take it has
        room."""
        members, excluded = self._fleet.allowed(ask.needs, now)
        if not any(member.worker.id in self._fleet.roomy for member in members[:SHORTLIST]) and (
            len(members) <= SHORTLIST or not self._fleet.roomy
        ):
            return None
        if len(members) > SHORTLIST:
            members = self._shortlist(ask, members, now, also)
        offers = self._fleet.offers_of(ask.needs.model)
        placing, forecast = self._placing, self._forecast
        home = forecast.home(ask)
        tokens, output = forecast.prompt_tokens(ask), forecast.answer_tokens(ask)
        best = inf
        too_short: dict[WorkerId, str] = {}
        rated: list[tuple[float, Member, float, Line, ModelOffer]] = []
        unexplored: list[tuple[Member, float, Line, ModelOffer]] = []
        for member in members:
            offer = offers[member.worker.id]
            if offer.context_tokens is not None and self._fleet.is_too_long(tokens, offer, ask.needs, now):
                too_short[member.worker.id] = f"a context of {offer.context_tokens} tokens"
                continue
            line = member.line(offer, placing.social, placing.kappa)
            cached = forecast.cached(ask, member, offer, home)
            if not line.explored and not member.running and tokens <= EXPLORED_WITH_TOKENS:
                unexplored.append((member, cached, line, offer))
                continue
            full = line.full or (offer.memory_tokens is not None and not member.fits(offer, tokens))
            seconds = expected_seconds(line, tokens - cached, output, now, full=full)
            if home is not None and home.worker_id != member.worker.id:
                seconds *= placing.stick
            rated.append((seconds, member, cached, line, offer))
            if seconds < best:
                best = seconds
        for member, cached, line, offer in unexplored:
            seconds = expected_seconds(line, tokens - cached, output, now, full=line.full)
            rated.append((min(seconds, best), member, cached, line, offer))
            best = min(best, seconds)
        waited = max(now - ask.arrived, 0.0)
        limit = placing.cut * best + placing.cut_seconds + placing.patience * waited
        combine, weights = placing.policy.combine, self._weights
        candidates: list[Candidate] = []
        usable: list[tuple[Member, float]] = []
        reasons = {**excluded, **too_short}
        for seconds, member, cached, line, offer in rated:
            worker_id = member.worker.id
            if seconds > limit or line.full or not member.fits(offer, tokens):
                reasons[worker_id] = "no room" if line.full else f"would take {seconds:.1f} s"
                continue
            standing = Standing(
                running=member.load,
                slots=member.slots,
                success_rate=member.window.success_rate,
                average_seconds=None,
                best_average_seconds=None,
                reliability=member.reliability,
                expected_seconds=seconds,
                least_expected_seconds=best,
            )
            usable.append((member, cached))
            candidates.append(candidate(worker_id, standing, weights, combine, seconds, int(cached)))
        if not usable:
            return None
        index = draw([one.weight for one in candidates], self._chance.random())
        member, cached = usable[index]
        choice = Choice(worker_id=member.worker.id, candidates=tuple(candidates), excluded=reasons)
        return Chosen(member, choice, tokens - cached)

    def _shortlist(
        self, ask: Ask, members: Sequence[Member], now: float, also: Iterable[Member]
    ) -> list[Member]:
        """Of many, those to compare: the best as things were a moment ago for a prompt that none of them
        knows, the home of the conversation, and `also` those where something has just changed."""
        needs = ask.needs
        offers = self._fleet.offers_of(needs.model)
        service = (needs.model, needs.endpoint), needs.kin
        at, version, best = self._shortlists.get(service, (-inf, -1, ()))
        if now - at > SHORTLIST_SECONDS or version != self._fleet.version:
            tokens, output = self._forecast.prompt_tokens(ask), self._forecast.answer_tokens(ask)
            placing = self._placing

            def seconds(member: Member) -> float:
                line = member.line(offers[member.worker.id], placing.social, placing.kappa)
                return expected_seconds(line, tokens, output, now, full=line.full)

            best = tuple(nsmallest(SHORTLISTED, members, key=seconds))
            self._shortlists[service] = now, self._fleet.version, best
        allowed = {member.worker.id: member for member in best}
        home = self._forecast.home(ask)
        more = list(also)
        if home is not None and (member := self._fleet.get(home.worker_id)) is not None:
            more.append(member)
        able = self._fleet.able(needs.model, needs.endpoint, now, needs.kin).ids
        for member in more:
            if member.worker.id in able:
                allowed[member.worker.id] = member
        if not needs.avoid:
            return list(allowed.values())
        may = set(members)
        return [member for member in allowed.values() if member in may]
