"""What must hold after any history, whatever the policy: events in any order, and a shadow of who waits and
who runs that is kept from the commands alone."""

import math
import random
from dataclasses import dataclass, replace
from types import MappingProxyType

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from balancer.core.admission import AdmissionPolicy
from balancer.core.batches import BatchPolicy
from balancer.core.breaker import BreakerPolicy
from balancer.core.breaker import Phase as BreakerPhase
from balancer.core.dispatcher import Dispatcher, DispatchPolicy, HedgePolicy
from balancer.core.model import (
    BLOCK_CHARS,
    Abandon,
    Arrived,
    Ask,
    Began,
    Candidate,
    Command,
    Condition,
    Draining,
    Ended,
    Endpoint,
    Gone,
    Grant,
    Loading,
    Lost,
    Measures,
    ModelName,
    ModelOffer,
    Needs,
    Probe,
    Prompt,
    Refusal,
    Refuse,
    Reported,
    Seen,
    ServiceClass,
    Tick,
    Ticket,
    Verdict,
    Worker,
    WorkerId,
)
from balancer.core.placement import POLICIES, PlacementPolicy

NAMES = ("a", "b", "c", "d")
MODELS = ("m", "n")
OWN = ModelName("m:7b-q4")
"""What a worker that calls model m otherwise calls it."""
KINDS = {
    "vllm": Condition(engine="vllm", slots=8, shares_prefixes=True),
    "mlx": Condition(engine="mlx", hardware="Apple M3 Max", slots=3, calibrates=True),
    "old": Condition(engine="llama.cpp", slots=1),
    "silent": Condition(),
}
"""Engines, and a server of which nobody knows anything."""
LOADS = ({"loaded": False}, {"loaded": False, "loading": True}, {"loaded": False, "failed": "too large"})
"""How a model may stand that is not loaded."""


@dataclass(slots=True)
class Running:
    """What holds a slot."""

    worker_id: WorkerId
    since: float
    ask: Ask | None
    """None: a probe."""
    warm: bool = False
    of: Ticket | None = None
    began: float | None = None
    tokens: int = 0


def in_batch(ask: Ask) -> bool:
    """It waits for what others leave. An answer that is to go on waits among the interactive ones."""
    return ask.service_class is ServiceClass.BATCH and ask.needs.kin is None


