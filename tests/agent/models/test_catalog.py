"""What counts as a model: in the folder of downloads, and at a path that the user gave."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from agent.models.scenes import files_in, gguf
from worker_agent.models.catalog import Catalog, NotAModel, describe
from worker_agent.models.local import Format


def put(folder: Path, name: str, changed: dict[str, Any] | None = None) -> Path:
    """A model as a download leaves it."""
    files = {"m-Q4_K_M.gguf": gguf(1000)}
    place = folder / name
    place.mkdir(parents=True)
    for file, content in files.items():
        (place / file).write_bytes(content)
    manifest = {
        "name": name,
        "repo": "org/model",
        "commit": "c" * 40,
        "format": "gguf",
        "main": next(iter(files)),
        "files": [
            {"name": file, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for file, content in files.items()
        ],
        **(changed or {}),
    }
    (place / "model.json").write_text(json.dumps(manifest))
    return place


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "models")


def offered(catalog: Catalog) -> list[str]:
    return [model.name for model in catalog.scan()]


def test_a_folder_that_is_not_there_has_no_models(catalog: Catalog) -> None:
    assert catalog.scan() == ()


def test_what_is_complete_is_offered_and_nothing_else(catalog: Catalog) -> None:
    put(catalog.folder, "good")
    put(catalog.folder, "begun")
    (catalog.folder / "begun" / "model.json").unlink()
    put(catalog.folder / ".staging", "fetching")
    put(catalog.folder / "quarantine", "bad")
    (catalog.folder / "notes.txt").write_text("hello")
    assert offered(catalog) == ["good"]


@pytest.mark.parametrize(
    "changed",
    [
        {"main": "../other.gguf"},
        {"files": [{"name": "../../etc/passwd", "size": 1, "sha256": "0" * 64}]},
        {"files": []},
        {"name": "another"},
        {"commit": "main"},
        {"format": "pickle"},
    ],
)
def test_a_manifest_that_is_not_as_we_write_it_offers_nothing(
    catalog: Catalog, changed: dict[str, Any]
) -> None:
    put(catalog.folder, "bad", changed)
    assert offered(catalog) == []
    assert catalog.entries()[0].fault


def test_a_file_that_is_missing_shorter_or_a_link_takes_the_model_away(
    catalog: Catalog, tmp_path: Path
) -> None:
    for name in ("missing", "shorter", "link"):
        put(catalog.folder, name)
    (catalog.folder / "missing" / "m-Q4_K_M.gguf").unlink()
    (catalog.folder / "shorter" / "m-Q4_K_M.gguf").write_bytes(b"GGUF")
    elsewhere = tmp_path / "elsewhere.gguf"
    (catalog.folder / "link" / "m-Q4_K_M.gguf").rename(elsewhere)
    (catalog.folder / "link" / "m-Q4_K_M.gguf").symlink_to(elsewhere)
    assert offered(catalog) == []
    assert {entry.name: entry.fault for entry in catalog.entries()} == {
        "missing": "m-Q4_K_M.gguf is missing",
        "shorter": f"m-Q4_K_M.gguf has 4 bytes in place of {len(gguf(1000))}",
        "link": "m-Q4_K_M.gguf is missing",
    }


def test_a_link_to_a_folder_is_no_model_of_ours(catalog: Catalog, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "good")
    catalog.folder.mkdir()
    (catalog.folder / "good").symlink_to(tmp_path / "elsewhere" / "good")
    assert offered(catalog) == []
    with pytest.raises(NotAModel):
        catalog.delete("good")
    assert files_in(tmp_path / "elsewhere") == {"good/model.json", "good/m-Q4_K_M.gguf"}


# ... deleting


def test_deleting_takes_the_model_and_what_was_begun_of_it(catalog: Catalog) -> None:
    put(catalog.folder, "good")
    put(catalog.folder, "other")
    put(catalog.folder / ".staging", "good")
    put(catalog.folder / "quarantine", "good")
    catalog.delete("good")
    assert files_in(catalog.folder) == {"other/model.json", "other/m-Q4_K_M.gguf"}
    with pytest.raises(NotAModel, match="there is no downloaded model 'good'"):
        catalog.delete("good")


def test_deleting_follows_no_link_out(catalog: Catalog, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "diary").write_text("mine")
    (put(catalog.folder, "good") / "link").symlink_to(precious)
    catalog.delete("good")
    assert (precious / "diary").read_text() == "mine"


@pytest.mark.parametrize("name", ["../outside", "..", "", "/", "a/b", ".staging", "quarantine", "."])
def test_deleting_by_a_name_that_leads_elsewhere(catalog: Catalog, tmp_path: Path, name: str) -> None:
    put(tmp_path, "outside")
    put(catalog.folder, "good")
    with pytest.raises(NotAModel, match="cannot be a model's name here"):
        catalog.delete(name)
    assert (tmp_path / "outside" / "model.json").exists()
    assert offered(catalog) == ["good"]


def test_a_model_that_is_being_fetched_is_not_deleted(catalog: Catalog) -> None:
    begun = put(catalog.folder / ".staging", "good")
    descriptor = os.open(begun, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(NotAModel, match="cancel it first"):
        catalog.delete("good")
    os.close(descriptor)
    catalog.delete("good")


def test_a_deletion_that_was_cut_short_is_finished_by_the_next(catalog: Catalog) -> None:
    put(catalog.folder, "good")
    put(catalog.folder / ".staging", ".deleted.old.123")
    catalog.delete("good")
    assert files_in(catalog.folder) == set()


# ... verifying


def test_a_bit_that_flipped_on_the_disk_is_found_and_the_file_quarantined(catalog: Catalog) -> None:
    place = put(catalog.folder, "good")
    read: list[int] = []
    assert catalog.verify("good", read.append) == ()
    assert sum(read) == len(gguf(1000))
    with (place / "m-Q4_K_M.gguf").open("r+b") as file:
        file.seek(500)
        file.write(bytes([gguf(1000)[500] ^ 1]))
    assert offered(catalog) == ["good"], "its size is right, and its content is not read at each look"
    assert catalog.verify("good") == ("m-Q4_K_M.gguf",)
    assert offered(catalog) == []
    assert "quarantine/good/m-Q4_K_M.gguf.refused" in files_in(catalog.folder)
    with pytest.raises(NotAModel, match=r"is damaged: m-Q4_K_M\.gguf is missing; download it again"):
        catalog.verify("good")


# ... a path that the user gave


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(1000))
    model = describe(str(path), "mine")
    assert (model.name, model.path, model.format, model.ours) == ("mine", str(path), Format.GGUF, False)
    assert model.size_bytes == path.stat().st_size


def test_any_part_of_a_split_file_is_all_of_it(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(gguf(1000))
    model = describe(str(tmp_path / "m-00002-of-00002.gguf"), "mine")
    assert model.path.endswith("m-00001-of-00002.gguf")
    assert model.size_bytes == 2 * len(gguf(1000))
    assert describe(str(tmp_path), "mine").path == model.path
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(NotAModel, match=r"one part of 2, and m-00001-of-00002\.gguf is not beside it"):
        describe(str(tmp_path / "m-00002-of-00002.gguf"), "mine")


def folder(path: Path, config: dict[str, Any], **more: bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"weights")
    for name, content in more.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def test_folders_of_safetensors(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "max_position_embeddings": 512,
    }
    plain = describe(str(folder(tmp_path / "plain", config)), "mine")
    assert (plain.format, plain.size_bytes, plain.facts.context_tokens) == (Format.SAFETENSORS, 7, 512)
    quantised = folder(tmp_path / "mlx", config | {"quantization": {"bits": 4, "group_size": 64}})
    assert describe(str(quantised), "mine").format is Format.MLX
    others = folder(tmp_path / "awq", config | {"quantization_config": {"quant_method": "awq"}})
    assert describe(str(others), "mine").format is Format.SAFETENSORS


@pytest.mark.parametrize("file", ["config__json", "tokenizer_config__json", "preprocessor_config__json"])
def test_a_folder_that_asks_for_code_of_its_own(tmp_path: Path, file: str) -> None:
    path = folder(tmp_path / "m", {}, **{file: b'{"auto_map": {"AutoModel": "evil.Model"}}'})
    with pytest.raises(NotAModel, match=r"code of its own \(auto_map\), which is never run here"):
        describe(str(path), "mine")


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m.ckpt", "m.PKL"])
def test_pickles(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x80\x04")
    with pytest.raises(NotAModel, match="can run code when it is loaded"):
        describe(str(path), "mine")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotAModel, match="pickle files, which can run code"):
        describe(str(tmp_path), "mine")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("m.gguf", b"<html>", "is called GGUF and is not"),
        ("m.safetensors", b"x", "weights alone: give its folder"),
        ("m.zip", b"x", "neither a GGUF file nor a folder"),
    ],
)
def test_other_files(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NotAModel, match=why):
        describe(str(tmp_path / name), "mine")


def test_folders_of_which_nothing_can_be_made(tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match="holds no model"):
        describe(str(tmp_path), "mine")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(gguf(10))
    with pytest.raises(NotAModel, match="several GGUF files: give the path of one"):
        describe(str(tmp_path), "mine")
    with pytest.raises(NotAModel, match=r"lacks model-00002-of-00002\.safetensors"):
        describe(str(folder(tmp_path / "m", {}, **{"model-00001-of-00002__safetensors": b"x"})), "mine")


def test_what_is_no_path_is_a_hubs_name(tmp_path: Path) -> None:
    model = describe("mlx-community/Qwen2.5-7B-Instruct-4bit", "mine")
    assert (model.format, model.size_bytes) == (Format.HUB, None)
    for path in ("/no/such/model", "./m", "no/such.gguf", "org/m.bin", str(tmp_path / "m.gguf")):
        with pytest.raises(NotAModel, match="there is no file or folder"):
            describe(path, "mine")


def test_a_path_that_the_system_refuses_to_look_at_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match="cannot be read: File name too long"):
        describe(str(tmp_path / ("x" * 300) / "model"), "a")
