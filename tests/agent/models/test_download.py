"""One download as a process, against a hub on loopback that does everything wrong that can go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.hub import FakeHub, Faults

from agent.models.scenes import (
    FOLDER_REPO,
    GGUF_REPO,
    fetch,
    fetching,
    files_in,
    gguf,
    noise,
    transformers_folder,
)
from agent.scenes import wait_until
from worker_agent.models.catalog import Catalog
from worker_agent.models.local import Format

FILE = "tiny-Q4_K_M.gguf"


def offered(folder: Path) -> list[str]:
    return [model.name for model in Catalog(folder).scan()]


# ... what is fetched


def test_a_gguf_model_is_fetched_verified_and_offered(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf()
    repo = hub.add(GGUF_REPO, {FILE: content, "tiny-Q8_0.gguf": gguf(seed=2), "README.md": b"hello"})
    ended = fetch(hub, tmp_path)
    assert (ended.code, ended.why) == (0, "")
    assert files_in(tmp_path) == {f"tiny/{FILE}", "tiny/model.json"}
    (model,) = Catalog(tmp_path).scan()
    assert (model.name, model.format, model.size_bytes) == ("tiny", Format.GGUF, len(content))
    assert model.ours
    assert model.origin == f"hub:{GGUF_REPO}@{repo.commit}"
    assert Path(model.path).read_bytes() == content
    manifest = json.loads((tmp_path / "tiny" / "model.json").read_text())
    assert manifest["files"] == [
        {"name": FILE, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ]
    assert ended.lines[0] == {"done": 0, "total": len(content)}
    note = "0 of 1 files are verified"
    assert ended.lines[-1] == {"done": len(content), "verifying": True, "note": note}


def test_of_a_folder_nothing_comes_that_could_hold_code(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(FOLDER_REPO, transformers_folder())
    assert fetch(hub, tmp_path, FOLDER_REPO).code == 0
    assert files_in(tmp_path / "tiny") == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    (model,) = Catalog(tmp_path).scan()
    assert (model.format, model.size_bytes) == (Format.SAFETENSORS, 300_000)
    assert model.path == str(tmp_path / "tiny")


def test_weights_that_mlx_has_quantised_are_told_by_their_config(hub: FakeHub, tmp_path: Path) -> None:
    config = json.dumps({"quantization": {"bits": 4}}).encode()
    hub.add(FOLDER_REPO, transformers_folder() | {"config.json": config}, tags=["mlx"])
    assert fetch(hub, tmp_path, FOLDER_REPO, formats=["mlx", "safetensors"]).code == 0
    assert Catalog(tmp_path).scan()[0].format is Format.MLX


def test_weights_for_mlx_alone_are_refused_before_they_have_come(hub: FakeHub, tmp_path: Path) -> None:
    config = json.dumps({"quantization": {"bits": 4}}).encode()
    hub.add(FOLDER_REPO, transformers_folder() | {"config.json": config})  # without the tag that says so
    ended = fetch(hub, tmp_path, FOLDER_REPO, formats=["safetensors"])
    assert (ended.code, "quantised for MLX" in ended.why) == (1, True)
    assert not hub.asked_for("model-0000")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused_before_its_weights_have_come(
    hub: FakeHub, tmp_path: Path, file: str
) -> None:
    asks_for_code = json.dumps({"auto_map": {"AutoModel": "modeling_tiny.Tiny"}}).encode()
    hub.add(FOLDER_REPO, transformers_folder() | {file: asks_for_code})
    ended = fetch(hub, tmp_path, FOLDER_REPO)
    assert ended.code == 1
    assert f"{file} names code of its own (auto_map)" in ended.why
    assert not hub.asked_for("model-0000")
    assert offered(tmp_path) == []


def test_pickles_alone_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(FOLDER_REPO, {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    ended = fetch(hub, tmp_path, FOLDER_REPO)
    assert (ended.code, "as pickle files only" in ended.why) == (1, True)
    assert not hub.asked_for("resolve", "hub")


def test_another_quantisation_can_be_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf(), "tiny-Q8_0.gguf": gguf(seed=2)})
    assert fetch(hub, tmp_path, file="q8_0").code == 0
    assert files_in(tmp_path / "tiny") == {"tiny-Q8_0.gguf", "model.json"}


def test_all_parts_of_a_split_file_come(hub: FakeHub, tmp_path: Path) -> None:
    parts = {f"Q4_K_M/tiny-Q4_K_M-0000{n}-of-00002.gguf": gguf(seed=n) for n in (1, 2)}
    hub.add(GGUF_REPO, parts)
    assert fetch(hub, tmp_path).code == 0
    (model,) = Catalog(tmp_path).scan()
    assert model.path == str(tmp_path / "tiny/Q4_K_M/tiny-Q4_K_M-00001-of-00002.gguf")
    assert model.size_bytes == sum(map(len, parts.values()))


# ... cuts


def test_a_second_start_goes_on_where_the_first_was_killed(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf(1_000_000)
    repo = hub.add(GGUF_REPO, {FILE: content}, faults={FILE: Faults(cuts=[300_000] + [0] * 50)})
    ended = fetch(hub, tmp_path)
    assert ended.code == 1
    assert "what has come is kept" in ended.why
    assert offered(tmp_path) == []
    assert hub.sent == {FILE: 300_000}

    repo.faults.clear()
    again = fetch(hub, tmp_path)
    assert again.code == 0
    assert again.lines[0] == {"done": 300_000, "total": len(content)}
    assert hub.sent == {FILE: len(content)}, "each byte came once"
    assert hub.asked_for(FILE)[-1].range == "bytes=300000-"
    assert (tmp_path / "tiny" / FILE).read_bytes() == content


def test_cuts_are_mended_without_a_second_start(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf(1_000_000)
    faults = Faults(cuts=[100_000] * 8, unavailable=1)  # more than there are tries without a byte
    hub.add(GGUF_REPO, {FILE: content}, faults={FILE: faults})
    hub.unavailable = 2
    ended = fetch(hub, tmp_path)
    assert (ended.code, ended.why) == (0, "")
    assert hub.sent == {FILE: len(content)}
    assert any("it is tried again" in line.get("note", "") for line in ended.lines)


def test_a_hub_that_knows_no_ranges_sends_everything_again(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf(500_000)
    hub.add(GGUF_REPO, {FILE: content}, faults={FILE: Faults(cuts=[200_000], knows_ranges=False)})
    ended = fetch(hub, tmp_path)
    assert ended.code == 0
    assert ended.lines[-1]["done"] == len(content), "what came twice is not counted twice"
    assert (tmp_path / "tiny" / FILE).read_bytes() == content


def test_a_hub_that_stays_busy_is_given_up(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()})
    hub.unavailable = 1000
    ended = fetch(hub, tmp_path)
    assert (ended.code, "answered 503" in ended.why) == (1, True)
    assert len(hub.asked) == 6


def test_a_second_start_stays_with_the_commit_of_the_first(hub: FakeHub, tmp_path: Path) -> None:
    first = hub.add(GGUF_REPO, {FILE: gguf(400_000)}, faults={FILE: Faults(cuts=[100_000] + [0] * 50)})
    assert fetch(hub, tmp_path).code == 1
    first.faults.clear()
    hub.add(GGUF_REPO, {FILE: gguf(400_000, seed=9)})
    assert fetch(hub, tmp_path).code == 0
    assert Catalog(tmp_path).scan()[0].origin == f"hub:{GGUF_REPO}@{first.commit}"
    assert hub.sent == {FILE: len(first.files[FILE])}


def test_where_the_commit_of_the_first_start_is_gone_it_begins_anew(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf(400_000)}, faults={FILE: Faults(cuts=[100_000] + [0] * 50)})
    assert fetch(hub, tmp_path).code == 1
    del hub.repos[GGUF_REPO]
    second = hub.add(GGUF_REPO, {FILE: gguf(400_000, seed=9)})
    assert fetch(hub, tmp_path).code == 0
    assert (tmp_path / "tiny" / FILE).read_bytes() == second.files[FILE]


def test_a_hub_that_refuses_for_a_while_costs_nothing_that_has_come(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf(400_000)
    repo = hub.add(GGUF_REPO, {FILE: content}, faults={FILE: Faults(cuts=[100_000] + [0] * 50)})
    assert fetch(hub, tmp_path).code == 1
    repo.faults.clear()
    repo.private = True
    assert "or it is private" in fetch(hub, tmp_path).why
    repo.private = False
    assert fetch(hub, tmp_path).code == 0
    assert hub.sent == {FILE: len(content)}


def test_a_start_that_was_ended_while_it_put_files_in_place_needs_no_byte_again(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.add(FOLDER_REPO, transformers_folder())
    assert fetch(hub, tmp_path, FOLDER_REPO).code == 0
    sent = dict(hub.sent)
    (tmp_path / "tiny").rename(tmp_path / ".staging" / "tiny")  # as far as it was before the last step
    (tmp_path / ".staging" / "tiny" / "model.json").unlink()
    assert offered(tmp_path) == []
    assert fetch(hub, tmp_path, FOLDER_REPO).code == 0
    assert hub.sent == sent
    assert offered(tmp_path) == ["tiny"]


# ... lies


def test_a_flipped_bit_is_refused_and_quarantined(hub: FakeHub, tmp_path: Path) -> None:
    repo = hub.add(GGUF_REPO, {FILE: gguf()}, faults={FILE: Faults(flipped=1234)})
    ended = fetch(hub, tmp_path)
    assert ended.code == 1
    assert "its hash differs" in ended.why
    assert offered(tmp_path) == []
    refused = f"quarantine/tiny/{FILE}.part.refused"
    assert files_in(tmp_path) - {".staging/tiny/.fetching.json"} == {refused}

    repo.faults.clear()
    assert fetch(hub, tmp_path).code == 0
    assert offered(tmp_path) == ["tiny"]


def test_a_flipped_bit_in_a_small_file_is_found_by_gits_hash(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(FOLDER_REPO, transformers_folder(), faults={"tokenizer_config.json": Faults(flipped=1)})
    ended = fetch(hub, tmp_path, FOLDER_REPO)
    assert (ended.code, "tokenizer_config.json is not what the hub says" in ended.why) == (1, True)
    assert offered(tmp_path) == []


def test_a_file_without_a_hash_is_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {}, more_siblings=[{"rfilename": FILE, "size": 100}])
    ended = fetch(hub, tmp_path)
    assert (ended.code, "tells no hash" in ended.why) == (1, True)
    assert not hub.asked_for("resolve", "hub")


def test_a_file_that_is_shorter_than_it_was_told_is_not_taken(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf()
    hub.add(GGUF_REPO, {FILE: content}, faults={FILE: Faults(told_size=len(content) + 10)})
    ended = fetch(hub, tmp_path)
    assert ended.code == 1
    assert offered(tmp_path) == []


@pytest.mark.parametrize("endless", [False, True])
def test_a_file_that_is_longer_than_it_was_told_is_cut_off(
    hub: FakeHub, tmp_path: Path, endless: bool
) -> None:
    content = gguf()
    faults = Faults(told_size=None if endless else len(content) - 10, endless=endless)
    hub.add(GGUF_REPO, {FILE: content}, faults={FILE: faults})
    ended = fetch(hub, tmp_path)
    assert (ended.code, "sends more of" in ended.why) == (1, True)
    assert sum((tmp_path / file).stat().st_size for file in files_in(tmp_path)) < 10_000


@pytest.mark.parametrize(
    "name", ["../../evil.gguf", "/etc/evil.gguf", "a\\..\\evil.gguf", "C:evil.gguf", "a\0.gguf", "a//b.gguf"]
)
def test_a_repository_with_a_name_that_leaves_its_folder_is_refused_as_a_whole(
    hub: FakeHub, tmp_path: Path, name: str
) -> None:
    evil = {"rfilename": name, "size": 4, "blobId": "0" * 40}
    hub.add(GGUF_REPO, {FILE: gguf()}, more_siblings=[evil])
    folder = tmp_path / "a" / "models"
    ended = fetch(hub, folder)
    assert (ended.code, "outside of its folder" in ended.why) == (1, True)
    assert not hub.asked_for("resolve", "hub")
    assert files_in(tmp_path) == set()


def test_a_link_in_the_staging_folder_is_not_written_through(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()})
    precious = tmp_path / "precious"
    precious.write_text("mine")
    staging = tmp_path / "models" / ".staging" / "tiny"
    staging.mkdir(parents=True)
    (staging / f"{FILE}.part").symlink_to(precious)
    assert fetch(hub, tmp_path / "models").code == 0
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("answer", [b"<html>log in here</html>", b"[]", b'{"siblings": 3}', b'{"id": "x"}'])
def test_what_is_no_hub_says_so(hub: FakeHub, tmp_path: Path, answer: bytes) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()})
    hub.broken_api = answer
    ended = fetch(hub, tmp_path)
    assert (ended.code, "check HF_ENDPOINT" in ended.why) == (1, True)


def test_an_api_answer_without_end_is_not_read_to_its_end(hub: FakeHub, tmp_path: Path) -> None:
    hub.broken_api = b'{"id": "' + b"x" * (40 * 2**20) + b'"}'
    ended = fetch(hub, tmp_path)
    assert (ended.code, "an answer without end" in ended.why) == (1, True)


# ... who may


def test_the_token_goes_to_the_hub_and_not_to_where_the_hub_sends_us(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()}, gated=True)
    ended = fetch(hub, tmp_path, token="hf_secret")
    assert ended.code == 0
    assert {asked.token for asked in hub.asked if asked.server == "hub"} == {"Bearer hf_secret"}
    assert {asked.token for asked in hub.asked if asked.server == "cdn"} == {None}
    assert "hf_secret" not in ended.output
    assert not [file for file in files_in(tmp_path) if b"hf_secret" in (tmp_path / file).read_bytes()]


def test_nothing_is_told_of_this_machine_and_nothing_else_is_asked(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()})
    assert fetch(hub, tmp_path).code == 0
    assert len(hub.asked) == 3, "the API, the hub, the CDN"
    agents = {asked.agent.partition(";")[0] for asked in hub.asked}
    assert agents == {"llm-room-balancer/1"}
    assert not any(word in asked.agent for asked in hub.asked for word in ("agent/", "torch"))


def test_a_gated_model_says_where_to_accept_its_licence(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()}, gated=True)
    ended = fetch(hub, tmp_path)
    assert ended.code == 1
    assert f"accept its licence at {hub.endpoint}/{GGUF_REPO}, then set HF_TOKEN" in ended.why
    with_another = fetch(hub, tmp_path, token="hf_other")
    assert "this token's owner has no access yet" in with_another.why


def test_a_private_model_says_that_it_may_be_one(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()}, private=True)
    assert "or it is private" in fetch(hub, tmp_path).why
    assert "does not know this token" in fetch(hub, tmp_path, token="hf_other").why


def test_a_repository_or_a_revision_that_does_not_exist(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()})
    assert "127.0.0.1 has no org/None" in fetch(hub, tmp_path, "org/None").why
    assert "has no such revision" in fetch(hub, tmp_path, revision="v9").why


def test_offline_is_respected(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "agent.models.scenes.environment", lambda *_, **__: {**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert "HF_HUB_OFFLINE is set" in fetch(hub, tmp_path).why
    assert hub.asked == []


def test_no_hub_at_all(hub: FakeHub, tmp_path: Path) -> None:
    ended = fetch(hub, tmp_path, endpoint="http://127.0.0.1:9")
    assert (ended.code, "cannot be reached" in ended.why) == (1, True)


# ... the disk


def test_room_on_the_disk_is_looked_for_first(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()})
    free = shutil.disk_usage(tmp_path).free
    ended = fetch(hub, tmp_path, margin_bytes=free * 2)
    assert ended.code == 1
    assert "are left alone: make room there" in ended.why
    assert not hub.asked_for("resolve", "hub")


@pytest.fixture
def tiny_disk() -> Iterator[Path]:
    """Of 1 MiB, really full at its end."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
            pytest.skip("no small disk can be mounted here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_a_disk_that_others_fill_meanwhile(hub: FakeHub, tiny_disk: Path) -> None:
    content = gguf(700_000)
    repo = hub.add(GGUF_REPO, {FILE: content}, faults={FILE: Faults(cuts=[100_000] + [0] * 50)})
    assert fetch(hub, tiny_disk).code == 1
    repo.faults[FILE] = Faults(hold_after=1)  # the room is looked for, then somebody else takes it
    asked = len(hub.asked_for(FILE))
    with fetching(hub, tiny_disk) as process:
        wait_until(lambda: len(hub.asked_for(FILE)) > asked)
        (tiny_disk / "others").write_bytes(noise(500_000))
        hub.release.set()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is full: make room and start it again" in output.replace('"}\n{"failed":"', "")
    assert offered(tiny_disk) == []

    (tiny_disk / "others").unlink()
    repo.faults.clear()
    before = hub.sent[FILE]
    assert fetch(hub, tiny_disk).code == 0
    assert hub.sent[FILE] - before < len(content) - 100_000, "it went on from where the disk was full"
    assert (tiny_disk / "tiny" / FILE).read_bytes() == content


def test_a_file_system_that_takes_no_large_files(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf(300_000)})

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    ended = fetch(hub, tmp_path, preexec=limit)
    assert (ended.code, "takes no file of this size" in ended.why) == (1, True)
    assert offered(tmp_path) == []


