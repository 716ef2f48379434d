"""A configuration file that is edited while requests run: by any editor, rightly, wrongly, half."""

import asyncio
import json
import logging
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import OpenRoom, Room, listed
from tests.fakes.engine import FakeEngine

ROOMS = 5
"""An edit is mostly waiting for a file to settle: so many are edited side by side."""
EDITS = int(os.environ.get("CONFIG_EDITS", "200")) // ROOMS
"""Of each room. CONFIG_EDITS=1000 takes about four minutes."""
TOLD_SECONDS = 2.0
"""As promised; twice as long is waited for, since a test may have the processor to itself or not."""
ASK = {"model": "fake", "messages": [{"role": "user", "content": "Say it."}], "max_tokens": 8}

Save = Callable[[Path, str], None]


def in_place(file: Path, text: str) -> None:
    file.write_text(text)


def renamed(file: Path, text: str) -> None:
    draft = file.with_suffix(".swp")
    draft.write_text(text)
    draft.replace(file)


def deleted_and_created(file: Path, text: str) -> None:
    file.unlink()
    file.write_text(text)


def link_turned(file: Path, text: str) -> None:
    target = file.with_name(f"{file.name}.{random.getrandbits(32):08x}")
    target.write_text(text)
    draft = file.with_suffix(".link")
    draft.symlink_to(target.name)
    draft.replace(file)
    for left in file.parent.glob(f"{file.name}.????????"):
        if left != target:
            left.unlink()


SAVES: tuple[Save, ...] = (in_place, renamed, deleted_and_created, link_turned)


class Editor:
    """Writes files as people do, and knows what is wrong with each."""

    def __init__(self, workers: list[dict[str, Any]], chance: random.Random) -> None:
        self.workers = workers
        self.chance = chance
        self.told_seconds: list[float] = []

    def right(self) -> str:
        """A file that can be used. The first worker stays, so that there is one for each request."""
        further = [one | self._limits() for one in self.workers[1:] if self.chance.random() < 0.6]
        content = {
            "health_check_interval": 0.2,
            "max_wait": self.chance.choice([20, 30, 40]),
            "max_queue": self.chance.choice([500, 1000]),
            "workers": [self.workers[0] | self._limits(), *further],
        }
        return json.dumps(content, indent=self.chance.choice([None, 2])) + "// as people write it\n"

    def _limits(self) -> dict[str, Any]:
        return {"max_concurrent_requests": self.chance.randint(2, 6)}

    def wrong(self) -> tuple[str, int, int]:
        """A file with one fault, and its line and column."""
        line = len(self.told_seconds) + 2  # another one each time: no fault is told by the one before
        above = "\n" * (line - 1)
        return self.chance.choice(
            [
                (f'{above}{{"prot": 1}}', line, 2),
                (f'{above}{{"port": "x"}}', line, 10),
                (f'{above}{{"workers": [\n  {{"host": "a"}}\n  {{"host": "b"}}\n]}}', line + 2, 3),
                (f"{above}{{'port': 4000}}", line, 2),
                (f'{above}{{"max_queue": 1,, "port": 1}}', line, 17),
                (f'{above}{{"workers": [{{"host": "http://a"}}]}}', line, 23),
            ]
        )


async def asking(room: Room, until: asyncio.Event) -> tuple[int, list[str]]:
    """How many answers came whole, and what else."""
    whole, failed = 0, []
    while not until.is_set():
        async with room.http.post(
            f"{room.url}/v1/chat/completions", json=ASK | {"stream": whole % 2 == 0}
        ) as response:
            text = await response.text()
            if response.status == 200 and ("[DONE]" in text or '"finish_reason"' in text):
                whole += 1
            else:
                failed.append(f"{response.status} {text[:200]}")
    return whole, failed


async def shown(room: Room, holds: Callable[[dict[str, Any]], bool], within: float = 20.0) -> dict[str, Any]:
    """`GET /admin/config`, as soon as it holds."""
    told: dict[str, Any] = {}
    with suppress(TimeoutError):
        async with asyncio.timeout(within):
            while True:
                _, told = await room.admin("GET", "/config")
                if holds(told):
                    return told
                await asyncio.sleep(0.02)
    raise AssertionError(f"not within {within:g} s: {told}")


def is_in_force(text: str) -> Callable[[dict[str, Any]], bool]:
    content = json.loads(text.partition("//")[0])
    caps = {one["id"]: one["max_concurrent_requests"] for one in content["workers"]}

    def holds(told: dict[str, Any]) -> bool:
        settings = told["settings"]
        return (
            told["status"]["state"] == "ok"
            and {one["id"]: one["cap"] for one in told["workers"]} == caps
            and (settings["max_wait"], settings["max_queue"]) == (content["max_wait"], content["max_queue"])
        )

    return holds


@pytest.mark.timeout(60 + 4 * EDITS)
async def test_no_edit_fails_a_request_and_every_fault_is_told_by_its_place(open_room: OpenRoom, caplog):
    async with FakeEngine(tokens=6, token_seconds=0.01) as a, FakeEngine(tokens=6) as b, FakeEngine() as c:
        rows = [listed(engine, name) for engine, name in ((a, "a"), (b, "b"), (c, "c"))]
        editors: list[Editor] = []
        async with asyncio.TaskGroup() as rooms:
            for number in range(ROOMS):
                editors.append(Editor(rows, random.Random(number)))
                rooms.create_task(edited(open_room, editors[-1], lambda text: text in caplog.text))
        told = sorted(seconds for editor in editors for seconds in editor.told_seconds)
        print(f"{len(told)} faults told within {told[-1]:.2f} s, half of them {told[len(told) // 2]:.2f} s")


