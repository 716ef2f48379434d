"""llama.cpp: a real `llama-server` from PATH, else the same server out of the `xllamacpp` wheel. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker_agent.engines.spec import Capacity, EngineSpec, Launch, positive, sum_of_metrics

_BATCH_TOKENS = 256
"""A prompt whose client left is dropped between two batches: 0.8 to 1 s later on one core, where 6 to 24 s
were seen at llama.cpp's default of 2048. It cost no prefill speed (2 cores, 135M model: 300 tokens/s, 305 at
512).
Not in our hands: llama.cpp looks for a client that left only after a second in which no other answer was
ready, so that beside running streams an abandoned prompt may be read to its end."""

_CACHE_MIB = 512
"""RAM for the prompts of idle slots. llama.cpp's default of 8 GiB is more than many machines have."""


def _argv(launch: Launch) -> list[str]:
    tokens = launch.context_tokens or LLAMA_CPP.default_context_tokens or 0
    if launch.program is None:
        return [
            *(launch.python, "-m", "worker_agent.engines.llama_cpp_runner"),
            *("--model", launch.model, "--alias", launch.name, "--port", str(launch.port)),
            *("--slots", str(launch.slots), "--context-tokens", str(tokens)),
            *("--threads", str(launch.threads)),
            *("--batch-tokens", str(_BATCH_TOKENS), "--cache-mib", str(_CACHE_MIB)),
        ]
    return [
        *(launch.program, "--model", launch.model, "--alias", launch.name),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
        *("--parallel", str(launch.slots), "--ctx-size", str(launch.slots * tokens)),
        *("--threads", str(launch.threads), "--threads-batch", str(launch.threads)),
        *("--batch-size", str(_BATCH_TOKENS), "--ubatch-size", str(_BATCH_TOKENS)),
        *("--cache-ram", str(_CACHE_MIB), "--metrics", "--slots", "--jinja", "--no-webui"),
    ]


def _context_tokens(model: Mapping[str, Any]) -> int | None:
    meta = model.get("meta")
    return positive(meta.get("n_ctx")) if isinstance(meta, Mapping) else None  # per slot


def _capacity(launch: Launch, context_tokens: int | None, _page: str) -> Capacity:
    """Each slot holds one context, and keeps its last prompt; older ones go to the cache in RAM."""
    if context_tokens is None:
        return Capacity()
    slots = launch.slots * context_tokens
    per_token = launch.cache_bytes_per_token
    in_ram = 0 if per_token is None else _CACHE_MIB * 2**20 // per_token
    return Capacity(memory_tokens=slots, cache_tokens=slots + in_ram)


LLAMA_CPP = EngineSpec(
    name="llama.cpp",
    argv=_argv,
    secret_variable="LLAMA_API_KEY",  # read by llama-server itself, and by our runner of the wheel
    ready_path="/health",
    start_limit_seconds=300,
    request_model=lambda launch: launch.name,
    keep_alive=False,
    default_slots=4,
    default_context_tokens=4096,
    read_context_tokens=_context_tokens,
    read_capacity=_capacity,
    busy_path="/metrics",
    read_busy=lambda page: sum_of_metrics(
        page, ("llamacpp:requests_processing", "llamacpp:requests_deferred")
    ),
    # It looks for a client that left only after a second in which it told nobody anything, nor this page.
    busy_pauses_seconds=(0.1, 0.3, 1.5),
    continue_chat=dict,  # a trailing message of the assistant's is taken as the beginning of its answer
)
