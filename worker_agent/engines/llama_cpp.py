"""llama.cpp: a real `llama-server` from PATH, else the same server out of the `xllamacpp` wheel. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker_agent.engines.spec import Capacity, EngineSpec, Launch, positive, sum_of_metrics
from worker_agent.memory import Load, Need, Pool
from worker_agent.models.local import Format

_BATCH_TOKENS = 256
"""A prompt whose client left is dropped between two batches: 0.8 to 1 s later on one core, where 6 to 24 s
were seen at llama.cpp's default of 2048. It cost no prefill speed (2 cores, 135M model: 300 tokens/s, 305 at
512).
Not in our hands: llama.cpp looks for a client that left only after a second in which no other answer was
ready, so that beside running streams an abandoned prompt may be read to its end."""

_CACHE_MIB = 512
"""RAM for the prompts of idle slots. llama.cpp's default of 8 GiB is more than many machines have."""

_CHECKPOINTS = 4
"""Of a slot's state, for models that look at a window only; each takes a window's keys and values. At
llama.cpp's default of 32 they alone can take more than the cache itself."""

_ALL_LAYERS = "999"

_PROGRAM_BYTES = 160 * 2**20
_BUFFERS_PER_WEIGHTS = 1 / 64
"""Measured on Linux x86_64 (xllamacpp 2026.10.11549, batches of 256 tokens, flash attention, no cache of
prompts), resident memory without weights and cache: 55 MiB with SmolLM2 135M, 66 MiB once all slots had read
prompts; 137 MiB for a model of 7B width with a vocabulary of 152k, of which 74 MiB came with its first long
prompt. Without flash attention it was 124 MiB more at a context of 4096.
Weights are counted once: where llama.cpp rearranges them for the processor (Q4_0: 542 MiB of 838 MiB beside
the mapped file), the file's own pages are given back as memory gets short."""

_GPU_BYTES = 768 * 2**20
"""Of a GPU's memory beside weights and cache: the driver's context and compute buffers. Not measured here."""


def _argv(launch: Launch) -> list[str]:
    tokens = launch.context_tokens or LLAMA_CPP.default_context_tokens or 0
    layers = ("--n-gpu-layers", _ALL_LAYERS) if launch.offload else ()
    if launch.program is None:
        return [
            *(launch.python, "-m", "worker_agent.engines.llama_cpp_runner"),
            *("--model", launch.model, "--alias", launch.name, "--port", str(launch.port)),
            *("--slots", str(launch.slots), "--context-tokens", str(tokens)),
            *("--threads", str(launch.threads), "--batch-size", str(_BATCH_TOKENS)),
            *("--cache-ram", str(_CACHE_MIB), "--ctx-checkpoints", str(_CHECKPOINTS)),
            *("--flash-attn", "auto", *layers, *launch.args),
        ]
    return [
        *(launch.program, "--model", launch.model, "--alias", launch.name),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
        *("--parallel", str(launch.slots), "--ctx-size", str(launch.slots * tokens)),
        *("--threads", str(launch.threads), "--threads-batch", str(launch.threads)),
        *("--batch-size", str(_BATCH_TOKENS), "--ubatch-size", str(_BATCH_TOKENS)),
        *("--cache-ram", str(_CACHE_MIB), "--ctx-checkpoints", str(_CHECKPOINTS)),
        *("--flash-attn", "auto", *layers),
        *("--metrics", "--slots", "--jinja", "--no-webui", "--offline", *launch.args),
    ]


def _environment(launch: Launch) -> Mapping[str, str]:
    if not launch.devices:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, launch.devices))}


def _need(load: Load) -> Need:
    """A slot's share of the cache is its own (`--kv-unified` is not given): one answer that grows never ends
    those beside it, as it does in a cache for all. The cache of prompts keeps at least one, however long."""
    context = load.context_tokens * load.token_bytes
    overhead = (
        _GPU_BYTES * load.devices
        if load.pool is Pool.VRAM  # what it keeps in RAM besides is not counted: pages of a file, mostly
        else _PROGRAM_BYTES + _CACHE_MIB * 2**20 + context
    )
    return Need(
        weights_bytes=load.weights_bytes,
        cache_bytes=load.slots * context,
        overhead_bytes=overhead + int(load.weights_bytes * _BUFFERS_PER_WEIGHTS),
        pool=load.pool,
    )


def _context_tokens(model: Mapping[str, Any]) -> int | None:
    meta = model.get("meta")
    return positive(meta.get("n_ctx")) if isinstance(meta, Mapping) else None  # per slot


def _capacity(launch: Launch, context_tokens: int | None, _page: str) -> Capacity:
    """Each slot holds one context, and keeps its last prompt; older ones go to the cache in RAM.

    Where the user gives `--kv-unified` one request may take more than a slot's share; all together hold the
    same.
    """
    if context_tokens is None:
        return Capacity()
    slots = launch.slots * min(context_tokens, launch.context_tokens or context_tokens)
    per_token = launch.cache_bytes_per_token
    in_ram = 0 if per_token is None else _CACHE_MIB * 2**20 // per_token
    return Capacity(memory_tokens=slots, cache_tokens=slots + in_ram)


LLAMA_CPP = EngineSpec(
    name="llama.cpp",
    argv=_argv,
    environment=_environment,
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
    formats=frozenset({Format.GGUF}),
    need=_need,
    install="uv sync --extra llama-cpp (or install llama-server on PATH)",
    minimum_version="b11393",
    minimum_reason="a chat message could break older ones' memory (CVE-2026-107183), and a GGUF file those"
    " before b8146 (CVE-2026-27940)",
    protected=frozenset(
        {
            *("--host", "--port", "--reuse-port", "--path", "--api-prefix", "--api-key", "--api-key-file"),
            *("--ssl-key-file", "--ssl-cert-file", "--cors-origins", "--cors-credentials"),
            *("-m", "--model", "-a", "--alias", "-mu", "--model-url", "-hf", "-hfr", "--hf-repo"),
            *("-hff", "--hf-file", "-dr", "--docker-repo", "-mmu", "--mmproj-url"),
            *("--models-dir", "--models-preset", "--models-max", "--models-autoload"),
            *("--rpc", "--slot-save-path", "--media-path", "--log-prompts-dir"),
            *("--tools", "--tools-runtime", "-ag", "--agent", "--mcp-servers-config", "--mcp-servers-json"),
            *("--ui-mcp-proxy", "--webui-mcp-proxy", "--webui", "--ui"),
        }
    ),
    by_setting={
        **dict.fromkeys(("-np", "--parallel", "--slots"), "slots"),
        **dict.fromkeys(("-c", "--ctx-size", "--context-tokens"), "context_tokens"),
        **dict.fromkeys(("-t", "--threads", "-tb", "--threads-batch"), "threads"),
    },
    protected_variables=("LLAMA_ARG_",),
)
