"""The settings in force: what a changed file changes while all runs, and what it leaves as it is."""

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from balancer import config_file
from balancer.admin import NotReloaded
from balancer.discovery import Entry
from balancer.live import LiveConfiguration, LiveSettings
from balancer.settings import Settings, load
from worker_agent import forgiving_json

A = {"id": "a", "host": "10.0.0.1", "port": 8000}
B = {"id": "b", "host": "10.0.0.2", "port": 8000}


class Scene:
    """A file, what is made of it, and the room that it was put into."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "balancer.json"
        self.put: list[list[str]] = []
        self.waits: list[float] = []
        self.write(workers=[A], max_wait=1.0)
        self.live = LiveConfiguration(load(self.file, {}), self._put_room)
        self.live.govern(
            LiveSettings(frozenset({"max_wait"}), lambda settings: self.waits.append(settings.max_wait)),
            LiveSettings(
                frozenset({"policy", "scorer_weights"}),
                lambda _settings: None,
                fits=lambda _, after: after.policy != "round_robin",
            ),
        )

    def _put_room(self, entries: Any) -> None:
        self.put.append([entry.worker.id for entry in entries])

    def write(self, text: str | None = None, **members: object) -> None:
        self.file.write_text(json.dumps(members) if text is None else text)

    def status(self) -> dict[str, Any]:
        status: Any = self.live.shown()["status"]
        return dict(status)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.fixture(autouse=True)
def root_level() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


async def test_a_saved_file_is_applied_as_the_difference_to_what_was(scene: Scene, caplog):
    caplog.set_level(logging.INFO)
    await scene.live.was_saved()
    assert (scene.put, scene.waits, caplog.text) == ([], [], "")
    scene.write(workers=[A, B], max_wait=1.0)
    await scene.live.was_saved()
    assert (scene.put, scene.waits) == ([["a", "b"]], [])
    scene.write(workers=[A, B], max_wait=2.0)
    caplog.set_level(logging.INFO)
    await scene.live.was_saved()
    assert (scene.put, scene.waits) == ([["a", "b"]], [2.0])
    assert "settings changed: max_wait" in caplog.text
    assert scene.live.shown()["settings"]["max_wait"] == 2.0
    assert scene.live.shown()["sources"]["max_wait"].startswith("balancer.json:1:")


async def test_what_only_a_restart_changes_is_told_and_not_shown_as_in_force(scene: Scene, caplog):
    scene.write(workers=[A], max_wait=2.0, port=4001, policy="round_robin")
    told = await scene.live.reload("a test")
    assert (told.applied, told.needs_restart) == (("max_wait",), ("port", "policy", "scorer_weights"))
    shown = scene.live.shown()
    assert (shown["needs_restart"], shown["settings"]["port"]) == (("port", "policy", "scorer_weights"), 4000)
    scene.write(workers=[A], max_wait=2.0, policy="least_loaded")
    told = await scene.live.reload("a test")
    assert (told.applied, told.needs_restart) == (("policy", "scorer_weights"), ())


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ('{"workers": [],\n "prot": 1}', 2, 2, 'did you mean "port"?'),
        ('{"workers": [\n', 1, 14, "the file ends here too early"),
        ("", 1, 1, "nothing in here"),
        (None, None, None, "there is no such file"),
    ],
)
async def test_a_file_that_cannot_be_used_leaves_all_as_it_was_and_is_told_until_it_is_mended(
    scene: Scene, caplog, text, line, column, words
):
    if text is None:
        scene.file.unlink()
    else:
        scene.write(text)
    await scene.live.was_saved()
    assert (scene.put, scene.live.is_ok) == ([], False)
    status = scene.status()
    (fault,) = status["faults"]
    assert (status["state"], fault["line"], fault["column"]) == ("broken", line, column)
    assert words in fault["message"]
    assert status["since"] > status["last_good_at"]
    assert words in caplog.text
    with pytest.raises(NotReloaded):
        await scene.live.reload("a test")
    caplog.set_level(logging.INFO)
    scene.write(workers=[A], max_wait=1.0)
    await scene.live.was_saved()
    assert scene.live.is_ok
    assert (scene.status()["state"], scene.status()["faults"]) == ("ok", [])
    assert "fine again" in caplog.text


async def test_a_file_that_lists_no_workers_any_more_is_applied_and_warned_of(scene: Scene, caplog):
    scene.write(workers=[])
    await scene.live.was_saved()
    assert scene.put == [[]]
    assert "lists no workers any more: 1 leave" in caplog.text


async def test_a_log_line_tells_each_fault_and_bounds_them(scene: Scene, caplog):
    scene.write('{"a": 1, ' + ", ".join(f'"b{number}": 1' for number in range(30)) + "}")
    await scene.live.was_saved()
    assert len(caplog.records) == 11
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert "21 more faults" in caplog.text


async def test_a_secret_that_cannot_be_had_is_told_and_named_as_a_file_to_look_at(scene: Scene, caplog):
    scene.write(workers=[A | {"api_key": {"file": "key"}}])
    await scene.live.was_saved()
    assert "which cannot be read" in caplog.text
    key = scene.file.parent / "key"
    assert scene.live.files() == (scene.file, key)
    key.write_text("worker-key")
    await scene.live.was_saved()
    assert (scene.live.is_ok, scene.put) == (True, [["a"]])
    key.write_text("another-worker-key")
    await scene.live.was_saved()
    assert scene.put == [["a"], ["a"]]
    assert "worker-key" not in caplog.text + json.dumps(scene.live.shown())


@pytest.mark.parametrize(
    "members",
    [
        None,
        {"admin_key_file": "pipe"},
        {"workers": [A | {"api_key": {"file": "pipe"}}]},
        {"workers": [A | {"tls": True, "ca_file": "pipe"}]},
        {"discover": [{"dns": "a.test", "type": "openai", "api_key": {"file": "pipe"}}]},
    ],
    ids=["the file itself", "admin key", "worker's key", "CA", "key of a name"],
)
async def test_a_pipe_is_a_fault_and_not_waited_for(scene: Scene, members: dict[str, object] | None):
    if members is None:
        scene.file.unlink()
        os.mkfifo(scene.file)
    else:
        os.mkfifo(scene.file.parent / "pipe")
        scene.write(**members)
    async with asyncio.timeout(20):
        with pytest.raises(NotReloaded, match="no plain file"):
            await scene.live.reload("a test")
        assert scene.live.files()[0] == scene.file


async def test_the_key_of_a_name_is_read_with_the_file_and_put_when_it_changes(scene: Scene):
    put: list[str] = []

    def apply(settings: Settings) -> None:
        key.unlink()  # what is applied was read before
        put.extend(source.pattern.headers["Authorization"] for source in settings.named_sources())

    scene.live.govern(LiveSettings(frozenset({"discover"}), apply))
    key = scene.file.parent / "key"
    scene.write(discover=[{"dns": "a.test", "type": "openai", "api_key": {"file": "key"}}])
    for text in ("first-key", "second-key"):
        key.write_text(text)
        await scene.live.was_saved()
    assert put == ["Bearer first-key", "Bearer second-key"]
    assert "-key" not in json.dumps(scene.live.shown())


async def test_where_a_value_stands_is_told_as_the_file_is_now(scene: Scene):
    scene.write(f'{{\n"port": 4000,\n"workers": [{json.dumps(A)}],\n"max_wait": 1.0, "max_body_mib": 7}}')
    await scene.live.was_saved()
    sources: Any = scene.live.shown()["sources"]
    places = [sources[name] for name in ("max_wait", "port", "max_body_mib")]
    assert places == ["balancer.json:4:1", "balancer.json:2:1", "default"]  # the last waits for a restart


def test_weights_of_another_policy_than_the_files_own_do_not_come_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "f.json"
    file.write_text('{"policy": "least_loaded", "scorer_weights": {"idleness": 3}}')
    assert load(file, {}).source_of("scorer_weights") == "f.json:1:28"
    assert load(file, {"policy": "round_robin"}).source_of("scorer_weights") == "default"
    monkeypatch.setenv("BALANCER_SCORER_WEIGHTS", '{"rest": 2}')
    settings = load(file, {"policy": "round_robin"})
    assert settings.source_of("scorer_weights") == "BALANCER_SCORER_WEIGHTS"


def test_a_file_that_stays_the_same_is_parsed_once(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    parsed = []
    monkeypatch.setattr(
        config_file, "tree", lambda *given, **more: parsed.append(1) or forgiving_json.tree(*given, **more)
    )
    for text in ('{"max_wait": 2.0}', '{"max_wait": 2.0,, }'):
        scene.write(text)
        for _ in range(3):
            scene.live.files()
    assert len(parsed) == 2


def test_every_setting_knows_where_its_value_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "f.json"
    file.write_text(
        '{\n  "port": 1, // ours\n  "max_queue": 2,\n  "mdns": true,\n  "workers": [\n {"host": "a"}]}'
    )
    monkeypatch.setenv("BALANCER_MAX_QUEUE", "3")
    monkeypatch.setenv("MAX_RETRIES", "")
    settings: Settings = load(file, {"mdns": False, "host": None})
    assert {
        name: settings.source_of(name) for name in ("port", "max_queue", "mdns", "host", "max_retries")
    } == {
        "port": "f.json:2:3",
        "max_queue": "BALANCER_MAX_QUEUE",
        "mdns": "--no-mdns",
        "host": "default",
        "max_retries": "default",
    }
    assert settings.worker_sources == ("f.json:6:2",)
    assert isinstance(settings.room[0], Entry)
