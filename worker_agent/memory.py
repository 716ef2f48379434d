"""Whether a model fits: what it will take, and what this machine has for models. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Pool(StrEnum):
    """Memory that is counted apart."""

    RAM = "ram"
    """The machine's, or a Mac's unified memory."""
    VRAM = "vram"
    """The GPU's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one loaded model takes, in bytes."""

    weights_bytes: int
    cache_bytes: int
    """Keys and values of all slots at their full context."""
    overhead_bytes: int
    """What the engine takes besides: its program, its buffers, its cache of earlier prompts."""
    pool: Pool = Pool.RAM

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.overhead_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNow:
    """One pool as it is at this moment, in bytes."""

    total_bytes: int
    """Installed, or what the container or the driver allows us."""
    available_bytes: int
    """What a new process could have without anything being swapped or killed."""
