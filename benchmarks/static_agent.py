"""The agent's hop without an engine to run: its gateway in front of servers that are there already.

`python -m benchmarks.static_agent --engine PORT --engine PORT ...` prints a port for each as its first line,
in their order. The agents are called `agent-0`, `agent-1`, ..., and each speaks TLS with a certificate of its
own and answers only to balancers that hold `KEY`, as a real one does. They are those of several machines in
one process: what a request costs is the same, and one process is easier to weigh.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks.mock_worker import MODEL
from worker_agent import certificate
from worker_agent.certificate import Certificate
from worker_agent.changes import Changes
from worker_agent.cluster_key import ClusterKey
from worker_agent.engines.vllm import VLLM
from worker_agent.exchange import Fault
from worker_agent.gate import Gate
from worker_agent.gateway import Gateway
from worker_agent.plans import Plan
from worker_agent.readiness import Address
from worker_agent.resident import Resident
from worker_agent.server import ServerPolicy, listening
from worker_agent.supervised import Serving
from worker_agent.wire import EngineState, Report, ServedModel

SLOTS = 1024
KEY = "the-cluster-key-of-a-benchmark"


@dataclass(frozen=True, slots=True)
class StaticEngine:
    """An engine that is always ready."""

    plan: Plan
    serving: Serving | None

    def heard(self, serving: Serving) -> None:
        """It needs no proof of life."""

    def doubt(self, serving: Serving) -> None:
        """Nobody could restart it."""

    def stuck(self, serving: Serving, reason: str) -> None:
        """As little."""


class StaticModel:
    """The one model of an agent, always loaded."""

    def __init__(self, resident: Resident) -> None:
        self._resident = resident

    @property
    def names(self) -> tuple[str, ...]:
        """MODEL."""
        return (MODEL,)

    @property
    def running(self) -> int:
        """Requests held open towards the engine."""
        return self._resident.watch.open

    def knows(self, name: str) -> bool:
        """Whether it is MODEL."""
        return name == MODEL

    def plan(self, name: str) -> Plan | None:
        """What runs."""
        return self._resident.plan

    def resident(self, name: str) -> Resident | None:
        """The engine."""
        return self._resident

    @asynccontextmanager
    async def entered(self, name: str, wait_seconds: float) -> AsyncIterator[Resident]:
        """At once: a benchmark has no more clients than there are slots."""
        yield self._resident

    def drain(self) -> None:
        """Nobody waits for anything."""

    def stop_all(self, fault: Fault) -> None:
        """Ends every request."""
        self._resident.watch.stop_all(fault)

    def cut_all(self) -> None:
        """Ends every connection that has one."""
        self._resident.watch.cut_all()


def agent_id(number: int) -> str:
    """Of the agent in front of the engine with that number, from 0."""
    return f"agent-{number}"


def gateway(number: int, port: int, own: Certificate) -> tuple[Gateway, Resident]:
    """In front of the server at that port of loopback, which keeps its connections as vLLM does. `own`: with
    which it is served."""
    plan = Plan(spec=VLLM, model=MODEL, name=MODEL, slots=SLOTS, context_tokens=None, threads=1)
    serving = Serving(address=Address(port=port, secret=None), model=MODEL, context_tokens=None)
    model = ServedModel(name=MODEL)

    def report() -> Report:
        return Report(
            id=agent_id(number),
            state=EngineState.READY,
            engine=plan.spec.name,
            models=(model,),
            slots=plan.slots,
            running=one.running,
        )

    changes = Changes()
    resident = Resident(StaticEngine(plan, serving), changes)
    gate = Gate(agent_id(number), ClusterKey(KEY, None), own.fingerprint)
    one = Gateway(StaticModel(resident), report, changes, gate)
    return one, resident


async def _serve(engines: Sequence[int]) -> None:
    told_to_stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, told_to_stop.set)
    policy = ServerPolicy.for_slots(SLOTS)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gateways, ports = [], []
        for number, port in enumerate(engines):
            own = certificate.kept(folder / f"{number}.pem")
            one, resident = gateway(number, port, own)
            await stack.enter_async_context(resident.connected())
            served = listening(one.application(), "127.0.0.1", 0, policy, own.server_context())
            ports.append((await stack.enter_async_context(served)).port)
            gateways.append(one)
        print(*ports, flush=True)
        await told_to_stop.wait()
        for one in gateways:
            await one.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_agent")
    parser.add_argument("--engine", type=int, action="append", required=True, help="the port of a server")
    uvloop.run(_serve(parser.parse_args().engine))


if __name__ == "__main__":
    main()
