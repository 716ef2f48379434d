"""vLLM, on NVIDIA GPUs. Pure."""

from __future__ import annotations

from worker_agent.engines.spec import EngineSpec, Launch, positive


def _argv(launch: Launch) -> list[str]:
    context = () if launch.context_tokens is None else ("--max-model-len", str(launch.context_tokens))
    return [
        *(launch.python, "-m", "vllm.entrypoints.cli.main", "serve", launch.model),
        *("--served-model-name", launch.name),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
        *("--max-num-seqs", str(launch.slots), *context),
        "--enable-prompt-tokens-details",  # without it usage does not say what came from the prefix cache
    ]


VLLM = EngineSpec(
    name="vllm",
    argv=_argv,
    # vLLM reports its use to its makers unless told otherwise.
    environment=lambda _launch: {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
    secret_variable="VLLM_API_KEY",
    ready_path="/health",
    start_limit_seconds=1800,  # a download, then minutes of compiling and graph capture
    request_model=lambda launch: launch.name,
    keep_alive=True,
    default_slots=32,
    default_context_tokens=None,
    read_context_tokens=lambda model: positive(model.get("max_model_len")),
)
