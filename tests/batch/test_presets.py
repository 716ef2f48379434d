from __future__ import annotations

import json
from pathlib import Path

import pytest

from balancer.batch.presets import PresetError, Shelf, own_folder, parse, read
from balancer.package_data import configs

GOOD = {"name": "mine", "prompts": [{"name": "a", "text": "What?"}]}


def faults(fields: object) -> tuple[str, ...]:
    with pytest.raises(PresetError) as caught:
        parse(json.dumps(fields).encode())
    return caught.value.faults


@pytest.mark.parametrize(("name", "count"), [("summary", 3), ("research", 5), ("analysis", 3)])
def test_the_presets_that_come_with_the_program_are_usable(name: str, count: int, tmp_path: Path):
    preset = Shelf(tmp_path).get(name)
    assert len(preset.prompts) == count
    assert preset.system
    assert preset.description


def test_every_file_in_the_presets_folder_is_listed(tmp_path: Path):
    files = {entry.name.removesuffix(".json") for entry in (configs() / "presets").iterdir()}
    assert {found.name for found in Shelf(tmp_path).all()} == files


def test_the_users_preset_hides_ours_of_the_same_name(tmp_path: Path):
    (tmp_path / "summary.json").write_text(json.dumps(GOOD | {"name": "summary"}))
    assert [prompt.name for prompt in Shelf(tmp_path).get("summary").prompts] == ["a"]
    assert {found.name: found.own for found in Shelf(tmp_path).all()}["summary"]


def test_a_broken_preset_is_listed_with_its_faults_and_harms_no_other(tmp_path: Path):
    (tmp_path / "mine.json").write_text("{")
    found = {found.name: found for found in Shelf(tmp_path).all()}
    assert found["mine"].preset is None
    assert "line 1" in found["mine"].faults[0]
    assert found["research"].preset is not None


def test_an_unknown_name_is_answered_with_the_names_that_there_are(tmp_path: Path):
    with pytest.raises(PresetError, match="analysis, research, summary"):
        Shelf(tmp_path).get("sumary")


def test_faults_are_sentences_that_name_the_place():
    assert faults({"name": "x", "prompts": [{"name": "a"}]}) == ("`prompts[1].text` is missing.",)
    assert faults(GOOD | {"promts": []}) == ("`promts` is not a key of a preset; is it misspelt?",)
    assert faults(GOOD | {"name": "../x"})[0].startswith("`name` may hold letters")
    assert faults([]) == ("A preset is a JSON object: it starts with { and ends with }.",)
    (twice,) = faults(GOOD | {"prompts": GOOD["prompts"] * 2})
    assert "two prompts are named 'a'" in twice


def test_all_faults_are_told_at_once():
    prompt = {"name": "a", "text": "What?", "max_tokens": 0, "temperature": "hot"}
    assert len(faults({"name": "x", "prompts": [prompt]})) == 2


@pytest.mark.parametrize("data", [b"\xff\xfe{", b"[" * 100_000, b"x" * 300_000, b'{"name": }'])
def test_what_is_no_json_is_a_preset_error(data: bytes):
    with pytest.raises(PresetError):
        parse(data)


def test_a_preset_is_called_as_its_file(tmp_path: Path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(PresetError, match="make them agree"):
        read(path)


def test_the_fingerprint_changes_with_a_question_but_not_with_the_description():
    preset = parse(json.dumps(GOOD).encode())
    reworded = parse(json.dumps(GOOD | {"description": "new"}).encode())
    asked = parse(json.dumps(GOOD | {"prompts": [{"name": "a", "text": "Why?"}]}).encode())
    assert preset.fingerprint == reworded.fingerprint != asked.fingerprint


def test_the_users_folder_follows_the_config_home():
    assert own_folder({"XDG_CONFIG_HOME": "/c"}) == Path("/c/llm-room-balancer/presets")
    assert own_folder({}) == Path.home() / ".config/llm-room-balancer/presets"
