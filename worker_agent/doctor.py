"""What `worker-agent doctor` finds: the machine, its engines, what would run and why, what fits, how fast it
would be, and what to install.

`findings` gives one dictionary, whose keys stay as they are (docs/ENGINES.md); `show` prints it for people.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from worker_agent.engines import ENGINES
from worker_agent.engines.choice import Choice, Installed, NoChoice, outdated
from worker_agent.engines.fitting import DEFAULT_CONTEXT, Size, Wishes, fit, places
from worker_agent.engines.llama_cpp import LLAMA_CPP
from worker_agent.engines.mlx import MLX
from worker_agent.engines.spec import EngineSpec
from worker_agent.engines.vllm import VLLM
from worker_agent.hardware import Hardware
from worker_agent.memory import MemoryNow, Pool, budget
from worker_agent.models.catalog import NotAModel, describe
from worker_agent.models.local import LocalModel
from worker_agent.plans import Options, Plan, plan_for

_GIB = 2**30
_KIB = 2**10

_SIZES = (
    ("1.5B", 1.5e9, 28 * _KIB),
    ("3B", 3.1e9, 36 * _KIB),
    ("8B", 8.0e9, 128 * _KIB),
    ("14B", 14.8e9, 192 * _KIB),
    ("32B", 32.8e9, 256 * _KIB),
    ("70B", 70.6e9, 320 * _KIB),
)
"""Parameters, and bytes of keys and values per token, as Qwen 2.5 and Llama 3 have them."""

_BITS: Mapping[str, Sequence[tuple[str, float]]] = {
    LLAMA_CPP.name: (("Q8_0", 8.5), ("Q4_K_M", 4.85)),
    MLX.name: (("8-bit", 8.5), ("4-bit", 4.5)),
    VLLM.name: (("bf16", 16.0), ("AWQ 4-bit", 4.9)),
}
"""Per parameter, best first."""

_OF_BANDWIDTH = 2 / 3
"""Each token reads all weights once; so much of the bandwidth on the data sheet is reached, about."""

_MOST_TOKENS = 300
"""Small models are bounded by other things than memory."""

_BANDWIDTHS = {
    "Apple M1": 68, "Apple M1 Pro": 200, "Apple M1 Max": 400, "Apple M1 Ultra": 800,
    "Apple M2": 100, "Apple M2 Pro": 200, "Apple M2 Max": 400, "Apple M2 Ultra": 800,
    "Apple M3": 100, "Apple M3 Pro": 150, "Apple M3 Max": 300, "Apple M3 Ultra": 819,
    "Apple M4": 120, "Apple M4 Pro": 273, "Apple M4 Max": 410, "Apple M5": 153,
    "GeForce RTX 3060": 360, "GeForce RTX 3070": 448, "GeForce RTX 3080": 760, "GeForce RTX 3090": 936,
    "GeForce RTX 4060": 272, "GeForce RTX 4060 Ti": 288, "GeForce RTX 4070": 504,
    "GeForce RTX 4070 SUPER": 504, "GeForce RTX 4070 Ti": 504, "GeForce RTX 4070 Ti SUPER": 672,
    "GeForce RTX 4080": 717, "GeForce RTX 4080 SUPER": 736, "GeForce RTX 4090": 1008,
    "GeForce RTX 5060": 448, "GeForce RTX 5060 Ti": 448, "GeForce RTX 5070": 672,
    "GeForce RTX 5070 Ti": 896, "GeForce RTX 5080": 960, "GeForce RTX 5090": 1792,
    "Tesla T4": 320, "Tesla P40": 347, "Tesla V100": 900, "L4": 300, "L40": 864, "L40S": 864,
    "A10": 600, "A10G": 600, "A30": 933, "A40": 696, "A100": 1555, "A100-SXM4-80GB": 2039,
    "RTX A4000": 448, "RTX A5000": 768, "RTX A6000": 768, "RTX 6000 Ada Generation": 960,
    "H100 PCIe": 2000, "H100 80GB HBM3": 3350, "H200": 4800,
}  # fmt: skip
"""GB/s, from the makers' public data sheets; where a chip comes in several, the lower one."""


def findings(
    hardware: Hardware,
    installed: Installed,
    choice: Choice | NoChoice,
    memory: Mapping[Pool, MemoryNow],
    *,
    options: Options | None = None,
    share: float = 0.9,
    models: Sequence[LocalModel] = (),
) -> dict[str, Any]:
    """All that is told, ready for JSON. `memory`: as measured; `share` of it is for models. `models`: those
    that were downloaded or configured. Reads their files' heads: call it in a thread.
    """
    options = options or Options()
    room = {pool: replace(now, available_bytes=budget(now, 0, share)) for pool, now in memory.items()}

    def plan(model: LocalModel, options: Options) -> Plan:
        return plan_for(model, options, hardware, installed, room)

    found: dict[str, Any] = {"hardware": str(hardware), "installed": _installed(installed)}
    found |= _chosen(choice, options, plan, hardware)
    return found | {
        "memory": {
            pool.value: {
                "total_bytes": now.total_bytes,
                "available_bytes": now.available_bytes,
                "for_models_bytes": room[pool].available_bytes,
            }
            for pool, now in memory.items()
        },
        "engines": {spec.name: _engine(spec, installed) for spec in ENGINES.values()},
        "fits": list(_fits(hardware, installed, room)),
        "models": [_model(model, plan, hardware) for model in models],
        "install": list(_to_install(hardware, installed)),
    }


