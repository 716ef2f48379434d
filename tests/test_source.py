"""The source itself: formatted, linted, typed, and free of what does not belong in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CHECKS = {
    "formatted": ("ruff", "format", "--check", "."),
    "linted": ("ruff", "check", "."),
    "typed": ("mypy",),
}


@pytest.mark.parametrize("command", CHECKS.values(), ids=CHECKS)
def test_the_source_is(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


def tracked() -> list[Path]:
    """Files that git knows; in an unpacked archive, all source files."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in ROOT.rglob("*") if path.suffix in {".py", ".md", ".toml", ".json"}]


def test_no_file_names_a_package_registry_or_a_private_path():
    """The lock file apart, which is as uv writes it."""
    banned = re.compile(rb"pypi\.org|pythonhosted\.org|registry\.npmjs|/root/|/work/|/home/[a-z]+/")
    for path in tracked():
        if path.name in {"uv.lock", "LICENSE", "test_source.py"} or not path.is_file():
            continue
        found = banned.search(path.read_bytes())
        assert found is None, f"{path.relative_to(ROOT)}: {found and found.group()!r}"


def test_the_top_level_holds_what_was_agreed():
    agreed = {
        "pyproject.toml", "uv.lock", "balancer", "worker_agent", "configs", "tests", "benchmarks",
        "README.md", "LICENSE", "CHANGELOG.md", "docs",
    }  # fmt: skip
    there = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in there if not name.startswith(".")} <= agreed
