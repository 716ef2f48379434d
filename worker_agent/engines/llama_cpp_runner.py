"""Runs llama.cpp's own HTTP server out of the `xllamacpp` wheel: for machines without `llama-server`.

    LLAMA_API_KEY=... python -m worker_agent.engines.llama_cpp_runner --model FILE --alias NAME --port N ...

The secret comes by environment (other users of the machine can read an argv). The process ends with code 1
where the model cannot be loaded or the port is taken, and by SIGTERM's default action otherwise: there is
nothing to save, so there is no handler that could hang.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llama_cpp_runner", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--alias", required=True, help="the model's name in answers")
    parser.add_argument("--port", type=int, required=True, help="on 127.0.0.1")
    parser.add_argument("--slots", type=int, required=True, help="requests decoded at once")
    parser.add_argument("--context-tokens", type=int, required=True, help="per slot")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, required=True, help="prefill step")
    parser.add_argument("--cache-mib", type=int, required=True, help="RAM for the prompts of idle slots")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Serves until it is told to stop; 1 when it cannot."""
    given = _arguments(argv)
    import xllamacpp  # here, so that wrong arguments do not wait for 40 MB of library

    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = {given.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = given.port
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.n_parallel = given.slots
    params.n_ctx = given.slots * given.context_tokens
    params.n_batch = params.n_ubatch = given.batch_tokens
    params.cache_ram_mib = given.cache_mib
    params.cpuparams.n_threads = given.threads
    params.cpuparams_batch.n_threads = given.threads
    params.endpoint_metrics = params.endpoint_slots = params.endpoint_props = True
    params.use_jinja = True
    params.ui = False
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, OSError, ValueError) as error:
        print(f"llama.cpp did not start: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the agent reads it
        return 1
    print(f"llama.cpp serves on {server.listening_address}", file=sys.stderr, flush=True)  # noqa: T201
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