async def edited(open_room: OpenRoom, editor: Editor, was_logged: Callable[[str], bool]) -> None:
    """A room whose file is edited again and again while clients ask."""
    async with open_room(editor.workers[0], watch_config=True) as room:
        over = asyncio.Event()
        clients = [asyncio.ensure_future(asking(room, over)) for _ in range(2)]
        try:
            for _ in range(EDITS):
                await one_edit(room, editor, was_logged)
        finally:
            over.set()
        outcomes = await asyncio.gather(*clients)
        assert [failed for _, failed in outcomes if failed] == []
        assert all(whole > EDITS for whole, _ in outcomes)
        await room.idle()


async def one_edit(room: Room, editor: Editor, was_logged: Callable[[str], bool]) -> None:
    """Of any kind, by any editor; until it is applied, or what is wrong with it is told."""
    chance = editor.chance
    save, kind = chance.choice(SAVES), chance.random()
    if kind < 0.4:
        text, line, column = editor.wrong()
        began = asyncio.get_running_loop().time()
        save(room.config, text)
        await shown(room, has_fault_at(line, column), within=2 * TOLD_SECONDS)
        editor.told_seconds.append(asyncio.get_running_loop().time() - began)
        assert was_logged(f"{room.config}:{line}:{column}: ")
        return
    text = editor.right()
    if kind < 0.5:  # half of it, and a moment later the rest
        in_place(room.config, text[: chance.randrange(len(text) // 2)])
        await asyncio.sleep(chance.random() * 0.2)
        save = in_place
    save(room.config, text)
    await shown(room, is_in_force(text))


def has_fault_at(line: int, column: int) -> Callable[[dict[str, Any]], bool]:
    return lambda told: (line, column) in [(one["line"], one["column"]) for one in told["status"]["faults"]]


async def test_a_stream_ends_as_it_began_while_its_worker_moves_is_limited_and_is_left_out(
    open_room: OpenRoom, caplog
):
    caplog.set_level(logging.WARNING)
    async with FakeEngine(tokens=200, token_seconds=0.02) as old, FakeEngine() as new:
        row = listed(old, "a", max_concurrent_requests=3)
        async with open_room(row, watch_config=True) as room:
            streams = [
                await room.openai.chat.completions.create(**ASK | {"max_tokens": 200}, stream=True)
                for _ in range(3)
            ]
            for stream in streams:
                await anext(stream)
            for changed in (
                row | {"max_concurrent_requests": 1},
                listed(new, "a", api_key={"file": "worker-key"}),
            ):
                (room.config.parent / "worker-key").write_text("a-key-of-its-own")
                room.config.write_text(json.dumps({"workers": [changed], "health_check_interval": 0.2}))
                url = f"http://{changed['host']}:{changed['port']}"
                cap = changed.get("max_concurrent_requests", 5)
                await shown(
                    room,
                    lambda told, at=(url, cap): [(one["url"], one["cap"]) for one in told["workers"]] == [at],
                )
            await room.ready()
            async with room.http.post(f"{room.url}/v1/chat/completions", json=ASK) as response:
                assert response.status == 200
            assert new.requests[-1].headers["authorization"] == "Bearer a-key-of-its-own"
            room.config.write_text('{"workers": []}')
            await shown(room, lambda told: told["workers"] == [])
            assert "lists no workers any more" in caplog.text
            for stream in streams:
                text = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
                assert len(text) > 150
            assert [one.outcome.value for one in old.requests] == ["completed"] * 3


async def test_a_file_that_is_broken_shows_in_the_metrics_until_it_is_mended(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine, watch_config=True) as room:
        right = room.config.read_text()
        assert "balancer_config_ok 1.0" in await room.metrics()
        for broken in ("{", "", None):
            if broken is None:
                room.config.unlink()
            else:
                room.config.write_text(broken)
            await shown(room, lambda told: told["status"]["state"] == "broken")
            assert "balancer_config_ok 0.0" in await room.metrics()
            assert room.worker("a").state == "ready"
            room.config.write_text(right)
            await shown(room, lambda told: told["status"]["state"] == "ok")
        assert "balancer_config_ok 1.0" in await room.metrics()


async def test_settings_that_are_live_hold_for_the_next_request(open_room: OpenRoom):
    async with FakeEngine(tokens=3) as engine, open_room(engine, watch_config=True) as room:
        named = {"Host": "balancer.lab.org"}
        async with room.http.get(f"{room.url}/v1/models", headers=named) as response:
            assert response.status == 421
        content = json.loads(room.config.read_text())
        room.config.write_text(json.dumps(content | {"allow_hosts": ["balancer.lab.org"], "max_queue": 0}))
        await shown(room, lambda told: told["settings"]["max_queue"] == 0)
        async with room.http.get(f"{room.url}/v1/models", headers=named) as response:
            assert response.status == 200
        room.config.write_text(json.dumps(content | {"policy": "round_robin", "hot_path": False}))
        told = await shown(room, lambda told: "hot_path" in told["needs_restart"])
        assert {"policy", "hot_path"} <= set(told["needs_restart"])
        assert "max_queue" not in told["needs_restart"]
