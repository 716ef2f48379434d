"""The batch class: prompts wait as papers, and each worker takes the work that it should. Pure.

A group is what shares a beginning: the prompts of one paper. Its prefix is computed once, by its first
prompt; the others follow where it is remembered. The rules are those of ROUTING 2, "Batch".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, nsmallest
from itertools import count

from balancer.core.fairness import Turns
from balancer.core.fleet import ANSWER_ROOM_TOKENS, MEMORY_SHARE, Able, Fleet, Flight, Member
from balancer.core.forecast import Forecast
from balancer.core.model import Ask, Endpoint, ModelName, ModelOffer, Needs, Ticket, WorkerId

LINGER_SECONDS = 30.0
"""A group with nothing left to do is remembered for so long: a retry, or a client that sends the prompts of
a paper one after the other, finds it where its prefix is."""
HORIZON_SHARE, HORIZON_LEAST_SECONDS, HORIZON_MOST_SECONDS = 0.01, 0.2, 1.0
"""How long a forecast of the whole batch's end is used: a share of what remains, within bounds."""
STEAL_BELOW, DUPLICATE_BELOW = 0.5, 0.9
"""A follower leaves its home, a straggler gets a copy, when that takes less than this share of the time."""
SECOND_COPY_BELOW = 0.5
"""A prefix is computed again on the same worker when that costs less than this share of what it saves."""
FRESH_LOOKS = 2
"""So many papers are looked at when a worker should not take the first: the next are about as long."""
FRESH_OF_A_CLIENT = 4
HORIZON_SECONDS_PER_WORKER = 0.0025
"""Where there are hundreds of them, a forecast is used for longer."""

Service = tuple[ModelName, Endpoint]


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    reserve: float = 0.5
    """The share of each worker's slots and memory that is kept from batch while chat is active."""
    active_seconds: float = 30.0
    """Chat is active for so long after its last request."""
    slice_seconds: float = 0.5
    """While chat is active, a long prompt is read in pieces of so many seconds; 0: at once."""
    commit: float = 0.8
    """A busy worker may hold papers worth this share of the time that the whole batch will still take."""
    floor: float = 0.05
    """The share of all tokens that batch gets even while chats would take every slot."""


