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

    def __str__(self) -> str:
        """For people: `9.3 GiB (weights 5.1, cache 3.2, engine 1.0)`."""
        weights, cache, engine = (
            f"{part / _GIB:.1f}" for part in (self.weights_bytes, self.cache_bytes, self.overhead_bytes)
        )
        return f"{self.total_bytes / _GIB:.1f} GiB (weights {weights}, cache {cache}, engine {engine})"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNow:
    """One GPU at this moment, in bytes."""

    index: int
    """As `nvidia-smi` counts."""
    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNow:
    """One pool as it is at this moment, in bytes."""

    total_bytes: int
    """Installed, or what the container or the driver allows us."""
    available_bytes: int
    """What a new process could have without anything being swapped or killed."""
    devices: tuple[DeviceNow, ...] = ()
    """The GPUs that it is the sum of; empty: not told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A model as an engine would load it: what an engine's need is computed from."""

    weights_bytes: int
    slots: int
    context_tokens: int
    """Per slot."""
    cache_bytes_per_token: int | None = None
    """None: its files do not tell; then the widest cache that models of its size have is assumed."""
    pool: Pool = Pool.RAM
    devices: int = 1
    """GPUs that it is spread over."""
    batch_tokens: int = 0
    """Tokens of prompts worked on in one step, where the engine's buffers grow with them."""
    room_bytes: int | None = None
    """What it may take at most, for engines that make use of all they get; None: as much as it likes."""

    @property
    def token_bytes(self) -> int:
        """Of keys and values."""
        if self.cache_bytes_per_token is not None:
            return self.cache_bytes_per_token
        return min(max(self.weights_bytes // 8192, _NARROWEST), _WIDEST)


_GIB = 2**30
# Of a token's keys and values, where a file does not tell: 4-bit Llama 2 7B has 512 KiB for 4 GiB of weights,
# one eight-thousandth; Llama 1 65B, which had a head of keys for each of queries, 2.5 MiB.
_NARROWEST = 64 * 2**10
_WIDEST = 5 * 2**19


def held_bytes(now: MemoryNow, told_bytes: int, given_bytes: int) -> int:
    """What our engines hold of a pool. Drivers tell nothing of it in most containers; then it is what those
    that serve were given, as far as so much is in use at all."""
    return told_bytes or min(max(given_bytes, 0), max(0, now.total_bytes - now.available_bytes))


def budget(now: MemoryNow, ours_bytes: int, share: float) -> int:
    """What our engines together may take of a pool, in bytes: this share of what is free and of what they
    hold already. Never more than the pool has."""
    return int(share * min(max(now.available_bytes, 0) + max(ours_bytes, 0), now.total_bytes))
