"""llama-cpp-python's own server. Only for those who ask for it by name. Pure.

It works on one request after the other, and by itself cuts off the answer that runs when the next request
comes, with status 200: hence `--interrupt_requests false`. It tells neither how busy it is nor what it holds,
and its streams carry no usage.
"""

from __future__ import annotations

from worker_agent.engines.spec import EngineSpec, Launch
from worker_agent.memory import Load, Need
from worker_agent.models.local import Format

_BATCH_TOKENS = 256
_PROGRAM_BYTES = 256 * 2**20
"""Measured on Linux x86_64 (0.3.36, SmolLM2 135M, context 2048): 130 MiB without weights and cache."""
_SCORES_BYTES = _BATCH_TOKENS * 262_144 * 4
"""It keeps the scores of every word for each token of a batch; without `--logits_all false` for each token of
the context. 262,144 is the largest vocabulary in use."""


def _argv(launch: Launch) -> list[str]:
    tokens = launch.context_tokens or LLAMA_CPP_PYTHON.default_context_tokens or 0
    return [
        *(launch.python, "-m", "llama_cpp.server", "--model", launch.model, "--model_alias", launch.name),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
        *("--n_ctx", str(tokens), "--n_batch", str(_BATCH_TOKENS), "--logits_all", "false"),
        *("--n_threads", str(launch.threads), "--n_threads_batch", str(launch.threads)),
        *("--n_gpu_layers", "-1" if launch.offload else "0"),
        *("--interrupt_requests", "false", *launch.args),
    ]


def _need(load: Load) -> Need:
    return Need(
        weights_bytes=load.weights_bytes,
        cache_bytes=load.context_tokens * load.token_bytes,  # one request at a time, whatever is wished
        overhead_bytes=_PROGRAM_BYTES + _SCORES_BYTES + load.weights_bytes // 64,
        pool=load.pool,
    )


LLAMA_CPP_PYTHON = EngineSpec(
    name="llama-cpp-python",
    argv=_argv,
    secret_variable="API_KEY",
    # Its list of models waits until the answer that runs has ended; this page comes at once, and like all of
    # them not before the model is loaded.
    ready_path="/openapi.json",
    start_limit_seconds=300,
    request_model=lambda launch: launch.name,
    keep_alive=False,  # after a prompt that is too long it closes, having promised not to
    default_slots=1,
    default_context_tokens=4096,
    most_slots=1,
    read_context_tokens=lambda _model: None,
    formats=frozenset({Format.GGUF}),
    need=_need,
    install="uv sync --extra llama-cpp-python (compiles llama.cpp: minutes)",
    minimum_version="0.3.36",
    minimum_reason="it is the one that this project is tested with",
    protected=frozenset(
        {
            *("--host", "--port", "--api-key", "--ssl-keyfile", "--ssl-certfile", "--root-path"),
            *("--model", "--model-alias", "--config-file", "--interrupt-requests", "--rpc-servers"),
            *("--hf-model-repo-id", "--hf-pretrained-model-name-or-path", "--hf-tokenizer-config-path"),
        }
    ),
    by_setting={"--n-ctx": "context_tokens", "--n-threads": "threads", "--n-threads-batch": "threads"},
    protected_variables=(
        "HOST",
        "PORT",
        "CONFIG_FILE",
        "MODEL",
        "MODEL_ALIAS",
        "N_CTX",
        "INTERRUPT_REQUESTS",
    ),
)
