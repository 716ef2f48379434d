"""Real engines. Those that are too large to be dependencies of this project have environments of their own:
they are left out unless asked for by mark (`-m vllm`), and skipped, with the reason, where there is none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from agent.conftest import RunningAgent
from agent.meeting import meet_process

from tests.e2e.conftest import open_room
from tests.fakes.agent_gate import KEY

__all__ = ["open_room"]

CHECKOUT = Path(__file__).parents[2]
ASKED_FOR = frozenset({"vllm", "mlx", "llama_server", "llama_cpp_python"})
"""Marks of engines from environments of their own."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Minutes of starting, gigabytes of memory: only for those who name a mark."""
    if config.option.markexpr:
        return
    left_out = [item for item in items if any(mark.name in ASKED_FOR for mark in item.iter_markers())]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def environment(**more: str) -> dict[str, str]:
    """Ours, for a Python of another environment: this checkout is importable there, no hub is asked."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_AGENT_")}
    shared = {"HF_HUB_OFFLINE": "1", "WORKER_AGENT_CLUSTER_KEY": KEY}
    return {**ours, "PYTHONPATH": str(CHECKOUT), **shared, **more}


def start_agent(
    python: Path,
    engine: str,
    model: Path | None,
    data_dir: Path,
    variables: Mapping[str, str],
    more: Sequence[str],
) -> RunningAgent:
    """`worker-agent run` by the Python that has the engine, as a user's environment has both; it is met."""
    command = [
        *(str(python), "-m", "worker_agent", "run", "--engine", engine),
        *(() if model is None else ("--model", str(model))),
        *("--host", "127.0.0.1", "--port", "0", "--no-mdns", "--data-dir", str(data_dir)),
        *("--log-level", "debug", *more),
    ]
    agent = RunningAgent(
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(**variables)
        )
    )
    meet_process(agent.port, KEY)
    return agent


def engines_of(agent: RunningAgent) -> list[psutil.Process]:
    """The first process of each engine, which is the leader of its group: agent, guard, engine.

    What keeps the machine awake has a guard, too, and listens nowhere.
    """
    found = []
    for guard in psutil.Process(agent.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            found += [process for process in guard.children() if "--port" in process.cmdline()]
    return found


def engine_of(agent: RunningAgent) -> psutil.Process:
    """The first process of the only one."""
    [engine] = engines_of(agent)
    return engine
