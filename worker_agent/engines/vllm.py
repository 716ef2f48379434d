"""vLLM, on NVIDIA GPUs. Pure."""

from __future__ import annotations

import re

from worker_agent.engines.spec import Capacity, EngineSpec, Launch, positive, sum_of_metrics

_CACHE = re.compile(r"^vllm:cache_config_info\{([^\n]{1,8192})\}", re.MULTILINE)


def _argv(launch: Launch) -> list[str]:
    context = () if launch.context_tokens is None else ("--max-model-len", str(launch.context_tokens))
    return [
        *(launch.python, "-m", "vllm.entrypoints.cli.main", "serve", launch.model),
        *("--served-model-name", launch.name),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
        *("--max-num-seqs", str(launch.slots), *context),
        "--enable-prompt-tokens-details",  # without it usage does not say what came from the prefix cache
    ]


def _capacity(_launch: Launch, _context_tokens: int | None, metrics: str) -> Capacity:
    """The KV cache, known once the engine has measured what memory is left; it is memory and cache in one."""
    found = _CACHE.search(metrics)
    # A count that it does not have yet is the text "None".
    labels = dict(re.findall(r'(\w+)="(\d{1,12})"', found[1])) if found else {}
    # Where layers differ, a block is not so many tokens of all of them: newer versions count themselves.
    blocks = int(labels.get("num_gpu_blocks", 0)) * int(labels.get("block_size", 0))
    tokens = int(labels.get("kv_cache_size_tokens", blocks))
    return Capacity(memory_tokens=positive(tokens), cache_tokens=positive(tokens))


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
    capacity_path="/metrics",
    read_capacity=_capacity,
    busy_path="/metrics",
    read_busy=lambda page: sum_of_metrics(page, ("vllm:num_requests_running", "vllm:num_requests_waiting")),
    continue_chat=lambda body: {**body, "continue_final_message": True, "add_generation_prompt": False},
)
