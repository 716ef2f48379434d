"""What a batch takes at the best, the least prefill, the chats a fleet can carry. Pure.

There are two bounds of a batch. `fluid_bound` is the routing study's (`bound.py`), in which its goals are
given: every machine is busy to the end with the same mixture of papers, at its best batch size. A clever
split can beat that by some per cent, so `makespan_bound` is what no policy can beat. It follows from the
engine model: its time is spent on reading tokens and on steps, and a step is shared by at most as many
streams as there are slots and memory for. It allows any split of the batch between the machines, also of
one paper (whose prefix is then computed on each). So it is the dual of a linear program: for any prices of
the machines' seconds,

    makespan >= sum over papers of (the cheapest way to do that paper) / (sum of the prices).

Prices are sought that make it high; any prices at all make it true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter, itemgetter

from benchmarks.sim.engine import EngineSpec
from benchmarks.sim.prefixes import Work
from benchmarks.sim.workloads import Fault, MeanTurn, Paper

_ROUNDS = 100
"""Of the search for prices; further ones gain less than 0.1 %."""


@dataclass(frozen=True, slots=True)
class _Cost:
    """Seconds of one kind of engine for one paper."""

    prefix: float
    own: tuple[float, ...]
    """For each request, the prefix apart."""


def least_prefill(batch: Sequence[Paper]) -> int:
    """Tokens, when every prefix is computed once."""
    return sum(paper.prefix + sum(one.work.own for one in paper.requests) for paper in batch)


@lru_cache(maxsize=16)  # each policy of a comparison asks for the same one
def makespan_bound(
    engines: tuple[EngineSpec, ...], batch: tuple[Paper, ...], faults: tuple[Fault, ...] = ()
) -> float:
    """Seconds. `faults`: at moments in seconds, on engines by their index."""
    costs = {spec: _costs(spec, batch) for spec in dict.fromkeys(engines)}
    prices = {spec: 1 / sum(cost.prefix + sum(cost.own) for cost in each) for spec, each in costs.items()}
    usable = [_usable_seconds([one for one in faults if one.machine == i]) for i in range(len(engines))]

    def capacity(spec: EngineSpec, moment: float) -> float:
        return sum(by(moment) for engine, by in zip(engines, usable, strict=True) if engine == spec)

    best = 0.0
    for number in range(_ROUNDS):
        worth, load = _cheapest(costs, prices)
        seconds = _first_time(
            worth, lambda t: sum(price * capacity(spec, t) for spec, price in prices.items())
        )
        best = max(best, seconds)
        for spec in prices:
            # Who would get more than it can do in that time is too cheap.
            able = capacity(spec, seconds)
            excess = (load[spec] - able) / max(load[spec], able, 1e-9)
            prices[spec] *= 1 + 0.5 / (1 + number / 4) * excess
    return best


def fluid_bound(
    engines: tuple[EngineSpec, ...], batch: Sequence[Paper], faults: tuple[Fault, ...] = ()
) -> float:
    """Seconds, as `makespan_bound`."""
    rates = {spec: 1 / sum(_paper_seconds(spec, paper) for paper in batch) for spec in dict.fromkeys(engines)}
    usable = [_usable_seconds([one for one in faults if one.machine == i]) for i in range(len(engines))]

    def done(moment: float) -> float:
        return sum(rates[engine] * by(moment) for engine, by in zip(engines, usable, strict=True))

    return _first_time(1.0, done)


def _paper_seconds(spec: EngineSpec, paper: Paper) -> float:
    """On a machine that always has as many streams as its slots and memory allow."""
    works = [one.work for one in paper.requests]
    count = len(works)
    each = (paper.prefix + sum(work.own + work.output for work in works)) / count
    streams = max(1, min(spec.slots, int(min(spec.pool_tokens / each, spec.slots))))
    context = sum(work.prompt + work.output / 2 for work in works) / count
    token = spec.step_seconds / streams + spec.stream_seconds + spec.context_seconds * context
    reading = spec.prefill_seconds(0, paper.prefix)
    reading += sum(spec.prefill_seconds(paper.prefix, work.own) for work in works)
    return reading + token * sum(work.output for work in works)


def _costs(spec: EngineSpec, batch: Sequence[Paper]) -> list[_Cost]:
    """A step's fixed seconds are shared by slots or by memory: whichever makes the whole batch dearer."""
    requests = [(one.work, paper) for paper in batch for one in paper.requests]
    by_slots = 1 / spec.slots
    by_memory = [
        min(1.0, (paper.prefix / len(paper.requests) + work.own + work.output) / max(spec.pool_tokens, 1))
        for work, paper in requests
    ]
    steps = [work.output - 1 for work, _ in requests]
    charged = sum(count * share for count, share in zip(steps, by_memory, strict=True))
    memory_is_short = charged > by_slots * sum(steps)
    shares = iter(by_memory if memory_is_short else [by_slots] * len(requests))
    return [
        _Cost(
            prefix=spec.prefill_seconds(0, paper.prefix),
            own=tuple(
                spec.prefill_seconds(one.work.prefix, one.work.own) + _decoding(spec, one.work, next(shares))
                for one in paper.requests
            ),
        )
        for paper in batch
    ]


