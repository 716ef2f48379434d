"""The settings in force: what a changed file changes while all runs, and what it leaves as it is."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from balancer.admin import NotReloaded
from balancer.discovery import Entry
from balancer.live import LiveConfiguration, LiveSettings
from balancer.settings import Settings, load

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
