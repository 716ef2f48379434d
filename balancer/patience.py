"""Limits on somebody else's silence that do not count our own.

When the event loop stood still (a machine under load, a debugger, a lid that was closed), timers are due the
moment it runs again, before what came meanwhile is read: everybody would seem to have been silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

TOLERATED_LAG_SECONDS = 0.25
"""A timer that runs so late shows a loop that stood still."""
SECOND_CHANCE_SECONDS = 1.0
"""For what came meanwhile to be read."""


class Patience:
    """Ends the block of `patient` when its time is over; `reschedule` moves that."""

    def __init__(self, scope: asyncio.Timeout, when: float) -> None:
        self._scope = scope
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_at(when, self._due, when)

    def reschedule(self, when: float) -> None:
        """On the loop's clock."""
        self._timer.cancel()
        self._timer = self._loop.call_at(when, self._due, when)

    def cancel(self) -> None:
        self._timer.cancel()

    def _due(self, when: float) -> None:
        now = self._loop.time()
        if now - when > TOLERATED_LAG_SECONDS:
            self.reschedule(now + SECOND_CHANCE_SECONDS)
        else:
            self._scope.reschedule(now)


@asynccontextmanager
async def patient(when: float) -> AsyncIterator[Patience]:
    """Raises `TimeoutError` out of the block when its time is over, on the loop's clock."""
    async with asyncio.timeout(None) as scope:
        patience = Patience(scope, when)
        try:
            yield patience
        finally:
            patience.cancel()
