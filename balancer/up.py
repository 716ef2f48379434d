"""`balancer up`: a balancer and a worker agent on this machine, from nothing to a first answer.

The agent is a process of its own, as on any other machine; this one starts it again should it die, and
takes it down with itself: its standard input is a pipe that closes when this process ends, however it ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from balancer.addresses import join_line
from balancer.app import Running
from balancer.core.dispatcher import WorkerView

log = logging.getLogger(__name__)

AGENT_LOG = "agent.log"
CANNOT_RUN = 2
"""The agent's exit status for what a restart does not mend: no engine, a wrong setting."""
STOP_SECONDS = 20.0
"""An agent lets running answers finish for 10 s, and its engine has a few more to end."""
HURRIED_SECONDS = 3.0
LOOK_SECONDS = 0.2
SHORTEST_REST, LONGEST_REST = 0.5, 30.0
"""Between two starts of an agent that dies, doubled each time; from the first again after LONG_LIFE."""
LONG_LIFE = 60.0
QUICK_DEATH, MAX_QUICK_DEATHS = 10.0, 4
"""An agent that dies so often, each time so soon, will not live."""
MAX_LOG_BYTES = 4 * 1024 * 1024
"""An agent's log starts afresh beyond this, with the agent."""


_AGENTS_KEY = "WORKER_AGENT_CLUSTER_KEY"
_OWN_KEYS = {"BALANCER_ADMIN_KEY", "BALANCER_CLUSTER_KEY", f"{_AGENTS_KEY}_FILE"}
"""The last would name another key beside the one that we give."""


class AgentFailed(Exception):
    """The agent cannot run; the message is its own last words."""


@dataclass(slots=True)
class LocalAgent:
    """The worker agent that `up` runs beside the balancer."""

    log_file: Path
    options: tuple[str, ...] = ()
    """Passed on to `worker-agent run`: which engine and model, how many slots."""
    hurried: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its end may cost running answers."""
    _process: asyncio.subprocess.Process | None = None
    _cluster_key: Callable[[], str] = field(default=str, repr=False)

    @asynccontextmanager
    async def running(
        self, balancer_url: str, data_dir: Path, cluster_key: Callable[[], str]
    ) -> AsyncIterator[asyncio.Task[None]]:
        """Started, and started again while the block runs, with the cluster key as it is then.

        Gives the task that does it: it ends with `AgentFailed` when starting again is of no use.
        """
        self._cluster_key = cluster_key
        command = (
            sys.executable,
            *("-m", "worker_agent", "run", "--host", "127.0.0.1", "--port", "0", "--no-mdns"),
            *("--balancer", balancer_url),
            *("--data-dir", str(data_dir), "--exit-with-parent"),
            *self.options,
        )
        # Kept here, awaited on leaving.
        keeping = asyncio.create_task(self._keep(command), name="local agent")  # noqa: TID251
        try:
            yield keeping
        finally:
            keeping.cancel()
            with suppress(asyncio.CancelledError, AgentFailed):
                await keeping
            await self._stop()

    async def _keep(self, command: tuple[str, ...]) -> None:
        loop = asyncio.get_running_loop()
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            _private(self.log_file, "wb").close()
        except OSError as error:
            raise AgentFailed(
                f"cannot write its log {self.log_file}: {error.strerror}; choose another --data-dir"
            ) from error
        rest, quick_deaths = SHORTEST_REST, 0
        while True:
            began = loop.time()
            status = await self._run_once(command)
            lived = loop.time() - began
            quick_deaths = quick_deaths + 1 if lived < QUICK_DEATH else 0
            if status == CANNOT_RUN or quick_deaths >= MAX_QUICK_DEATHS:
                raise AgentFailed(self.last_words())
            rest = SHORTEST_REST if lived > LONG_LIFE else min(rest * 2, LONGEST_REST)
            log.warning(
                "the worker agent ended with status %d (see %s); it is started again in %g s",
                *(status, self.log_file, rest),
            )
            await asyncio.sleep(rest)

    async def _run_once(self, command: tuple[str, ...]) -> int:
        if self.log_file.stat().st_size > MAX_LOG_BYTES:
            self.log_file.write_bytes(b"")
        with _private(self.log_file, "ab") as output:
            # A session of its own: Ctrl-C in the terminal is for us, who then stop it in order.
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=agent_environment(os.environ, self._cluster_key()),
                start_new_session=True,
            )
        return await self._process.wait()

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        ended = asyncio.ensure_future(process.wait())
        hurried = asyncio.ensure_future(self.hurried.wait())
        try:
            await asyncio.wait((ended, hurried), timeout=STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and self.hurried.is_set():
                process.send_signal(signal.SIGTERM)  # the second one ends it at once
                await asyncio.wait((ended,), timeout=HURRIED_SECONDS)
        finally:
            hurried.cancel()
            if process.returncode is None:
                log.warning("the worker agent does not stop; it is killed, and its engine with it")
                process.kill()
            await ended

    def last_words(self, lines: int = 12) -> str:
        """The end of the agent's log."""
        with suppress(OSError), self.log_file.open("rb") as file:
            file.seek(max(file.seek(0, 2) - 8192, 0))
            text = file.read().decode("utf-8", "replace").strip()
            return "\n".join(text.splitlines()[-lines:])
        return ""


