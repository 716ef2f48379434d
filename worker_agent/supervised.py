"""One engine under supervision: performs what the table in `supervision` says, and tells it what happens.

The one owner of the engine's state. Others ask (`want`, `unwant`, `doubt`) and read what is true now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field

import aiohttp

from worker_agent import readiness
from worker_agent.engines.spec import Capacity, Launch
from worker_agent.plans import Plan
from worker_agent.process import Process, allowed_environment, running
from worker_agent.readiness import Address, NotOurs
from worker_agent.supervision import Do, Event, Life, State, SupervisionPolicy

_LOG = logging.getLogger(__name__)
_LOGGED_LINES_PER_START = 200
"""An engine's start is told in the log up to here; a crash loop must not fill a disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """An engine that is ready, as a relay needs it. For one start: the next has another port and secret."""

    address: Address
    model: str
    """What goes into the `model` field."""
    context_tokens: int | None
    capacity: Capacity = field(default_factory=Capacity)


class SupervisedEngine:
    """Starts, watches, restarts and stops one engine."""

    def __init__(
        self,
        plan: Plan,
        policy: SupervisionPolicy,
        on_change: Callable[[], None],
        before_restart: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`on_change` is called after each change of `state`; it must not raise or block. `before_restart` is
        awaited before each start but the first; it may call `unwant`, and nothing is started."""
        self.plan = plan
        self._policy = policy
        self._on_change = on_change
        self._before_restart = before_restart
        self._was_started = False
        self._life = Life()
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._process: Process | None = None
        self._ending: Do | None = None  # asked for before the process was there, or since
        self._found: Serving | None = None
        self._serving: Serving | None = None
        self._doubting = False
        self._progress = 0  # parts of answers that came, over all starts
        self._stopped = asyncio.Event()
        self._reason = ""

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._life.state

    @property
    def serving(self) -> Serving | None:
        """Where to send requests; None unless READY."""
        return self._serving

    @property
    def pid(self) -> int | None:
        """Of the process whose descendants the engine is; None: there is none."""
        return None if self._process is None else self._process.pid

    @property
    def reason(self) -> str:
        """Why it went down last, for people; empty: it has not."""
        return self._reason

    @property
    def detail(self) -> str:
        """One sentence for people: why the state is what it is. Never holds what clients wrote."""
        match self._life.state:
            case State.STARTING:
                return f"loading {self.plan.name}"
            case State.RESTING:
                return f"{self._reason}; it is started again after a rest"
            case State.FAILED:
                return (
                    f"{self._reason}, {self._policy.faults_to_fail} times in a short while: it stays down."
                    " See this machine's worker-agent log, then restart worker-agent"
                )
            case State.ENDING:
                return f"{self._reason}; it is being restarted"
            case _:
                return ""

    @contextlib.asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """It can be wanted while the block lasts; no process is left afterwards."""
        # The engine is on loopback: no proxy from the environment, no cookies, no shared connections.
        connector = aiohttp.TCPConnector(force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as self._session,
            asyncio.TaskGroup() as self._tasks,
        ):
            try:
                yield
            finally:
                self._set_alarm(None)
                for task in tuple(self._running):
                    task.cancel()

    def want(self) -> None:
        """Starts it, also out of FAILED; nothing if it is on its way. Only within `supervised`."""
        self._tell(Event.WANTED)

    def unwant(self) -> None:
        """Stops it; `stopped` tells when that is done."""
        self._tell(Event.UNWANTED)

    def hurry(self) -> None:
        """A stop that is under way: at once, please."""
        self._tell(Event.HURRIED)

    async def stopped(self) -> None:
        """Waits until it is STOPPED after an `unwant`."""
        while self._life.state is not State.STOPPED:
            await self._stopped.wait()

    def heard(self, serving: Serving) -> None:
        """A part of an answer came from it: whatever else it does, it is not deaf."""
        if serving is self._serving:
            self._progress += 1

    def doubt(self, serving: Serving) -> None:
        """A request could not reach it. It is asked whether it still hears, and restarted if it does not."""
        if serving is self._serving and not self._doubting:
            self._doubting = True
            self._start(self._check(serving))

    def stuck(self, serving: Serving, reason: str) -> None:
        """It works on requests and nothing comes of them. It is restarted, whatever it says of itself."""
        if serving is self._serving:
            self._reason = reason
            self._tell(Event.DEAF)

    # What happens ...

    def _tell(self, event: Event) -> None:
        before = self._life.state
        now = asyncio.get_running_loop().time()
        if event is Event.WOKE and before is State.STARTING:
            self._reason = f"it generated nothing within {self._policy.start_limit_seconds:.0f} s"
        self._life, reaction = self._life.after(event, now, self._policy)
        if reaction is None:
            return
        self._set_alarm(reaction.alarm_seconds)
        for do in reaction.do:
            self._perform(do)
        if self._life.state is not before:
            level = logging.WARNING if self._life.state in (State.RESTING, State.FAILED) else logging.INFO
            _LOG.log(
                level,
                "engine %s: %s -> %s %s",
                self.plan.spec.name,
                before.value,
                self.state.value,
                self.detail,
            )
        if self._life.state is State.STOPPED:
            self._stopped.set()
        else:
            self._stopped.clear()
        self._on_change()

    def _set_alarm(self, seconds: float | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if seconds is not None:
            self._alarm = asyncio.get_running_loop().call_later(seconds, self._tell, Event.WOKE)

    def _perform(self, do: Do) -> None:
        match do:
            case Do.SPAWN:
                self._ending = None
                self._start(self._live())
            case Do.TERMINATE | Do.KILL:
                self._ending = do
                self._end()
            case Do.ANNOUNCE:
                self._serving = self._found
            case Do.WITHDRAW:
                self._serving = None

    # ... and what is done about it.

    def _start(self, work: Coroutine[None, None, None]) -> None:
        assert self._tasks is not None, "an engine is wanted only within `supervised`"
        task = self._tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _end(self) -> None:
        if self._process is not None and self._ending is Do.TERMINATE:
            self._process.terminate()
        elif self._process is not None and self._ending is Do.KILL:
            self._process.kill()

    async def _live(self) -> None:
        """One start: from spawn to the end of the process."""
        spec = self.plan.spec
        if self._was_started and self._before_restart is not None:
            await self._before_restart()
        if self._ending is not None:
            self._tell(Event.EXITED)
            return
        self._was_started = True
        try:
            port = readiness.free_port()
            launch = self.plan.launch(port)
            address = Address(port=port, secret=secrets.token_hex(16) if spec.secret_variable else None)
            environment = {
                **allowed_environment(os.environ, fetches=not launch.local),
                **spec.environment(launch),
                **self.plan.environment,
            }
            if spec.secret_variable is not None and address.secret is not None:
                environment[spec.secret_variable] = address.secret
            async with running(spec.argv(launch), environment, self._logger_of_one_start()) as self._process:
                self._end()  # somebody may have changed their mind while it was spawned
                async with asyncio.TaskGroup() as tasks:
                    probing = tasks.create_task(self._probe(address, launch, self._process.pid))
                    code = await self._process.wait()
                    probing.cancel()
                self._explain_exit(code, self._process)
        except OSError as error:
            self._reason = f"it could not be started: {error.strerror or type(error).__name__}"
        finally:
            self._process = None
        self._tell(Event.EXITED)

    async def _probe(self, address: Address, launch: Launch, pid: int) -> None:
        spec, model = self.plan.spec, self.plan.spec.request_model(launch)
        try:
            told = await readiness.until_it_generates(self._session, spec, address, model, pid)
        except NotOurs as error:
            self._reason = str(error)
            self._tell(Event.DEAF)
            return
        tokens = told.context_tokens or self.plan.context_tokens
        capacity = spec.read_capacity(launch, tokens, told.capacity_page)
        self._found = Serving(address=address, model=model, context_tokens=tokens, capacity=capacity)
        self._tell(Event.ANSWERED)

    async def _check(self, serving: Serving) -> None:
        try:
            heard = await readiness.answers_at_all(
                self._session, self.plan.spec, serving.address, lambda: self._progress
            )
        finally:
            self._doubting = False
        if not heard and serving is self._serving:
            self._reason = "its process lives but does not answer"
            self._tell(Event.DEAF)

    def _explain_exit(self, code: int, process: Process) -> None:
        if self._life.state not in (State.STARTING, State.READY):
            return  # we ended it: the reason is known
        how = f"ended by signal {code - 128}" if code > 128 else f"ended with code {code}"
        self._reason = f"{self.plan.spec.name} {how}"
        if self._life.state is State.STARTING and process.tail:
            # It has seen no prompt but ours, so its last words are its own.
            self._reason += f" ({process.tail[-1][:200]})"

    def _logger_of_one_start(self) -> Callable[[str], None]:
        """Engine output goes to our log until it serves: from then on it may hold what clients write."""
        left = _LOGGED_LINES_PER_START

        def log(line: str) -> None:
            nonlocal left
            if self._life.state is State.STARTING and left > 0:
                left -= 1
                _LOG.debug("%s: %s", self.plan.spec.name, line)

        return log
