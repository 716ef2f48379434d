"""Engines that are too large to be dependencies of this project, each in an environment of its own.

Left out unless asked for by mark (`-m vllm`), and skipped, with what to type, where the environment is not
told.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from agent.conftest import RunningAgent

from tests.e2e.conftest import open_room

__all__ = ["open_room"]

CHECKOUT = Path(__file__).parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Minutes of starting, gigabytes of memory: only for those who name a mark."""
    if config.option.markexpr:
        return
    here = Path(__file__).parent
    left_out = [item for item in items if here in item.path.parents]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def told(variable: str, how: str) -> Path:
    """The path in this variable of the environment; skips the test, and says how, where there is none."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set. {how}")
    path = Path(value).expanduser()
    if not path.exists():
        pytest.fail(f"{variable} names {path}, which does not exist. {how}")
    return path.absolute()


def environment(**more: str) -> dict[str, str]:
    """Ours, for a Python of another environment: this checkout is importable there, no hub is asked."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_AGENT_")}
    return {**ours, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", **more}


def start_agent(
    python: Path, engine: str, model: Path, data_dir: Path, variables: dict[str, str], more: Sequence[str]
) -> RunningAgent:
    """`worker-agent run` by the Python that has the engine, as a user's environment has both."""
    command = [
        *(str(python), "-m", "worker_agent", "run", "--engine", engine, "--model", str(model)),
        *("--host", "127.0.0.1", "--port", "0", "--no-mdns", "--data-dir", str(data_dir)),
        *("--log-level", "debug", *more),
    ]
    return RunningAgent(
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(**variables)
        )
    )


def engine_of(agent: RunningAgent) -> psutil.Process:
    """The engine's first process, which is the leader of its group: agent, guard, engine."""
    [guard] = psutil.Process(agent.process.pid).children()
    [engine] = guard.children()
    return engine
