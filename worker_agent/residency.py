"""Which models are loaded and which give way: decides, for `residents` to perform. Pure.

A model that somebody waits for is loaded where its need fits beside those that are there. Where it does not,
idle ones give way, then busy ones, which have their turn first: a model serves all who wait for it for at
least as long as loading it twice takes, so that two models which alternate cost a load per turn and not one
per request. A turn counts from the moment that its model could serve, not from the moment that another was
asked for: who has served for longer than that has had it, the number of loads is bounded either way, and the
newcomer waits less.

Memory is counted by what models need at most, not by what they have touched so far; those that are still on
their way out count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from worker_agent.memory import Need, Pool

_GIB = 2**30


class Phase(Enum):
    """Where a model is between disk and memory."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    CLOSING = "closing"
    """It ends what it has begun, and then gives way: nothing new is sent to it."""
    LEAVING = "leaving"
    """Its engine is being stopped; its memory is not free yet."""
    FAILED = "failed"
    """Its engine died too often. It is loaded again only after `forgive`."""


_RESIDENT = (Phase.LOADING, Phase.READY, Phase.CLOSING, Phase.LEAVING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is known of a model before it is loaded."""

    need: Need | None = None
    """None: not known; it is loaded only where no other is."""
    pinned: bool = False
    """It makes room for nobody."""
    ttl_seconds: float | None = None
    """Unloaded when it was idle for so long; None: it stays."""
    load_seconds: float = 10.0
    """What loading it takes, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyPolicy:
    """How long a model has its place for sure."""

    least_turn_seconds: float = 10.0
    turn_loads: float = 2.0
    """A turn in times of what loading takes: at least two thirds of the time is spent serving."""
    pause_loads: float = 0.1
    """During its turn a model counts as idle only after a pause, so long in times of what loading takes:
    a client that asks again and again leaves moments in between, and each would cost a load."""
    longest_pause_seconds: float = 1.0
    wish_seconds: float = 60.0
    """A load that was promised to somebody who did not wait is begun within this time or not at all."""


@dataclass(frozen=True, slots=True)
class Load:
    """Start its engine."""

    name: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Stop its engine; nothing runs on it."""

    name: str
    given_up: bool = False
    """It could not be loaded, and another model is wanted."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell all who wait for it that it cannot be loaded, and why."""

    name: str
    why: str


Command: TypeAlias = Load | Unload | Refuse


@dataclass(slots=True)
class _Model:
    name: str
    terms: Terms
    phase: Phase = Phase.UNLOADED
    held: Need | None = None
    """What it was loaded with."""
    active: int = 0
    waiters: dict[int, float] = field(default_factory=dict)
    """When each came, oldest first."""
    wished: float | None = None
    """Since when somebody wants it loaded without waiting for it."""
    wish_ends: float = math.inf
    used: float = 0.0
    since: float = 0.0
    """When it began to be loaded, or since when it serves."""
    promised: bool = False
    """Somebody was told to come back for it, and has not come yet."""
    stumbled: bool = False
    """Its engine ended, or took too long, before it could serve; another try is under way."""

    @property
    def resident(self) -> bool:
        return self.phase in _RESIDENT

    @property
    def wanted_since(self) -> float | None:
        oldest = next(iter(self.waiters.values()), None)
        return min((at for at in (oldest, self.wished) if at is not None), default=None)


class Residency:
    """All models of one machine. The caller's clock in seconds; the keys of waiters are the caller's, too."""

    def __init__(self, policy: ResidencyPolicy) -> None:
        self._policy = policy
        self._models: dict[str, _Model] = {}
        self._wake_at: float | None = None

    @property
    def wake_at(self) -> float | None:
        """When `decide` may have something new to say although nothing happens; None: never."""
        return self._wake_at

    # What there is ...

    def offer(self, name: str, terms: Terms) -> None:
        """It can be loaded on these terms; of a model that is loaded the need counts from its next load."""
        known = self._models.get(name)
        if known is None:
            self._models[name] = _Model(name, terms)
        else:
            known.terms = terms

    def withdraw(self, name: str) -> None:
        """It cannot be loaded any more. Only for one that is not resident."""
        assert not self._models[name].resident
        del self._models[name]

    def phase(self, name: str) -> Phase:
        """Where it is."""
        return self._models[name].phase

    def is_idle(self, name: str) -> bool:
        """Whether it works for nobody, and nobody waits for it."""
        model = self._models[name]
        return not model.active and not model.waiters

    def wanted(self) -> list[str]:
        """Models to be loaded, the one that has been waited for longest first."""
        return [model.name for model in self._wanted()]

    def held_bytes(self) -> Mapping[Pool, int]:
        """What is set aside for resident models; one whose need is not known counts nothing."""
        return _sum(model.held for model in self._models.values() if model.resident)

    def pinned_bytes(self, but: str) -> Mapping[Pool, int]:
        """The part of that which belongs to pinned ones, without this one."""
        return _sum(model.held for model in self._pinned() if model.name != but)

    def serving_bytes(self) -> Mapping[Pool, int]:
        """The part of it that belongs to those that are loaded."""
        loaded = (Phase.READY, Phase.CLOSING)
        return _sum(model.held for model in self._models.values() if model.phase in loaded)

    def why_not_again(self, name: str, budget: Mapping[Pool, int]) -> str | None:
        """Why the engine of a resident model, which has died, is not to be started again: what it had is
        taken; None: it may."""
        model = self._models[name]
        others = [one for one in self._resident() if one is not model]
        if model.held is None or _fits(others, model, budget):
            return None
        others = [one for one in others if one.held is not None and one.held.pool is model.held.pool]
        return _too_large(name, model.held, others, budget, beside="loaded")

    # ... what happens ...

    def waits(self, name: str, key: int, now: float) -> None:
        """A request waits for it."""
        self._models[name].waiters[key] = now

    def waits_no_more(self, name: str, key: int) -> None:
        """It is served, refused, or its client has left."""
        self._models[name].waiters.pop(key, None)

    def wish(self, name: str, now: float, *, lasting: bool = False) -> None:
        """Somebody wants it loaded and does not wait. A lasting wish stands until it is met or refused."""
        model = self._models[name]
        ends = math.inf if lasting else now + self._policy.wish_seconds
        if model.wished is None:
            model.wished, model.wish_ends = now, ends
        else:
            model.wish_ends = max(model.wish_ends, ends)

    def promise(self, name: str, now: float) -> None:
        """A request for it did not wait, and was told to come back: it is loaded, and finds its turn kept."""
        model = self._models[name]
        model.promised = True
        if model.phase not in (Phase.LOADING, Phase.READY):
            self.wish(name, now)

    def begins(self, name: str, now: float) -> None:
        """A request is sent to it."""
        model = self._models[name]
        model.active += 1
        model.used, model.promised = now, False

    def ends(self, name: str, now: float) -> None:
        """One that was sent to it is over."""
        model = self._models[name]
        model.active -= 1
        model.used = now

    def loaded(self, name: str, now: float) -> None:
        """It can serve."""
        model = self._models[name]
        if model.phase is Phase.LOADING:
            model.phase, model.since, model.used, model.wished = Phase.READY, now, now, None

    def stumbled(self, name: str) -> None:
        """Its engine has died, and is started again: where it was being loaded, nobody waits for that who
        wants another model."""
        model = self._models[name]
        model.stumbled = model.phase is Phase.LOADING

    def failed(self, name: str) -> None:
        """Its engine stays down."""
        model = self._models[name]
        model.phase, model.held, model.wished, model.promised = Phase.FAILED, None, None, False

    def forgive(self, name: str) -> None:
        """One that failed may be loaded again."""
        if self._models[name].phase is Phase.FAILED:
            self._models[name].phase = Phase.UNLOADED

    def gone(self, name: str) -> None:
        """Its engine's process has ended."""
        model = self._models[name]
        if model.resident:
            model.phase, model.held = Phase.UNLOADED, None
            model.promised = model.promised and model.wished is not None

    def dismiss(self, name: str) -> None:
        """Its engine is being stopped whatever it does, since somebody said so."""
        model = self._models[name]
        model.wished = None
        if model.resident:
            model.phase = Phase.LEAVING

    def refused(self, name: str) -> None:
        """Nobody waits for it any more: it was found that it cannot be loaded."""
        model = self._models[name]
        model.waiters.clear()
        model.wished, model.promised = None, False

    # ... and what follows.

    def decide(self, now: float, budget: Mapping[Pool, int]) -> list[Command]:
        """What is to be done. It is taken as done: the models are LOADING or LEAVING from here on.

        `budget`: bytes that all models together may take of each pool at present.
        """
        commands: list[Command] = []
        self._wake_at = None
        self._drop_old_wishes(now)
        commands += self._unload_the_expired(now)
        victims: list[_Model] | None = None  # of the first that finds no room
        claim: list[_Model] = []  # who will be there once it has found it
        for model in self._wanted():
            if (why := self._never(model, budget)) is not None:
                self.refused(model.name)
                commands.append(Refuse(model.name, why))
                continue
            resident = self._resident()
            fits = _fits(resident, model, budget)
            if fits and (victims is None or _fits(claim, model, budget)):
                self._begin(model, now)
                claim.append(model)
                commands.append(Load(model.name))
            elif victims is None:
                victims = self._victims(model, budget, now)
                claim = [*(one for one in resident if one not in victims), model]
        commands += self._make_room(victims or [], now)
        return commands

    def seconds_until_room(self, name: str, now: float, budget: Mapping[Pool, int]) -> float | None:
        """How long until others have made room for it, about; None: it does not fit, whoever leaves.

        How long requests run is not known, and not counted.
        """
        model = self._models[name]
        if model.phase in (Phase.CLOSING, Phase.LEAVING):  # those for whom it leaves come first
            return max(
                (self._turn_seconds(one) + one.terms.load_seconds for one in self._wanted()), default=0.0
            )
        others = [one for one in self._resident() if one is not model]
        if _fits(others, model, budget):
            return 0.0
        if self._never(model, budget) is not None:
            return None
        return max(self._free_at(one, now) - now for one in self._victims(model, budget, now))

    def _wanted(self) -> list[_Model]:
        found = [
            (since, model)
            for model in self._models.values()
            if model.phase is Phase.UNLOADED and (since := model.wanted_since) is not None
        ]
        return [model for _, model in sorted(found, key=lambda pair: pair[0])]

    def _resident(self) -> list[_Model]:
        return [model for model in self._models.values() if model.resident]

    def _pinned(self) -> list[_Model]:
        return [
            model for model in self._resident() if model.terms.pinned and model.phase is not Phase.LEAVING
        ]

    def _begin(self, model: _Model, now: float) -> None:
        model.phase, model.held, model.since, model.wished = Phase.LOADING, model.terms.need, now, None
        model.stumbled = False

    def _never(self, model: _Model, budget: Mapping[Pool, int]) -> str | None:
        """Why it does not fit even if all who may leave have left; None: it does."""
        pinned = [one for one in self._pinned() if one is not model]
        if _fits(pinned, model, budget):
            return None
        need = model.terms.need
        if need is None:
            names = ", ".join(one.name for one in pinned)
            return (
                f"what {model.name} needs is not known before it is loaded, and {names} is pinned: unpin that"
            )
        if any(one.held is None for one in pinned):
            names = ", ".join(one.name for one in pinned if one.held is None)
            return f"{names} is pinned, and what it takes is not known: unpin it to load {model.name}"
        return _too_large(model.name, need, pinned, budget, beside="pinned")

    def _victims(self, model: _Model, budget: Mapping[Pool, int], now: float) -> list[_Model]:
        """Who leaves for it: as few as will do, those that are on their way first, then by when they can."""
        may_leave = [one for one in self._resident() if one is not model and not self._stays(one)]
        may_leave.sort(key=lambda one: (self._reluctance(one, now), self._free_at(one, now), one.used))
        stay = [one for one in self._resident() if one is not model and one not in may_leave]
        leave: list[_Model] = []
        for one in may_leave:
            if _fits([*stay, *may_leave[len(leave) :]], model, budget):
                break
            leave.append(one)
        for one in leave[::-1]:  # a small one that left first may stay after all where a large one leaves
            others = [other for other in may_leave if other not in leave or other is one]
            if one.phase is not Phase.LEAVING and _fits([*stay, *others], model, budget):
                leave.remove(one)
        return leave

    def _stays(self, model: _Model) -> bool:
        return model.terms.pinned and model.phase is not Phase.LEAVING

    def _reluctance(self, model: _Model, now: float) -> int:
        """Least first: going already, idle, busy, not even there."""
        if model.phase is Phase.LEAVING:
            return 0
        if model.phase is Phase.CLOSING:
            return 1
        if model.phase is Phase.LOADING and not self._is_given_up(model):
            return 4
        return 2 if self._gives_way_at_once(model, now) else 3

    def _turn_seconds(self, model: _Model) -> float:
        return max(self._policy.least_turn_seconds, self._policy.turn_loads * model.terms.load_seconds)

    def _free_at(self, model: _Model, now: float) -> float:
        """When it may be asked to give way; what it has begun it ends even then."""
        if model.phase in (Phase.LEAVING, Phase.CLOSING) or self._is_given_up(model):
            return now
        turn_ends = model.since + self._turn_seconds(model)
        if model.phase is Phase.LOADING:
            return max(now, turn_ends + model.terms.load_seconds)
        if model.active or model.waiters or model.promised:
            return max(now, turn_ends)
        pause = min(self._policy.longest_pause_seconds, self._policy.pause_loads * model.terms.load_seconds)
        return max(now, min(turn_ends, model.used + pause))

    def _is_given_up(self, model: _Model) -> bool:
        """Whether its load has gone wrong once, and nobody waits for the next try."""
        return model.phase is Phase.LOADING and model.stumbled and not model.waiters

    def _gives_way_at_once(self, model: _Model, now: float) -> bool:
        return not model.active and not model.waiters and self._free_at(model, now) <= now

    def _make_room(self, victims: Sequence[_Model], now: float) -> list[Command]:
        """Closes or unloads them once all of them can go; those that were closed for nothing serve on."""
        for model in self._models.values():
            if model.phase is Phase.CLOSING and model not in victims:
                model.phase = Phase.READY
        waits_for = [
            self._free_at(one, now)
            for one in victims
            if one.phase is Phase.READY and self._free_at(one, now) > now
        ]
        for at in waits_for:
            self._wake_by(at)
        if waits_for or any(one.phase is Phase.LOADING and not self._is_given_up(one) for one in victims):
            return []
        commands: list[Command] = []
        for one in victims:
            if one.phase is Phase.READY:
                one.phase = Phase.CLOSING
            given_up = one.phase is Phase.LOADING
            if given_up or (one.phase is Phase.CLOSING and not one.active):
                one.phase = Phase.LEAVING
                commands.append(Unload(one.name, given_up))
        return commands

    def _unload_the_expired(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for model in self._models.values():
            ttl = model.terms.ttl_seconds
            if ttl is None or model.terms.pinned or model.phase is not Phase.READY:
                continue
            if model.active or model.waiters:
                continue
            if now - model.used >= ttl:
                model.phase = Phase.LEAVING
                commands.append(Unload(model.name))
            else:
                self._wake_by(model.used + ttl)
        return commands

    def _drop_old_wishes(self, now: float) -> None:
        for model in self._models.values():
            if model.wished is None or model.resident:
                continue
            if now >= model.wish_ends:
                model.wished, model.promised = None, False
            elif model.wish_ends < math.inf:
                self._wake_by(model.wish_ends)

    def _wake_by(self, at: float) -> None:
        self._wake_at = at if self._wake_at is None else min(self._wake_at, at)


def _need(model: _Model) -> Need | None:
    return model.held if model.resident else model.terms.need


def _fits(others: Collection[_Model], model: _Model, budget: Mapping[Pool, int]) -> bool:
    """Whether it can be there beside the others, as far as the memory goes that it needs itself. One whose
    need is not known is there alone."""
    need, needs = _need(model), [_need(one) for one in others]
    if need is None or any(each is None for each in needs):
        return not others
    return _sum([need, *needs])[need.pool] <= budget.get(need.pool, 0)


def _sum(needs: Iterable[Need | None]) -> Counter[Pool]:
    taken: Counter[Pool] = Counter()
    for need in needs:
        if need is not None:
            taken[need.pool] += need.total_bytes
    return taken


def _too_large(
    name: str, need: Need, others: Sequence[_Model], budget: Mapping[Pool, int], *, beside: str
) -> str:
    held = [(one.name, one.held) for one in others if one.held is not None and one.held.pool is need.pool]
    of = budget.get(need.pool, 0)
    free = max(0, of - sum(need.total_bytes for _, need in held))
    parts = f"weights {_gib(need.weights_bytes)}, cache {_gib(need.cache_bytes)}"
    where = "of the GPU's memory " if need.pool is Pool.VRAM else ""
    text = (
        f"{name} needs {_gib(need.total_bytes)} GiB ({parts}, engine {_gib(need.overhead_bytes)});"
        f" {where}{_gib(free)} GiB are free for models, of {_gib(of)}"
    )
    names = ", ".join(f"{name} {_gib(need.total_bytes)}" for name, need in held)
    return f"{text}; {beside}: {names}" if names else text


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f}"
