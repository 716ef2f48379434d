from __future__ import annotations

from pathlib import Path

import pytest

from balancer.package_data import _first_folder, configs


def test_a_checkout_has_its_configs_beside_the_packages():
    assert (configs() / "presets" / "summary.json").is_file()


def test_a_wheel_has_its_configs_inside_the_package(tmp_path: Path):
    inside, beside = tmp_path / "balancer" / "configs", tmp_path / "configs"
    inside.mkdir(parents=True)
    assert _first_folder(inside, beside) == inside


def test_an_installation_without_configs_says_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="reinstall"):
        _first_folder(tmp_path / "nowhere")
