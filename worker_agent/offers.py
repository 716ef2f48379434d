"""A model that can be loaded here, and on which terms the user wants that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from worker_agent.engines.choice import NoChoice
from worker_agent.memory import MemoryNow, Pool
from worker_agent.models.local import Format, LocalModel
from worker_agent.plans import Plan

Planner: TypeAlias = Callable[[Mapping[Pool, MemoryNow]], Plan]
"""What shall run, given what models may take of each pool now (`available_bytes`). Reads files: for a thread.
Raises `NoChoice`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One model, whether it is loaded or not."""

    model: LocalModel
    plan: Planner
    expected: Plan | None = None
    """What will run as far as is known before memory was looked at; None: nothing is known yet."""
    preload: bool = False
    """Loaded when the agent starts."""
    pinned: bool = False
    """Never unloaded to make room."""
    ttl_seconds: float | None = None
    """Unloaded when nobody has asked for it for so long; None: never for that reason."""

    @property
    def name(self) -> str:
        """What clients ask for."""
        return self.model.name


def without_model(name: str, why: str, *, preload: bool = False) -> Offer:
    """Of a name that the user has given to a model that cannot be served; `why` is a sentence for people."""

    def plan(_memory: Mapping[Pool, MemoryNow]) -> Plan:
        raise NoChoice(why)

    # Nobody has looked at it, so its path and format say nothing.
    return Offer(model=LocalModel(name=name, path=name, format=Format.HUB), plan=plan, preload=preload)
