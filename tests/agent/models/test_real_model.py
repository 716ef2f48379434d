"""A real model from the fake hub, really loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from fakes.hub import FakeHub, Faults

from agent.models.scenes import GGUF_REPO, fetch
from agent.scenes import wait_until
from worker_agent import installed
from worker_agent.engines.llama_cpp import LLAMA_CPP
from worker_agent.engines.spec import Launch
from worker_agent.models.catalog import Catalog
from worker_agent.readiness import free_port

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(300)]


def asked(port: int, path: str, body: dict[str, object] | None = None) -> dict[str, object] | None:
    """The answer; None: there is none yet."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer secret"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            found: dict[str, object] = json.load(response)
            return found
    except urllib.error.URLError:
        return None


def test_a_model_that_came_in_two_pieces_answers(hub: FakeHub, tmp_path: Path) -> None:
    embedded = installed.detect().embedded_model
    if embedded is None:
        pytest.skip("the embedded model is not installed")
    content = Path(embedded).read_bytes()
    file = "SmolLM2-135M-Instruct-Q4_1.gguf"
    hub.add(GGUF_REPO, {file: content}, faults={file: Faults(cuts=[len(content) // 2])})
    assert fetch(hub, tmp_path, name="smol").code == 0
    (model,) = Catalog(tmp_path).scan()
    assert model.facts.cache_bytes_per_token == 30 * 3 * 2 * 64 * 2
    port = free_port()
    launch = Launch(
        python=sys.executable,
        model=model.path,
        name=model.name,
        port=port,
        slots=1,
        context_tokens=512,
        threads=1,
    )
    engine = subprocess.Popen(LLAMA_CPP.argv(launch), env={**os.environ, "LLAMA_API_KEY": "secret"})
    try:
        wait_until(lambda: asked(port, "/health"), seconds=120)
        answer = asked(port, "/v1/completions", {"prompt": "One, two, three,", "max_tokens": 4})
        assert answer is not None
        assert answer["model"] == "smol"
    finally:
        engine.kill()
        engine.wait()
