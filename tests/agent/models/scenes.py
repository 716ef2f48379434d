"""What the tests of downloads share: small models as a hub has them, and one download as a process."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes.hub import FakeHub

GGUF_REPO = "org/Tiny-GGUF"
FOLDER_REPO = "org/Tiny"
CHECKOUT = Path(__file__).parents[3]


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that are everywhere different, so that a piece in the wrong place shows."""
    return random.Random(seed).randbytes(size)


def gguf(size: int = 300_000, seed: int = 1) -> bytes:
    """Begins as a GGUF file does."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + noise(size, seed)


def transformers_folder(**more: bytes) -> dict[str, bytes]:
    """A model as transformers lays it out, beside what is never fetched."""
    return {
        "config.json": json.dumps({"num_hidden_layers": 2}).encode(),
        "tokenizer_config.json": b"{}",
        "tokenizer.json": noise(5000),
        "model-00001-of-00002.safetensors": noise(200_000, 2),
        "model-00002-of-00002.safetensors": noise(100_000, 3),
        "model.safetensors.index.json": b"{}",
        "pytorch_model.bin": b"a pickle",
        "modeling_tiny.py": b"import os",
        "README.md": b"# Tiny",
        **more,
    }


@dataclass(frozen=True)
class Ended:
    """A download's process when it has ended."""

    code: int
    lines: list[dict[str, Any]]
    output: str

    @property
    def why(self) -> str:
        return "".join(line.get("failed", "") for line in self.lines)


def order(hub: FakeHub, folder: Path, repo: str = GGUF_REPO, **more: Any) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "endpoint": hub.endpoint,
        "repo": repo,
        "name": "tiny",
        "formats": ["gguf", "safetensors"],
        "margin_bytes": 0,
        "retry_seconds": 0.0,
        **more,
    }


def environment(token: str | None = None, *, measured: bool = True) -> dict[str, str]:
    """`measured`: the process tells coverage what of the code it has run."""
    left_out = ("HF_",) if measured else ("HF_", "COVERAGE_")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return ours if token is None else {**ours, "HF_TOKEN": token}


def _argv(wanted: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "worker_agent.models.download", json.dumps(wanted)]


@contextlib.contextmanager
def fetching(hub: FakeHub, folder: Path, repo: str = GGUF_REPO) -> Iterator[subprocess.Popen[str]]:
    """The same while it runs; ended with the block."""
    argv = _argv(order(hub, folder, repo))
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, env=environment(), cwd=CHECKOUT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def fetch(
    hub: FakeHub,
    folder: Path,
    repo: str = GGUF_REPO,
    *,
    token: str | None = None,
    preexec: Callable[[], None] | None = None,
    **more: Any,
) -> Ended:
    """One download as a process of its own, to its end."""
    process = subprocess.run(
        _argv(order(hub, folder, repo, **more)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(token, measured=preexec is None),  # a limit would cut off coverage's own file, too
        cwd=CHECKOUT,
        timeout=90,
        preexec_fn=preexec,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    return Ended(process.returncode, lines, process.stdout)


def files_in(folder: Path) -> set[str]:
    """Everything that is not a folder, links included, by its path below."""
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
