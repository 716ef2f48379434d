"""No name that comes from outside leads anywhere but below our own folder."""

from __future__ import annotations

import string
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.models.names import (
    BadName,
    is_file_name,
    leaves_its_folder,
    model_name,
    name_for,
    repository,
    revision,
)

NASTY = st.text(alphabet=st.sampled_from("a./\\:\0\n ~*?CON%2eé-_1"), min_size=0, max_size=12)
ANY = st.one_of(st.text(max_size=40), NASTY, st.lists(NASTY, max_size=4).map("/".join))


@given(ANY)
def test_a_model_name_is_one_folder_and_stands_in_a_url_as_it_is(name: str) -> None:
    try:
        model_name(name)
    except BadName:
        return
    assert quote(name, safe="") == name
    assert PurePosixPath(name).parts == PureWindowsPath(name).parts == (name,)
    assert not name.startswith(".")
    assert name.rstrip(". ") == name


@given(ANY)
def test_a_file_name_stays_below_its_folder_on_every_system(name: str) -> None:
    if not is_file_name(name):
        return
    assert not leaves_its_folder(name)
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind("models") / name
        assert path.parts[0] == "models"
        assert path.parts[1:] == tuple(name.split("/"))
        assert not set(path.parts) & {"..", "."}
    assert Path("/models", name).resolve().is_relative_to("/models")


@given(st.lists(st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=5), min_size=1))
def test_plain_names_are_file_names(parts: list[str]) -> None:
    names = [f"f{part}.json" for part in parts][:4]
    assert is_file_name("/".join(names))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../x.gguf",
            "a/../../x.gguf",
            "/etc/passwd",
            "a//b",
            "./a",
            "a/.",
            "",
            "C:x",
            "c:/x",
            "a\\b",
            "\\\\h\\s",
        ),
        *("x\0.gguf", "x\n.gguf", "..", "a/..", "x\x7f"),
    ],
)
def test_names_that_lead_elsewhere_are_known(name: str) -> None:
    assert leaves_its_folder(name)
    assert not is_file_name(name)


@pytest.mark.parametrize(
    "name",
    ["model.json", "Model.JSON", "con.json", "a/NUL.gguf", "a.", "a /b", ".hidden", "é.gguf", "a/b/c/d/e"],
)
def test_names_that_some_system_takes_for_something_else_are_no_file_names(name: str) -> None:
    assert not is_file_name(name)


@pytest.mark.parametrize(
    "name", ["quarantine", "Quarantine", ".staging", "a/b", "..", "", "x" * 97, "nul", "a."]
)
def test_names_that_no_model_has(name: str) -> None:
    with pytest.raises(BadName, match="cannot be a model's name here"):
        model_name(name)


def test_a_repository_gives_the_name() -> None:
    assert name_for("mlx-community/Qwen2.5-7B-Instruct-4bit") == "Qwen2.5-7B-Instruct-4bit"


@pytest.mark.parametrize(
    "repo", ["gpt2", "a/b/c", "../b", "a/..", "https://x/y", "a/b?c", "a/b%2f", "/a", "a/", "a--b/c"]
)
def test_what_is_no_repository(repo: str) -> None:
    with pytest.raises(BadName):
        repository(repo)


@pytest.mark.parametrize("name", ["main", "v1.0", "refs/pr/3", "0" * 40])
def test_revisions(name: str) -> None:
    assert revision(name) == name


@pytest.mark.parametrize("name", ["../main", "a//b", "a/../b", "-x", "a?b", ""])
def test_what_is_no_revision(name: str) -> None:
    with pytest.raises(BadName):
        revision(name)
