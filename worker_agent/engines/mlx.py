"""MLX: `mlx_lm server`, on Apple silicon. Pure.

Its traps, each answered elsewhere by one rule: it does not exit when its port is taken, and stays alive
without a model (supervision: a start limit, an ownership check and a generated token); it looks any other
model name up on the hub (the gateway rewrites `model`); it speaks HTTP/1.0, so that a stream cut short looks
complete (the gateway asks for the end marker).

It tells nobody how many requests it works on, and its chat route closes a trailing message of the assistant's
and begins a new turn: no orphans are counted, no answers that were begun elsewhere are taken.
"""

from __future__ import annotations

from worker_agent.engines.spec import EngineSpec, Launch


def _argv(launch: Launch) -> list[str]:
    return [
        *(launch.python, "-m", "mlx_lm", "server", "--model", launch.model),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
        *("--decode-concurrency", str(launch.slots), "--prompt-concurrency", str(launch.slots)),
    ]


MLX = EngineSpec(
    name="mlx",
    argv=_argv,
    secret_variable=None,
    ready_path="/health",
    start_limit_seconds=1800,  # the first start may download tens of GiB
    request_model=lambda _launch: "default_model",
    keep_alive=False,  # HTTP/1.0
    default_slots=4,
    default_context_tokens=None,
    read_context_tokens=lambda _model: None,
)
