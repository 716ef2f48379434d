"""The same bytes, cut in any way, to the hot path and to aiohttp: the same verdict, the same number of
answers, the same bodies behind them.

`corpus/` holds whole exchanges; mutations of them are tried too, more of them with `HOT_PATH_EXAMPLES=50000`.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from balancer.hot_path import ServerPolicy
from balancer.inference import InferencePolicy
from tests.e2e.fronts import Served, serving

CORPUS = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "corpus").glob("*.http"))}
EXAMPLES = int(os.environ.get("HOT_PATH_EXAMPLES", "2000"))
AT_ONCE = 20
QUIET_SECONDS = (0.25, 2.0)
"""Without an answer, after which one is not expected any more; and the same for another look where the two
seem to differ: the machine may just have been slow."""


@dataclass(frozen=True)
class Verdict:
    statuses: tuple[int, ...]
    closed: bool
    bodies: tuple[bytes, ...]


async def judged(served: Served, data: bytes, cuts: list[int], mark: str, quiet: float) -> Verdict:
    """What becomes of these bytes. `mark`: a value in the request headers by which its bodies are known."""
    reader, writer = await served.connect()
    got, closed = b"", False
    try:
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            writer.write(data[start:end])
            await asyncio.sleep(0)
        while True:
            try:
                piece = await asyncio.wait_for(reader.read(65536), quiet)
            except TimeoutError:
                break
            closed = not piece
            if closed:
                break
            got += piece
    except ConnectionError:
        closed = True
    finally:
        writer.close()
    statuses = tuple(int(one) for one in re.findall(rb"HTTP/1\.[01] (\d{3}) ", got) if one != b"100")
    bodies = tuple(one.body for one in served.inference.asked if one.headers.get("x-mark") == mark)
    return Verdict(statuses, closed, bodies)


def marked(data: bytes, mark: str) -> bytes:
    """With a header that tells which example a body belongs to."""
    return data.replace(b"\r\nContent-Type:", f"\r\nX-Mark: {mark}\r\nContent-Type:".encode())


@asynccontextmanager
async def both() -> AsyncIterator[tuple[Served, Served]]:
    limits = InferencePolicy(max_body_bytes=4000)
    async with serving(ServerPolicy(), limits) as hot, serving(ServerPolicy(hot_path=False), limits) as plain:
        yield hot, plain


async def compare(servers: tuple[Served, Served], name: str, data: bytes, cuts: list[int], mark: str) -> str:
    """What differs; empty: nothing."""
    for look, quiet in enumerate(QUIET_SECONDS):
        own = f"{mark}.{look}"
        sent = marked(data, own)
        hot, plain = await asyncio.gather(*(judged(one, sent, cuts, own, quiet) for one in servers))
        if agree(hot, plain):
            return ""
    return f"{name}: hot {hot}, aiohttp {plain}, for {sent!r} cut at {cuts}"


def agree(hot: Verdict, plain: Verdict) -> bool:
    """The same, up to what a refusal at the end leaves open. Never is anything a request to one of them that
    is none, or another one, to the other."""
    if hot == plain:
        return True
    if hot.closed and hot.statuses[-1:] >= (400,) and is_beginning(hot, plain):
        return True  # the body of what was refused was not all there yet; to the other, it was
    if plain.statuses and plain.statuses[-1] < 400:
        return False
    if hot.bodies == plain.bodies and hot.statuses == plain.statuses:
        return True  # the same, the other way round
    if not hot.closed:
        # aiohttp sees in the middle of a head that it is wrong; the hot path waits for the rest of it.
        return plain.closed and (hot.statuses, hot.bodies) == (plain.statuses[:-1], plain.bodies)
    # A client that still sends when it is refused may lose the answer to a reset. And aiohttp forgets a good
    # request that comes in one piece with a bad one behind it, where the hot path has answered it by then.
    return plain.closed and hot.bodies[: len(plain.bodies)] == plain.bodies


def is_beginning(one: Verdict, other: Verdict) -> bool:
    statuses, bodies = other.statuses[: len(one.statuses)], other.bodies[: len(one.bodies)]
    return (one.statuses, one.bodies) == (statuses, bodies)


@pytest.mark.parametrize("name", CORPUS)
async def test_both_say_the_same_of_the_corpus(name):
    data = CORPUS[name]
    async with both() as servers:
        whole = await compare(servers, name, data, [], "m0")
        in_the_middle = await compare(servers, name, data, [len(data) // 2], "m1")
        byte_by_byte = await compare(servers, name, data, list(range(1, min(len(data), 300))), "m2")
        assert not whole
        assert not in_the_middle
        assert not byte_by_byte


TOKENS = [
    *(b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"\xff", b";", b",", b"0", b"1", b"2", b"chunked"),
    *(b"Content-Length: 2\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: localhost\r\n", b"Host: \r\n"),
    *(
        b"Connection: close\r\n",
        b"Expect: 100-continue\r\n",
        b" folded\r\n",
        b"POST ",
        b" HTTP/1.1\r\n",
        b"{}",
    ),
    *(b"\r\n\r\n", b"0\r\n\r\n", b"2\r\n{}\r\n", b"HTTP/1.0", b"/v1/completions", b"?", b"#", b"%2f", b"//"),
]


def mutated(dice: Random) -> tuple[str, bytes, list[int]]:
    name = dice.choice(list(CORPUS))
    data = bytearray(CORPUS[name])
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(5):
            case 0:
                data[at:at] = dice.choice(TOKENS)
            case 1:
                del data[at : at + dice.choice((1, 1, 2, 8))]
            case 2:
                data[at : at + 1] = bytes([dice.randrange(256)])
            case 3:
                data[at:at] = dice.choice(list(CORPUS.values()))[: dice.randrange(1, 80)]
            case 4:
                data += dice.choice(list(CORPUS.values()))
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.choice((0, 0, 1, 3))))
    return name, bytes(data), cuts


async def test_both_say_the_same_of_mutations():
    seed = int(os.environ.get("HOT_PATH_SEED", "1"))
    differences: list[str] = []
    numbers = iter(range(EXAMPLES))

    async def try_some(servers: tuple[Served, Served]) -> None:
        for number in numbers:
            name, data, cuts = mutated(Random(seed * 1_000_003 + number))
            found = await compare(servers, f"{number} ({name})", data, cuts, f"m{number}")
            if found:
                differences.append(found)

    async with both() as servers:
        await asyncio.gather(*(try_some(servers) for _ in range(AT_ONCE)))
    assert not differences, "\n".join(differences[:20])
