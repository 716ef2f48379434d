"""Our own commands as real processes, started as a user starts them, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.fakes.agent_gate import KEY

WAIT_SECONDS = 60.0
"""For a real engine to load its small model on a busy machine."""

SHARED_KEY = {"BALANCER_CLUSTER_KEY": KEY, "WORKER_AGENT_CLUSTER_KEY": KEY}
"""Variables of balancers and agents that are to know each other; fakes hold the same key."""


@dataclass
class Command:
    """A running command of ours, and all the processes that were ever seen below it."""

    process: asyncio.subprocess.Process
    output: Path
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def look(self) -> list[psutil.Process]:
        """Notes which processes it has now, itself first; they are remembered for `survivors`."""
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            for process in (top, *top.children(recursive=True)):
                self.seen.setdefault(process.pid, process)
        return self.survivors()

    def survivors(self) -> list[psutil.Process]:
        """Those that still run; a zombie that nobody has waited for does not."""
        alive = []
        for process in self.seen.values():
            with suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    def engine(self) -> psutil.Process:
        """The engine's own process: the last of the chain, which holds the model."""
        found = [
            process
            for process in self.look()
            if "guard.py" not in " ".join(process.cmdline()) and "runner" in " ".join(process.cmdline())
        ]
        return found[-1]

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    async def until_nothing_is_left(self, within: float = 15.0) -> None:
        """TimeoutError names what still runs."""
        try:
            async with asyncio.timeout(within):
                while self.survivors():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"still running: {[p.cmdline() for p in self.survivors()]}") from None

    async def until_it_says(self, text: str, within: float = WAIT_SECONDS) -> None:
        try:
            async with asyncio.timeout(within):
                while text not in self.text():
                    if self.process.returncode is not None:
                        raise AssertionError(f"it ended with {self.process.returncode}:\n{self.text()}")
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"it does not say {text!r}:\n{self.text()}") from None

    async def ended(self, within: float = 30.0) -> int:
        async with asyncio.timeout(within):
            return await self.process.wait()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def command(
    *words: str, output: Path, home: Path, within: Sequence[str] = (), **variables: str
) -> AsyncIterator[Command]:
    """`python -m ...` in an environment that holds nothing of the developer's; killed on leaving.

    `within`: a command that becomes ours without a process of its own, like `ip netns exec NAME`.
    """
    measuring = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"} | measuring | variables
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *within,
            sys.executable,
            "-m",
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    running = Command(process, output)
    try:
        yield running
    finally:
        for left in reversed(running.look()):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        await process.wait()
