"""Which worker should get an ask, of those that may: by scores, or by what it will cost on each. Pure.

`placement` has the formulae; this applies them to the fleet, in a room of hundreds without looking at all of
it for each ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from typing import Protocol

from balancer.core.batches import Planner, Service
from balancer.core.fleet import Fleet, Line, Member, Reach
from balancer.core.forecast import Forecast, Home
from balancer.core.model import Ask, Candidate, Choice, ModelOffer, ServiceClass, WorkerId
from balancer.core.placement import PlacementPolicy, candidate, draw, expected_seconds, pick, rate
from balancer.core.scorers import Standing

SHORTLIST, SHORTLISTED = 64, 24
"""In a room of more workers than the first, an ask is compared with the best so many of them only ..."""
SHORTLIST_SECONDS = 0.1
"""... as they were at most so long ago."""
RIVALS = 3
"""With so many of the best it is found out cheaply that an ask will prefer to wait."""
NOT_LOADED = "has not loaded the model, and others have"
TOO_LATE = "will not have loaded the model in time"
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


_Kind = tuple[Service, str | None, Reach]
"""Of asks that may go to the same workers."""
_Rated = tuple[float, Member, float, Line, ModelOffer]
"""What an ask would take there, and what of its prompt is remembered."""


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
        self._shortlists: dict[_Kind, tuple[float, int, tuple[Member, ...]]] = {}
        """When they were made, at which version of the fleet, and who is on them."""

    def choose(
        self,
        ask: Ask,
        now: float,
        also: Iterable[Member],
        queued: Callable[[], float],
        *,
        outside: bool = False,
    ) -> Chosen | None:
        """Who gets it; None: nobody who should take it has room. `also`: workers where something has just
        changed. `queued`: seconds until its turn comes at those that have its model. `outside`: a fallback is
        to answer in place of the room."""
        members: Sequence[Member]
        excluded: Mapping[WorkerId, str]
        if outside:
            members, excluded = self._fleet.outside(ask.needs, now), {}
        else:
            members, excluded = self._fleet.allowed(ask.needs, now, batch=_is_batch(ask))
        if self._placing.policy.estimates:
            return self._choose_by_estimate(ask, members, excluded, now, also, queued)
        return self._choose_by_scores(ask, members, excluded, now)

    def adopt(self, placing: PlacementPolicy) -> None:
        """Choose by it from now on."""
        self._placing = placing
        self._weights = placing.effective_weights()
        self.forget_shortlists()

    def forget_shortlists(self) -> None:
        self._shortlists.clear()

    def _choose_by_scores(
        self, ask: Ask, members: Sequence[Member], excluded: Mapping[WorkerId, str], now: float
    ) -> Chosen | None:
        is_batch = _is_batch(ask)
        reasons = dict(excluded)
        standings: dict[WorkerId, Standing] = {}
        with_room = []
        offers = self._fleet.offers_of(ask.needs.model)
        for member in self._most_loaded(ask, members, reasons, now):
            has_room = not member.is_full(offers[member.worker.id]) and (
                not is_batch or self._planner.has_room(member, now)
            )
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

    def _most_loaded(
        self, ask: Ask, members: Sequence[Member], reasons: dict[WorkerId, str], now: float
    ) -> Sequence[Member]:
        """Scores know nothing of loads: so those that have the model, else those that load it, else all."""
        if not any(member.loads for member in members):
            return members
        offers = self._fleet.offers_of(ask.needs.model)
        by_state: tuple[list[Member], list[Member], list[Member]] = [], [], []
        for member in members:
            load = member.loads.get(offers[member.worker.id].own_name)
            if load is None:
                by_state[0].append(member)
            elif not load.begun:
                by_state[2].append(member)
            elif now + load.wait(now) > ask.deadline:
                reasons[member.worker.id] = TOO_LATE
            else:
                by_state[1].append(member)
        if TOO_LATE in reasons.values():  # the model is being loaded: only who is in time loads it as well
            in_time = [
                one for one in by_state[2] if now + one.load_wait(offers[one.worker.id], now) <= ask.deadline
            ]
            by_state = by_state[0], by_state[1], in_time
        best = next(filter(None, by_state), [])
        for member in members:
            if member not in best:
                reasons.setdefault(member.worker.id, NOT_LOADED)
        return best

    def prefers_waiting(self, ask: Ask, changed: Sequence[Member], now: float) -> bool:
        """A cheap first look at one of many: whatever `changed` has to offer, there surely is better to wait
        for. Only where little has changed, and the line was looked at before that."""
        needs, placing, forecast = ask.needs, self._placing, self._forecast
        able = self._fleet.able_for(needs, now)
        if needs.avoid or needs.kin is not None or not able.members:
            return False
        home = self._home(ask)
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
            and (line := member.line(offer, placing.social, placing.kappa)).explored
            and not line.cold
            and seconds(member, offer) > limit
            for member in changed
        )

    def _choose_by_estimate(
        self,
        ask: Ask,
        members: Sequence[Member],
        excluded: Mapping[WorkerId, str],
        now: float,
        also: Iterable[Member],
        queued: Callable[[], float],
    ) -> Chosen | None:
        """ROUTING 2, "Pick": by what the ask will cost on each worker. None: nobody who should take it has
        room."""
        if not any(member.worker.id in self._fleet.roomy for member in members[:SHORTLIST]) and (
            len(members) <= SHORTLIST or not self._fleet.roomy
        ):
            return None
        if len(members) > SHORTLIST:
            members = self._shortlist(ask, members, now, also)
        offers = self._fleet.offers_of(ask.needs.model)
        placing, forecast = self._placing, self._forecast
        home = self._home(ask)
        tokens, output = forecast.prompt_tokens(ask), forecast.answer_tokens(ask)
        best = inf
        warm = inf
        """The least of those that have the model or load it, in time or not."""
        reasons = dict(excluded)
        rated: list[_Rated] = []
        cold: list[_Rated] = []
        unexplored: list[tuple[Member, float, Line, ModelOffer]] = []
        for member in members:
            offer = offers[member.worker.id]
            if offer.context_tokens is not None and self._fleet.is_too_long(tokens, offer, ask.needs, now):
                reasons[member.worker.id] = f"a context of {offer.context_tokens} tokens"
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
            if line.cold:
                cold.append((seconds, member, cached, line, offer))
                continue
            warm = min(warm, seconds)
            if line.ready_at > ask.deadline:
                reasons[member.worker.id] = TOO_LATE
                continue
            rated.append((seconds, member, cached, line, offer))
            if seconds < best:
                best = seconds
        for member, cached, line, offer in unexplored:
            seconds = expected_seconds(line, tokens - cached, output, now, full=line.full)
            rated.append((min(seconds, best), member, cached, line, offer))
            best = min(best, seconds)
            warm = min(warm, seconds)
        waited = max(now - ask.arrived, 0.0)
        patience = placing.patience * waited
        if cold:
            # Where nobody loads it, the best of them; else those for whom it pays although others have it,
            # and those without whom nobody would be in time.
            may_take = inf if warm == inf else (max(warm, queued()) + patience) / placing.load_factor
            none_in_time = not rated
            for one in cold:
                if one[0] > may_take and not (none_in_time and now + one[3].fixed <= ask.deadline):
                    reasons[one[1].worker.id] = NOT_LOADED
                    continue
                rated.append(one)
                best = min(best, one[0])
        limit = placing.cut * best + placing.cut_seconds + patience
        combine, weights = placing.policy.combine, self._weights
        candidates: list[Candidate] = []
        usable: list[tuple[Member, float]] = []
        for seconds, member, cached, line, offer in rated:
            worker_id = member.worker.id
            # What waits elsewhere is seen in `best` only as far as it runs, not as far as it stands in line.
            is_too_slow = seconds > limit and not (line.cold and warm < inf)
            if is_too_slow or line.full or not member.fits(offer, tokens):
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

    def _home(self, ask: Ask) -> Home | None:
        """Of its conversation; none where its worker has unloaded the model, and with it what it knew."""
        home = self._forecast.home(ask)
        member = self._fleet.get(home.worker_id) if home is not None else None
        if member is None or not member.loads:
            return home
        offer = self._fleet.offers_of(ask.needs.model).get(member.worker.id)
        return None if offer is None or member.is_unloaded(offer) else home

    def _shortlist(
        self, ask: Ask, members: Sequence[Member], now: float, also: Iterable[Member]
    ) -> list[Member]:
        """Of many, those to compare: the best as things were a moment ago for a prompt that none of them
        knows, the home of the conversation, and `also` those where something has just changed."""
        needs = ask.needs
        offers = self._fleet.offers_of(needs.model)
        reach = self._fleet.reach(needs, batch=_is_batch(ask))
        service = (needs.model, needs.endpoint), needs.kin, reach
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
        able = self._fleet.able(needs.model, needs.endpoint, now, needs.kin, reach).ids
        for member in more:
            if member.worker.id in able:
                allowed[member.worker.id] = member
        if not needs.avoid:
            return list(allowed.values())
        may = set(members)
        return [member for member in allowed.values() if member in may]


def _is_batch(ask: Ask) -> bool:
    """It waits for what others leave. An answer that is to go on has a client that reads it, whatever its
    class."""
    return ask.service_class is ServiceClass.BATCH and ask.needs.kin is None
