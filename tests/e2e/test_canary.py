"""What people send and the keys that they hold are told to nobody else.

A unique text stands wherever a client, an engine or a person can put one; then everything that the programs
have written, and everything that they tell others, is searched for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import free_port, listed
from tests.e2e.processes import Command, command
from tests.fakes.engine import FakeEngine
from tests.fakes.faults import OK, Fault

ADMIN_KEY, CLUSTER_KEY = "canary-admin-key-5b1c", "canary-cluster-key-9e02"
PROMPT, TOOL, METADATA, USER = (
    "canary-prompt-a81f",
    "canary-tool-77aa",
    "canary-metadata-30d1",
    "canary-user-4c4c",
)
HEADER, COOKIE, QUERY, PATH = (
    "canary-header-1f0e",
    "canary-cookie-662b",
    "canary-query-0a9d",
    "canary-path-b5b5",
)
BODY, HEAD, WRONG_KEY = "canary-body-8d3e", "canary-head-d2d2", "canary-wrong-key-417e"
ENGINE = "canary-engine-e77e"
"""What an engine says that fails: it may quote the prompt."""
SENT = (PROMPT, TOOL, METADATA, USER, HEADER, COOKIE, QUERY, PATH, BODY, HEAD, WRONG_KEY, ENGINE)
KEYS = (ADMIN_KEY, CLUSTER_KEY)
MESSAGES = [{"role": "user", "content": PROMPT}]
ASK: dict[str, Any] = {
    "model": "fake",
    "messages": MESSAGES,
    "max_tokens": 12,
    "metadata": {"note": METADATA},
    "user": USER,
    "tools": [
        {
            "type": "function",
            "function": {"name": "look_up", "description": TOOL, "parameters": {"type": "object"}},
        }
    ],
}

DEFECTIVE = """
import asyncio
import balancer.inference as inference
from balancer.__main__ import app

whole = inference._parsed

async def fails(body):
    raise ValueError(body)

async def parsed(endpoint, body, secret):
    text = body.decode(errors="replace")
    if "provoke" not in text:
        return await whole(endpoint, body, secret)
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda body: {}[body], text)
    loop.create_task(fails(text), name=text)
    return {}[text]

inference._parsed = parsed
app()
"""
"""A balancer with a defect that quotes a whole body, in each of the places where it can come to light."""


@dataclass
class Scene:
    """A balancer as a process, and everything that it may have told."""

    running: Command
    url: str
    http: aiohttp.ClientSession
    told: dict[str, str] = field(default_factory=dict)
    """What others than the sender can read, by where."""

    async def ask(self, key: str, path: str = "/v1/chat/completions", **more: Any) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {key}", "X-Secret": HEADER, "Cookie": f"session={COOKIE}"}
        async with self.http.post(
            f"{self.url}{path}", headers=headers | more.pop("headers", {}), **more
        ) as response:
            return response.status, await response.text()

    async def admin(self, method: str, path: str, body: object = None) -> str:
        async with self.http.request(
            method, f"{self.url}{path}", json=body, headers={"X-Admin-Key": ADMIN_KEY}
        ) as response:
            return await response.text()

    async def send_raw(self, data: bytes) -> None:
        """What no client library would send; the answer is the sender's own."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(5):
                await writer.drain()
                await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def until_it_says(self, *texts: str) -> None:
        for text in texts:
            await self.running.until_it_says(text)


@asynccontextmanager
async def balancer(
    tmp_path: Path, rows: Iterable[dict[str, Any]], kind: str, **settings: object
) -> AsyncIterator[Scene]:
    port = free_port()
    file = tmp_path / "balancer.json"
    file.write_text(json.dumps({"workers": list(rows), "health_check_interval": 0.2} | settings))
    (tmp_path / "defective.py").write_text(DEFECTIVE)
    words = (
        *("defective", "serve", "--config", str(file), "--host", "127.0.0.1", "--port", str(port)),
        *("--no-mdns", "--data-dir", str(tmp_path / "data")),
    )
    variables = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]),
        "PYTHONFAULTHANDLER": "1",
        "BALANCER_ADMIN_KEY": ADMIN_KEY,
        "BALANCER_CLUSTER_KEY": CLUSTER_KEY,
        "LOG_LEVEL": "DEBUG",
        "BALANCER_LOG_FORMAT": kind,
    }
    async with command(*words, output=tmp_path / "balancer.log", home=tmp_path, **variables) as running:
        await running.until_it_says("listening on")
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
            scene = Scene(running, f"http://127.0.0.1:{port}", http)
            async with asyncio.timeout(30):
                while '"ready":true' not in await scene.admin("GET", "/health") and '"state":"ready"' not in (
                    await scene.admin("GET", "/admin/workers")
                ):
                    await asyncio.sleep(0.05)
            yield scene


