"""Wakes whoever waits for the next change of what the agent would say of itself."""

from __future__ import annotations

import asyncio


class Changes:
    """Wakes whoever waits for the next change."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    @property
    def next(self) -> asyncio.Event:
        """Is set at the next change. Taken before looking at what may change, it misses none."""
        return self._next

    def announce(self) -> None:
        """Something changed."""
        self._next.set()
        self._next = asyncio.Event()
