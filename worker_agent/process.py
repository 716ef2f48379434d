"""One engine's process: spawned behind the guard, told to end, its last words kept.

The environment that it gets is a list of what engines need, never all of ours: an engine loads files and
libraries that strangers made, and has no use for the keys in a login shell.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

_GUARD = Path(__file__).with_name("guard.py")
_TAIL_LINES = 50
_LINE_CHARACTERS = 300
_GUARD_LIMIT_SECONDS = 5.0  # a guard that does not do its work by then (it was stopped?) is killed itself
_AFTERGLOW_SECONDS = 2.0  # how long output may still come once the process is gone

_ALLOWED = re.compile(
    r"""PATH|HOME|USER|LOGNAME|LANG|LC_[A-Z]+|TZ|TMPDIR|TERM|VIRTUAL_ENV|PYTHONPATH|PYTHONDONTWRITEBYTECODE
    |LD_LIBRARY_PATH|LD_PRELOAD|DYLD_[A-Z_]+|XDG_CACHE_HOME|SSL_CERT_(FILE|DIR)|(HTTPS?|NO)_PROXY|(https?|no)_proxy
    |(HF|HUGGINGFACE|CUDA|NVIDIA|NCCL|VLLM|MLX|MTL|METAL|GGML|OMP|OPENBLAS|MKL|TORCH|TRITON)_[A-Z0-9_]+""",
    re.VERBOSE,
)


_SECRET = re.compile(r"(.*_)?(TOKEN|SECRET|PASSWORD|CREDENTIALS?|KEY)(_.*)?")


def allowed_environment(ours: Mapping[str, str], *, fetches: bool = False) -> dict[str, str]:
    """What of our environment an engine may see: no secrets, but the hub's token where it `fetches` its model
    from there. Pure."""
    return {
        name: value
        for name, value in ours.items()
        if _ALLOWED.fullmatch(name)
        and (not _SECRET.fullmatch(name) or (fetches and name.startswith("HF_TOKEN")))
    }


class Lines:
    """Cuts output into printable, bounded lines, however it arrives. Pure."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that are complete now; what is longer than a line may be loses its end."""
        *whole, rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        self._rest = rest[: 4 * _LINE_CHARACTERS]  # bytes: at most four per character
        return [line for line in map(_printable, whole) if line]


def _printable(line: bytes) -> str:
    text = line.decode("utf-8", "replace")[:_LINE_CHARACTERS]
    return "".join(character if character.isprintable() else " " for character in text).strip()


class Process:
    """A running engine. Made by `running`, which also ends it."""

    def __init__(
        self,
        guard: asyncio.subprocess.Process,
        output: asyncio.StreamReader,
        on_line: Callable[[str], None],
    ) -> None:
        self._guard = guard
        self._output = output
        self._on_line = on_line
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        """The engine's last words, oldest first. May hold what clients wrote: not for logs or reports."""

    @property
    def pid(self) -> int:
        """Of the guard; the engine is its child."""
        return self._guard.pid

    def terminate(self) -> None:
        """Asks the engine and its children to end."""
        self._order(b"t")

    def kill(self) -> None:
        """Ends them."""
        self._order(b"k")
        with contextlib.suppress(ProcessLookupError):
            self._guard.send_signal(signal.SIGCONT)  # a guard that somebody has stopped obeys nobody

    async def wait(self) -> int:
        """Reads its output, and returns its exit code: 128 + n where signal n ended it. To be called once."""
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._read())
            code = await self._guard.wait()
            await asyncio.wait([reading], timeout=_AFTERGLOW_SECONDS)
            reading.cancel()
        return code

    def _order(self, order: bytes) -> None:
        assert self._guard.stdin is not None
        if self._guard.returncode is None and not self._guard.stdin.is_closing():
            self._guard.stdin.write(order)

    async def _read(self) -> None:
        lines = Lines()
        while data := await self._output.read(16 * 1024):
            for line in lines.feed(data):
                self.tail.append(line)
                self._on_line(line)


@contextlib.asynccontextmanager
async def running(
    argv: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]
) -> AsyncIterator[Process]:
    """An engine, for as long as the block lasts; nothing of it is left afterwards, cancelled or not.

    Raises `OSError` where not even the guard can be started.
    """
    async with _pipe() as (output, write_end):
        try:
            guard = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_GUARD), *argv),
                env=environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,  # a Ctrl-C at the terminal is the agent's to answer
            )
        finally:
            os.close(write_end)
        process = Process(guard, output, on_line)
        try:
            yield process
        finally:
            process.kill()
            await _gone(guard)


@contextlib.asynccontextmanager
async def _pipe() -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """A pipe of our own: asyncio calls a process ended only when nobody holds the pipes that it made, and an
    engine's forgotten child may hold them for ever. The write end is the caller's to close."""
    read_end, write_end = os.pipe()
    output = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(output), os.fdopen(read_end, "rb", 0)
    )
    try:
        yield output, write_end
    finally:
        transport.close()


async def _gone(guard: asyncio.subprocess.Process) -> None:
    """Waits for the end of what was killed, whatever happens to us meanwhile: it takes milliseconds."""
    waiting = asyncio.ensure_future(guard.wait())
    cancelled = False
    while not waiting.done():
        try:
            _, pending = await asyncio.wait([waiting], timeout=_GUARD_LIMIT_SECONDS)
        except asyncio.CancelledError:
            cancelled = True
        else:
            if pending:
                guard.kill()
    if guard.stdin is not None:
        guard.stdin.close()
    if cancelled:
        raise asyncio.CancelledError