async def what_others_can_read(scene: Scene, request_id: str) -> None:
    pages = ("workers", "config", "models", "presets", "keys", "audit", f"requests/{request_id}/why")
    for page in pages:
        scene.told[f"/admin/{page}"] = await scene.admin("GET", f"/admin/{page}")
    for path in ("/health", "/readyz", "/metrics", "/v1/models", "/ui", "/v1/models/none", "/nowhere"):
        async with scene.http.get(f"{scene.url}{path}") as response:
            scene.told[path] = await response.text()
    for body in ({"model": "none", "messages": []}, {"model": 1}, "no object"):
        _, scene.told[f"error for {body}"] = await scene.ask("none", json=body, headers={"X-Secret": "none"})


def left_behind(scene: Scene, *folders: Path) -> None:
    """Everything that was written: the log, and the files of the data folder but those that hold a key."""
    scene.told["the log"] = scene.running.text()
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and file.name not in ("admin_key", "cluster_key"):
                scene.told[str(file)] = file.read_text(errors="replace")


def hits(scene: Scene, needles: Iterable[str]) -> list[str]:
    return [
        f"{needle} in {where}" for where, text in scene.told.items() for needle in needles if needle in text
    ]


@pytest.mark.parametrize(
    ("kind", "hot_path"), [("text", True), ("json", True), ("text", False), ("json", False)]
)
async def test_nothing_that_was_sent_and_no_key_is_told_to_anybody_else(
    tmp_path: Path, kind: str, hot_path: bool
):
    async with FakeEngine(tokens=12) as engine:
        row = listed(engine, "a") | {"api_key": {"file": "worker-key"}}
        (tmp_path / "worker-key").write_text("canary-worker-key-c0c0")
        async with balancer(tmp_path, [row], kind, auth="keys", hot_path=hot_path) as scene:
            made = json.loads(await scene.admin("POST", "/admin/keys", {"name": "lab"}))
            key = made["key"]
            own_id = "the-request-that-is-asked-about"
            status, answer = await scene.ask(key, json=ASK, headers={"X-Request-ID": own_id})
            assert status == 200
            said = json.loads(answer)["choices"][0]["message"]["content"].split()
            needles = (
                *SENT,
                *KEYS,
                key,
                key.partition(".")[2],
                "canary-worker-key-c0c0",
                " ".join(said[2:6]),
            )
            assert len(said) == 12
            assert engine.requests[-1].headers["authorization"] == "Bearer canary-worker-key-c0c0"

            refused = {"error": {"message": f"{ENGINE}: {PROMPT}"}}
            for fault in (
                Fault.reply_with(json.dumps(refused).encode(), status=400),
                Fault.reply_with(f"<html>{ENGINE}".encode(), status=500),
                Fault.error_in_body(ENGINE),
                Fault.close(at_token=2),
                Fault.garbage(at_token=2),
            ):
                engine.script(fault, OK)
                await scene.ask(key, json=ASK | {"stream": True})
            for path in (
                f"/v1/chat/completions?q={QUERY}",
                f"/{PATH}",
                f"/v1/models/{PATH}",
                f"/admin/{PATH}",
            ):
                await scene.ask(key, path, json=ASK)
            await scene.admin("GET", f"/admin/{PATH}")
            await scene.admin("GET", f"/admin/requests/{PATH}/why")
            await scene.ask(WRONG_KEY, json=ASK)
            await scene.ask(f"sk-lb-{made['id']}.{WRONG_KEY}", json=ASK)
            for data in (
                f'{{"model": "fake", {BODY}',
                f'["{BODY}"]',
                f'{{"messages": "{BODY}", "model": 5}}',
            ):
                await scene.ask(key, data=data.encode(), headers={"Content-Type": "application/json"})
            for data in (
                f"GET /{HEAD} HTTP/9.9\r\n\r\n",
                f"{HEAD}\x00\x1b[31m\r\n\r\n",
                f"GET / HTTP/1.1\r\n{HEAD}\r\n\r\n",
            ):
                await scene.send_raw(data.encode())
            await scene.ask(key, json=ASK | {"provoke": BODY})
            await scene.until_it_says("KeyError", "ValueError")

            await what_others_can_read(scene, own_id)
            scene.running.send(signal.SIGABRT)
            assert await scene.running.ended() == -signal.SIGABRT
            left_behind(scene, tmp_path / "data")
            assert hits(scene, needles) == []
            assert (
                '"status":200' in scene.told["the log"]
                if kind == "json"
                else " 200 " in scene.told["the log"]
            )
            assert own_id in scene.told["the log"]
            assert "Abort" in scene.told["the log"]  # the crash was looked at, too
            if kind == "json":
                lines = scene.told["the log"].partition("Fatal Python error")[0].splitlines()
                assert all(isinstance(json.loads(line)["message"], str) for line in lines)


