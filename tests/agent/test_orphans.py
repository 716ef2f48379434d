from __future__ import annotations

from worker_agent.orphans import OrphanPolicy, Orphans

POLICY = OrphanPolicy()


def test_one_that_was_left_counts_until_the_engine_says_that_it_is_done() -> None:
    orphans = Orphans(POLICY)
    orphans.left()
    orphans.left()
    orphans.seen(busy=3, served=1)
    assert orphans.count == 2
    orphans.seen(busy=2, served=1)
    assert orphans.count == 1
    orphans.seen(busy=1, served=1)
    assert orphans.count == 0


def test_what_somebody_else_does_with_the_engine_is_nobodys_orphan() -> None:
    orphans = Orphans(POLICY)
    orphans.seen(busy=3, served=0)
    assert orphans.count == 0


def test_too_many_for_too_long_are_told_with_their_time() -> None:
    orphans = Orphans(POLICY)
    orphans.left()
    assert orphans.tick(2, 0, 100.0) is None
    assert orphans.tick(2, 0, 100.0 + POLICY.seconds) is None
    assert orphans.tick(2, 0, 101.0 + POLICY.seconds) == POLICY.seconds + 1


def test_a_few_of_many_slots_may_stay() -> None:
    orphans = Orphans(POLICY)
    orphans.left()
    assert orphans.tick(4, 0, 0.0) is None
    assert orphans.tick(4, 0, 10_000.0) is None


def test_an_answer_that_runs_beside_them_buys_time() -> None:
    orphans = Orphans(POLICY)
    orphans.left()
    orphans.tick(2, 1, 0.0)
    assert orphans.tick(2, 1, 2 * POLICY.seconds) is None
    assert orphans.tick(2, 0, 2 * POLICY.seconds) is not None
    assert orphans.tick(2, 1, POLICY.seconds_beside_others + 1) is not None


def test_the_time_begins_anew_once_there_were_few() -> None:
    orphans = Orphans(POLICY)
    orphans.left()
    orphans.tick(1, 0, 0.0)
    orphans.seen(0, 0)
    orphans.tick(1, 0, 20.0)
    orphans.left()
    orphans.tick(1, 0, 25.0)
    assert orphans.tick(1, 0, POLICY.seconds + 1) is None
