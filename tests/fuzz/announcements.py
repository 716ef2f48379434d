"""Packets of mDNS: anybody on the network may send any."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from balancer.discovery import MAX_NAMES, Browser
from tests.fuzz.connections import turn
from tests.fuzz.target import CORPUS, Target, looped
from worker_agent import wire

SOURCE = ("127.0.0.1", 5353)
HEAD_BYTES = 2
GOOD = CORPUS / "mdns" / "an-agent"


@asynccontextmanager
async def _browsing() -> AsyncIterator[tuple[Browser, list[tuple[object, ...]]]]:
    found: list[tuple[object, ...]] = []
    browser = Browser(found=lambda *said: found.append(said), interfaces=["127.0.0.1"])
    assert await browser.start()
    try:
        async with asyncio.timeout(10):
            while not found:  # until it listens
                _listener(browser).datagram_received(_packets(GOOD.read_bytes())[0], SOURCE)
                await asyncio.sleep(0.01)
        yield browser, found
    finally:
        await browser.aclose()


async def packets(browsing: tuple[Browser, list[tuple[object, ...]]], data: bytes) -> None:
    """Datagrams, each after its length in two bytes. Nothing is raised; what is found is fit to be tried."""
    browser, found = browsing
    for packet in _packets(data):
        _listener(browser).datagram_received(packet, SOURCE)
        await asyncio.sleep(0)
    await turn()
    assert len(browser._names) <= MAX_NAMES
    for said in found:
        announced, addresses, port = said[0], said[-2], said[-1]
        name = announced.id if isinstance(announced, wire.Announced) else announced
        assert isinstance(name, str)
        assert name.isprintable()
        assert 1 <= len(name) <= 128
        assert isinstance(addresses, Sequence)
        assert isinstance(port, int)
        assert 0 <= port <= 65535
    found.clear()


def _listener(browser: Browser) -> Any:
    assert browser._zeroconf is not None
    return browser._zeroconf.zeroconf.engine.protocols[0]


def _packets(data: bytes) -> list[bytes]:
    made, at = [], 0
    while at + HEAD_BYTES <= len(data):
        [size] = struct.unpack_from(">H", data, at)
        made.append(data[at + HEAD_BYTES : at + HEAD_BYTES + size])
        at += HEAD_BYTES + size
    return made


TARGETS = (
    Target(
        "mdns",
        looped(_browsing, packets),
        (
            *(
                b"\xc0\x0c",
                b"\xc0\x00",
                b"\xff\xff",
                b"\0\0\x84\0",
                b"\x0b_llm-worker",
                b"\x04_tcp",
                b"\x05local\0",
            ),
            *(
                b"\0\x0c\0\x01",
                b"\0\x10\x80\x01",
                b"\0\x21\x80\x01",
                b"\0\x01\x80\x01",
                b"\0\x1c\x80\x01",
                b"\0\x2f",
            ),
            *(
                b"\0\0\0\x78\0\x04\x0a\0\0\x01",
                b"\x03v=2",
                b"\x04id=a",
                b"\x09_services",
                b"\x3f" + b"a" * 63,
            ),
        ),
        is_slow=True,
    ),
)
