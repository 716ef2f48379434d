"""The soak's load follows from its seed, and its log says what its engines and clients saw."""

from __future__ import annotations

import pytest

from benchmarks import soak
from benchmarks.history import Began, Bounds, Ended, Ending, Kind, violations
from benchmarks.soak import Log, Plan, slope
from tests.fakes.engine import Fault, Outcome, Request


def planned(seed: int, count: int = 500):
    plan = Plan(seed, 20.0)
    return [plan.next() for _ in range(count)]


def test_the_same_seed_is_the_same_load_and_another_is_another():
    assert planned(7) == planned(7)
    assert planned(7) != planned(8)


def test_all_shapes_come_and_a_hundredth_is_faulty():
    load = planned(1, 5000)
    assert {one.shape for one in load} == set(soak.SHAPES)
    assert 0.005 < sum(one.fault is not None for one in load) / len(load) < 0.02


def test_a_slope_is_that_of_an_hour():
    assert slope([(0.0, 50.0), (1800.0, 51.0), (3600.0, 52.0)]) == pytest.approx(2.0)
    assert slope([(0.0, 50.0)]) is None


def request(started: float, ended: float, outcome: Outcome, **more) -> Request:
    return Request(
        method="POST",
        path="/v1/chat/completions",
        headers={"x-request-id": "soak-1"},
        raw=b"",
        body=more.pop("body", {}),
        started=started,
        closes=False,
        outcome=outcome,
        ended=ended,
        **more,
    )


def attempts(*requests: Request):
    log = Log()
    log.calls["soak-1"] += [(f"w{number}", one) for number, one in enumerate(requests)]
    return log.told()


def test_what_follows_a_failure_is_a_retry():
    told = attempts(request(0.0, 1.0, Outcome.BROKEN), request(1.1, 2.0, Outcome.COMPLETED))
    assert [one.kind for one in told if isinstance(one, Began)] == [Kind.FIRST, Kind.RETRY]


def test_what_runs_beside_another_attempt_is_a_copy():
    told = attempts(request(0.0, 2.0, Outcome.CLIENT_LEFT), request(1.0, 1.5, Outcome.COMPLETED))
    assert [one.kind for one in told if isinstance(one, Began)] == [Kind.FIRST, Kind.COPY]


def test_an_engine_that_died_of_it_crashed():
    told = attempts(request(0.0, 1.0, Outcome.BROKEN, fault=Fault.die(at_token=3)))
    assert [one.ending for one in told if isinstance(one, Ended)] == [Ending.CRASHED]


def test_a_fifth_attempt_is_a_violation():
    told = attempts(*(request(at, at + 0.5, Outcome.BROKEN) for at in range(5)))
    assert [one.rule for one in violations(told, Bounds())] == ["I6"]