@dataclass(slots=True, eq=False)
class Group:
    """Prompts that begin alike."""

    number: int
    service: Service
    client: str
    blocks: tuple[int, ...]
    """What they have in common."""
    waiting: OrderedDict[Ticket, Ask] = field(default_factory=OrderedDict)
    homes: dict[WorkerId, None] = field(default_factory=dict)
    """Workers that have, or are computing, its prefix."""
    running: int = 0
    quiet_since: float = 0.0

    @property
    def is_fresh(self) -> bool:
        return bool(self.waiting) and not self.homes


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A worker shall do this."""

    ask: Ask
    ticket: Ticket
    group: Group
    warm_tokens: float | None = None
    """Only so many tokens of its prompt are to be read."""
    because: str


@dataclass(frozen=True, slots=True)
class Horizon:
    """How far the whole batch has to go, as seen `at` some moment; in seconds."""

    at: float
    remaining: float
    """Until it can be done, all workers busy to the end."""
    fastest: float
    """In which the fastest worker does one paper."""
    soonest: float
    """In which some worker would be done with one more paper and all that it has."""
    workers: int

    def holds(self, now: float) -> bool:
        """It is still of use."""
        least = max(HORIZON_LEAST_SECONDS, HORIZON_SECONDS_PER_WORKER * self.workers)
        age = max(min(HORIZON_SHARE * self.remaining, HORIZON_MOST_SECONDS), least)
        return now - self.at <= age


@dataclass(slots=True, eq=False)
class _ServiceLine:
    """All groups of one model and endpoint."""

    groups: dict[int, Group] = field(default_factory=dict)
    by_block: dict[tuple[str, int], Group] = field(default_factory=dict)
    fresh: dict[str, list[tuple[int, int, Group]]] = field(default_factory=dict)
    """By client, the longest first: minus the characters, number, group."""
    waiting: int = 0
    horizon: Horizon | None = None


@dataclass(slots=True)
class BatchLine:
    """Who waits in class batch, in groups."""

    turns: Turns = field(default_factory=Turns)
    _services: dict[Service, _ServiceLine] = field(default_factory=dict)
    _where: dict[Ticket, Group] = field(default_factory=dict)
    _at_home: dict[WorkerId, dict[int, Group]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def __len__(self) -> int:
        return len(self._where)

    def join(self, ticket: Ticket, ask: Ask) -> Group:
        service = ask.needs.model, ask.needs.endpoint
        line = self._services.setdefault(service, _ServiceLine())
        group = _fitting(line, ask) or self._new_group(line, service, ask)
        group.waiting[ticket] = ask
        if ask.admitted:  # it has been in line before
            group.waiting.move_to_end(ticket, last=False)
        self._where[ticket] = group
        self.turns.joined(ask.client)
        line.waiting += 1
        if not group.homes and len(group.waiting) == 1:
            self._refresh(group)
        return group

    def leave(self, ticket: Ticket) -> Ask | None:
        group = self._where.pop(ticket, None)
        if group is None:
            return None
        ask = group.waiting.pop(ticket)
        self.turns.left(ask.client)
        self._services[group.service].waiting -= 1
        return ask

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._where

    def asks(self) -> Iterator[tuple[Ticket, Ask]]:
        """All that wait, in no order that means anything."""
        return ((ticket, group.waiting[ticket]) for ticket, group in self._where.items())

    def ask_of(self, ticket: Ticket) -> Ask:
        return self._where[ticket].waiting[ticket]

    def tickets(self, service: Service) -> list[Ticket]:
        return [ticket for ticket, group in self._where.items() if group.service == service]

    def services(self) -> list[Service]:
        """What is waited for."""
        return [service for service, line in self._services.items() if line.waiting]

    def services_under_way(self) -> list[Service]:
        """Of what nothing waits any more, and something runs."""
        return [
            service
            for service, line in self._services.items()
            if not line.waiting and any(group.running for group in line.groups.values())
        ]

    def waits_for(self, service: Service) -> int:
        line = self._services.get(service)
        return line.waiting if line else 0

    def overdue(self, now: float) -> list[Ticket]:
        return [ticket for ticket, group in self._where.items() if group.waiting[ticket].deadline <= now]

    def sent(self, group: Group, worker_id: WorkerId) -> None:
        group.running += 1
        group.homes[worker_id] = None
        self._at_home.setdefault(worker_id, {})[group.number] = group

    def ended(self, group: Group, now: float) -> None:
        group.running -= 1
        group.quiet_since = now

    def evict(self, worker_id: WorkerId, models: Set[ModelName] | None = None) -> None:
        """That worker remembers nothing any more, of any model or of these: its groups may go anywhere."""
        at_home = self._at_home.get(worker_id, {})
        for group in list(at_home.values()):
            if models is not None and group.service[0] not in models:
                continue
            del at_home[group.number]
            group.homes.pop(worker_id, None)
            if group.is_fresh:
                self._refresh(group)
        if not at_home:
            self._at_home.pop(worker_id, None)

    def at_home(self, worker_id: WorkerId) -> Iterable[Group]:
        return self._at_home.get(worker_id, {}).values()

    def groups(self, service: Service) -> Iterable[Group]:
        line = self._services.get(service)
        return line.groups.values() if line else ()

    def fresh(self, service: Service) -> Iterator[Group]:
        """Papers that nobody has begun: of the client whose turn it is first, its longest ones first."""
        line = self._services.get(service)
        if line is None:
            return
        for client in self.turns.order(line.fresh):
            heap = line.fresh[client]
            while heap and not heap[0][2].is_fresh:
                heappop(heap)
            if not heap:
                del line.fresh[client]
            for _, _, group in nsmallest(FRESH_OF_A_CLIENT, heap):
                if group.is_fresh:
                    yield group

    def count_fresh(self, service: Service) -> int:
        """Groups that nobody has begun; what is begun meanwhile may be counted until it comes up."""
        line = self._services.get(service)
        return sum(map(len, line.fresh.values())) if line else 0

    def horizon(self, service: Service) -> Horizon | None:
        return self._services[service].horizon

    def set_horizon(self, service: Service, horizon: Horizon) -> None:
        self._services[service].horizon = horizon

    def tidy(self, now: float) -> None:
        """Forget groups that have been quiet for long, and models that nothing is left of."""
        for service, line in list(self._services.items()):
            over = [
                group
                for group in line.groups.values()
                if not group.waiting and not group.running and now - group.quiet_since > LINGER_SECONDS
            ]
            for group in over:
                del line.groups[group.number]
                _unregister(line, group, group.blocks)
                for worker_id in group.homes:
                    self._at_home.get(worker_id, {}).pop(group.number, None)
            if over:
                _drop_stale(line)
            if not line.groups:
                del self._services[service]

    def _new_group(self, line: _ServiceLine, service: Service, ask: Ask) -> Group:
        group = Group(next(self._numbers), service, ask.client, ask.prompt.blocks)
        line.groups[group.number] = group
        for block in group.blocks:
            line.by_block[group.client, block] = group
        return group

    def _refresh(self, group: Group) -> None:
        first = next(iter(group.waiting.values()))
        heap = self._services[group.service].fresh.setdefault(group.client, [])
        heappush(heap, (-first.prompt.chars, group.number, group))


def _fitting(line: _ServiceLine, ask: Ask) -> Group | None:
    """The group of the same client with which it has at least half of itself in common; what the group has
    in common is then only that."""
    blocks = ask.prompt.blocks
    for depth in range(len(blocks), max((len(blocks) - 1) // 2, 0), -1):
        group = line.by_block.get((ask.client, blocks[depth - 1]))
        if group is not None:
            if depth < len(group.blocks):
                _unregister(line, group, group.blocks[depth:])
                group.blocks = group.blocks[:depth]
            return group
    return None


def _drop_stale(line: _ServiceLine) -> None:
    """Groups that were begun, or whose prompts were taken back, have nothing to do among the fresh."""
    for client, heap in list(line.fresh.items()):
        kept = [entry for entry in heap if entry[2].is_fresh]
        heapify(kept)
        if kept:
            line.fresh[client] = kept
        else:
            del line.fresh[client]


def _unregister(line: _ServiceLine, group: Group, blocks: Sequence[int]) -> None:
    for block in blocks:
        if line.by_block.get((group.client, block)) is group:
            del line.by_block[group.client, block]


@dataclass(frozen=True, slots=True)
class Paper:
    """What is left of a group, in tokens."""

    shared: float
    """Of its prefix."""
    own: float
    """Of each prompt besides."""
    output: float
    """Of each answer."""
    prompts: int


def _streams(member: Member, offer: ModelOffer, paper: Paper) -> float:
    """How many prompts of such papers it works on at once when it is full: its memory may hold fewer than
    its slots."""
    if offer.memory_tokens is None:
        return member.slots
    each = paper.shared / max(paper.prompts, 1) + paper.own + ANSWER_ROOM_TOKENS
    return max(min(member.slots, MEMORY_SHARE * offer.memory_tokens / each), 1.0)


class Planner:
    """Which work of the batch line a worker should take."""

    def __init__(self, line: BatchLine, fleet: Fleet, forecast: Forecast, policy: BatchPolicy) -> None:
        self._line = line
        self._fleet = fleet
        self._forecast = forecast
        self._policy = policy
        self._declined: dict[tuple[Service, WorkerId], tuple[Horizon, int]] = {}
        """Who can't finish any new paper in time: as of which horizon, and which state of the worker."""

    def adopt(self, policy: BatchPolicy) -> None:
        """Plan by it from now on."""
        self._policy = policy
        self._declined.clear()

    def has_chats(self, member: Member, now: float) -> bool:
        """People have used it of late, and will again."""
        return now - member.last_chat < self._policy.active_seconds

    def has_room(self, member: Member, now: float, *, anyway: bool = False) -> bool:
        """Whether it may get one more of class batch: where people chat, a share of its slots is for them.
        `anyway`: batch has had too little, and may use these too."""
        slots = member.slots
        if slots > 1 and not anyway and self.has_chats(member, now):
            slots -= max(1, round(self._policy.reserve * slots))
        return member.load < slots

    def is_open(self, member: Member, now: float, *, anyway: bool = False) -> bool:
        """It may take something of class batch: one prompt is read at a time, and none beside a chat's."""
        if not self.has_room(member, now, anyway=anyway):
            return False
        if member.chats and now < member.pause_until:
            return False
        alone = self.has_chats(member, now)
        return not any(alone or not flight.is_interactive for flight in member.pending.values())

    def able(self, service: Service, now: float) -> Able:
        """Who may be given prompts of it, room apart."""
        return self._fleet.able_for(Needs(model=service[0], endpoint=service[1]), now, batch=True)

    def work_for(
        self, member: Member, service: Service, now: float, *, anyway: bool = False
    ) -> Assignment | None:
        """`member` is well, and open."""
        offer = self._fleet.offers_of(service[0]).get(member.worker.id)
        if offer is None or service[1] not in offer.endpoints or not self._line.waits_for(service):
            return None
        if member.is_full(offer) or self._waits_for_a_load(member, offer):
            return None
        active = self.has_chats(member, now)
        share = 1 - self._policy.reserve if active and not anyway else MEMORY_SHARE
        if (follower := self._follower(member, offer, service, now, share)) is not None:
            return self._start(*follower, member, offer, active, "its prefix is here")
        key = service, member.worker.id
        horizon = self._line.horizon(service)
        if (
            horizon is not None
            and horizon.holds(now)
            and self._declined.get(key) == (horizon, member.changes)
        ):
            return None
        looks = 0
        for group in self._line.fresh(service):
            first = self._first_for(group, member, now)
            if first is None:
                continue  # it may not go here
            if self._fits(member, offer, group, first[1], share, now) and self._in_time(
                member, offer, group, now
            ):
                return self._start(group, first, member, offer, active, "a paper that it can finish in time")
            looks += 1
            if looks == FRESH_LOOKS:
                break
        if looks:
            if (horizon := self._line.horizon(service)) is not None:
                self._declined[key] = horizon, member.changes
            return None
        return self._stolen(member, offer, service, now, share, active) or self._second_copy(
            member, offer, service, now, active
        )

    def _waits_for_a_load(self, member: Member, offer: ModelOffer) -> bool:
        """One prompt of class batch is read at a time, and so one waits at a time until it can be."""
        name = offer.own_name
        return any(not one.is_interactive and one.offer.own_name == name for one in member.awaiting.values())

    def stragglers(self, service: Service, now: float) -> list[tuple[float, Flight]]:
        """What runs and could be copied, with the seconds that it may still take, the longest first. None
        while anything waits."""
        if self._line.waits_for(service):
            return []
        found: list[tuple[float, Flight]] = []
        for member in self._fleet:
            for flight in member.running.values():
                ask = flight.ask
                if (
                    flight.kind != "ask"
                    or flight.is_interactive
                    or not ask.replayable
                    or (ask.needs.model, ask.needs.endpoint) != service
                ):
                    continue
                token = member.speeds_of(flight.offer).writing.at(member.load)
                left = self._forecast.remaining_tokens(flight) * token
                if flight.ticket in member.awaiting:
                    left += member.load_wait(flight.offer, now) + flight.expected
                elif flight.first is None:
                    read_for = now - flight.reading_from
                    left += max(flight.expected - read_for, 0.2 * read_for)
                found.append((left, flight))
        found.sort(key=lambda one: (-one[0], one[1].ticket))
        return found

    def worth_copying(
        self, flight: Flight, left: float, member: Member, offer: ModelOffer, now: float
    ) -> bool:
        """This worker would be done with it in a fraction of the time that is left."""
        tokens = self._forecast.prompt_tokens(flight.ask)
        if (
            flight.member is member
            or member.worker.fallback
            or member.is_unloaded(offer)
            or member.is_full(offer)
            or member.worker.id in flight.ask.needs.avoid
            or self._fleet.is_too_long(tokens, offer, flight.ask.needs, now, batch=True)
            or not member.fits(offer, tokens)
        ):
            return False
        uncached = tokens - self._forecast.cached(flight.ask, member, offer, None)
        return self._latency(member, offer, uncached, flight.output) < DUPLICATE_BELOW * left

    # The rules

    def _follower(
        self, member: Member, offer: ModelOffer, service: Service, now: float, share: float
    ) -> tuple[Group, tuple[Ticket, Ask]] | None:
        """A prompt of a paper whose prefix is on this worker, and not being computed there."""
        for group in self._line.at_home(member.worker.id):
            if not group.waiting or group.service != service:
                continue
            first = self._first_for(group, member, now)
            if first is None or not self._fits(member, offer, group, first[1], share, now):
                continue
            if group.number not in member.papers_in_use:
                return group, first
            held = member.remembered(offer).depth(group.blocks)
            if member.shares_prefixes and held >= len(group.blocks) > 0:
                return group, first
        return None

    def _in_time(self, member: Member, offer: ModelOffer, group: Group, now: float) -> bool:
        """A worker may take a paper that it can finish before the whole room can be done."""
        paper = self._sizes(group)
        horizon = self._horizon(group, now)
        load, cost = self._load(member, offer, paper, now), self._cost(member, offer, paper)
        if load + cost <= horizon.soonest or self._is_soonest(load + cost, group, paper, now):
            return True  # who else should
        if load > 0:
            return load + cost <= self._policy.commit * horizon.remaining
        return max(cost, self._alone(member, offer, paper, 1)) <= horizon.remaining + horizon.fastest

    def _is_soonest(self, seconds: float, group: Group, paper: Paper, now: float) -> bool:
        """Of those that may take its first prompt at all, where that failed on some before."""
        first = next(iter(group.waiting.values()))
        if not first.needs.avoid:
            return False
        offers = self._fleet.offers_of(group.service[0])
        return all(
            seconds <= self._load(one, offer, paper, now) + self._cost(one, offer, paper)
            for one in self._fleet.allowed(first.needs, now, batch=True)[0]
            for offer in [offers[one.worker.id]]
        )

    def _horizon(self, group: Group, now: float) -> Horizon:
        known = self._line.horizon(group.service)
        if known is not None and known.holds(now):
            return known
        paper = self._sizes(group)
        offers = self._fleet.offers_of(group.service[0])
        papers, pace = float(self._line.count_fresh(group.service)), 0.0
        fastest = soonest = float("inf")
        members = self.able(group.service, now).members
        unloaded: list[tuple[float, float]] = []
        for member in members:
            offer = offers[member.worker.id]
            cost, load = self._cost(member, offer, paper), self._load(member, offer, paper, now)
            if member.is_unloaded(offer):
                unloaded.append((load, cost))
                soonest = min(soonest, load + cost)
                continue
            pace += 1 / cost
            papers += load / cost
            fastest = min(fastest, self._alone(member, offer, paper, max(member.load, 1)))
            soonest = min(soonest, load + cost)
        for load, cost in sorted(unloaded):
            if not pace or load < papers / pace:  # it has the model before the others would be through
                papers += load / cost
                pace += 1 / cost
                fastest = min(fastest, load + cost)
        horizon = Horizon(now, papers / pace if pace else 0.0, fastest, soonest, len(members))
        self._line.set_horizon(group.service, horizon)
        return horizon

    def _alone(self, member: Member, offer: ModelOffer, paper: Paper, streams: int) -> float:
        """Seconds of a paper on a worker that begins it now, beside so many streams."""
        speeds = member.speeds_of(offer)
        rounds = 1 if member.shares_prefixes else paper.prompts
        reading = (paper.shared + paper.own) / speeds.prefill_tokens_per_second
        return reading + rounds * paper.output * speeds.writing.at(streams)

    def _stolen(
        self, member: Member, offer: ModelOffer, service: Service, now: float, share: float, active: bool
    ) -> Assignment | None:
        """A follower that would be done clearly later at home."""
        best: tuple[float, Group, tuple[Ticket, Ask]] | None = None
        for group in self._line.groups(service):
            if not group.waiting or member.worker.id in group.homes:
                continue
            last = self._first_for(group, member, now, reverse=True)
            if last is None or not self._fits(member, offer, group, last[1], share, now):
                continue
            paper = self._sizes(group)
            at_home = min(
                (self._at_home_seconds(home, group, last[1], now) for home in group.homes),
                default=float("inf"),
            )
            here = self._latency(member, offer, paper.shared + paper.own, paper.output)
            here += member.load_wait(offer, now)
            gain = at_home - here
            if here < STEAL_BELOW * at_home and (best is None or gain > best[0]):
                best = gain, group, last
        if best is None:
            return None
        return self._start(best[1], best[2], member, offer, active, "it would be done later at home")

    def _at_home_seconds(self, worker_id: WorkerId, group: Group, ask: Ask, now: float) -> float:
        """Until the last of its prompts is done where its prefix is; endless where it may not go."""
        home = self._fleet.get(worker_id)
        if home is None or home not in self._fleet.allowed(ask.needs, now, batch=True)[0]:
            return float("inf")
        offer = self._fleet.offers_of(group.service[0]).get(worker_id)
        if offer is None:
            return float("inf")
        paper = self._sizes(group)
        rounds = -(-paper.prompts // (home.slots if home.shares_prefixes else 1))
        wait = max(home.backlog(now), home.load_wait(offer, now))
        return wait + self._latency(home, offer, paper.own, paper.output) * rounds

    def _second_copy(
        self, member: Member, offer: ModelOffer, service: Service, now: float, active: bool
    ) -> Assignment | None:
        """Where engines can't share a prefix: compute it once more beside the first, when so much waits for
        it that this pays."""
        for group in self._line.at_home(member.worker.id):
            if not group.waiting or group.service != service or member.shares_prefixes:
                continue
            copies = member.papers_in_use.get(group.number, 0)
            first = self._first_for(group, member, now)
            if first is None or not copies:
                continue
            paper = self._sizes(group)
            speeds = member.speeds_of(offer)
            writing = paper.prompts * paper.output * speeds.writing.at(member.load + 1)
            saved = writing / copies - writing / (copies + 1)
            if paper.shared / speeds.prefill_tokens_per_second < SECOND_COPY_BELOW * saved:
                return self._start(group, first, member, offer, active, "so much waits for this prefix")
        return None

    def _start(
        self,
        group: Group,
        ask: tuple[Ticket, Ask],
        member: Member,
        offer: ModelOffer,
        active: bool,
        because: str,
    ) -> Assignment:
        """The prompt itself, or, while people chat, a slice of a long one first."""
        ticket, asked = ask
        seconds = self._policy.slice_seconds
        if active and seconds and not member.worker.fallback:
            step = max(seconds * member.speeds_of(offer).prefill_tokens_per_second, 128.0)
            sizes = self._forecast.sizes(group.service[0])
            prefix = len(group.blocks) * sizes.block_tokens()
            held = member.remembered(offer).depth(group.blocks) * sizes.block_tokens()
            uncached = self._forecast.prompt_tokens(asked) - self._forecast.cached(asked, member, offer, None)
            # Whole blocks: what is not remembered as one would be read again.
            warm = -(-(held + step) // sizes.block_tokens()) * sizes.block_tokens()
            if uncached > 1.5 * step and prefix - held > 0.5 * step:
                return Assignment(
                    ask=asked,
                    ticket=ticket,
                    group=group,
                    warm_tokens=min(warm, prefix),
                    because="a slice of a long prompt, since people chat",
                )
        return Assignment(ask=asked, ticket=ticket, group=group, because=because)

    def _first_for(
        self, group: Group, member: Member, now: float, *, reverse: bool = False
    ) -> tuple[Ticket, Ask] | None:
        """The first of its prompts that this worker may be given."""
        for ticket, ask in reversed(group.waiting.items()) if reverse else group.waiting.items():
            if ask.needs.local_only and member.worker.fallback:
                continue
            if not ask.needs.avoid or member in self._fleet.allowed(ask.needs, now, batch=True)[0]:
                return ticket, ask
        return None

    # Seconds and tokens

    def _sizes(self, group: Group) -> Paper:
        first = next(iter(group.waiting.values()))
        sizes = self._forecast.sizes(group.service[0])
        shared = len(group.blocks) * sizes.block_tokens()
        own = max(sizes.prompt_tokens(first.prompt) - shared, 1.0)
        return Paper(shared, own, sizes.answer_tokens(first), len(group.waiting))

    def _fits(
        self, member: Member, offer: ModelOffer, group: Group, ask: Ask, share: float, now: float
    ) -> bool:
        tokens = self._forecast.prompt_tokens(ask)
        if self._fleet.is_too_long(tokens, offer, ask.needs, now, batch=True):
            return False
        return member.fits(offer, tokens, self.shared_tokens(member, group), share)

    def shared_tokens(self, member: Member, group: Group) -> float:
        """Of its prompts, what those that run there hold already."""
        if not member.shares_prefixes or group.number not in member.papers_in_use:
            return 0.0
        return len(group.blocks) * self._forecast.sizes(group.service[0]).block_tokens()

    def _latency(self, member: Member, offer: ModelOffer, uncached: float, output: float) -> float:
        speeds = member.speeds_of(offer)
        reading = uncached / speeds.prefill_tokens_per_second
        return reading + output * speeds.writing.at(max(member.load, 1))

    def _cost(self, member: Member, offer: ModelOffer, paper: Paper) -> float:
        """Seconds of a paper on a worker that is full."""
        speeds, streams = member.speeds_of(offer), _streams(member, offer, paper)
        reading = (paper.shared + paper.prompts * paper.own) / speeds.prefill_tokens_per_second
        return reading + paper.prompts * paper.output * speeds.writing.at(streams) / streams

    def _load(self, member: Member, offer: ModelOffer, paper: Paper, now: float) -> float:
        """Seconds of work that is bound to this worker, of papers like this one."""
        speeds, streams = member.speeds_of(offer), _streams(member, offer, paper)
        token = speeds.writing.at(max(member.load, 1))
        tokens = 0.0
        reading = 0.0
        for group in self._line.at_home(member.worker.id):
            if group.waiting and len(group.homes) == 1:
                bound = self._sizes(group)
                tokens += bound.prompts * bound.output
                reading += bound.prompts * bound.own
        for flight in member.running.values():
            done = 0.0 if flight.first is None else (now - flight.first) / token
            tokens += max(flight.output - done, 0.0)
        seconds = reading / speeds.prefill_tokens_per_second
        seconds += max(member.backlog(now), member.load_wait(offer, now))
        return seconds + tokens * speeds.writing.at(streams) / streams
