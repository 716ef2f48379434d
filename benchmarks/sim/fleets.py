"""The rooms that are simulated: machines with measured or derived rates, for an 8B-class model at 4 bit.

Rates from the routing study (`fleet.py`): "published" ones rest on a published measurement, "derived"
ones on the machine's memory bandwidth and compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, PositiveFloat, PositiveInt, TypeAdapter, with_config

from benchmarks.sim.engine import EngineSpec


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine, or `count` of them, with one engine."""

    name: str
    engine: EngineSpec
    ideal_limit: PositiveInt
    """What somebody who knows the machine well would set as its limit by hand; for rivals that need one."""
    count: PositiveInt = 1


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    machines: tuple[Machine, ...]
    sustained_share: PositiveFloat = 0.65
    """The highest share of the fluid chat capacity that any policy sustains; 100 % of a chat workload."""

    def each(self) -> tuple[Machine, ...]:
        """Every single machine, with a name of its own."""
        return tuple(
            replace(machine, name=f"{machine.name}-{number}", count=1)
            for machine in self.machines
            for number in range(machine.count)
        )


def _rtx4090(count: int) -> Machine:
    """Published: vLLM, 7-8B FP16, 644 tokens/s at 16 streams and 975 at 32; FP8 halves the step (derived)."""
    engine = EngineSpec(
        kind="vllm",
        prefill_tokens_per_second=8000,
        step_seconds=0.0105,
        stream_seconds=0.00035,
        context_seconds=1.5e-7,
        slots=64,
        cache_tokens=90_000,
    )
    return Machine(name="rtx4090", engine=engine, ideal_limit=40, count=count)


def _rtx3090(count: int) -> Machine:
    """Derived: 0.55 of a 4090's prefill, 0.9 of its bandwidth."""
    engine = EngineSpec(
        kind="vllm",
        prefill_tokens_per_second=4500,
        step_seconds=0.0125,
        stream_seconds=0.0006,
        context_seconds=1.6e-7,
        slots=64,
        cache_tokens=90_000,
    )
    return Machine(name="rtx3090", engine=engine, ideal_limit=40, count=count)


def _studio(count: int) -> Machine:
    """Published: M3 Ultra, MLX, 110-119 tokens/s alone, 3.0-4.3 times that at 10; prefill derived."""
    engine = EngineSpec(
        kind="mlx",
        prefill_tokens_per_second=950,
        step_seconds=0.0085,
        stream_seconds=0.002,
        context_seconds=2e-7,
        slots=16,
        cache_tokens=200_000,
    )
    return Machine(name="studio", engine=engine, ideal_limit=16, count=count)


def _m4_pro(count: int) -> Machine:
    """Derived: twice an M4."""
    engine = EngineSpec(
        kind="llama.cpp",
        prefill_tokens_per_second=430,
        step_seconds=0.019,
        stream_seconds=0.004,
        context_seconds=6e-7,
        slots=4,
        cache_tokens=64_000,
    )
    return Machine(name="m4-pro", engine=engine, ideal_limit=4, count=count)


def _mini(count: int) -> Machine:
    """Published: Mac mini M4, llama.cpp, Q4_K_M, 225 tokens/s of prompt and 20.9 of answer."""
    engine = EngineSpec(
        kind="llama.cpp",
        prefill_tokens_per_second=210,
        step_seconds=0.04,
        stream_seconds=0.008,
        context_seconds=1.2e-6,
        slots=4,
        cache_tokens=48_000,
    )
    return Machine(name="mini", engine=engine, ideal_limit=4, count=count)


def _cpu(count: int) -> Machine:
    """Published: an old CPU, 7B, 21 tokens/s of prompt and 6.7 of answer."""
    engine = EngineSpec(
        kind="llama.cpp",
        prefill_tokens_per_second=25,
        step_seconds=0.15,
        stream_seconds=0.05,
        context_seconds=3e-6,
        slots=1,
        cache_tokens=24_000,
    )
    return Machine(name="cpu", engine=engine, ideal_limit=1, count=count)


FLEETS: Mapping[str, Callable[[], Fleet]] = {
    "mixed7": lambda: Fleet(machines=(_rtx4090(1), _studio(2), _mini(3), _cpu(1)), sustained_share=0.70),
    "equal8": lambda: Fleet(machines=(_rtx3090(8),), sustained_share=0.58),
    "mixed40": lambda: Fleet(
        machines=(_rtx4090(4), _rtx3090(6), _studio(8), _m4_pro(6), _mini(12), _cpu(4)), sustained_share=0.66
    ),
}


def fleet_named(name: str) -> Fleet:
    """A row of FLEETS, or a JSON file with the fields of `Fleet`.

    Raises `OSError`, and `ValueError` with a sentence where the file is no fleet.
    """
    if name in FLEETS:
        return FLEETS[name]()
    return TypeAdapter(Fleet).validate_json(Path(name).read_bytes())