def test_what_is_in_the_way_and_not_ours_is_left_alone(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()})
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "diary.txt").write_text("mine")
    ended = fetch(hub, tmp_path)
    assert (ended.code, "is in the way, and not ours" in ended.why) == (1, True)
    assert (tmp_path / "tiny" / "diary.txt").read_text() == "mine"


def test_a_model_that_lost_a_file_gets_only_that_one_again(hub: FakeHub, tmp_path: Path) -> None:
    files = transformers_folder()
    first = hub.add(FOLDER_REPO, files)
    assert fetch(hub, tmp_path, FOLDER_REPO).code == 0
    hub.add(FOLDER_REPO, files | {"tokenizer.json": noise(5000, 7)})  # the hub has gone on meanwhile
    lost = "model-00002-of-00002.safetensors"
    (tmp_path / "tiny" / lost).unlink()
    assert offered(tmp_path) == []
    sent = dict(hub.sent)
    assert fetch(hub, tmp_path, FOLDER_REPO).code == 0
    again = {name for name in hub.sent if hub.sent[name] != sent[name]}
    assert again == {lost}
    assert Catalog(tmp_path).scan()[0].origin == f"hub:{FOLDER_REPO}@{first.commit}"


def test_a_damaged_model_is_not_replaced_by_another(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(FOLDER_REPO, transformers_folder())
    hub.add(GGUF_REPO, {FILE: gguf()})
    assert fetch(hub, tmp_path, FOLDER_REPO).code == 0
    (tmp_path / "tiny" / "config.json").unlink()
    ended = fetch(hub, tmp_path)
    assert (ended.code, f"damaged, and from {FOLDER_REPO}: delete it first" in ended.why) == (1, True)
    assert len(files_in(tmp_path / "tiny")) == 6


def test_two_processes_do_not_write_one_model(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()}, faults={FILE: Faults(hold_after=1000)})
    with fetching(hub, tmp_path) as first:
        wait_until(lambda: hub.sent.get(FILE))
        second = fetch(hub, tmp_path)
        assert (second.code, "is being downloaded at this moment" in second.why) == (1, True)
        hub.release.set()
        assert first.wait(60) == 0


def test_a_config_with_numbers_that_only_python_writes_is_read(hub: FakeHub, tmp_path: Path) -> None:
    """As Mamba's relatives have it: `"time_step_limit": [0.0, Infinity]`."""
    config = json.dumps({"num_hidden_layers": 2, "time_step_limit": [0.0, float("inf")]}).encode()
    assert b"Infinity" in config
    hub.add(FOLDER_REPO, transformers_folder(**{"config.json": config}))
    ended = fetch(hub, tmp_path, FOLDER_REPO)
    assert (ended.code, ended.why) == (0, "")
    assert offered(tmp_path) == ["tiny"]
