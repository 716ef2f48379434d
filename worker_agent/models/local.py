"""A model as this machine has it. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Format(StrEnum):
    """In which form the weights are."""

    GGUF = "gguf"
    """One file, or the first of several parts, for llama.cpp."""
    SAFETENSORS = "safetensors"
    """A folder as the hub has it, for vLLM, and for MLX, which reads it too."""
    MLX = "mlx"
    """A folder of safetensors that MLX has quantised: nothing else reads it."""
    HUB = "hub"
    """The hub's name of a model that the engine fetches by itself; nothing of it is known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What its own files say of a model."""

    cache_bytes_per_token: int | None = None
    """Of keys and values, at two bytes a number; None: the files do not tell."""
    context_tokens: int | None = None
    """For which it was trained."""
    parameters: int | None = None
    quantization: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """One model that can be loaded here."""

    name: str
    """What clients ask for."""
    path: str
    """As the engine takes it: a file, a folder, or a hub name."""
    format: Format
    size_bytes: int | None = None
    """Of its weights on disk; None: it is not on this disk."""
    facts: Facts = Facts()
    origin: str = ""
    """Where it came from, for people: `given`, `included`, `hub:org/model@revision`."""
    ours: bool = False
    """We have fetched it, and may delete it."""
