"""The checker of a run's log: each rule is broken once, and a good run breaks none."""

from __future__ import annotations

import pytest

from benchmarks.history import (
    Asked,
    AtRest,
    Began,
    Bounds,
    Delivered,
    Ended,
    Ending,
    Finished,
    Kind,
    Outcome,
    Record,
    Resources,
    Resulted,
    Said,
    Submitted,
    violations,
)

REFERENCE = "amber birch cedar"


def answered(request: str = "r", *texts: str, outcome: Outcome = Outcome.SUCCESS) -> list[Record]:
    """A request and what its client got."""
    return [
        Asked(at=0.0, request=request, reference=REFERENCE),
        *(Delivered(at=1.0, request=request, text=text) for text in texts),
        Finished(at=2.0, request=request, outcome=outcome),
    ]


def rules(records: list[Record], bounds: Bounds | None = None) -> list[str]:
    return [violation.rule for violation in violations(records, bounds)]


def test_a_run_in_which_all_was_well_breaks_no_rule():
    log = [
        Resources(at=0.0, rss_mib=50.0, files=20, tasks=5),
        Submitted(at=0.0, batch="b", item="1"),
        Began(at=0.5, worker="w", call="1", request="r"),
        *answered("r", "amber birch", " cedar"),
        Ended(at=2.0, call="1", ending=Ending.COMPLETED),
        Resulted(at=3.0, batch="b", item="1"),
        Said(at=3.0, where="log", text="one request"),
        AtRest(at=4.0, counters={"running": 0}),
        Resources(at=4.0, rss_mib=51.0, files=20, tasks=5),
    ]
    bounds = Bounds(
        slots={"w": 1}, secrets=["amber birch"], rss_growth_mib=2.0, files_growth=0, tasks_growth=0
    )
    assert violations(log, bounds) == []


@pytest.mark.parametrize("outcomes", [0, 2])
def test_a_request_has_exactly_one_outcome(outcomes):
    end = [Finished(at=1.0, request="r", outcome=Outcome.ERROR)] * outcomes
    assert rules([Asked(at=0.0, request="r"), *end]) == ["I1"]


def test_a_truncated_answer_may_not_pass_for_a_success():
    assert rules(answered("r", "amber birch")) == ["I2"]


@pytest.mark.parametrize("outcome", [Outcome.ERROR, Outcome.BROKEN, Outcome.LEFT])
def test_a_truncated_answer_that_says_so_is_honest(outcome):
    assert rules(answered("r", "amber birch", outcome=outcome)) == []


@pytest.mark.parametrize("text", ["amber birch birch", "amber cedar", "amber birch cedar delta"])
@pytest.mark.parametrize("outcome", list(Outcome))
def test_what_was_delivered_is_a_beginning_of_the_one_right_text(text, outcome):
    assert rules(answered("r", text, outcome=outcome)) == ["I2"]


def test_nothing_comes_after_the_end():
    log = [
        *answered("r", "amber", outcome=Outcome.ERROR),
        Delivered(at=3.0, request="r", text=" birch"),
    ]
    assert rules(log) == ["I3"]


def test_counters_return_to_nothing_and_only_the_last_reading_counts():
    assert rules([AtRest(at=1.0, counters={"waiting": 2}), AtRest(at=2.0, counters={"waiting": 0})]) == []
    assert rules([AtRest(at=2.0, counters={"waiting": 1})]) == ["I4"]


def test_a_worker_never_has_more_than_its_slots_and_work_for_nobody_counts():
    begun: list[Record] = [
        Began(at=0.0, worker="w", call="1", request="r"),
        Began(at=1.0, worker="w", call="2"),
    ]
    assert rules(begun, Bounds(slots={"w": 1})) == ["I5"]
    assert (
        rules([begun[0], Ended(at=0.5, call="1", ending=Ending.LEFT), begun[1]], Bounds(slots={"w": 1})) == []
    )


def test_a_request_has_no_more_attempts_than_are_allowed_and_a_copy_is_none():
    first = Began(at=0.0, worker="a", call="1", request="r")
    copy = Began(at=0.1, worker="b", call="2", request="r", kind=Kind.COPY)
    retry = Began(at=0.2, worker="c", call="3", request="r", kind=Kind.RETRY)
    assert rules([first, copy], Bounds(attempts=1)) == []
    assert rules([first, copy, retry], Bounds(attempts=1)) == ["I6"]


def test_a_request_kills_no_more_workers_than_are_allowed():
    log: list[Record] = []
    for number in range(3):
        log.append(Began(at=0.0, worker=f"w{number}", call=str(number), request="r"))
        log.append(Ended(at=0.0, call=str(number), ending=Ending.CRASHED))
    assert rules(log, Bounds(crashes=3)) == []
    assert rules(log, Bounds(crashes=2)) == ["I6"]


def retries(number: int, each_seconds: float) -> list[Record]:
    return [
        Began(at=turn * each_seconds, worker="w", call=str(turn), request=f"r{turn}", kind=Kind.RETRY)
        for turn in range(number)
    ]


def test_retries_stay_within_their_budget_whatever_the_pace():
    bounds = Bounds(retries_per_second=10.0, retry_seconds=1.0)
    assert rules(retries(200, each_seconds=0.1), bounds) == []
    assert rules(retries(11, each_seconds=0.0), bounds) == []
    assert rules(retries(12, each_seconds=0.0), bounds) == ["I7"]
    assert rules(retries(200, each_seconds=0.05), bounds) == ["I7"]


def test_requests_pay_for_retries_by_the_agreed_share():
    bounds = Bounds(retry_share=0.5, retries_per_second=0.0)
    asked: list[Record] = [
        record
        for number in range(10)
        for record in (
            Asked(at=float(number), request=str(number)),
            Finished(at=float(number), request=str(number), outcome=Outcome.ERROR),
        )
    ]
    each_second = [
        [*asked[turn * 2 : turn * 2 + 2], *[retry] * 2]
        for turn, retry in enumerate(
            Began(at=float(second), worker="w", call=str(second), kind=Kind.RETRY) for second in range(10)
        )
    ]
    paid = [record for second in each_second[::1] for record in second[:2]]
    assert rules(paid, bounds) == []
    assert rules([record for second in each_second for record in second], bounds) == ["I7"]


@pytest.mark.parametrize("results", [0, 2])
def test_a_batch_item_has_exactly_one_result(results):
    log = [Submitted(at=0.0, batch="b", item="1"), *[Resulted(at=1.0, batch="b", item="1")] * results]
    assert rules(log) == ["I8"]


def test_a_result_that_nobody_asked_for_is_wrong_too():
    assert rules([Resulted(at=1.0, batch="b", item="9")]) == ["I8"]


def test_a_secret_in_a_log_is_found_and_not_repeated():
    found = violations([Said(at=0.0, where="log", text="prompt: hush-1")], Bounds(secrets=["hush-1"]))
    assert [violation.rule for violation in found] == ["I9"]
    assert "hush-1" not in str(found[0])


def test_what_the_process_holds_returns_to_what_it_held():
    log = [Resources(at=0.0, rss_mib=50.0, files=20), Resources(at=9.0, rss_mib=70.0, files=25)]
    assert rules(log, Bounds(rss_growth_mib=10.0, files_growth=2)) == ["I10", "I10"]
    assert rules(log, Bounds(rss_growth_mib=30.0, files_growth=9)) == []
    assert rules(log) == []