def _private(path: Path, mode: str) -> IO[bytes]:
    """Its owner's alone: what an engine writes into it is not ours to judge. Raises `OSError`."""
    file: IO[bytes] = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    os.fchmod(file.fileno(), 0o600)  # it may have been there before
    return file


def agent_environment(own: Mapping[str, str], cluster_key: str) -> dict[str, str]:
    """What an agent of ours finds in its environment: the cluster key, which a command line would show to
    everybody on this machine, and none of the balancer's own keys. Pure."""
    kept = {name: value for name, value in own.items() if name not in _OWN_KEYS}
    return kept | {_AGENTS_KEY: cluster_key}


async def until_ready(
    balancer: Running, keeping: asyncio.Task[None], show: Callable[[str], None]
) -> WorkerView:
    """The first worker that can be used. `show` is told what is going on meanwhile.

    Raises `AgentFailed`.
    """
    while True:
        workers = balancer.snapshot().workers
        for view in workers:
            if view.state == "ready" and view.models:
                return view
        if keeping.done():
            await keeping
        ours = next((view for view in workers if view.worker.type == "agent"), None)
        if ours is not None and ours.state == "failed":
            raise AgentFailed(ours.detail or "its engine does not start")
        show(_progress(ours))
        await asyncio.sleep(LOOK_SECONDS)


def _progress(agent: WorkerView | None) -> str:
    if agent is None or agent.state in ("unknown", "lost"):
        return "starting the worker agent"
    if agent.state == "starting":
        return f"{agent.engine} loads its model on {agent.hardware}"
    return f"{agent.engine} is {agent.state}{': ' if agent.detail else ''}{agent.detail}"


# What is shown at the end; pure but for `lan_addresses`.


def welcome(
    view: WorkerView,
    *,
    local: str,
    places: tuple[str, ...],
    invitation: str,
    loopback_only: bool,
    certificate: Path | None = None,
    needs_key: bool = False,
) -> dict[str, str]:
    """What a new user wants to know, by heading; the commands work as pasted.

    They bound the answer: a small model now and then does not stop before its context is full.

    `local`: the balancer's URL on this machine. `places`: where it is for others, `host:port`.
    `certificate`: of the balancer's own making, which clients have to be told to trust. `needs_key`: answers
    are for those who bring a key.
    """
    model = view.models[0]
    trusting = "" if certificate is None else f"--cacert {shlex.quote(str(certificate))} "
    if needs_key:
        trusting += '-H "Authorization: Bearer $OPENAI_API_KEY" '
    texts = {
        "Endpoint": "\n".join([f"{local}/v1", *(f"{_url(place)}/v1" for place in places)]),
        "Model": f"{model} ({view.engine} on {view.hardware})" if view.hardware else model,
        **({"A key, first of all": _key_first(local)} if needs_key else {}),
        "Try it": (
            f"curl {trusting}{local}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f'  -d \'{{"model": "{model}", "stream": true, "max_tokens": 200, '
            '"messages": [{"role": "user", "content": "Say hello."}]}\''
        ),
        "From Python (pip install openai)": (
            f"{_python_client(local, certificate, needs_key)}\n"
            "answer = client.chat.completions.create(\n"
            f'    model="{model}", max_tokens=200, '
            'messages=[{"role": "user", "content": "Say hello."}]\n'
            ")\n"
            "print(answer.choices[0].message.content)"
        ),
        "Another machine": _joining(invitation, places, loopback_only),
    }
    if view.advice:
        texts["This machine could do more"] = "\n".join(view.advice)
    return texts


def _python_client(local: str, certificate: Path | None, needs_key: bool) -> str:
    """With `needs_key` the SDK takes the key from its own variable."""
    where = f'base_url="{local}/v1"' + ("" if needs_key else ', api_key="none"')
    if certificate is None:
        return f"from openai import OpenAI\nclient = OpenAI({where})"
    return (
        "import ssl\n"
        "from openai import DefaultHttpxClient, OpenAI\n"
        f"trusted = ssl.create_default_context(cafile={str(certificate)!r})\n"
        f"client = OpenAI({where}, http_client=DefaultHttpxClient(verify=trusted))"
    )


def _key_first(local: str) -> str:
    return f'export OPENAI_API_KEY="$(uv run balancer keys create --name me --url {local})"'


def _joining(invitation: str, places: tuple[str, ...], loopback_only: bool) -> str:
    if loopback_only or not places:
        return "needs this balancer to listen on the network: start it with --host 0.0.0.0"
    return (
        "on it, in a checkout of this project (the line holds the cluster key: keep it to yourself):\n"
        f"{join_line(invitation)}"
    )


def _url(place: str) -> str:
    return place if "://" in place else f"http://{place}"