def _decoding(spec: EngineSpec, work: Work, share: float) -> float:
    """Seconds for all tokens but the first, which comes with the prompt's end."""
    context = work.prompt + (work.output + 1) / 2
    a, b, c = spec.step_seconds, spec.stream_seconds, spec.context_seconds
    return (work.output - 1) * (a * share + b + c * context)


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to do a paper: its cost at some prices, and the seconds that each kind of engine works."""

    price: float
    seconds: tuple[tuple[EngineSpec, float], ...]


_Priced = Sequence[tuple[float, EngineSpec, _Cost]]
"""What a paper costs on each kind, with the price of a second there."""


def _cheapest(
    costs: Mapping[EngineSpec, Sequence[_Cost]], prices: Mapping[EngineSpec, float]
) -> tuple[float, dict[EngineSpec, float]]:
    """The price of doing every paper in the cheapest way, and the seconds each kind would work for that."""
    load = dict.fromkeys(costs, 0.0)
    total = 0.0
    for ways in zip(*costs.values(), strict=True):
        priced = [(prices[spec], spec, cost) for spec, cost in zip(costs, ways, strict=True)]
        way = _on_one(priced)
        if len(priced) > 1:
            way = min(way, _on_several(priced), key=attrgetter("price"))
        total += way.price
        for spec, seconds in way.seconds:
            load[spec] += seconds
    return total, load


def _on_one(priced: _Priced) -> _Way:
    whole = [(price * (cost.prefix + sum(cost.own)), spec, cost) for price, spec, cost in priced]
    price, spec, cost = min(whole, key=itemgetter(0))
    return _Way(price, ((spec, cost.prefix + sum(cost.own)),))


def _on_several(priced: _Priced) -> _Way:
    """At the least two prefixes, and each request where it is cheapest: no split of a paper costs less."""
    prefixes = sorted(
        ((price * cost.prefix, spec, cost.prefix) for price, spec, cost in priced), key=itemgetter(0)
    )
    requests = [
        min(each, key=itemgetter(0))
        for each in zip(
            *([(price * seconds, spec, seconds) for seconds in cost.own] for price, spec, cost in priced),
            strict=True,
        )
    ]
    parts = [*prefixes[:2], *requests]
    return _Way(sum(price for price, _, _ in parts), tuple((spec, seconds) for _, spec, seconds in parts))


def _usable_seconds(faults: Sequence[Fault]) -> Callable[[float], float]:
    """How many seconds' worth a machine can do by some moment, with what happens to it."""
    events = sorted(faults, key=lambda fault: fault.at)

    def by(moment: float) -> float:
        done, since, speed = 0.0, 0.0, 1.0
        for fault in events:
            if fault.at >= moment:
                break
            done += speed * (fault.at - since)
            since = fault.at
            speed = {"hang": 0.0, "crash": 0.0, "return": 1.0, "slow": 1 / fault.factor}[fault.what]
        return done + speed * (moment - since)

    return by


def _first_time(worth: float, by: Callable[[float], float]) -> float:
    """The moment at which so much can have been done; by bisection, from below."""
    low, high = 0.0, 1.0
    while by(high) < worth:
        low, high = high, 2 * high
        if high > 1e12:
            raise ValueError("with these faults the batch can never be done")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if by(middle) < worth else (low, middle)
    return low


def chat_turns_per_second(engines: Sequence[EngineSpec], turn: MeanTurn) -> float:
    """What a fleet carries at most, each prefix found in a cache (`chat_capacity` of the study)."""
    total = 0.0
    for spec in engines:
        streams = max(1, min(spec.slots, spec.pool_tokens // (turn.prompt + turn.answer)))
        token = spec.step_seconds / streams + spec.stream_seconds + spec.context_seconds * turn.prompt
        prefill = turn.question / spec.prefill_tokens_per_second * (1 + spec.attention * turn.prompt)
        total += 1 / (prefill + turn.answer * token)
    return total
