"""Stands between agent and engine, so that no engine outlives its agent, not even by SIGKILL.

    python -I -S guard.py PROGRAM ARGUMENT...

Standard library only, and little of it: it is started before every engine. Its standard input is a pipe whose
other end only the agent holds. A byte on it is an order: `t` terminates the engine's process group, `k` kills
it. Its end means that the agent is gone, however that came: the group is terminated, and killed 2 s later.
The guard lives in a group of its own, ends with the engine's code (128 + n for signal n), and takes along
whatever the engine left running.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

ORPHAN_GRACE_SECONDS = 2.0
HELPERS_SECONDS = 1.0
_LOOK_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1  # prctl(2)
_CANNOT_EXECUTE = 127  # what a shell says


def _die_with_me() -> Callable[[], None] | None:
    """For Linux: a call to make in the child, so that it is killed when the guard itself is."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        os.killpg(group, number)


def main(argv: list[str]) -> int:
    """Runs the engine and obeys the pipe until the engine has ended."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    # Handlers, not SIG_IGN, which the engine would inherit. Only the pipe gives orders here.
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        engine = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_me()
        )
    except OSError as error:
        print(f"cannot start {argv[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201 - the agent reads it
        return _CANNOT_EXECUTE
    try:
        code = _obey(engine, wake_read)
        _let_helpers_end(engine.pid)
    finally:
        _signal_group(engine.pid, signal.SIGKILL)  # those that the engine left behind for good
    return code if code >= 0 else 128 - code


def _let_helpers_end(group: int) -> None:
    """An engine's helpers may outlive it for a moment: Python's own gives back the shared memory that vLLM's
    processes had (seen: up to 420 MB of /dev/shm, left at each stop that did not wait for it)."""
    for _ in range(int(HELPERS_SECONDS / _LOOK_SECONDS)):
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(_LOOK_SECONDS)


def _obey(engine: subprocess.Popen[bytes], wake_read: int) -> int:
    orders: list[int] = [0]  # standard input, until its end
    patience: float | None = None
    while (code := engine.poll()) is None:
        ready, _, _ = select.select([wake_read, *orders], [], [], patience)
        if not ready:
            _signal_group(engine.pid, signal.SIGKILL)
            patience = None
        if wake_read in ready:
            os.read(wake_read, 512)
        if 0 in ready:
            order = os.read(0, 1)
            if order == b"k":
                _signal_group(engine.pid, signal.SIGKILL)
            else:
                _signal_group(engine.pid, signal.SIGTERM)
            if not order:
                orders, patience = [], ORPHAN_GRACE_SECONDS
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
