"""A balancer in a thread of its own, for tests whose tools wait for answers in theirs."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from balancer.app import Running, running
from balancer.settings import load
from tests.e2e.conftest import free_port, listed
from tests.fakes.engine import FakeEngine

WAIT_SECONDS = 30.0


@dataclass
class ThreadedRoom:
    """A balancer with one fake engine, as worker `a`."""

    port: int
    data_dir: Path
    balancer: Running

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_key(self) -> str:
        return (self.data_dir / "admin_key").read_text().strip()


def routes(application: web.Application) -> set[tuple[str, str]]:
    """Method and path of every route, those within applications too. A path as OpenAPI writes it."""
    found = set()
    for route in application.router.routes():
        if route.resource is not None:
            found.add((route.method, re.sub(r"\{(\w+):[^}]+\}", r"{\1}", route.resource.canonical)))
    return found


def application_of(balancer: Running) -> web.Application:
    """All that it routes to."""
    found: web.Application = balancer._server._runner.app
    return found


@contextmanager
def threaded_room(folder: Path, **settings: Any) -> Iterator[ThreadedRoom]:
    """Ready to serve the model `fake`."""
    up, over = threading.Event(), threading.Event()
    made: list[ThreadedRoom] = []
    failed: list[BaseException] = []

    async def live() -> None:
        async with FakeEngine(tokens=4) as engine:
            file = folder / "balancer.json"
            file.write_text(json.dumps({"workers": [listed(engine, "a")]} | settings))
            flags = {"host": "127.0.0.1", "port": free_port(), "mdns": False, "data_dir": folder / "data"}
            async with running(load(file, flags)) as balancer:
                async with asyncio.timeout(WAIT_SECONDS):
                    while not any(view.state == "ready" for view in balancer.snapshot().workers):
                        await asyncio.sleep(0.01)
                made.append(ThreadedRoom(balancer.port, folder / "data", balancer))
                up.set()
                await asyncio.to_thread(over.wait)

    def run() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:
            failed.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=run, name="room", daemon=True)
    thread.start()
    up.wait(WAIT_SECONDS)
    try:
        if not made:
            raise failed[0] if failed else TimeoutError("the room is not ready")
        yield made[0]
    finally:
        over.set()
        thread.join(WAIT_SECONDS)
    if failed:
        raise failed[0]
