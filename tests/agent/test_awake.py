"""The machine is held awake while it serves: the decisions, and real children of ours."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.scenes import alive, pids, until, wait_until
from worker_agent.awake import Awake, AwakePolicy, Vigil, ways

POLICY = AwakePolicy(linger_seconds=60, again_seconds=600)
PATIENT = AwakePolicy(linger_seconds=3600)
HASTY = AwakePolicy(linger_seconds=0.05, again_seconds=3600)


# What keeps a system awake ...


def test_a_mac_is_kept_awake_by_caffeinate_that_ends_with_us() -> None:
    assert ways("Darwin", lambda name: f"/usr/bin/{name}", 42) == (("/usr/bin/caffeinate", "-i", "-w", "42"),)


def test_linux_is_asked_for_sleep_and_idleness_and_then_for_what_anybody_gets() -> None:
    found = ways("Linux", lambda name: f"/bin/{name}", 42)
    assert [command[1] for command in found] == ["--what=sleep:idle", "--what=idle"]
    assert {command[0] for command in found} == {"/bin/systemd-inhibit"}
    assert {command[-3:] for command in found} == {("--mode=block", "sleep", "infinity")}


@pytest.mark.parametrize("system", ["Linux", "Darwin", "FreeBSD"])
def test_where_there_is_neither_nothing_is_done(system: str) -> None:
    assert ways(system, lambda _name: None, 42) == ()


# ... and when.


def test_it_is_held_while_busy_and_for_a_while_longer() -> None:
    vigil = Vigil(1, POLICY)
    assert not vigil.holds(0)
    vigil.set(True, 0)
    assert vigil.holds(10_000)
    vigil.set(False, 10_000)
    assert vigil.holds(10_059)
    assert vigil.next_look(10_059) == 1
    assert not vigil.holds(10_060)


def test_the_while_begins_at_the_last_end_and_not_at_each_word_of_idleness() -> None:
    vigil = Vigil(1, POLICY)
    vigil.set(True, 0)
    vigil.set(False, 0)
    vigil.set(False, 59)
    assert not vigil.holds(60)


def test_an_agent_that_was_never_busy_never_holds() -> None:
    vigil = Vigil(1, POLICY)
    vigil.set(False, 0)
    assert not vigil.holds(1)
    assert vigil.next_look(1) is None


def test_a_way_that_is_refused_is_followed_by_the_next_and_the_last_by_a_rest() -> None:
    vigil = Vigil(2, POLICY)
    vigil.set(True, 0)
    assert not vigil.refused(0)
    assert (vigil.way, vigil.holds(0)) == (1, True)
    assert vigil.refused(1)
    assert not vigil.holds(2)
    assert vigil.next_look(2) == 599
    assert (vigil.way, vigil.holds(601)) == (0, True)


@given(st.lists(st.tuples(st.sampled_from(["busy", "idle", "refused"]), st.floats(0, 700)), max_size=30))
def test_a_machine_that_is_idle_for_long_may_always_sleep(history: list[tuple[str, float]]) -> None:
    vigil, now = Vigil(2, POLICY), 0.0
    for what, passed in history:
        now += passed
        if what == "refused":
            vigil.refused(now)
        else:
            vigil.set(what == "busy", now)
    vigil.set(False, now)
    assert not vigil.holds(now + POLICY.linger_seconds + 0.001)


# With real children.

INHIBITS = """#!/bin/sh
echo $$ >> "{starts}"
echo "$@" >> "{words}"
exec sleep 1000
"""
REFUSES = """#!/bin/sh
echo $$ >> "{starts}"
echo "$@" >> "{words}"
echo "Failed to inhibit: Access denied" >&2
exit 1
"""


@pytest.fixture
def program() -> str:
    return "caffeinate" if sys.platform == "darwin" else "systemd-inhibit"


def put(folder: Path, program: str, script: str) -> dict[str, str]:
    """A program on PATH that notes its starts; the environment in which it is found."""
    path = folder / "bin" / program
    path.parent.mkdir(exist_ok=True)
    path.write_text(script.format(starts=folder / "starts", words=folder / "words"))
    path.chmod(0o755)
    return {"PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}"}


async def test_a_child_runs_while_requests_do_and_is_gone_afterwards(tmp_path: Path, program: str) -> None:
    awake = Awake(HASTY, environment=put(tmp_path, program, INHIBITS))
    starts = tmp_path / "starts"
    async with awake.running():
        awake.set(True)
        await until(lambda: pids(starts))
        awake.set(False)
        await until(lambda: not alive(pids(starts)[0]))
        awake.set(True)
        await until(lambda: len(pids(starts)) == 2)
        assert alive(pids(starts)[1])
    assert not alive(pids(starts)[1])


async def test_short_pauses_between_requests_do_not_start_it_anew(tmp_path: Path, program: str) -> None:
    awake = Awake(PATIENT, environment=put(tmp_path, program, INHIBITS))
    starts = tmp_path / "starts"
    async with awake.running():
        awake.set(True)
        await until(lambda: pids(starts))
        for _ in range(50):
            awake.set(False)
            await asyncio.sleep(0)
            awake.set(True)
            await asyncio.sleep(0)
        awake.set(False)
        assert alive(pids(starts)[0])
    assert len(pids(starts)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has one way only")
async def test_an_agent_that_may_not_hold_off_sleep_holds_off_idleness(tmp_path: Path) -> None:
    script = 'case "$*" in *sleep:idle*) echo denied >&2; exit 1;; esac\n'
    environment = put(tmp_path, "systemd-inhibit", INHIBITS.replace("echo $$", script + "echo $$"))
    awake = Awake(PATIENT, environment=environment)
    async with awake.running():
        awake.set(True)
        await until(lambda: pids(tmp_path / "starts"))
        assert "--what=idle" in (tmp_path / "words").read_text()


async def test_a_refusal_is_told_once_and_hurts_nobody(
    tmp_path: Path, program: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worker_agent.awake")
    awake = Awake(HASTY, environment=put(tmp_path, program, REFUSES))
    tries = 1 if program == "caffeinate" else 2
    async with awake.running():
        awake.set(True)
        await until(lambda: caplog.messages)
        assert len(pids(tmp_path / "starts")) == tries
    assert caplog.messages == [
        "this machine may fall asleep while it serves: Failed to inhibit: Access denied"
    ]


async def test_a_program_that_vanished_is_no_fault_of_the_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worker_agent.awake")
    awake = Awake(HASTY, commands=[(str(tmp_path / "gone"),)])
    async with awake.running():
        awake.set(True)
        await until(lambda: caplog.messages)
    assert "No such file or directory" in caplog.text


async def test_where_nothing_can_nothing_happens() -> None:
    awake = Awake(HASTY, commands=[])
    async with awake.running():
        awake.set(True)
        awake.set(False)


AGENT_STAND_IN = """
import asyncio
from worker_agent.awake import Awake
async def main():
    awake = Awake()
    async with awake.running():
        awake.set(True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def test_an_agent_that_is_killed_leaves_no_machine_that_never_sleeps(tmp_path: Path, program: str) -> None:
    environment = {**os.environ, **put(tmp_path, program, INHIBITS)}
    agent = subprocess.Popen([sys.executable, "-c", AGENT_STAND_IN], env=environment)
    try:
        wait_until(lambda: pids(tmp_path / "starts"))
        holder = pids(tmp_path / "starts")[0]
        assert alive(holder)
    finally:
        agent.kill()
        agent.wait()
    wait_until(lambda: not alive(holder))
