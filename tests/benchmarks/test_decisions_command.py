"""The command, and the crowded room that it watches: its tickets add up, and it stays as full as it says."""

import subprocess
import sys
from random import Random

import orjson
import pytest

from balancer.core.model import Arrived, Began, Ended, Reported, ServiceClass, Tick
from balancer.core.placement import POLICIES, PlacementPolicy
from benchmarks import decisions
from benchmarks.rooms.asks import PAPER_BLOCKS, PROMPTS_PER_PAPER, Chats, Papers
from benchmarks.rooms.crowded import MACHINES, Crowd
from benchmarks.tables import shown

KEYS = {
    *("kind", "workers", "waiting", "events", "settled_seconds"),
    *("mean_us", "p50_us", "p99_us", "max_us", "growth"),
    *("arrived_us", "began_us", "ended_us", "reported_us", "tick_us"),
    *("grants", "refusals", "busy_share", "waiting_seen"),
}
ROOM_SLOTS = 2 * sum(machine.slots for machine in MACHINES)


def test_a_run_writes_the_rows_that_it_prints(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.decisions", "--quick", "--kind", "interactive", "batch"]
    command += ["--workers", "4", "8", "--waiting", "0", "20", "--events", "300", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    content = orjson.loads(path.read_bytes())
    rows = content["rows"]
    rooms = [(workers, waiting) for workers in (4, 8) for waiting in (0, 20)]
    assert [(row["kind"], row["workers"], row["waiting"]) for row in rows] == [
        (kind, *room) for kind in ("interactive", "batch") for room in rooms
    ]
    assert all(set(row) == KEYS for row in rows)
    assert all(row["events"] >= 300 for row in rows)
    assert [row["growth"] for row in rows if (row["workers"], row["waiting"]) == (4, 0)] == [1.0, 1.0]
    lines = [line.strip("│").split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [line[4].strip() for line in lines] == [shown(row["mean_us"], 1) for row in rows]
    assert content["about"]["policy"] == decisions.DispatchPolicy().placement.name
    assert {"python", "cpu"} <= set(content["about"])
    assert f"python: {content['about']['python']}" in done.stdout


def test_a_room_that_cannot_be_is_refused_with_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit):
        decisions.main(["--workers", "0", "--json", str(tmp_path / "rows.json")])
    assert "expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", decisions.KINDS)
def test_the_room_stays_as_crowded_as_it_was_made(policy, kind):
    """Nobody is lost or counted twice: `run` raises where dispatcher and scene disagree."""
    crowd = Crowd(PlacementPolicy(name=policy), kind, workers=8, waiting=40, seed=1)
    watch = crowd.run(events=3000, virtual_seconds=60.0, real_seconds=60.0)
    assert set(watch.spent_ns) == {Arrived, Began, Ended, Reported, Tick}
    asked = [
        share * ROOM_SLOTS + waiting for share, waiting in zip(watch.busy_shares, watch.waiting, strict=True)
    ]
    # A whole paper is missing before the next one comes; some come back a moment later.
    assert all(abs(many - ROOM_SLOTS - 40) <= 2 * PROMPTS_PER_PAPER for many in asked), asked
    assert watch.grants > 0
    assert watch.refusals == 0


def test_a_policy_that_fills_every_slot_has_a_full_room():
    crowd = Crowd(PlacementPolicy(name="round_robin"), "interactive", workers=8, waiting=40, seed=1)
    watch = crowd.run(events=1000, virtual_seconds=60.0, real_seconds=60.0)
    assert min(watch.busy_shares) == 1.0


def test_prompts_of_a_paper_share_its_blocks_and_no_others():
    papers = Papers(Random(1))
    asks = [papers.next(0.0).ask() for _ in range(2 * PROMPTS_PER_PAPER)]
    assert {len(ask.prompt.blocks) for ask in asks} == {PAPER_BLOCKS}
    assert len({ask.prompt.blocks for ask in asks[:PROMPTS_PER_PAPER]}) == 1
    assert not set(asks[0].prompt.blocks) & set(asks[-1].prompt.blocks)
    assert {ask.service_class for ask in asks} == {ServiceClass.BATCH}
    assert all(ask.replayable for ask in asks)


def test_a_turn_continues_the_one_before_and_begins_with_its_blocks():
    chats = Chats(Random(1))
    first = chats.next(0.0)
    chats.answered(first, 0.0)
    later = chats.next(1000.0)
    assert later.prompt.continues == first.prompt.conversation
    assert later.prompt.blocks[: len(first.prompt.blocks)] == first.prompt.blocks
    assert later.prompt.chars > first.prompt.chars
    assert not later.ask().replayable
