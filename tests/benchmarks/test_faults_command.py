"""The fault benchmark counts what clients were told, against text that it knows."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from benchmarks import faults
from benchmarks.asking import Answer, ask, chat
from benchmarks.faults import Count, Effort, Promise, Scene, Shape
from benchmarks.history import Outcome
from benchmarks.real_faults import common, row, seam_of
from benchmarks.serving import session
from tests.fakes.engine import FakeEngine, Fault, reference_text

REFERENCE = "amber birch cedar"


def answer(text: str, outcome: Outcome) -> Answer:
    return Answer(sent=0.0, status=200, pieces=[(1.0, text)], outcome=outcome)


@pytest.mark.parametrize(
    ("text", "outcome", "promise", "counted"),
    [
        (REFERENCE, Outcome.SUCCESS, Promise.CONTINUED, "continued"),
        ("amber birch", Outcome.SUCCESS, Promise.CONTINUED, "lost"),
        ("amber birch birch", Outcome.ERROR, Promise.TOLD, "lost"),
        ("amber birch", Outcome.ERROR, Promise.CONTINUED, "failed"),
        ("amber birch", Outcome.BROKEN, Promise.TOLD, "failed"),
        ("amber birch", Outcome.ERROR, Promise.TOLD, "told"),
    ],
)
def test_a_case_counts_by_what_its_client_was_told(text, outcome, promise, counted):
    count = Count()
    count.judge(answer(text, outcome), REFERENCE, promise, had_begun=True)
    figures = {name: getattr(count, name) for name in ("failed", "lost", "told", "continued")}
    assert figures == dict.fromkeys(figures, 0) | {counted: 1}


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault(), Outcome.SUCCESS),
        (Fault.no_end(), Outcome.BROKEN),
        (Fault.close(at_token=3), Outcome.BROKEN),
        (Fault.error_event(at_token=3, then_done=True), Outcome.ERROR),
        (Fault.status(500), Outcome.ERROR),
    ],
)
async def test_the_client_takes_only_the_end_mark_for_success(fault, outcome):
    async with FakeEngine(tokens=8) as engine, session() as http:
        engine.script(fault)
        told = await ask(http, engine.url, chat("fake", "hello", stream=True))
        assert told.outcome is outcome
        assert reference_text([{"role": "user", "content": "hello"}], 8).startswith(told.text)


async def test_each_case_fails_on_its_first_worker_and_is_counted(tmp_path):
    fault = Fault.close()
    scene = Scene(name="closed", shape=Shape.WHOLE, promise=Promise.ANSWERED, fault=fault)
    count = await faults.scripted(scene, 3, tmp_path)
    assert (count.tried, count.failed, count.lost, count.sound_failed) == (3, 0, 0, 0)
    assert len(count.detection) == 3


def test_a_broken_promise_is_an_exit_status(tmp_path, monkeypatch):
    async def measured(*_):
        return [Count(tried=2, lost=1).row(faults.SCENES[0])]

    monkeypatch.setattr(faults, "measure", measured)
    with pytest.raises(SystemExit) as ended:
        faults.main(["--json", str(tmp_path / "rows.json")])
    assert ended.value.code == 1
    assert orjson.loads((tmp_path / "rows.json").read_bytes())["rows"][0]["lost"] == 1


def test_rows_that_take_seconds_have_fewer_cases_unless_told():
    slow = next(scene for scene in faults.SCENES if scene.slow)
    quick = next(scene for scene in faults.SCENES if not scene.slow)
    assert Effort().cases(slow) < Effort().cases(quick)
    assert Effort(7, 7, 7).cases(slow) == 7


def test_no_two_scenes_have_one_name():
    names = [scene.name for scene in faults.SCENES]
    assert len(names) == len(set(names))


def test_the_seam_is_the_longest_pause_after_the_kill():
    pieces = [(0.0, "amber"), (5.0, " birch"), (5.1, " cedar"), (7.0, " delta"), (7.1, " ember")]
    told = Answer(sent=0.0, pieces=pieces, outcome=Outcome.SUCCESS)
    seam = seam_of(told, killed_at=5.05)
    assert seam is not None
    assert (seam.chars, seam.gap_seconds) == (len("amber birch cedar"), pytest.approx(1.9))


@pytest.mark.parametrize(
    ("text", "exact", "clean"),
    [
        ("amber birch cedar delta ember fjord", 1, 1),
        ("amber birch cedar delta ember other", 0, 1),
        ("amber birch birch cedar delta ember", 0, 0),
        ("amber birch delta ember fjord", 0, 0),
        ("amber other cedar delta ember fjord", None, None),
    ],
)
def test_exact_text_and_a_clean_seam_are_told_apart(text, exact, clean):
    at = len("amber birch")
    told = Answer(sent=0.0, pieces=[(0.0, text[:at]), (5.0, text[at:])], outcome=Outcome.SUCCESS)
    figures = row("case", told, "amber birch cedar delta ember fjord", killed_at=1.0, attempts=2)
    assert (figures["exact"], figures["clean"]) == (exact, clean)


def test_a_kill_that_hit_nothing_is_no_case():
    told = Answer(sent=0.0, pieces=[(0.0, "amber")], outcome=Outcome.SUCCESS)
    assert row("case", told, "amber", killed_at=1.0, attempts=1)["exact"] is None


def test_text_in_common_ends_where_they_differ():
    assert common("amber", "amble") == 3
    assert common("amber", "amber birch") == 5


async def test_an_answer_can_be_looked_at_while_it_comes():
    async with FakeEngine(tokens=8) as engine, session() as http:
        engine.script(Fault.stall(at_token=3))
        so_far = Answer(sent=0.0)
        body = chat("fake", "hello", stream=True)
        asking = asyncio.ensure_future(ask(http, engine.url, body, into=so_far))
        await engine.stalled()
        async with asyncio.timeout(10):
            while len(so_far.pieces) < 3:
                await asyncio.sleep(0)
        engine.resume()
        assert (await asking) is so_far
        assert so_far.outcome is Outcome.SUCCESS
