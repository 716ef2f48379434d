"""The guard and the process behind it, with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.scenes import alive, until, wait_until
from worker_agent.process import Lines, allowed_environment, running

IGNORES_TERM = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(os.getpid(), child.pid, flush=True)
while True: signal.pause()
"""
ENVIRONMENT = {"PATH": os.environ["PATH"]}


async def test_the_exit_code_and_the_last_words_are_kept() -> None:
    lines: list[str] = []
    script = "import sys; print('loading'); print('no such model', file=sys.stderr); sys.exit(7)"
    async with running([sys.executable, "-c", script], ENVIRONMENT, lines.append) as process:
        assert await process.wait() == 7
    assert sorted(lines) == ["loading", "no such model"]
    assert sorted(process.tail) == sorted(lines)


async def test_an_engine_ended_by_a_signal_says_so_as_a_shell_does() -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    async with running([sys.executable, "-c", script], ENVIRONMENT, lambda _line: None) as process:
        assert await process.wait() == 128 + signal.SIGKILL


async def test_a_program_that_does_not_exist_ends_with_127_and_a_reason() -> None:
    async with running(["/no/such/engine"], ENVIRONMENT, lambda _line: None) as process:
        assert await process.wait() == 127
    assert process.tail[-1] == "cannot start /no/such/engine: No such file or directory"


async def test_terminate_lets_an_engine_end_by_itself() -> None:
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('up', flush=True)\nwhile True: signal.pause()"
    )
    up = asyncio.Event()
    async with running([sys.executable, "-c", script], ENVIRONMENT, lambda _line: up.set()) as process:
        reading = asyncio.ensure_future(process.wait())
        await asyncio.wait_for(up.wait(), 10)
        process.terminate()
        assert await asyncio.wait_for(reading, 10) == 5


async def _stubborn(lines: list[str]) -> tuple[int, int]:
    await until(lambda: lines)
    engine, child = map(int, lines[0].split())
    return engine, child


async def test_kill_takes_an_engine_that_ignores_sigterm_and_its_children() -> None:
    lines: list[str] = []
    async with running([sys.executable, "-c", IGNORES_TERM], ENVIRONMENT, lines.append) as process:
        reading = asyncio.ensure_future(process.wait())
        engine, child = await _stubborn(lines)
        process.kill()
        assert await asyncio.wait_for(reading, 10) == 128 + signal.SIGKILL
    await until(lambda: not alive(engine) and not alive(child))


async def test_leaving_the_block_by_cancellation_leaves_nothing_running() -> None:
    lines: list[str] = []

    async def live() -> None:
        async with running([sys.executable, "-c", IGNORES_TERM], ENVIRONMENT, lines.append) as process:
            await process.wait()

    task = asyncio.ensure_future(live())
    engine, child = await _stubborn(lines)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not alive(engine) and not alive(child))


AGENT_STAND_IN = f"""
import asyncio, sys
from worker_agent.process import running
engine = [sys.executable, "-c", {IGNORES_TERM!r}]
async def main():
    async with running(engine, {{}}, lambda line: print(line, flush=True)) as p:
        print("guard", p.pid, flush=True)
        await p.wait()
asyncio.run(main())
"""


@pytest.fixture
def stand_in() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", AGENT_STAND_IN], stdout=subprocess.PIPE, text=True)


def _pids(agent: subprocess.Popen[str]) -> tuple[int, int, int]:
    assert agent.stdout is not None
    guard = int(agent.stdout.readline().split()[1])
    engine, child = map(int, agent.stdout.readline().split())
    agent.stdout.close()
    return guard, engine, child


def test_an_agent_that_is_killed_takes_even_a_stubborn_engine_along(stand_in: subprocess.Popen[str]) -> None:
    guard, engine, child = _pids(stand_in)
    assert alive(engine)
    stand_in.kill()
    stand_in.wait()
    wait_until(lambda: not any(map(alive, (guard, engine, child))), seconds=10)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_guard_that_is_killed_takes_the_engine_along(stand_in: subprocess.Popen[str]) -> None:
    guard, engine, child = _pids(stand_in)
    os.kill(guard, signal.SIGKILL)
    wait_until(lambda: not alive(engine), seconds=10)
    stand_in.wait(10)
    os.kill(child, signal.SIGKILL)  # an engine's own children are beyond a guard that is gone


def test_no_secret_of_ours_reaches_an_engine() -> None:
    ours = {
        "PATH": "/bin",
        "HF_HOME": "/hf",
        "CUDA_VISIBLE_DEVICES": "0",
        "LD_LIBRARY_PATH": "/lib",
        "AWS_SECRET_ACCESS_KEY": "canary",
        "HF_TOKEN": "canary",
        "VLLM_API_KEY": "canary",
        "WORKER_AGENT_CLUSTER_KEY": "canary",
        "OPENAI_API_KEY": "canary",
        "WORKER_AGENT_MODEL": "canary",
        "MY_PATH": "canary",
        "SSH_AUTH_SOCK": "canary",
    }
    assert allowed_environment(ours) == {name: value for name, value in ours.items() if value != "canary"}
    fetching = allowed_environment(ours, fetches=True)
    assert [name for name, value in fetching.items() if value == "canary"] == ["HF_TOKEN"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=20)), st.data())
def test_how_output_is_cut_changes_no_line(texts: list[str], data: st.DataObject) -> None:
    output = "".join(text + "\n" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=8)))
    whole, pieces = Lines(), Lines()
    expected = whole.feed(output)
    parts = [output[a:b] for a, b in zip([0, *cuts], [*cuts, len(output)], strict=True)]
    assert [line for part in parts for line in pieces.feed(part)] == expected


@given(st.binary(max_size=5000))
def test_lines_are_printable_and_bounded_whatever_an_engine_writes(output: bytes) -> None:
    lines = Lines().feed(output + b"\n")
    assert all(line.isprintable() and 0 < len(line) <= 300 for line in lines)


def test_the_guard_needs_nothing_but_the_standard_library() -> None:
    source = Path(__file__).parents[2].joinpath("worker_agent", "guard.py").read_text()
    imported = {
        line.split()[1].partition(".")[0]
        for line in source.splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imported <= {*sys.stdlib_module_names}


async def test_a_guard_that_somebody_has_stopped_obeys_a_kill_all_the_same() -> None:
    lines: list[str] = []
    async with running([sys.executable, "-c", IGNORES_TERM], ENVIRONMENT, lines.append) as process:
        reading = asyncio.ensure_future(process.wait())
        await until(lambda: lines)
        engine = int(lines[0].split()[0])
        os.kill(process.pid, signal.SIGSTOP)
        process.kill()
        assert await asyncio.wait_for(reading, 10) == 128 + signal.SIGKILL
        assert not alive(engine)
