"""Which certificate each agent had when it was first met, and what this balancer calls itself: what the
cluster plane keeps in the data folder. `Pins` is pure.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import orjson

from balancer import keys
from worker_agent import private_files

MAX_PINS = 1024
"""The agent that was met longest ago is forgotten for one more. Only who holds the key gets in here."""
PINS = "known_agents"
BALANCER_ID = "balancer_id"
"""What the files in the data folder are called."""
MAX_FILE_BYTES = 1024 * 1024

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class Pins:
    """By an agent's id the fingerprint of its certificate."""

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self._known = OrderedDict(known or {})

    def __len__(self) -> int:
        return len(self._known)

    def all(self) -> dict[str, str]:
        return dict(self._known)

    def of(self, agent_id: str) -> str | None:
        """None: it was never met."""
        return self._known.get(agent_id)

    def bind(self, agent_id: str, fingerprint: str) -> bool:
        """The agent was met with this certificate. True: for the first time.

        Raises `ValueError` for another certificate than before: `forget` it first.
        """
        before = self._known.get(agent_id)
        if before not in (None, fingerprint):
            raise ValueError(f"{agent_id} has another certificate")
        self._known[agent_id] = fingerprint
        self._known.move_to_end(agent_id)
        while len(self._known) > MAX_PINS:
            self._known.popitem(last=False)
        return before is None

    def forget(self, agent_id: str) -> bool:
        """Whatever certificate it has when it is next met is its own. False: it was never met."""
        return self._known.pop(agent_id, None) is not None

    def to_json(self) -> bytes:
        return orjson.dumps({"version": 1, "agents": self._known}, option=orjson.OPT_INDENT_2)

    @classmethod
    def from_json(cls, data: bytes) -> Pins:
        """Raises `ValueError`."""
        held = orjson.loads(data)
        agents = held.get("agents") if isinstance(held, dict) else None
        if not isinstance(agents, dict) or held.get("version") != 1:
            raise ValueError("not a list of agents")
        for agent_id, fingerprint in agents.items():
            if not agent_id or not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
                raise ValueError("a fingerprint in it is none")
        return cls(dict(list(agents.items())[-MAX_PINS:]))


class Memory:
    """What is kept between two runs. Blocking; its methods raise `KeyFault`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def balancer_id(self) -> str:
        """By which agents tell the balancers of a room apart; made on the first start."""
        path = self._folder / BALANCER_ID
        try:
            found = keys.read_own(path, MAX_FILE_BYTES).decode("ascii", "replace").strip()
            if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", found):
                return found
            raise keys.KeyFault(f"{path} holds no id: remove it, and a new one is made on the next start")
        except FileNotFoundError:
            made = f"balancer-{secrets.token_hex(4)}"
            self._write(path, f"{made}\n".encode())
            return made

    def pins(self) -> Pins:
        path = self._folder / PINS
        try:
            return Pins.from_json(keys.read_own(path, MAX_FILE_BYTES))
        except FileNotFoundError:
            return Pins()
        except ValueError as error:
            raise keys.KeyFault(
                f"{path} cannot be used: {error}. Put back a copy of it; or remove it, and the certificates "
                "of all agents are learned anew when they are next met"
            ) from None

    def keep(self, pins: bytes) -> None:
        """`Pins.to_json`, in place of what was kept before."""
        self._write(self._folder / PINS, pins)

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            private_files.replace(path, data)
        except OSError as error:
            raise keys.KeyFault(
                f"cannot write {path}: {error.strerror or error}; choose another --data-dir"
            ) from error