async def test_a_prompt_that_is_cut_off_or_left_is_not_told_either(tmp_path: Path):
    """A client that leaves in the middle of its body, of its answer, or of the line."""
    async with FakeEngine(tokens=200, token_seconds=0.05) as engine:
        async with balancer(tmp_path, [listed(engine, "a", max_concurrent_requests=1)], "text") as scene:
            body = json.dumps(ASK | {"stream": True, "max_tokens": 200}).encode()
            host, _, port = scene.url.removeprefix("http://").partition(":")
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            for sent, whole in ((body[: len(body) // 2], False), (body, True), (body, True)):
                with socket.create_connection((host, int(port))) as raw:
                    raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + sent)
                    if whole:
                        await engine.until(lambda: bool(engine.requests), "it is asked")
            await scene.until_it_says("client_left")
            await what_others_can_read(scene, "none")
            scene.running.send(signal.SIGTERM)
            assert await scene.running.ended() == 0
            left_behind(scene, tmp_path / "data")
            assert hits(scene, (*SENT, *KEYS)) == []


@pytest.mark.real_engine
@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["text", "json"])
async def test_an_agent_and_its_engine_keep_what_was_sent_to_themselves(tmp_path: Path, kind: str):
    port = free_port()
    words = (
        *("worker_agent", "run", "--id", "studio", "--host", "127.0.0.1", "--port", str(port), "--no-mdns"),
        *(
            "--data-dir",
            str(tmp_path / "agent"),
            "--threads",
            "1",
            "--slots",
            "1",
            "--context-tokens",
            "1024",
        ),
        *("--log-level", "debug"),
    )
    variables = {"WORKER_AGENT_CLUSTER_KEY": CLUSTER_KEY, "WORKER_AGENT_LOG_FORMAT": kind}
    row = {"id": "studio", "host": "127.0.0.1", "port": port, "type": "agent"}
    async with command(*words, output=tmp_path / "agent.log", home=tmp_path, **variables) as agent:
        async with balancer(tmp_path, [row], kind) as scene:
            models = json.loads(await scene.admin("GET", "/v1/models"))["data"]
            asked = {"model": models[0]["id"], "messages": MESSAGES, "max_tokens": 4, "user": USER}
            for more in ({}, {"stream": True}, {"metadata": {"note": METADATA}}):
                status, _ = await scene.ask("none", json=asked | more, headers={"X-Request-ID": "asked-once"})
                assert status == 200
            async with scene.http.get(f"https://127.0.0.1:{port}/{PATH}", ssl=False) as response:
                assert response.status >= 400
            await what_others_can_read(scene, "asked-once")
            agent.send(signal.SIGTERM)
            assert await agent.ended() == 0
            left_behind(scene, tmp_path / "data", tmp_path / "agent")
            scene.told["the agent's log"] = agent.text()
            assert hits(scene, (*SENT, *KEYS)) == []
            assert "asked-once" in scene.told["the log"]
            if kind == "json":
                for line in scene.told["the agent's log"].splitlines():
                    assert isinstance(json.loads(line)["message"], str), line
