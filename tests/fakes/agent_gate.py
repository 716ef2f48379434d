"""The agent's side of meeting balancers, as small as it can be, for fakes that report like an agent.

Made of the contract alone (`worker_agent.handshake` and `wire`), so that what it accepts is what the contract
says. Bytes in, bytes out: any server can ask it.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

import orjson

from worker_agent import handshake, wire
from worker_agent.gate import Challenges
from worker_agent.handshake import PLAIN, Role, Transcript

KEY = "a-cluster-key-of-these-tests"
PATHS = frozenset({wire.HELLO_PATH, wire.PROVE_PATH})


@dataclass(slots=True)
class AgentGate:
    """Who has met an agent of this id, and who has not."""

    agent_id: str
    key: str | None = KEY
    """None: it has none, and shows a code to nobody."""
    fingerprint: str = PLAIN
    """Of the certificate that the agent serves with."""
    hellos: int = 0
    refused: int = 0
    """Proofs that were none."""
    _challenges: Challenges = field(default_factory=lambda: Challenges(secrets.token_bytes(32), 256))
    _sessions: set[str] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body, for a POST to one of `PATHS`."""
        try:
            return self._hello(body) if path == wire.HELLO_PATH else self._prove(body)
        except wire.WireError as error:
            return _refusal(400, "not_understood", str(error))

    def has_met(self, session: str | None) -> bool:
        """Whether the header `wire.SESSION_HEADER` holds a session."""
        return session in self._sessions

    def unknown(self) -> tuple[int, bytes]:
        """What is answered without one."""
        return _refusal(401, wire.SESSION_UNKNOWN, "an agent answers only to balancers that it has met")

    def forget(self) -> None:
        """As an agent that was started again."""
        self._sessions.clear()

    def _hello(self, body: bytes) -> tuple[int, bytes]:
        wire.parse_hello(body)
        self.hellos += 1
        nonce = self._challenges.give(secrets.token_urlsafe(24), time.monotonic())
        by = wire.ProvenBy.CODE if self.key is None else wire.ProvenBy.KEY
        return 200, wire.HelloAnswer(id=self.agent_id, nonce=nonce, by=by).model_dump_json().encode()

    def _prove(self, body: bytes) -> tuple[int, bytes]:
        said = wire.parse_proof(body)
        transcript = Transcript(
            said.balancer, self.agent_id, said.nonce, said.agent_nonce, self.fingerprint, wire.WIRE_VERSION
        )
        key = handshake.key_bytes(self.key or secrets.token_hex(16))
        now = time.monotonic()
        known = self._challenges.is_good(said.agent_nonce, now)
        if not known or not handshake.is_proof(transcript, key, Role.BALANCER, said.proof):
            self.refused += 1
            return _refusal(403, "cluster_key_wrong", "the proof is not one of this agent's key")
        self._challenges.use_up(said.agent_nonce, now)
        self._sessions.add(transcript.session(key))
        answer = wire.ProofAnswer(proof=transcript.proof(key, Role.AGENT))
        return 200, answer.model_dump_json().encode()


def _refusal(status: int, code: str, message: str) -> tuple[int, bytes]:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return status, orjson.dumps({"error": error})
