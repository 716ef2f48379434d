"""A room of real engines on this machine, on loopback: agents with the embedded llama.cpp, and a balancer.

The agents are unequal as far as this machine allows: in slots, and in the processor cores that they are
bound to. What was started is ended when the block is left, by its process id; should this process be
killed, the agents end by themselves.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson
import psutil

MODEL = "smollm2-135m-instruct"
"""The embedded one."""
CONTEXT_TOKENS = 2048
READY_SECONDS = 90.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.05
LONG_SECONDS = 3600
"""Of a request's limits: the slowest policy's answers count too."""
_KEY = "the-cluster-key-of-a-benchmark"
SHARED_KEY = {"BALANCER_CLUSTER_KEY": _KEY, "WORKER_AGENT_CLUSTER_KEY": _KEY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    name: str
    slots: int
    threads: int
    cores: tuple[int, ...]
    """That it is bound to; empty: the system does not let one choose."""

    def __str__(self) -> str:
        bound = f" on {', '.join(map(str, self.cores))}" if self.cores else ""
        return f"{self.name}, {self.slots} slots, {self.threads} threads{bound}"


NAMES_AND_SLOTS = (("large", 4), ("small", 1), ("middle", 2))


def agents(count: int) -> tuple[Agent, ...]:
    """Two or three of them. The large one has two cores where there are enough, else one of its own; where
    there are fewer cores than agents, the others share what is left."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cores) < 2:
        return tuple(
            Agent(name=name, slots=slots, threads=1, cores=()) for name, slots in NAMES_AND_SLOTS[:count]
        )
    own = 2 if len(cores) > count else 1
    rest = cores[own:]
    shares = [tuple(cores[:own]), *((rest[number % len(rest)],) for number in range(count - 1))]
    return tuple(
        Agent(name=name, slots=slots, threads=len(share), cores=share)
        for (name, slots), share in zip(NAMES_AND_SLOTS, shares, strict=False)
    )


PORTS = range(20_000, 30_000)


@dataclass(frozen=True, slots=True)
class Started:
    """A process of ours, and where its words go."""

    process: asyncio.subprocess.Process
    words: Path

    def last_words(self) -> str:
        return self.words.read_text(errors="replace")[-2000:]


@dataclass(frozen=True, slots=True)
class Room:
    """A balancer whose workers are all ready."""

    url: str
    workers: tuple[Started, ...]

    def cpu_seconds(self) -> float:
        """Spent so far by the agents and their engines."""
        return sum(map(_cpu_seconds, self.workers))


@asynccontextmanager
async def room(agents: Sequence[Agent], policy: str, folder: Path) -> AsyncIterator[Room]:
    """Fresh processes, which remember nothing of an earlier room. `folder`: empty; theirs for the time.

    Raises SystemExit with the last words of what does not get ready.
    """
    async with AsyncExitStack() as stack:
        ports = _free_ports(len(agents) + 1)
        started = [
            await stack.enter_async_context(_agent(agent, port, folder))
            for agent, port in zip(agents, ports[1:], strict=True)
        ]
        config = folder / "balancer.json"
        entries = [
            {"id": agent.name, "host": "127.0.0.1", "port": port, "type": "agent"}
            for agent, port in zip(agents, ports[1:], strict=True)
        ]
        settings = {"request_timeout": LONG_SECONDS, "max_wait": LONG_SECONDS}
        config.write_bytes(orjson.dumps({"workers": entries, "policy": policy} | settings))
        words = (
            *("balancer", "serve", "--config", str(config), "--host", "127.0.0.1"),
            *("--port", str(ports[0]), "--no-mdns", "--data-dir", str(folder / "balancer")),
        )
        balancer = await stack.enter_async_context(_started(words, folder / "balancer.log"))
        url = f"http://127.0.0.1:{ports[0]}"
        await _until_ready(url, [balancer, *started], len(agents))
        yield Room(url, tuple(started))


@asynccontextmanager
async def _agent(agent: Agent, port: int, folder: Path) -> AsyncIterator[Started]:
    words = (
        *("worker_agent", "run", "--id", agent.name, "--host", "127.0.0.1", "--port", str(port)),
        *("--no-mdns", "--exit-with-parent", "--data-dir", str(folder / agent.name)),
        *("--threads", str(agent.threads), "--slots", str(agent.slots)),
        *("--context-tokens", str(CONTEXT_TOKENS)),
    )
    async with _started(words, folder / f"{agent.name}.log") as started:
        if agent.cores and sys.platform == "linux":
            os.sched_setaffinity(started.process.pid, agent.cores)  # its engine will inherit it
        yield started


@asynccontextmanager
async def _started(words: Sequence[str], log: Path) -> AsyncIterator[Started]:
    """`python -m ...`, ended when the block is left: politely, and after STOP_SECONDS for certain."""
    with log.open("wb") as file:
        # A session of its own: Ctrl-C in the terminal is for us, who then stop it in order.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=file,
            stderr=file,
            env=os.environ | SHARED_KEY,
            start_new_session=True,
        )
    try:
        yield Started(process, log)
    finally:
        await asyncio.shield(asyncio.ensure_future(_stop(process)))


async def _stop(process: asyncio.subprocess.Process) -> None:
    family = _family(process.pid)
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
    for left in family:  # an engine whose agent had to be killed
        with suppress(psutil.NoSuchProcess):
            left.kill()


def _family(pid: int) -> list[psutil.Process]:
    """The process and all below it. psutil tells a later process with the same id apart."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    return []


def _cpu_seconds(started: Started) -> float:
    spent = 0.0
    for process in _family(started.process.pid):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent += times.user + times.system
    return spent


def _free_ports(count: int) -> list[int]:
    """Below the range from which systems take ports by themselves: an engine that was started a moment ago
    must not have been given the one that is to be the balancer's."""
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            break
    return free


async def _until_ready(url: str, started: Sequence[Started], workers: int) -> None:
    """Until the balancer knows so many workers that can generate."""
    with suppress(TimeoutError):
        async with asyncio.timeout(READY_SECONDS), aiohttp.ClientSession() as http:
            while all(one.process.returncode is None for one in started):
                with suppress(aiohttp.ClientConnectionError):
                    async with http.get(f"{url}/readyz") as response:
                        if (await response.json())["workers_ready"] == workers:
                            return
                await asyncio.sleep(POLL_SECONDS)
    ended = [one for one in started if one.process.returncode is not None]
    said = "\n".join(f"{one.words.name}:\n{one.last_words()}" for one in ended or started)
    raise SystemExit(f"the room did not get ready within {READY_SECONDS:g} s:\n{said}")
