"""What shall run for a model: engine, numbers, memory, with every default filled in."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from worker_agent.engines.spec import EngineSpec, Launch
from worker_agent.memory import Need


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What shall run."""

    spec: EngineSpec
    model: str
    """A file, a folder or a hub name, as the engine takes it."""
    name: str
    """What clients ask for."""
    slots: int
    context_tokens: int | None
    threads: int
    program: str | None = None
    cache_bytes_per_token: int | None = None
    need: Need | None = None
    """None: not known (the engine fetches the model by itself)."""
    size_bytes: int | None = None
    args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def launch(self, port: int) -> Launch:
        """One start, on a port found for it."""
        return Launch(
            python=sys.executable,
            program=self.program,
            model=self.model,
            name=self.name,
            port=port,
            slots=self.slots,
            context_tokens=self.context_tokens,
            threads=self.threads,
            cache_bytes_per_token=self.cache_bytes_per_token,
            args=self.args,
        )
