"""MLX: `mlx_lm server`, on Apple silicon. Pure.

Its traps, each answered elsewhere by one rule: it does not exit when its port is taken, and stays alive
without a model (supervision: a start limit, an ownership check and a generated token); it looks any other
model name up on the hub (the gateway rewrites `model`); it speaks HTTP/1.0, so that a stream cut short looks
complete (the gateway asks for the end marker).

It tells nobody how many requests it works on, and its chat route closes a trailing message of the assistant's
and begins a new turn: no orphans are counted, no answers that were begun elsewhere are taken.
"""

from __future__ import annotations

from collections.abc import Mapping

from worker_agent.engines.spec import EngineSpec, Launch
from worker_agent.memory import Load, Need
from worker_agent.models.local import Format

_REMEMBERED_BYTES = 512 * 2**20
"""Of earlier prompts, beside what runs. By itself it keeps ten of any length."""

_PROGRAM_BYTES = 2**30
"""Measured with SmolLM2 135M on a CPU: 151 MiB beside the weights. The rest is for what a Mac adds, where it
was not measured: buffers of steps of 2048 tokens, which grow with the model, and freed ones that are kept."""

_ANSWER_TOKENS = 8192


def _argv(launch: Launch) -> list[str]:
    held = () if launch.need is None else ("--prompt-cache-bytes", str(_kept(launch.need.cache_bytes)))
    return [
        *(launch.python, "-m", "mlx_lm", "server", "--model", launch.model),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
        *("--decode-concurrency", str(launch.slots), "--prompt-concurrency", str(launch.slots)),
        *("--prompt-cache-size", str(max(10, 8 * launch.slots)), *held),
        # A request that does not say how long its answer may be would be cut at 512 tokens.
        *("--max-tokens", str(launch.context_tokens or _ANSWER_TOKENS)),
        # It has no key, and lets every web page read its answers unless told otherwise.
        *("--allowed-origins", "http://127.0.0.1"),
        *launch.args,
    ]


def _kept(cache_bytes: int) -> int:
    """What runs counts, too: it forgets earlier prompts as running ones grow."""
    return cache_bytes + _REMEMBERED_BYTES


def _environment(launch: Launch) -> Mapping[str, str]:
    if not launch.local:
        return {}
    # Its list of models is an empty page where the hub's cache folder does not exist: any folder will do.
    return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": launch.model}


def _need(load: Load) -> Need:
    return Need(
        weights_bytes=load.weights_bytes,
        cache_bytes=load.slots * load.context_tokens * load.token_bytes,
        overhead_bytes=_PROGRAM_BYTES + _REMEMBERED_BYTES + load.weights_bytes // 32,
        pool=load.pool,
    )


MLX = EngineSpec(
    name="mlx",
    argv=_argv,
    environment=_environment,
    secret_variable=None,
    ready_path="/health",
    start_limit_seconds=1800,  # the first start may download tens of GiB
    request_model=lambda _launch: "default_model",
    keep_alive=False,  # HTTP/1.0
    default_slots=4,
    default_context_tokens=None,
    read_context_tokens=lambda _model: None,
    formats=frozenset({Format.MLX, Format.SAFETENSORS, Format.HUB}),
    need=_need,
    install="uv sync --extra mlx",
    minimum_version="0.31",
    minimum_reason="older ones cannot bound what prompts may take, and came with an MLX whose reading"
    " of model files could be broken (CVE-2025-62608, CVE-2025-62609)",
    protected=frozenset({"--model", "--host", "--port", "--allowed-origins", "--trust-remote-code"}),
    by_setting={"--decode-concurrency": "slots", "--prompt-concurrency": "slots"},
)
