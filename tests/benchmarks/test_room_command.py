"""The command on real engines, what is left of its processes, and how rows come from what was seen."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter

import orjson
import psutil
import pytest

from benchmarks import room
from benchmarks.rooms import batch, engines

KEYS = {
    *("policy", "round", "makespan_s", "makespan_over_round_robin"),
    *("prompt_tokens", "cached_tokens", "cached_share", "cpu_s", "requests", "failed"),
    *("requests_large", "requests_small", "requests_middle"),
    *("chats", "chats_failed", "ttft_p50_s", "ttft_p99_s"),
}
WAIT_SECONDS = 120.0


@pytest.mark.real_engine
@pytest.mark.timeout(300)
def test_a_tiny_run_writes_the_rows_that_it_prints(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.room", "--quick", "--papers", "1", "--chat"]
    command += ["--policy", "round_robin", "weighted_random", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = orjson.loads(path.read_bytes())["rows"]
    assert [row["policy"] for row in rows] == ["round_robin", "weighted_random"]
    for row in rows:
        assert set(row) == KEYS
        assert (row["requests"], row["failed"]) == (5, 0)
        assert row["requests_large"] + row["requests_small"] == 5
        assert 0 < row["cached_tokens"] < row["prompt_tokens"]  # two engines, five questions on one paper
        assert row["cpu_s"] > 0
        assert row["chats"] >= 1
        assert row["ttft_p99_s"] >= row["ttft_p50_s"] > 0
        assert any(row["policy"] in line for line in done.stdout.splitlines())
    assert rows[0]["makespan_over_round_robin"] == 1.0
    assert rows[1]["makespan_over_round_robin"] == rows[1]["makespan_s"] / rows[0]["makespan_s"]


@pytest.mark.real_engine
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_nothing_is_left_running_when_it_is_interrupted(tmp_path, number):
    path = tmp_path / "rows.json"
    command = (sys.executable, "-m", "benchmarks.room", "--quick", "--json", str(path))
    process = await asyncio.create_subprocess_exec(
        *command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=asyncio.subprocess.PIPE
    )
    family = psutil.Process(process.pid)
    async with asyncio.timeout(WAIT_SECONDS):
        # Both agents with their engines, which a guard runs, and the balancer.
        while not all(_has(family, words) for words in ("llama_cpp_runner", "serve")):
            await asyncio.sleep(0.05)
        left = family.children(recursive=True)
        process.send_signal(number)
        _, said = await process.communicate()
        while any(_runs(one) for one in left):
            await asyncio.sleep(0.05)
    assert process.returncode == 1
    assert b"interrupted" in said
    assert not path.exists()
    assert not list(tmp_path.glob("room-*"))


@pytest.mark.real_engine
@pytest.mark.timeout(300)
async def test_a_policy_that_the_balancer_does_not_know_ends_it_with_the_balancers_words(tmp_path):
    with pytest.raises(SystemExit, match="no_such_policy"):
        async with engines.room(engines.agents(2), "no_such_policy", tmp_path):
            raise AssertionError("the room opened")


def _has(family: psutil.Process, word: str) -> bool:
    for process in family.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word in part for part in process.cmdline()):
                return True
    return False


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_papers_begin_differently_in_every_round():
    texts = [text for shift in (0, 137) for text in batch.papers(12, 3600, shift)]
    assert len({text[:100] for text in texts}) == 24
    assert {len(text) for text in texts} == {int(3600 * share) for share in batch.LENGTHS}


@pytest.mark.parametrize(
    ("answer", "cached"),
    [
        ({"usage": {"prompt_tokens_details": {"cached_tokens": 7}}, "timings": {"cache_n": 5}}, 7),
        ({"usage": {"prompt_tokens_details": {"cached_tokens": 0}}, "timings": {"cache_n": 5}}, 0),
        ({"usage": {"prompt_tokens_details": None}, "timings": {"cache_n": 5}}, 5),
        ({"usage": {}}, None),
    ],
)
def test_cached_tokens_are_the_engines_own_word(answer, cached):
    assert batch.cached_tokens(answer) == cached


def test_a_batch_is_compared_with_round_robins_of_its_round_unless_answers_were_lost():
    outcomes = [
        ("round_robin", 1, batch.Outcome(seconds=10.0, prompt_tokens=100, by_worker=Counter(large=5))),
        ("fast", 1, batch.Outcome(seconds=5.0, prompt_tokens=100, by_worker=Counter(small=5))),
        (
            "lossy",
            1,
            batch.Outcome(
                seconds=1.0, prompt_tokens=20, by_worker=Counter(small=1), failures=["status 503: no"]
            ),
        ),
        ("fast", 2, batch.Outcome(seconds=5.0, prompt_tokens=100, by_worker=Counter(small=5))),
        ("round_robin", 2, batch.Outcome(seconds=4.0, prompt_tokens=100, by_worker=Counter(large=5))),
    ]
    rows = room.compared([room.row(policy, number, told, 1.0, False) for policy, number, told in outcomes])
    assert [row["makespan_over_round_robin"] for row in rows] == [1.0, 0.5, None, 1.25, 1.0]
    assert [row["failed"] for row in rows] == [0, 0, 1, 0, 0]


def test_no_policy_is_always_first():
    assert [room.order(("a", "b", "c"), number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert room.order(("a", "b", "c"), 1) == ["b", "c", "a"]


def test_the_median_of_the_rounds_leaves_out_those_without_a_figure():
    rows = [
        {"policy": "p", "round": number, "makespan_s": seconds, "cached_share": share}
        for number, seconds, share in ((1, 4.0, None), (2, 2.0, 0.5), (3, 3.0, 0.25))
    ]
    assert room.medians(rows) == [
        {"policy": "p", "round": "median", "makespan_s": 3.0, "cached_share": 0.375}
    ]


@pytest.mark.parametrize("count", [2, 3])
def test_agents_differ_and_each_has_a_core_that_is_there(count):
    agents = engines.agents(count)
    assert len({agent.slots for agent in agents}) == count
    assert all(agent.threads == max(len(agent.cores), 1) for agent in agents)
    if sys.platform == "linux":
        assert {core for agent in agents for core in agent.cores} <= os.sched_getaffinity(0)
