"""A real balancer on a real port, in the loop of the test, over fake engines or real ones."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from openai import AsyncOpenAI

from balancer.app import Running, running
from balancer.core.dispatcher import WorkerView
from balancer.settings import load
from tests.fakes.agent_gate import KEY
from tests.fakes.engine import FakeEngine

WAIT_SECONDS = 20.0
"""After which a test that waits for a condition gives up."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Room:
    """A running balancer, and the clients that a test needs."""

    balancer: Running
    http: aiohttp.ClientSession
    openai: AsyncOpenAI
    data_dir: Path
    config: Path
    """The JSON file."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.balancer.port}"

    def worker(self, name: str) -> WorkerView:
        return next(view for view in self.balancer.snapshot().workers if view.worker.id == name)

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Waits until it holds; TimeoutError says what did not."""
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not holds():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise TimeoutError(f"not within {WAIT_SECONDS:g} s: {what}; {self.balancer.snapshot()}") from None

    async def ready(self, count: int = 1) -> None:
        await self.until(
            lambda: sum(view.state == "ready" for view in self.balancer.snapshot().workers) >= count,
            f"{count} workers ready",
        )

    async def idle(self) -> None:
        """Nothing waits, nothing runs: every slot was given back."""

        def holds() -> bool:
            room = self.balancer.snapshot()
            return room.running == room.waiting == 0 and not any(view.running for view in room.workers)

        await self.until(holds, "an idle room")

    @property
    def admin_headers(self) -> dict[str, str]:
        """Of who has the admin key."""
        return {"Authorization": f"Bearer {(self.data_dir / 'admin_key').read_text().strip()}"}

    async def admin(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON of an answer under `/admin`, asked for with the key."""
        async with self.http.request(
            method, f"{self.url}/admin{path}", json=body, headers=self.admin_headers
        ) as response:
            return response.status, await response.json()

    async def metrics(self) -> str:
        async with self.http.get(f"{self.url}/metrics") as response:
            return await response.text()


OpenRoom = Callable[..., AbstractAsyncContextManager[Room]]


def listed(engine: FakeEngine, name: str, **more: Any) -> dict[str, Any]:
    """A worker's entry in the JSON file. A fake that plays an agent speaks no TLS."""
    address = urlsplit(engine.url)
    plain = {"tls": False} if more.get("type") == "agent" else {}
    return {"id": name, "host": address.hostname, "port": address.port, "type": "openai"} | plain | more


def keep_cluster_key(data_dir: Path) -> None:
    """The balancer that starts there holds the key of the agents that are fakes, or were given `KEY`."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = data_dir / "cluster_key"
    if not file.exists():
        file.touch(0o600)
        file.write_text(f"{KEY}\n")


@pytest.fixture
def open_room(tmp_path: Path) -> OpenRoom:
    """`async with open_room(engine, engine, ..., setting=value) as room`: workers a, b, c ... of type openai;
    or rows for the JSON file in place of engines."""

    @asynccontextmanager
    async def opened(*workers: FakeEngine | dict[str, Any], **settings: Any) -> AsyncIterator[Room]:
        rows = [
            listed(worker, chr(ord("a") + number)) if isinstance(worker, FakeEngine) else worker
            for number, worker in enumerate(workers)
        ]
        port = settings.pop("port", None) or free_port()
        flags = {"host": "127.0.0.1", "port": port, "mdns": False, "data_dir": tmp_path / "data"}
        # A test that writes the file says itself when it is to be read, or asks for it to be watched.
        flags["watch_config"] = settings.pop("watch_config", False)
        keep_cluster_key(tmp_path / "data")
        file = tmp_path / f"balancer-{free_port()}.json"
        file.write_text(json.dumps({"workers": rows, "health_check_interval": 0.2} | settings))
        async with running(load(file, flags)) as balancer, aiohttp.ClientSession() as http:
            async with AsyncOpenAI(
                base_url=f"http://127.0.0.1:{balancer.port}/v1", api_key="none", max_retries=0
            ) as client:
                room = Room(balancer, http, client, tmp_path / "data", file)
                if workers:
                    await room.ready(sum(isinstance(worker, FakeEngine) for worker in workers))
                yield room

    return opened