def memory_bandwidth(hardware: Hardware) -> int | None:
    """GB/s of the memory that weights are read from, by the chip's data sheet; None: not known."""
    if hardware.apple_chip is not None:
        return _BANDWIDTHS.get(hardware.apple_chip)
    if not hardware.gpus or "laptop" in hardware.gpus[0].name.lower():
        return None
    words = f" {hardware.gpus[0].name.removeprefix('NVIDIA ')} "
    known = [name for name in _BANDWIDTHS if re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", words)]
    return _BANDWIDTHS[max(known, key=len)] if known else None


def tokens_per_second(hardware: Hardware, weights_bytes: int | None, pool: Pool) -> int | None:
    """Of one answer alone, about; None: not known. Mixtures of experts read a part of their weights only, and
    are faster."""
    bandwidth = memory_bandwidth(hardware)
    if bandwidth is None or not weights_bytes or (pool is Pool.RAM and hardware.apple_chip is None):
        return None
    return min(max(1, round(_OF_BANDWIDTH * bandwidth * 1e9 / weights_bytes)), _MOST_TOKENS)


def _installed(installed: Installed) -> dict[str, Any]:
    return {
        "mlx": installed.mlx,
        "vllm": installed.vllm,
        "llama-server": installed.llama_server,
        "xllamacpp": installed.xllamacpp,
        "llama-cpp-python": installed.llama_cpp_python,
        "embedded model": installed.embedded_model,
    }


def _engine(spec: EngineSpec, installed: Installed) -> dict[str, Any]:
    there = installed.has(spec)
    version = installed.versions.get(spec.name) if there else None
    fault = outdated(spec, installed) if there else None
    return {
        "installed": there,
        "version": version,
        "minimum_version": spec.minimum_version or None,
        "safe": None if version is None else fault is None,
        "detail": fault or "",
        "install": spec.install,
    }


def _chosen(
    choice: Choice | NoChoice,
    options: Options,
    plan: Callable[[LocalModel, Options], Plan],
    hardware: Hardware,
) -> dict[str, Any]:
    if isinstance(choice, NoChoice):
        return _nothing(str(choice))
    wished = replace(options, engine=choice.engine.name)
    try:
        planned = plan(describe(choice.model, choice.name), wished)
    except (NoChoice, NotAModel) as error:
        return _nothing(str(error))
    need = planned.need
    return {
        "engine": planned.spec.name,
        "why": choice.why,
        "model": planned.model,
        "name": planned.name,
        "slots": planned.slots,
        "context_tokens": planned.context_tokens,
        "threads": planned.threads,
        "needs": None
        if need is None
        else {
            "pool": need.pool.value,
            "weights_bytes": need.weights_bytes,
            "cache_bytes": need.cache_bytes,
            "engine_bytes": need.overhead_bytes,
            "total_bytes": need.total_bytes,
        },
        "tokens_per_second": None
        if need is None
        else tokens_per_second(hardware, need.weights_bytes, need.pool),
        "advice": [*choice.advice, *planned.advice],
    }


def _nothing(why: str) -> dict[str, Any]:
    return {"engine": None, "why": why, "advice": []}


def _fits(
    hardware: Hardware, installed: Installed, room: Mapping[Pool, MemoryNow]
) -> Iterator[dict[str, Any]]:
    """Model sizes at a context of 4096 with the engine that suits this machine, be it installed or not."""
    suited = MLX if hardware.is_apple_silicon else VLLM if hardware.gpus else LLAMA_CPP
    where = places(suited, hardware, room, llama_cpp_gpu=installed.llama_cpp_gpu)
    for size, parameters, token_bytes in _SIZES:
        for quantization, bits in _BITS[suited.name]:
            weights = int(parameters * bits / 8)
            wishes = Wishes(
                weights_bytes=weights,
                cache_bytes_per_token=token_bytes,
                trained_tokens=None,
                slots=None,
                context_tokens=DEFAULT_CONTEXT,
            )
            got = fit(suited, wishes, where)
            fits = isinstance(got, Size)
            yield {
                "parameters": size,
                "quantization": quantization,
                "engine": suited.name,
                "weights_bytes": weights,
                "fits": fits,
                "slots": got.slots if fits else 0,
                "context_tokens": DEFAULT_CONTEXT,
                "tokens_per_second": tokens_per_second(hardware, weights, got.place.pool) if fits else None,
            }


def _model(
    model: LocalModel, plan: Callable[[LocalModel, Options], Plan], hardware: Hardware
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": model.name,
        "format": model.format.value,
        "size_bytes": model.size_bytes,
        "fits": False,
        "engine": None,
        "slots": 0,
        "context_tokens": None,
        "tokens_per_second": None,
        "detail": "",
    }
    try:
        planned = plan(model, Options())
    except NoChoice as error:
        return told | {"detail": str(error)}
    pool = Pool.RAM if planned.need is None else planned.need.pool
    return told | {
        "fits": True,
        "engine": planned.spec.name,
        "slots": planned.slots,
        "context_tokens": planned.context_tokens,
        "tokens_per_second": tokens_per_second(hardware, model.size_bytes, pool),
        "detail": " ".join(planned.advice),
    }


def _to_install(hardware: Hardware, installed: Installed) -> Iterator[str]:
    best = MLX if hardware.is_apple_silicon else VLLM if hardware.gpus else LLAMA_CPP
    for spec in dict.fromkeys((best, LLAMA_CPP)):
        if not installed.has(spec):
            yield f"{spec.name}: {spec.install}"
    for spec in ENGINES.values():
        if installed.has(spec) and (fault := outdated(spec, installed)) is not None:
            yield fault


# For people.


def show(found: Mapping[str, Any]) -> None:
    """Prints it: a table where somebody looks at a terminal, plain lines elsewhere."""
    rows = list(lines(found))
    if not sys.stdout.isatty():
        sys.stdout.writelines(f"{key}: {text}\n" for key, text in rows)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for key, text in rows:
        table.add_row("" if key == before else key, text)
        before = key
    Console().print(table)


def lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What `findings` found, as a heading and a text each; headings repeat."""
    yield "hardware", found["hardware"]
    for pool, now in found["memory"].items():
        yield (
            f"memory ({pool})",
            f"{_gib(now['available_bytes'])} of {_gib(now['total_bytes'])} free,"
            f" {_gib(now['for_models_bytes'])} for models",
        )
    there = ", ".join(name for name, where in found["installed"].items() if where)
    yield "installed", there or "nothing"
    for name, engine in found["engines"].items():
        if engine["installed"]:
            yield "version", f"{name} {engine['version'] or 'unknown'}{_safety(engine)}"
    yield "engine", found["engine"] or "none"
    yield "why", found["why"]
    if found["engine"] is not None:
        yield from _what_would_run(found)
    for line in found["advice"]:
        yield "advice", line
    yield from _what_fits(found["fits"])
    for model in found["models"]:
        yield "model here", _one_model(model)
    for line in found["install"]:
        yield "install", line


def _what_would_run(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("model", "name", "slots", "context_tokens", "threads"):
        value = found[key]
        yield key.replace("_", " "), "the engine's own" if value is None else str(value)
    needs = found["needs"]
    if needs is not None:
        parts = ", ".join(
            f"{what} {_gib(needs[f'{key}_bytes'])}"
            for what, key in (("weights", "weights"), ("cache", "cache"), ("engine", "engine"))
        )
        yield "needs", f"{_gib(needs['total_bytes'])} of {needs['pool']} ({parts})"
    tokens = found["tokens_per_second"]
    yield "speed", "unknown" if tokens is None else _speed(tokens)


def _what_fits(sizes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    fitting = [size for size in sizes if size["fits"]]
    if not fitting:
        yield "fits", f"no model of {sizes[0]['parameters']} parameters or more" if sizes else "unknown"
    for size in reversed(fitting):
        slots = "1 slot" if size["slots"] == 1 else f"{size['slots']} slots"
        yield (
            "fits",
            f"{size['parameters']} {size['quantization']} ({_gib(size['weights_bytes'])}): {slots} of"
            f" {size['context_tokens']} tokens by {size['engine']}, {_speed(size['tokens_per_second'])}",
        )


def _one_model(model: Mapping[str, Any]) -> str:
    if not model["fits"]:
        return f"{model['name']}: {model['detail']}"
    slots = "1 slot" if model["slots"] == 1 else f"{model['slots']} slots"
    context = "its own context" if model["context_tokens"] is None else f"{model['context_tokens']} tokens"
    return f"{model['name']}: {slots} of {context} by {model['engine']}, {_speed(model['tokens_per_second'])}"


def _safety(engine: Mapping[str, Any]) -> str:
    return f" (not safe: {engine['detail']})" if engine["safe"] is False else ""


def _speed(tokens: int | None) -> str:
    return "unknown speed" if tokens is None else f"about {tokens} tokens/s for one answer"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
