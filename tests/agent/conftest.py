"""A real agent with the real llama.cpp engine and the small real model, as a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

import psutil
import pytest

from agent.meeting import KEY, meet_process
from agent.scenes import alive, wait_until

MODEL = "smollm2-135m-instruct"
_RUNNER = "worker_agent.engines.llama_cpp_runner"
_LISTENING = re.compile(r"listening on https://127\.0\.0\.1:(\d+)$")


@dataclass
class RunningAgent:
    """`worker-agent run` and what it logs."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ports: Queue[int | None] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        port = self._ports.get(timeout=30)
        assert port is not None, "\n".join(self.log)
        self.port = port
        self.url = f"https://127.0.0.1:{port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.log.append(line.rstrip())
                if match := _LISTENING.search(line.rstrip()):
                    self._ports.put(int(match[1]))
        self._ports.put(None)

    def family(self) -> list[int]:
        """The agent, its guard, its engine."""
        ours = psutil.Process(self.process.pid)
        return [ours.pid, *(child.pid for child in ours.children(recursive=True))]

    def engine(self) -> psutil.Process:
        """The engine's own process, once there is one."""
        found: list[psutil.Process] = []

        def look() -> bool:
            children = psutil.Process(self.process.pid).children(recursive=True)
            found[:] = [child for child in children if _argv(child)[1:3] == ["-m", _RUNNER]]
            return len(found) == 1

        wait_until(look)
        return found[0]

    def engine_port(self) -> int:
        argv = _argv(self.engine())
        return int(argv[argv.index("--port") + 1])

    def engine_secret(self) -> str:
        return self.engine().environ()["LLAMA_API_KEY"]


def _argv(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def start_agent(data_dir: Path, more: Sequence[str] = (), stdin: int = subprocess.DEVNULL) -> RunningAgent:
    command = [
        *(sys.executable, "-m", "worker_agent", "run", "--host", "127.0.0.1", "--port", "0", "--no-mdns"),
        *("--engine", "llama.cpp", "--threads", "1", "--slots", "2", "--context-tokens", "2048"),
        *("--data-dir", str(data_dir), "--log-level", "debug", *more),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_AGENT_")}
    environment["WORKER_AGENT_CLUSTER_KEY"] = KEY
    agent = RunningAgent(
        subprocess.Popen(command, stdin=stdin, stderr=subprocess.PIPE, text=True, env=environment)
    )
    meet_process(agent.port)
    return agent


def end_agent(agent: RunningAgent) -> None:
    """Whatever the test left; its engine goes with it."""
    if agent.process.poll() is not None:
        return
    family = agent.family()
    agent.process.send_signal(signal.SIGTERM)
    try:
        agent.process.wait(20)
    finally:
        agent.process.kill()
        agent.process.wait()
    wait_until(lambda: not any(map(alive, family)))


@pytest.fixture(scope="session")
def shared_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """One for all tests that leave it as they found it."""
    agent = start_agent(tmp_path_factory.mktemp("agent"))
    yield agent
    end_agent(agent)


@pytest.fixture
def own_agent(tmp_path: Path) -> Iterator[RunningAgent]:
    """One for a test that will hurt it."""
    agent = start_agent(tmp_path)
    yield agent
    end_agent(agent)
