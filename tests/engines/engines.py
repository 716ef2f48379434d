"""The engines that the contract is held to, one row each: how it is started here, and what it can do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from worker_agent import installed

VLLM_VARIABLES = {
    # Memory for keys and values on a CPU, in GiB: by itself vLLM takes half of the machine's.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # A minute of compiling at each start, which CPU builds do not keep. --enforce-eager does the same.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
HOW = "tests/engines/README.md says how to make it"


def told(variable: str) -> Path:
    """The path in this variable of the environment; skips the test, and says how, where there is none."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: {HOW}")
    path = Path(value).expanduser()
    if not path.exists():
        pytest.fail(f"{variable} names {path}, which does not exist: {HOW}")
    return path.absolute()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How the agent is started so that it runs this engine."""

    python: Path
    model: Path | None
    """None: the embedded one."""
    variables: Mapping[str, str] = field(default_factory=dict)


class LongPrompts(Enum):
    """What becomes of a prompt that is longer than the context."""

    REFUSED = "refused"
    """With status 400."""
    BROKEN_OFF = "broken off"
    """A stream is begun, and ends without a word or an end mark."""
    TAKEN = "taken"
    """The engine has no limit of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealEngine:
    """One row: what the contract may expect of it."""

    mark: str
    name: str
    """As the agent calls it."""
    find: Callable[[], Start]
    """Skips, and says how to make it, where this machine has none."""
    slots: int
    context_tokens: int
    """Per request, as it is reported."""
    tells_memory: bool = True
    """It says how many tokens it holds."""
    continues: bool = True
    """It goes on with an answer that was begun elsewhere."""
    usage_in_streams: bool = True
    busy: tuple[str, ...] = ()
    """Its own counts of requests that it works on or that wait in it; none: it does not count."""
    read: str | None = None
    """Its own count of prompt tokens that were read."""
    made: str | None = None
    """Its own count of tokens that were generated."""
    rests_by_clock: bool = True
    """That it does nothing shows in its processes' use of the processor; else only in its counts."""
    drops_prompts: bool = True
    """It reads a prompt no further when the client has left."""
    long_prompts: LongPrompts = LongPrompts.REFUSED
    prompt_repeats: int = 150
    """Of a ten-token sentence: a prompt that takes it seconds to read."""
    start_seconds: float = 60.0


def embedded_model() -> Path:
    """The GGUF of the quick start; skips the test where it is not installed."""
    model = installed.detect().embedded_model
    if model is None:
        pytest.skip("the embedded model is not installed. Type: uv sync --group quickstart")
    return Path(model)


def _without_llama_server() -> str:
    """PATH without the folders that have one, which the agent would prefer to the wheel."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder) / "llama-server").exists())


def _wheel() -> Start:
    return Start(
        python=Path(sys.executable), model=embedded_model(), variables={"PATH": _without_llama_server()}
    )


def _llama_server() -> Start:
    where = os.environ.get("WORKER_AGENT_TEST_LLAMA_SERVER") or shutil.which("llama-server")
    if where is None:
        pytest.skip(f"no llama-server on PATH, nor in WORKER_AGENT_TEST_LLAMA_SERVER: {HOW}")
    program = Path(where).expanduser()
    if program.name != "llama-server" or not os.access(program, os.X_OK):
        pytest.fail(f"{program} is no executable called llama-server: {HOW}")
    path = f"{program.absolute().parent}{os.pathsep}{os.environ['PATH']}"
    return Start(python=Path(sys.executable), model=embedded_model(), variables={"PATH": path})


def _llama_cpp_python() -> Start:
    return Start(python=told("WORKER_AGENT_TEST_LLAMA_CPP_PYTHON") / "python", model=embedded_model())


def _mlx() -> Start:
    python, model = told("WORKER_AGENT_TEST_MLX") / "python", told("WORKER_AGENT_TEST_MLX_MODEL")
    blas = os.environ.get("WORKER_AGENT_TEST_MLX_BLAS")
    variables = {"LD_PRELOAD": blas, "OPENBLAS_NUM_THREADS": "1"} if blas else {}
    # Without a hub cache: `GET /v1/models` does not survive that.
    return Start(python=python, model=model, variables={"HF_HUB_CACHE": str(model / "none"), **variables})


def _vllm() -> Start:
    python, model = told("WORKER_AGENT_TEST_VLLM") / "python", told("WORKER_AGENT_TEST_VLLM_MODEL")
    return Start(python=python, model=model, variables=VLLM_VARIABLES)


_LLAMA_CPP_COUNTS = ("llamacpp:requests_processing", "llamacpp:requests_deferred")

REAL_ENGINES = (
    RealEngine(
        mark="real_engine",
        name="llama.cpp",
        find=_wheel,
        slots=2,
        context_tokens=2048,
        busy=_LLAMA_CPP_COUNTS,
        read="llamacpp:prompt_tokens_total",
        made="llamacpp:tokens_predicted_total",
    ),
    RealEngine(
        mark="llama_server",
        name="llama.cpp",
        find=_llama_server,
        slots=2,
        context_tokens=2048,
        busy=_LLAMA_CPP_COUNTS,
        read="llamacpp:prompt_tokens_total",
        made="llamacpp:tokens_predicted_total",
    ),
    RealEngine(
        mark="llama_cpp_python",
        name="llama-cpp-python",
        find=_llama_cpp_python,
        slots=1,
        context_tokens=2048,
        tells_memory=False,
        continues=False,
        usage_in_streams=False,
        drops_prompts=False,
        long_prompts=LongPrompts.BROKEN_OFF,
    ),
    RealEngine(
        mark="mlx",
        name="mlx",
        find=_mlx,
        slots=2,
        context_tokens=2048,
        tells_memory=False,
        continues=False,
        drops_prompts=False,  # it reads up to 2048 tokens in one step
        long_prompts=LongPrompts.TAKEN,
    ),
    RealEngine(
        mark="vllm",
        name="vllm",
        find=_vllm,
        slots=2,
        context_tokens=8192,
        busy=("vllm:num_requests_running", "vllm:num_requests_waiting"),
        read="vllm:prompt_tokens_total",
        made="vllm:generation_tokens_total",
        rests_by_clock=False,
        prompt_repeats=750,
        start_seconds=400.0,
    ),
)
