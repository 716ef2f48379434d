"""Runs llama.cpp's own HTTP server out of the `xllamacpp` wheel: for machines without `llama-server`.

    LLAMA_API_KEY=... python -m worker_agent.engines.llama_cpp_runner --model FILE --alias NAME --port N ...

The secret comes by environment (other users of the machine can read an argv). The process ends with code 1
where the model cannot be loaded or the port is taken, and by SIGTERM's default action otherwise: there is
nothing to save, so there is no handler that could hang.

Beside what the agent says it takes those of llama-server's flags that people need, by their names there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llama_cpp_runner", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--alias", required=True, help="the model's name in answers")
    parser.add_argument("--port", type=int, required=True, help="on 127.0.0.1")
    parser.add_argument("--slots", type=int, required=True, help="requests decoded at once")
    parser.add_argument("--context-tokens", type=int, required=True, help="per slot")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", "-b", type=int, required=True, help="prefill step")
    parser.add_argument("--ubatch-size", "-ub", type=int, help="as the step unless given")
    parser.add_argument("--cache-ram", "-cram", type=int, required=True, help="MiB for prompts of idle slots")
    parser.add_argument("--ctx-checkpoints", "-ctxcp", type=int, default=32)
    parser.add_argument("--checkpoint-min-step", "-cms", type=int)
    parser.add_argument("--cache-reuse", type=int)
    parser.add_argument("--flash-attn", "-fa", choices=("on", "off", "auto"), default="auto")
    parser.add_argument("--n-gpu-layers", "--gpu-layers", "-ngl", type=int)
    parser.add_argument("--main-gpu", "-mg", type=int)
    parser.add_argument("--split-mode", "-sm", choices=("none", "layer", "row"))
    parser.add_argument("--tensor-split", "-ts", help="3,1")
    parser.add_argument("--cache-type-k", "-ctk", help="f16, q8_0, q4_0 ...")
    parser.add_argument("--cache-type-v", "-ctv", help="f16, q8_0, q4_0 ...")
    parser.add_argument("--kv-unified", "-kvu", action="store_true", help="one cache for all slots")
    parser.add_argument("--kv-unified-per-slot", type=int)
    parser.add_argument("--swa-full", action="store_true")
    parser.add_argument("--load-mode", "-lm", choices=("auto", "none", "mmap", "mlock", "mmap+mlock", "dio"))
    parser.add_argument("--no-repack", "-nr", action="store_true")
    parser.add_argument("--rope-freq-base", type=float)
    parser.add_argument("--rope-freq-scale", type=float)
    parser.add_argument("--chat-template", help="a Jinja template")
    parser.add_argument("--chat-template-file", help="a file with one")
    parser.add_argument("--mmproj", "-mm", help="a projector's GGUF file, for models that see")
    return parser.parse_args(argv)


def _parameters(given: argparse.Namespace, xllamacpp: Any) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = {given.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = given.port
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.n_parallel = given.slots
    params.n_ctx = given.slots * given.context_tokens
    params.n_batch = given.batch_size
    params.n_ubatch = given.ubatch_size or given.batch_size
    params.cache_ram_mib = given.cache_ram
    params.n_ctx_checkpoints = given.ctx_checkpoints
    params.cpuparams.n_threads = given.threads
    params.cpuparams_batch.n_threads = given.threads
    params.flash_attn_type = {
        "on": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "off": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        "auto": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO,
    }[given.flash_attn]
    params.kv_unified, params.swa_full, params.no_extra_bufts = (
        given.kv_unified,
        given.swa_full,
        given.no_repack,
    )
    params.endpoint_metrics = params.endpoint_slots = params.endpoint_props = True
    params.use_jinja = True
    params.ui = False
    params.offline = True
    _set_where_given(params, given, xllamacpp)
    return params


def _set_where_given(params: Any, given: argparse.Namespace, xllamacpp: Any) -> None:
    plain = {
        "checkpoint_min_step": given.checkpoint_min_step,
        "n_cache_reuse": given.cache_reuse,
        "n_gpu_layers": given.n_gpu_layers,
        "main_gpu": given.main_gpu,
        "kv_unified_per_slot": given.kv_unified_per_slot,
        "rope_freq_base": given.rope_freq_base,
        "rope_freq_scale": given.rope_freq_scale,
        "chat_template": given.chat_template,
    }
    for name, value in plain.items():
        if value is not None:
            setattr(params, name, value)
    if given.chat_template_file is not None:
        with open(given.chat_template_file, encoding="utf-8") as file:
            params.chat_template = file.read()
    if given.mmproj is not None:
        params.mmproj.path = given.mmproj
    if given.tensor_split is not None:
        shares = [float(share) for share in given.tensor_split.split(",")]
        params.tensor_split = shares + [0.0] * (len(params.tensor_split) - len(shares))
    for name, kind in (("cache_type_k", given.cache_type_k), ("cache_type_v", given.cache_type_v)):
        if kind is not None:
            setattr(params, name, _member(xllamacpp.ggml_type, f"GGML_TYPE_{kind}"))
    if given.split_mode is not None:
        params.split_mode = _member(xllamacpp.llama_split_mode, f"LLAMA_SPLIT_MODE_{given.split_mode}")
    if given.load_mode is not None:
        mode = given.load_mode.replace("+", "_").replace("dio", "direct_io")
        params.load_mode = _member(xllamacpp.llama_load_mode, f"LLAMA_LOAD_MODE_{mode}")


def _member(kind: Any, name: str) -> Any:
    found = next((member for member in kind if member.name.lower() == name.lower()), None)
    if found is None:
        raise ValueError(f"it knows no {name}")
    return found


def main(argv: Sequence[str]) -> int:
    """Serves until it is told to stop; 1 when it cannot."""
    given = _arguments(argv)
    import xllamacpp  # here, so that wrong arguments do not wait for 40 MB of library

    try:
        server = xllamacpp.Server(_parameters(given, xllamacpp))
    except (RuntimeError, OSError, ValueError) as error:
        print(f"llama.cpp did not start: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the agent reads it
        return 1
    print(f"llama.cpp serves on {server.listening_address}", file=sys.stderr, flush=True)  # noqa: T201
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
