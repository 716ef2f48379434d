"""A balancer as its users run it, in front of workers that are there already."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from balancer.config_file import WorkerEntry
from benchmarks.processes import Started, free_ports, started
from tests.fakes.agent_gate import KEY

READY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Serving:
    """`balancer serve`, ready."""

    url: str
    started: Started
    data_dir: Path

    @property
    def admin_headers(self) -> dict[str, str]:
        """For what is asked under `/admin`."""
        return admin_headers(self.data_dir)


@asynccontextmanager
async def balancer(
    entries: Sequence[dict[str, Any]], folder: Path, **settings: object
) -> AsyncIterator[Serving]:
    """With these workers, all of which can generate. Raises `NotReady`."""
    config = folder / "balancer.json"
    config.write_bytes(orjson.dumps({"workers": entries} | settings))
    (port,) = free_ports(1)
    arguments = (
        *(sys.executable, "-m", "balancer", "serve", "--config", str(config), "--host", "127.0.0.1"),
        *("--port", str(port), "--no-mdns", "--data-dir", str(folder / "data")),
    )
    shared = {"BALANCER_CLUSTER_KEY": KEY}
    async with started(arguments, folder / "balancer.log", environment=shared) as one:
        url = f"http://127.0.0.1:{port}"
        await one.ready(lambda: workers_ready(url, len(entries)), READY_SECONDS)
        yield Serving(url, one, folder / "data")


def admin_headers(data_dir: Path) -> dict[str, str]:
    """With the admin key that a balancer has made in its data folder."""
    return {"Authorization": f"Bearer {(data_dir / 'admin_key').read_text().strip()}"}


async def workers_ready(url: str, count: int) -> bool:
    """The balancer knows so many workers that can generate."""
    with suppress(aiohttp.ClientError):
        async with aiohttp.ClientSession() as http, http.get(f"{url}/readyz") as response:
            return bool((await response.json())["workers_ready"] >= count)
    return False


def entry(number: int, url: str, slots: int | None) -> dict[str, Any]:
    """The file's line for the worker `w0`, `w1`, ... at that URL; `slots` is None for a fake agent, which
    speaks no TLS."""
    host, port = url.removeprefix("http://").split(":")
    one: dict[str, Any] = {"id": f"w{number}", "host": host, "port": int(port)}
    if slots is None:
        return one | {"type": "agent", "tls": False}
    one |= {"type": "openai", "max_concurrent_requests": slots}
    return one | ({"continues": True} if "continues" in WorkerEntry.model_fields else {})


def session() -> aiohttp.ClientSession:
    """For as many requests at once as there are, each as long as it takes."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    )
