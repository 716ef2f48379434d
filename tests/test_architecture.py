"""What the layout promises, held by a machine: which way imports point, and what is pure.

Every module has a row in MAY_IMPORT (its own, or its package's); a new one without fails here.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("balancer", "worker_agent")

MAY_IMPORT: dict[str, set[str]] = {
    # The core decides, the dialects translate; they know nothing of those who call them.
    "balancer": set(),
    "balancer.core": set(),
    "balancer.dialects": {"balancer.core"},
    "balancer.identity": {"balancer.core"},
    "balancer.worker_types": {"balancer.core", "balancer.dialects", "balancer.identity"},
    "balancer.continuation": {"balancer.core", "balancer.dialects"},
    # The shell performs.
    "balancer.trust": {"worker_agent.plain_files"},
    "balancer.upstream": {"balancer.trust", "worker_agent.keep_alive"},
    "balancer.leases": {"balancer.core"},
    "balancer.patience": set(),
    "balancer.prefills": {"balancer.core", "balancer.dialects", "worker_agent.continuation"},
    "balancer.relay": {
        "balancer.continuation",
        "balancer.core",
        "balancer.dialects",
        "balancer.patience",
        "balancer.prefills",
        "balancer.upstream",
        "balancer.worker_types",
        "worker_agent.wire",
    },
    "balancer.journey": {
        "balancer.continuation",
        "balancer.core",
        "balancer.dialects",
        "balancer.leases",
        "balancer.relay",
    },
    # Who may ask for answers, and who may come in under /admin.
    "balancer.access": {"balancer.core", "balancer.keys"},
    "balancer.access_store": {
        "balancer.access",
        "balancer.core",
        "balancer.keys",
        "worker_agent.private_files",
    },
    "balancer.access_admin": {
        "balancer.access",
        "balancer.access_store",
        "balancer.core",
        "balancer.orders",
    },
    "balancer.sessions": set(),
    "balancer.orders": {"balancer.core"},
    "balancer.admin_door": {"balancer.core", "balancer.keys", "balancer.orders", "balancer.sessions"},
    "balancer.audit": set(),
    "balancer.client_tls": {
        "balancer.keys",
        "worker_agent.plain_files",
        "worker_agent.private_files",
    },
    "balancer.inference": {
        "balancer.access",
        "balancer.core",
        "balancer.dialects",
        "balancer.history",
        "balancer.journey",
        "worker_agent.log_format",
        "worker_agent.sources",
        "worker_agent.wire",
    },
    "balancer.watch": {
        "balancer.core",
        "balancer.identity",
        "balancer.meeting",
        "balancer.patience",
        "balancer.trust",
        "balancer.upstream",
        "balancer.worker_types",
        "worker_agent.wire",
    },
    "balancer.discovery": {
        "balancer.core",
        "balancer.upstream",
        "worker_agent.reachability",
        "worker_agent.wire",
    },
    # How machines find and reach each other where it is not plain.
    "balancer.announce": {"balancer.addresses", "worker_agent.advertise", "worker_agent.wire"},
    "balancer.names": {"balancer.core", "balancer.discovery"},
    "balancer.tunnels": {
        "balancer.core",
        "balancer.hardened",
        "worker_agent.carrying",
        "worker_agent.wire",
    },
    "balancer.keys": {"balancer.core", "worker_agent.handshake", "worker_agent.private_files"},
    "balancer.pins": {"balancer.keys", "worker_agent.private_files"},
    # The cluster plane: agents are met, and asked within a session.
    "balancer.meeting": {
        "balancer.upstream",
        "balancer.worker_types",
        "worker_agent.handshake",
        "worker_agent.wire",
    },
    "balancer.cluster": {
        "balancer.core",
        "balancer.keys",
        "balancer.meeting",
        "balancer.pins",
        "balancer.upstream",
        "balancer.worker_types",
        "worker_agent.handshake",
        "worker_agent.wire",
    },
    "balancer.cluster_admin": {
        "balancer.addresses",
        "balancer.admin",
        "balancer.cluster",
        "balancer.core",
        "balancer.keys",
        "balancer.orders",
        "worker_agent.handshake",
        "worker_agent.wire",
    },
    "balancer.cluster_cli": {"balancer.admin_cli"},
    "balancer.addresses": {"worker_agent.sources"},
    "balancer.fleet_models": {
        "balancer.core",
        "balancer.meeting",
        "balancer.trust",
        "balancer.upstream",
        "balancer.worker_types",
        "worker_agent.wire",
    },
    "balancer.admin": {
        "balancer.admin_door",
        "balancer.audit",
        "balancer.batch.presets",
        "balancer.core",
        "balancer.discovery",
        "balancer.fleet_models",
        "balancer.front",
        "balancer.history",
        "balancer.keys",
        "balancer.orders",
        "worker_agent.wire",
    },
    "balancer.metrics": {"balancer.core"},
    "balancer.history": {"balancer.core"},
    "balancer.front": {
        "balancer.core",
        "balancer.dialects",
        "balancer.identity",
        "balancer.inference",
        "balancer.metrics",
        "worker_agent.log_format",
        "worker_agent.private_files",
        "worker_agent.wire",
    },
    "balancer.dashboard": set(),
    "balancer.openapi": {
        "balancer.access",
        "balancer.audit",
        "balancer.batch.presets",
        "balancer.core",
        "balancer.dialects",
        "worker_agent.wire",
    },
    "balancer.clean_head": {"balancer.core"},
    "balancer.connections": {"balancer.core", "worker_agent.sources"},
    "balancer.securing": {"balancer.connections", "balancer.core"},
    "balancer.origins": {"balancer.core"},
    "balancer.hardened": {
        "balancer.clean_head",
        "balancer.core",
        "balancer.dialects",
        "balancer.origins",
    },
    "balancer.hot_path": {
        "balancer.clean_head",
        "balancer.connections",
        "balancer.core",
        "balancer.hardened",
        "balancer.inference",
        "balancer.origins",
        "balancer.securing",
    },
    # What is around the process: the socket that it inherits, the parent that owns it.
    "balancer.inherited": set(),
    "balancer.keeping": set(),
    # Configuration.
    "balancer.config_file": {
        "balancer.core",
        "balancer.worker_types",
        "worker_agent.forgiving_json",
        "worker_agent.sources",
    },
    "balancer.settings": {
        "balancer.config_file",
        "balancer.discovery",
        "balancer.names",
        "balancer.trust",
        "worker_agent.forgiving_json",
        "worker_agent.plain_files",
    },
    "balancer.config_watch": set(),
    "balancer.live": {
        "balancer.admin",
        "balancer.config_file",
        "balancer.discovery",
        "balancer.settings",
        "worker_agent.forgiving_json",
    },
    "balancer.package_data": set(),
    "balancer.logs": {"worker_agent.log_format"},
    # A batch has no way of its own to a worker: it asks the endpoint, as any client does.
    "balancer.reached": {"balancer.client_tls", "balancer.config_file"},
    "balancer.access_cli": {"balancer.admin_cli"},
    "balancer.batch": {
        "balancer.reached",
        "balancer.config_file",
        "balancer.package_data",
        "worker_agent.forgiving_json",
    },
    # Only these build things, and only they know the settings.
    "balancer.app": {
        "balancer",
        "worker_agent.reachability",
        "worker_agent.sources",
        "worker_agent.wire",
    },
    "balancer.up": {"balancer.addresses", "balancer.app", "balancer.core", "worker_agent.sources"},
    "balancer.doctor": {
        "balancer.core",
        "balancer.keys",
        "balancer.pins",
        "worker_agent.contacts",
        "worker_agent.diagnosis",
        "worker_agent.findings",
        "worker_agent.handshake",
        "worker_agent.multicast",
        "worker_agent.surroundings",
    },
    "balancer.__main__": {
        "balancer",
        "worker_agent.contacts",
        "worker_agent.findings",
        "worker_agent.findings_table",
        "worker_agent.forgiving_json",
    },
    "balancer.admin_cli": {
        "balancer.batch.client",
        "balancer.keys",
        "balancer.reached",
        "balancer.settings",
    },
    "balancer.config_cli": {
        "balancer.admin_cli",
        "balancer.client_tls",
        "balancer.config_file",
        "balancer.settings",
        "worker_agent.forgiving_json",
    },
    "balancer.ui_cli": {
        "balancer.admin_cli",
        "balancer.batch.client",
        "balancer.dashboard",
        "balancer.reached",
    },
    "balancer.entry": {"balancer.__main__"},
    # The agent never imports the balancer.
    "worker_agent": {"worker_agent"},
    "worker_agent.wire": set(),
    "worker_agent.sources": set(),
    "worker_agent.plain_files": set(),
    "worker_agent.forgiving_json": {"worker_agent.plain_files"},
    "worker_agent.log_format": set(),
    "worker_agent.findings": set(),
    "worker_agent.firewalls": {"worker_agent.findings"},
    "worker_agent.diagnosis": {"worker_agent.findings", "worker_agent.firewalls"},
    "worker_agent.guard": set(),
    "worker_agent.gguf": {"worker_agent.models.local"},
    "worker_agent.model_config": {"worker_agent.models.local"},
    "worker_agent.handshake": set(),
    "worker_agent.private_files": set(),
    "worker_agent.certificate": {"worker_agent.private_files"},
    "worker_agent.cluster_key": {"worker_agent.handshake", "worker_agent.private_files"},
    "worker_agent.hosts": set(),
    "worker_agent.keep_alive": set(),
    "worker_agent.memory": set(),
    "worker_agent.residency": {"worker_agent.memory"},
    "worker_agent.models.local": set(),
    "worker_agent.models.names": set(),
    "worker_agent.models.selection": {"worker_agent.models.local", "worker_agent.models.names"},
    "worker_agent.events": set(),
    "worker_agent.units": set(),
    "worker_agent.liveness": set(),
    "worker_agent.orphans": set(),
    "worker_agent.continuation": set(),
    "worker_agent.supervision": {"worker_agent.wire"},
    "worker_agent.engines": {
        "worker_agent.hardware",
        "worker_agent.memory",
        "worker_agent.models.local",
        "worker_agent.wire",
    },
}

MAY_READ_SETTINGS = {
    "balancer.app",
    "balancer.__main__",
    "balancer.admin_cli",
    "balancer.config_cli",
    "balancer.live",
    "worker_agent.app",
    "worker_agent.__main__",
    "worker_agent.service",
    "worker_agent.uninstall",
}

PURE = {
    "balancer.access",
    "balancer.sessions",
    "balancer.clean_head",
    "balancer.connections",
    "balancer.continuation",
    "balancer.core",
    "balancer.dialects",
    "balancer.identity",
    "balancer.origins",
    "balancer.worker_types",
    "worker_agent.gguf",
    "worker_agent.model_config",
    "worker_agent.handshake",
    "worker_agent.hosts",
    "worker_agent.memory",
    "worker_agent.residency",
    "worker_agent.models.local",
    "worker_agent.models.names",
    "worker_agent.models.selection",
    "worker_agent.diagnosis",
    "worker_agent.events",
    "worker_agent.findings",
    "worker_agent.firewalls",
    "worker_agent.units",
    "worker_agent.liveness",
    "worker_agent.orphans",
    "worker_agent.continuation",
    "worker_agent.wire",
    "worker_agent.sources",
    "worker_agent.supervision",
    "worker_agent.engines",
}
NOT_PURE = {"worker_agent.engines.llama_cpp_runner"}
"""Runs as a process of its own: it is the engine, not a part of the table."""

CLOCKS_LOOPS_NETWORK_FILES_LOGGERS_AND_DICE = {
    "aiohttp", "asyncio", "datetime", "http", "httptools", "io", "logging", "multiprocessing", "os",
    "pathlib", "psutil", "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "ssl",
    "subprocess", "tempfile", "threading", "time", "urllib", "uuid", "uvloop", "zeroconf",
}  # fmt: skip

HARMLESS = {"pathlib.PurePath", "urllib.parse"}
"""They take names apart, and touch no file and no network."""

BANNED_NAMES = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module that is named in an import, wherever in the file it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            name = node.module or ""
            # `from balancer import up` names a module, `from balancer.up import welcome` something in one.
            for alias in node.names:
                whole = f"{name}.{alias.name}"
                found.add(whole if whole in MODULES or whole in HARMLESS else name)
    return found


def row_for(module: str) -> str | None:
    """The most specific row: the module's own, else its package's."""
    name = module
    while name:
        if name in MAY_IMPORT and (name == module or name not in PACKAGES):
            return name
        name = name.rpartition(".")[0]
    return "worker_agent" if module.startswith("worker_agent") else None


def within(module: str, prefixes: set[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_the_agreed_way(module):
    row = row_for(module)
    assert row is not None, f"{module} has no row in MAY_IMPORT: say what it may know"
    ours = {name for name in imports(MODULES[module]) if within(name, set(PACKAGES))}
    wrong = {name for name in ours if not within(name, MAY_IMPORT[row] | {row})}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, PURE) and name not in NOT_PURE])
def test_what_decides_asks_no_clock_no_network_and_no_dice(module):
    roots = {name.partition(".")[0] for name in imports(MODULES[module]) - HARMLESS}
    assert not roots & CLOCKS_LOOPS_NETWORK_FILES_LOGGERS_AND_DICE


@pytest.mark.parametrize("module", MODULES)
def test_only_those_who_build_read_the_settings(module):
    if module not in MAY_READ_SETTINGS:
        settings = {"balancer.settings", "worker_agent.settings"} - {module}
        assert not imports(MODULES[module]) & settings


def test_every_row_is_about_something():
    assert not [row for row in MAY_IMPORT if row not in MODULES]


def test_files_are_named_for_their_subject():
    assert not [name for name in MODULES if name.rpartition(".")[2] in BANNED_NAMES]


def test_the_agents_contract_is_all_that_the_balancer_knows_of_it():
    known = {
        name for module, path in MODULES.items() if module.startswith("balancer") for name in imports(path)
    }
    assert {name for name in known if name.startswith("worker_agent")} <= {
        # What its doctor shares with the agent's.
        "worker_agent.contacts",
        "worker_agent.diagnosis",
        "worker_agent.findings",
        "worker_agent.findings_table",
        "worker_agent.multicast",
        "worker_agent.reachability",
        "worker_agent.surroundings",
        "worker_agent.advertise",
        "worker_agent.carrying",
        "worker_agent.continuation",
        "worker_agent.forgiving_json",
        "worker_agent.handshake",
        "worker_agent.keep_alive",
        "worker_agent.log_format",
        "worker_agent.plain_files",
        "worker_agent.private_files",
        "worker_agent.wire",
        "worker_agent.sources",
    }


def test_pure_parts_need_no_more_than_the_libraries_that_parse():
    allowed = {"orjson", "pydantic"} | set(sys.stdlib_module_names) | set(PACKAGES)
    for module in MODULES:
        if within(module, PURE) and module not in NOT_PURE:
            assert {name.partition(".")[0] for name in imports(MODULES[module])} <= allowed, module