class AnyHistory(RuleBasedStateMachine):
    policies: tuple[str, ...] = tuple(POLICIES)

    @initialize(
        data=st.data(),
        seed=st.integers(0, 1000),
        max_waiting=st.integers(0, 5),
        trip_after=st.integers(1, 3),
        slice_seconds=st.sampled_from([0.0, 0.5]),
        takes_copies=st.booleans(),
        known=st.booleans(),
        hedge=st.none()
        | st.builds(
            HedgePolicy,
            share=st.sampled_from([0.05, 0.3, 0.5, 1.0]),
            factor=st.sampled_from([1.0, 2.0]),
            least_seconds=st.sampled_from([0.2, 1.0]),
        ),
    )
    def open(self, data, seed, max_waiting, trip_after, slice_seconds, takes_copies, known, hedge):
        self.policy = data.draw(st.sampled_from(self.policies))
        self.estimates = POLICIES[self.policy].estimates
        self.dispatcher = Dispatcher(
            DispatchPolicy(
                placement=PlacementPolicy(self.policy),
                admission=AdmissionPolicy(max_waiting, 40),
                breaker=BreakerPolicy(trip_after, rest_seconds=5),
                batch=BatchPolicy(slice_seconds=slice_seconds),
                hedge=hedge,
                settle_seconds=0,
            ),
            random.Random(seed),
            started=0.0,
        )
        self.now = 0.0
        self.max_waiting = max_waiting
        self.takes_copies = takes_copies
        self.numbers = 0
        self.waiting: dict[Ticket, Ask] = {}
        self.running: dict[Ticket, Running] = {}
        self.held_until: dict[WorkerId, float] = {}
        self.external: dict[WorkerId, int] = {}
        self.own_tickets: set[Ticket] = set()
        self.offers: dict[WorkerId, dict[ModelName, ModelOffer]] = {}
        """What each worker of the room told last that it serves."""
        self.draining: set[WorkerId] = set()
        self.hedge = hedge
        self.hedges = self.chats_granted = 0
        if known:
            first, fallback = data.draw(st.integers(0, 3)), data.draw(st.booleans())
            for name, kind in list(zip(NAMES, KINDS, strict=True))[first:]:
                self.seen(name, None, 1, alias=False, fallback=fallback and name == "d")
                self.reported(name, kind, MODELS[:1], ready=True, slots=None, memory=None, busy=None)

    # The shell

    def tell(self, event) -> list[Command]:
        commands = self.dispatcher.handle(event, self.now)
        touched: set[WorkerId] = set()
        refused_copies: list[Ticket] = []
        for command in commands:
            match command:
                case Grant():
                    self.granted(command, refused_copies)
                    touched.add(command.worker.id)
                case Probe(ticket, worker):
                    self.own(ticket)
                    self.running[ticket] = Running(worker.id, self.now, None)
                    assert worker.id not in self.draining
                    assert not worker.fallback, "nobody has asked for that, and it costs money"
                    touched.add(worker.id)
                case Refuse(ticket=ticket, refusal=refusal):
                    needs = self.waiting.pop(ticket).needs
                    assert 1 <= command.retry_after <= (600 if refusal is Refusal.MODEL_LOADING else 60)
                    if needs.kin is not None:
                        assert (refusal is Refusal.MODEL_AWAY) == (not self.serving(needs))
                    if refusal is Refusal.MODEL_FAILED:
                        assert not self.serving(needs, failed=False)
                    if refusal is Refusal.LOCAL_ONLY:
                        assert needs.local_only
                        assert self.serving(needs._replace(local_only=False))
                case Abandon(ticket, _):
                    assert ticket in self.running
        for worker_id in touched:
            held = sum(one.worker_id == worker_id for one in self.running.values())
            assert held <= self.view(worker_id).slots
        for ticket in refused_copies:
            del self.running[ticket]
            commands += self.tell(Ended(ticket))
        return commands

    def own(self, ticket: Ticket) -> None:
        assert ticket < 0
        assert ticket not in self.own_tickets
        self.own_tickets.add(ticket)

    def granted(self, grant: Grant, refused_copies: list[Ticket]) -> None:
        worker_id = grant.worker.id
        assert grant.choice.worker_id == worker_id
        self.weighed(grant.choice.candidates, worker_id)
        if grant.copy_of is None:
            ask = self.waiting.pop(grant.ticket)
        else:
            self.own(grant.ticket)
            first = self.running[grant.copy_of]
            assert first.ask is not None
            assert first.of is None, "a copy is of an ask that runs"
            assert not first.warm
            assert first.worker_id != worker_id
            assert worker_id not in first.ask.needs.avoid
            assert all(one.of != grant.copy_of for one in self.running.values()), "one copy of each"
            ask = first.ask
            if ask.service_class is ServiceClass.INTERACTIVE:
                self.hedged(first, worker_id, grant.choice.because)
            if not self.takes_copies:
                refused_copies.append(grant.ticket)
        if grant.warm_chars is not None:
            assert ask.service_class is ServiceClass.BATCH
            assert 0 < grant.warm_chars <= ask.prompt.chars
        if grant.copy_of is None and ask.service_class is ServiceClass.INTERACTIVE:
            self.chats_granted += 1
        assert worker_id not in self.draining
        assert worker_id in self.serving(ask.needs, failed=False)
        if grant.worker.fallback:
            self.fell_back(grant, ask)
        assert not self.view(worker_id).stuck or grant.worker.fallback
        aliases = dict(self.view(worker_id).worker.aliases)
        assert grant.model in (None, aliases.get(ask.needs.model))
        others = (self.well(ask.needs) & self.alive_here(ask.needs)) - {worker_id} - ask.needs.avoid
        if worker_id in ask.needs.avoid or self.view(worker_id).breaker is not BreakerPhase.CLOSED:
            assert grant.worker.fallback or not others, "somebody is well, were it only busy"
        self.running[grant.ticket] = Running(
            worker_id, self.now, ask, warm=grant.warm_chars is not None, of=grant.copy_of
        )

    def fell_back(self, grant: Grant, ask: Ask) -> None:
        """Outside of the room is asked what may leave it, once, and what the room cannot answer."""
        assert not ask.needs.local_only
        assert ask.needs.kin is None
        assert grant.copy_of is None
        assert grant.warm_chars is None
        here = {one for one in self.serving(ask.needs) if not self.view(one).worker.fallback}
        if ask.service_class is ServiceClass.BATCH:
            assert not here
        if grant.choice.because == "no worker of the room is well":
            well = self.well(ask.needs) & here
            assert well <= ask.needs.avoid
            assert not well or ask.needs.failed_here

    def hedged(self, first: Running, worker_id: WorkerId, because: str) -> None:
        """A chat whose first token is late gets somebody who has nothing to do, and that seldom."""
        self.hedges += 1
        assert self.hedge is not None
        assert first.began is None
        assert self.now - first.since > self.hedge.least_seconds or "has yet to load" in because
        assert not any(one.worker_id == worker_id for one in self.running.values())
        assert self.view(worker_id).breaker is BreakerPhase.CLOSED
        assert self.hedges <= self.hedge.share * self.chats_granted

    def weighed(self, candidates: tuple[Candidate, ...], picked: WorkerId) -> None:
        weights = [each.weight for each in candidates]
        assert all(0 <= weight < math.inf for weight in weights)
        assert any(weights) or not weights
        for each in candidates:
            assert each.expected_seconds is None or 0 < each.expected_seconds < math.inf
            assert each.cached_tokens >= 0
        if candidates:
            assert picked in {each.worker_id for each in candidates}

    # What the shadow knows

    def view(self, worker_id: str):
        return next(v for v in self.dispatcher.snapshot(self.now).workers if v.worker.id == worker_id)

    def serving(self, needs: Needs, *, failed: bool = True) -> set[WorkerId]:
        """Who does this, if not now, and may be asked for it. `failed`: also who says that they cannot."""
        return {
            view.worker.id
            for view in self.dispatcher.snapshot(self.now).workers
            if self.does(view.worker, needs, failed=failed)
        }

    def does(self, worker: Worker, needs: Needs, *, failed: bool = False) -> bool:
        if worker.fallback and (needs.local_only or needs.kin is not None):
            return False
        told = self.offers.get(worker.id, {})
        own = dict(worker.aliases).get(needs.model)
        offer = replace(told[own], known_as=own) if own in told else told.get(needs.model)
        if offer is not None and offer.failed is not None and not failed:
            return False
        if worker.fallback and worker.aliases and own not in told:
            return False
        if offer is None or needs.kin is None:
            return offer is not None
        may = needs.endpoint is not Endpoint.CHAT or offer.continues is not False
        return offer.kin == needs.kin and may

    def alive(self, needs: Needs) -> set[WorkerId]:
        """Who does this and could be asked now, its errors and its room apart."""
        return {
            view.worker.id
            for view in self.dispatcher.snapshot(self.now).workers
            if self.does(view.worker, needs)
            and not view.stuck
            and view.state == "ready"
            and self.now >= self.held_until.get(view.worker.id, 0.0)
        }

    def alive_here(self, needs: Needs) -> set[WorkerId]:
        """Those of them that are of the room."""
        return {one for one in self.alive(needs) if not self.view(one).worker.fallback}

    def well(self, needs: Needs) -> set[WorkerId]:
        return {one for one in self.alive(needs) if self.view(one).breaker is BreakerPhase.CLOSED}

    # What happens

    @rule(
        model=st.sampled_from(MODELS),
        avoid=st.frozensets(st.sampled_from(NAMES)),
        early=st.floats(0, 5),
        batch=st.booleans(),
        client=st.sampled_from("xyz"),
        document=st.integers(0, 3),
        blocks=st.integers(0, 40),
        more=st.integers(0, 2 * BLOCK_CHARS),
        max_output=st.none() | st.integers(0, 500),
        replayable=st.booleans(),
        turn=st.none() | st.integers(0, 3),
        admitted=st.booleans(),
        endpoint=st.sampled_from([Endpoint.CHAT, Endpoint.CHAT, Endpoint.COMPLETIONS]),
        kin=st.sampled_from([None, None, None, "m", "n", "q4", OWN]),
        local_only=st.booleans(),
        failed_here=st.booleans(),
        patience=st.sampled_from([5, 30, 30]),
    )
    def arrives(
        self,
        model,
        avoid,
        early,
        batch,
        client,
        document,
        blocks,
        more,
        max_output,
        replayable,
        turn,
        admitted,
        endpoint,
        kin,
        local_only,
        failed_here,
        patience,
    ):
        shared = [document * 1000 + number for number in range(blocks)]
        own = [hash((self.numbers, number)) for number in range(more // BLOCK_CHARS)]
        ask = Ask(
            needs=Needs(
                model=ModelName(model),
                endpoint=endpoint,
                avoid=frozenset(map(WorkerId, avoid)),
                kin=kin,
                local_only=local_only,
                failed_here=failed_here,
            ),
            arrived=self.now - early,
            deadline=math.inf if batch else self.now + patience,
            service_class=ServiceClass.BATCH if batch else ServiceClass.INTERACTIVE,
            client=client,
            prompt=Prompt(
                chars=blocks * BLOCK_CHARS + more,
                blocks=(*shared, *own),
                conversation=None if turn is None else turn + 1,
                continues=turn,
            ),
            max_output=max_output,
            replayable=replayable,
            admitted=kin is not None or (admitted and not self.full(batch)),
        )
        self.join(ask)

    @rule(
        client=st.sampled_from("xy"),
        document=st.integers(0, 3),
        blocks=st.integers(1, 40),
        prompts=st.integers(2, 6),
        replayable=st.booleans(),
    )
    def a_paper_arrives(self, client, document, blocks, prompts, replayable):
        needs = Needs(model=ModelName("m"), endpoint=Endpoint.CHAT)
        for _ in range(prompts):
            prompt = Prompt(
                chars=blocks * BLOCK_CHARS + 200,
                blocks=tuple(document * 1000 + number for number in range(blocks)),
            )
            self.join(
                Ask(
                    needs=needs,
                    arrived=self.now,
                    deadline=math.inf,
                    service_class=ServiceClass.BATCH,
                    client=client,
                    prompt=prompt,
                    replayable=replayable,
                )
            )

    @rule(count=st.integers(1, 6), seconds=st.floats(0, 10))
    def much_is_answered(self, count, seconds):
        self.pass_time(seconds)
        for ticket in sorted(self.running)[:count]:
            if ticket in self.running and self.running[ticket].began is None:
                self.begin(ticket)
        self.pass_time(seconds)
        for ticket in sorted(self.running)[:count]:
            if ticket in self.running:
                self.end(ticket, Verdict.GOOD, self.measures(self.running[ticket]))

    @rule(model=st.sampled_from(MODELS), seconds=st.floats(0.5, 7))
    def a_chat_is_begun_late(self, model, seconds):
        """If it is begun at all."""
        needs = Needs(model=ModelName(model), endpoint=Endpoint.CHAT)
        self.join(Ask(needs=needs, arrived=self.now, deadline=self.now + 30, prompt=Prompt(chars=200)))
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.tell(Tick())

    def full(self, batch: bool) -> bool:
        own = [one for one in self.waiting.values() if in_batch(one) == batch]
        return len(own) >= (40 if batch else self.max_waiting)

    def join(self, ask: Ask) -> list[Command]:
        self.numbers += 1
        ticket = Ticket(self.numbers)
        self.waiting[ticket] = ask
        return self.tell(Arrived(ticket, ask))

    @precondition(lambda self: any(one.began is None for one in self.running.values()))
    @rule(data=st.data(), after=st.floats(0, 3))
    def begins(self, data, after):
        unbegun = sorted(ticket for ticket, one in self.running.items() if one.began is None)
        self.pass_time(after)
        unbegun = [ticket for ticket in unbegun if ticket in self.running]
        self.begin(data.draw(st.sampled_from(unbegun)))

    def begin(self, ticket: Ticket) -> None:
        """As the shell does: of a chat that runs twice, who begins first goes on."""
        one = self.running[ticket]
        one.began = self.now
        if one.ask is not None and one.ask.service_class is ServiceClass.INTERACTIVE:
            for other in self.others(ticket):
                del self.running[other]
                self.tell(Ended(other))
        self.tell(Began(ticket))

    def others(self, ticket: Ticket) -> list[Ticket]:
        """Further attempts at the same ask."""
        of = self.running[ticket].of
        return [other for other, its in self.running.items() if other == of or its.of == ticket]

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(),
        verdict=st.sampled_from(list(Verdict)),
        unreachable=st.booleans(),
        hold=st.none() | st.floats(0, 9),
        measured=st.booleans(),
        cached=st.none() | st.integers(0, 5000),
        output=st.none() | st.integers(0, 1000),
        silent=st.booleans(),
        loading=st.none() | st.none() | st.none() | st.floats(0, 60),
    )
    def ends(self, data, verdict, unreachable, hold, measured, cached, output, silent, loading):
        ticket = data.draw(st.sampled_from(sorted(self.running)))
        one = self.running[ticket]
        if hold is not None:
            until = max(self.held_until.get(one.worker_id, 0.0), self.now + hold)
            self.held_until[one.worker_id] = until
        measures = self.measures(one, cached=cached, output=output) if measured else None
        told = None
        if loading is not None and verdict is Verdict.UNKNOWN:
            told = Loading(one.worker_id, None, loading)
        self.end(ticket, verdict, measures, unreachable and verdict is Verdict.BAD, hold, silent, told)

    def measures(self, one: Running, *, cached: int | None = 0, output: int | None = 20) -> Measures:
        prompt = one.ask.prompt.chars // 4 if one.ask else 1
        return Measures(
            seconds=self.now - one.since,
            first_byte=one.began,
            prompt_tokens=prompt,
            cached_tokens=None if cached is None else min(cached, prompt),
            output_tokens=output,
        )

    def end(self, ticket: Ticket, verdict: Verdict, measures: Measures | None, *more) -> None:
        """As the shell does: a warm-up's ask arrives again, the first answer ends the other attempt."""
        others = self.others(ticket)
        one = self.running.pop(ticket)
        self.tell(Ended(ticket, verdict, measures, *more))
        if one.ask is None:
            return
        if one.warm:
            self.join(replace(one.ask, admitted=True))
            return
        if verdict is Verdict.GOOD:
            for other in others:
                del self.running[other]
                self.tell(Ended(other))
        elif verdict is Verdict.BAD and not others:
            avoid = one.ask.needs.avoid | {one.worker_id}
            self.join(replace(one.ask, needs=one.ask.needs._replace(avoid=avoid), admitted=True))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leaves_the_line(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[ticket]
        self.tell(Ended(ticket))

    @rule(
        name=st.sampled_from(NAMES),
        cap=st.none() | st.integers(1, 3),
        port=st.integers(1, 2),
        alias=st.booleans(),
        fallback=st.sampled_from([False, False, True]),
    )
    def seen(self, name, cap, port, alias, fallback=False):
        aliases = ((ModelName("m"), OWN),) if alias else ()
        worker = Worker(
            id=WorkerId(name),
            type="agent",
            url=f"http://{name}:{port}",
            cap=cap,
            aliases=aliases,
            fallback=fallback,
        )
        self.tell(Seen(worker))

    @rule(
        name=st.sampled_from(NAMES),
        kind=st.sampled_from(list(KINDS)),
        models=st.sampled_from([MODELS, ("m",), (OWN,), ("m", OWN), ("n",), ()]),
        slots=st.none() | st.integers(1, 3),
        memory=st.none() | st.integers(1000, 30_000),
        busy=st.none() | st.integers(0, 6),
        identity=st.sampled_from(["", "", "q4", "q8"]),
        continues=st.sampled_from([None, True, False]),
        load=st.sampled_from([*(3 * [{}]), *LOADS]),
        seconds=st.floats(0, 60),
        tells=st.booleans(),
    )
    def reported(
        self,
        name,
        kind,
        models,
        slots,
        memory,
        busy,
        ready=True,
        identity="",
        continues=None,
        load=MappingProxyType({}),
        seconds=0.0,
        tells=True,
    ):
        offers = tuple(
            ModelOffer(
                name=ModelName(model),
                memory_tokens=memory,
                identity=identity,
                continues=continues,
                load_seconds=seconds,
                **(load if model == "m" else {}),
            )
            for model in sorted(models)
        )
        room = {view.worker.id for view in self.dispatcher.snapshot(self.now).workers}
        if name in room and (offers or ready):
            self.offers[WorkerId(name)] = {offer.name: offer for offer in offers}
        state = "ready" if ready else "loading"
        condition = replace(
            KINDS[kind], models=offers, ready=ready, state=state, running=busy, tells_loads=tells
        )
        if slots is not None:
            condition = replace(condition, slots=slots)
        self.external[WorkerId(name)] = busy or 0
        self.tell(Reported(WorkerId(name), condition))

    @rule(
        name=st.sampled_from(NAMES),
        what=st.sampled_from(["lost", "abandoned", "gone", "loading", "again", "draining", "drained"]),
    )
    def trouble(self, name, what):
        worker_id = WorkerId(name)
        match what:
            case "gone":
                self.offers.pop(worker_id, None)
                self.draining.discard(worker_id)
                self.tell(Gone(worker_id))
            case "draining":
                if self.dispatcher.has_worker(worker_id):
                    self.draining.add(worker_id)
                self.tell(Draining(worker_id))
            case "drained":
                self.draining.discard(worker_id)
                self.tell(Draining(worker_id, on=False))
            case "loading":
                self.reported(name, "vllm", [], ready=False, slots=None, memory=None, busy=None)
            case "again":
                self.tell(Lost(worker_id, "gone dark"))
                self.reported(name, "vllm", MODELS, ready=True, slots=None, memory=None, busy=None)
            case _:
                self.tell(Lost(worker_id, "gone dark", what == "abandoned"))

    @rule(seconds=st.floats(0, 20), grown=st.integers(0, 100))
    def time_passes(self, seconds, grown):
        self.now += seconds
        for one in self.running.values():
            one.tokens += grown if one.began is not None else 0
        self.tell(Tick({ticket: one.tokens for ticket, one in self.running.items() if one.tokens}))

    # What holds

    @invariant()
    def counts_add_up(self):
        snapshot = self.dispatcher.snapshot(self.now)
        batch = [one for one in self.waiting.values() if in_batch(one)]
        assert (snapshot.waiting, snapshot.waiting_batch) == (len(self.waiting), len(batch))
        assert snapshot.running == sum(one.ask is not None for one in self.running.values())
        for view in snapshot.workers:
            on_it = sum(one.worker_id == view.worker.id for one in self.running.values())
            assert view.running == on_it
            assert view.slots >= 1
            if view.state == "ready":
                assert view.worker.id not in self.draining

    @invariant()
    def numbers_stay_finite(self):
        for view in self.dispatcher.snapshot(self.now).workers:
            assert 0 <= view.success_rate <= 1
            for number in (
                view.average_seconds,
                view.prefill_tokens_per_second,
                view.tokens_per_second,
            ):
                assert number is None or 0 <= number < math.inf

    @invariant()
    def nobody_waits_beside_a_worker_that_should_take_them(self):
        """Nothing is left for a tick of the same moment but what only ticks look at: batch prompts that
        another worker should take from their home, and copies. That comes to rest at once too."""
        people = {t for t, one in self.waiting.items() if not in_batch(one)}
        more = [one for one in self.tell(Tick()) if isinstance(one, Grant)]
        assert self.estimates or all(one.copy_of is not None for one in more)
        assert not people & {one.ticket for one in more}
        ticks = 0
        while more and self.takes_copies:
            ticks += 1
            assert ticks <= 4
            more = [one for one in self.tell(Tick()) if isinstance(one, Grant)]

    @invariant()
    def who_waits_has_a_place(self):
        standings = {ticket: self.dispatcher.standing(ticket, self.now) for ticket in self.waiting}
        assert all(standings.values())
        places = [
            (in_batch(ask), ask.needs.model, ask.needs.endpoint, standings[ticket].position)
            for ticket, ask in self.waiting.items()
        ]
        assert len(set(places)) == len(places)
        assert all(1 <= place[3] <= len(places) for place in places)
        assert not any(self.dispatcher.standing(ticket, self.now) for ticket in self.running)

    @invariant()
    def who_could_only_go_on_waits_for_somebody(self):
        assert all(ask.needs.kin is None or self.serving(ask.needs) for ask in self.waiting.values())

    @invariant()
    def nobody_waits_in_an_idle_room(self):
        """People not at all; batch while a forecast of its end is believed, a second or so."""
        idle = self.waiting_though_idle()
        assert all(in_batch(one) for one in idle)
        if idle:
            self.pass_time(1.1)
            self.pass_time(1.1)
            assert not self.waiting_though_idle()

    def waiting_though_idle(self) -> list[Ask]:
        """Who waits for something that somebody could do, while nobody does anything."""
        if self.running or any(self.external.values()):
            return []
        return [ask for ask in self.waiting.values() if self.alive_here(ask.needs)]

    def teardown(self):
        """When all is well again and everything is answered, everybody's turn comes."""
        if not hasattr(self, "dispatcher"):
            return
        for name in NAMES:
            self.seen(name, None, 1, alias=False)
            self.trouble(name, "drained")
            self.reported(name, "vllm", MODELS, ready=True, slots=2, memory=None, busy=0)
        steps = 60 + 4 * len(self.waiting)
        while (self.waiting or self.running) and steps:
            steps -= 1
            self.now += 5.0
            for ticket in list(self.running):
                if ticket in self.running and self.running[ticket].began is None:
                    self.begin(ticket)
            for ticket in list(self.running):
                if ticket in self.running:
                    self.end(ticket, Verdict.GOOD, self.measures(self.running[ticket]))
            self.tell(Tick())
        assert not self.waiting, "somebody's turn never came"
        assert not self.running
        self.counts_add_up()


class Estimating(AnyHistory):
    policies = tuple(name for name, policy in POLICIES.items() if policy.estimates)


class Scoring(AnyHistory):
    policies = tuple(name for name, policy in POLICIES.items() if not policy.estimates)


FOUND = [Phase.explicit, Phase.reuse, Phase.generate]
"""A history is told as it was found: to make it shorter can take minutes. `Phase.shrink` does."""

TestEstimating = Estimating.TestCase
TestEstimating.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, phases=FOUND)
TestScoring = Scoring.TestCase
TestScoring.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, phases=FOUND)
