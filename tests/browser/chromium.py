"""A real browser without a window, driven over its own debugging protocol: as much of it as the page's tests
need."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

WAIT_SECONDS = 30.0

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""None: this machine has none."""


class PageError(AssertionError):
    """A script of the test failed in the page."""


@dataclass
class Page:
    """One tab."""

    socket: aiohttp.ClientWebSocketResponse
    errors: list[str] = field(default_factory=list)
    """What the page complained about: exceptions, what its content policy has refused."""
    requested: list[str] = field(default_factory=list)
    """Every address that was asked for."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _waiting: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)

    async def listen(self) -> None:
        async for message in self.socket:
            told = message.json()
            if (number := told.get("id")) is not None:
                if not self._waiting[number].done():
                    self._waiting[number].set_result(told)
                continue
            match told["method"]:
                case "Runtime.exceptionThrown":
                    details = told["params"]["exceptionDetails"]
                    self.errors.append(str(details.get("exception", {}).get("description", details["text"])))
                case "Log.entryAdded" if told["params"]["entry"]["source"] in ("security", "violation"):
                    self.errors.append(told["params"]["entry"]["text"])
                case "Network.requestWillBeSent":
                    self.requested.append(told["params"]["request"]["url"])

    async def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(WAIT_SECONDS):
            told = await self._waiting[number]
        del self._waiting[number]
        if "error" in told:
            raise PageError(f"{method}: {told['error']}")
        result: dict[str, Any] = told["result"]
        return result

    async def open(self, url: str) -> None:
        await self.do("Page.navigate", url=url)

    async def value(self, script: str) -> Any:
        """Of an expression, awaited if it is a promise."""
        told = await self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise PageError(f"{script}: {told['exceptionDetails']}")
        return told["result"].get("value")

    async def until(self, script: str) -> Any:
        """Its value as soon as that is true."""
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while True:
                    with suppress(PageError):  # the page may just be changing
                        if value := await self.value(script):
                            return value
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.value("document.body.innerText")
            raise TimeoutError(
                f"never true: {script}; errors: {self.errors}; the page says: {text}"
            ) from None

    async def type(self, text: str) -> None:
        """Into whatever has the focus."""
        await self.do("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        """Enter, Tab, Escape or Space."""
        codes = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "Space": (32, " ")}
        number, text = codes[key]
        told = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": number}
        await self.do("Input.dispatchKeyEvent", type="keyDown", **told, **({"text": text} if text else {}))
        await self.do("Input.dispatchKeyEvent", type="keyUp", **told)

    async def cookies(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.do("Network.getCookies"))["cookies"]
        return found


@asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Page]:
    """A browser with an empty profile in this folder, and its one page."""
    assert PROGRAM is not None
    profile = folder / "profile"
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    )
    try:
        async with aiohttp.ClientSession() as http:
            socket = await _socket(http, profile / "DevToolsActivePort")
            page = Page(socket)
            listening = asyncio.ensure_future(page.listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.do(f"{domain}.enable")
            try:
                yield page
            finally:
                listening.cancel()
                await socket.close()
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _socket(http: aiohttp.ClientSession, told: Path) -> aiohttp.ClientWebSocketResponse:
    async with asyncio.timeout(WAIT_SECONDS):
        while not (port := _port(told)):
            await asyncio.sleep(0.05)
        while True:
            async with http.get(f"http://127.0.0.1:{port}/json/list") as response:
                pages = [one for one in await response.json() if one["type"] == "page"]
            if pages:
                return await http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
            await asyncio.sleep(0.05)


def _port(told: Path) -> str:
    """As the browser writes it into this file, the first of two lines; empty: not yet."""
    lines = told.read_text().splitlines() if told.exists() else []
    return lines[0] if len(lines) > 1 else ""
