"""Keeps this machine from sleeping while it serves, and no longer.

A child does it, by the system's own means: `caffeinate` on a Mac, `systemd-inhibit` on Linux. It stands
behind the guard as engines do, so that not even a SIGKILL of the agent leaves a machine that never sleeps
again. A lid that is closed, and a person who says "sleep now" to a Mac, are obeyed: only sleep from idleness
is held off. When to hold is decided by `Vigil`, which is pure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from worker_agent.process import Process, running

_LOG = logging.getLogger(__name__)
_ENVIRONMENT = ("PATH", "DBUS_SYSTEM_BUS_ADDRESS", "LANG")

Command: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AwakePolicy:
    """When to let go, in seconds."""

    linger_seconds: float = 60.0
    """From the last request's end: the next one is often on its way, and a machine that falls asleep between
    two costs both of them."""
    again_seconds: float = 600.0
    """Where the system refused, it is asked again after so long."""


def ways(system: str, found: Callable[[str], str | None], pid: int) -> tuple[Command, ...]:
    """The commands that keep this system awake for as long as they run, the best first; none: nothing can.

    `system` as `platform.system` says it, `found` as `shutil.which`, `pid`: with whose end they end. Pure.
    """
    if system == "Darwin" and (program := found("caffeinate")):
        return ((program, "-i", "-w", str(pid)),)
    if system == "Linux" and (program := found("systemd-inhibit")):
        # Sleep may be held off by whoever sits at the machine or is root, idleness by anybody (logind's rules
        # for polkit): a service of a user, or one who came by SSH, has the second at least.
        return tuple(
            (
                *(program, f"--what={what}", "--who=LLM worker agent", "--why=It answers requests"),
                *("--mode=block", "sleep", "infinity"),
            )
            for what in ("sleep:idle", "idle")
        )
    return ()


class Vigil:
    """Decides whether to hold the machine awake, and by which of its ways. Pure: `now` is the caller's."""

    def __init__(self, ways: int, policy: AwakePolicy) -> None:
        self._ways = ways
        self._policy = policy
        self._busy = False
        self._linger_until: float | None = None
        self._refused_until: float | None = None
        self.way = 0
        """Which to use: the first that was not refused."""

    def set(self, busy: bool, now: float) -> None:
        """Requests run, or none do any more."""
        if self._busy and not busy:
            self._linger_until = now + self._policy.linger_seconds
        self._busy = busy

    def refused(self, now: float) -> bool:
        """The present way did not work, or ended by itself. True: that was the last of them."""
        self.way += 1
        if self.way < self._ways:
            return False
        self.way = 0
        self._refused_until = now + self._policy.again_seconds
        return True

    def holds(self, now: float) -> bool:
        """Whether the machine shall be held awake at this moment."""
        if not self._ways or (self._refused_until is not None and now < self._refused_until):
            return False
        return self._busy or (self._linger_until is not None and now < self._linger_until)

    def next_look(self, now: float) -> float | None:
        """In how many seconds `holds` may change although nothing happens; None: it will not."""
        times = [
            time for time in (self._linger_until, self._refused_until) if time is not None and time > now
        ]
        return min(times) - now if times else None


class Awake:
    """Holds this machine awake while it is busy. Does nothing where nothing can."""

    def __init__(
        self,
        policy: AwakePolicy | None = None,
        *,
        commands: Sequence[Command] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`commands` in place of those that `ways` finds here, `environment` in place of ours."""
        given = os.environ if environment is None else environment
        self._environment = {name: given[name] for name in _ENVIRONMENT if name in given}
        if commands is None:
            path = given.get("PATH")
            commands = ways(platform.system(), lambda name: shutil.which(name, path=path), os.getpid())
        self._commands = tuple(commands)
        self._vigil = Vigil(len(self._commands), policy or AwakePolicy())
        self._changed = asyncio.Event()
        self._complained = False

    def set(self, busy: bool) -> None:
        """Requests run, or none do any more. Cheap: to be called at each change."""
        self._vigil.set(busy, asyncio.get_running_loop().time())
        self._changed.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block lasts, the machine is held awake when it is busy; afterwards no child is left."""
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(self._keep())
            try:
                yield
            finally:
                keeping.cancel()

    async def _keep(self) -> None:
        if not self._commands:
            _LOG.debug("nothing here keeps the machine awake")
            return
        while True:
            await self._until(holding=True)
            refused = await self._hold(self._commands[self._vigil.way])
            if refused is None:
                continue
            _LOG.debug("not held awake: %s", refused)
            if self._vigil.refused(asyncio.get_running_loop().time()) and not self._complained:
                self._complained = True
                _LOG.info("this machine may fall asleep while it serves: %s", refused)

    async def _hold(self, command: Command) -> str | None:
        """Holds until that is over: None. Where the command ends before, what it said last."""
        try:
            async with running(command, self._environment, lambda _line: None) as child:
                return await self._held_by(child, command[0])
        except OSError as error:
            return f"{command[0]} cannot be started: {error.strerror}"

    async def _held_by(self, child: Process, program: str) -> str | None:
        async with asyncio.TaskGroup() as tasks:
            ended = tasks.create_task(child.wait())
            over = tasks.create_task(self._until(holding=False))
            await asyncio.wait((ended, over), return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                child.kill()  # what it held goes with it
                return None
            over.cancel()
            return child.tail[-1] if child.tail else f"{program} ended with code {ended.result()}"

    async def _until(self, *, holding: bool) -> None:
        loop = asyncio.get_running_loop()
        while self._vigil.holds(loop.time()) is not holding:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._vigil.next_look(loop.time())):
                    await self._changed.wait()
