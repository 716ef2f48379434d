"""What agents answer to a balancer that meets them, and what follows from it. Pure.

The handshake itself is `worker_agent.handshake`; `cluster` performs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from balancer.upstream import Answer
from balancer.worker_types import said_in
from worker_agent import wire
from worker_agent.handshake import Role, Transcript, is_proof
from worker_agent.wire import Hello, HelloAnswer

OTHER_CERTIFICATE = (
    "its certificate is another one than when it was met: another machine has taken its id, or it was set up "
    "anew. If you know that it was, on the balancer: balancer cluster forget {id}"
)
NO_TLS = (
    "it speaks no TLS there: update the agent; or, where its settings say so on purpose, list it in the "
    'config with "tls": false'
)
NO_KEY_HELD = "whoever answers there does not hold the cluster key"
OTHER_KEY = (
    "it holds another cluster key: on it, run `worker-agent join` with what `balancer cluster invite` shows"
)


class NotMet(Exception):
    """There is no session with an agent; the sentence says why."""

    def __init__(self, sentence: str, *, certain: bool = False) -> None:
        super().__init__(sentence)
        self.certain = certain
        """It was answered, and asking again soon is of no use."""


class IsPending(NotMet):
    """The agent has no key yet, and waits for somebody to approve it."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(
            f"it shows a code and waits to be let in; on the balancer: balancer workers approve {agent_id} "
            "CODE",
            certain=True,
        )


class KeyRefused(NotMet):
    """The agent holds another key than the one that was proved."""


class AnotherCertificate(NotMet):
    """Who is there is not who was met under this id before."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(OTHER_CERTIFICATE.format(id=agent_id), certain=True)


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first half of a handshake."""

    transcript: Transcript
    by: wire.ProvenBy


def greeted(hello: Hello, answer: Answer) -> Greeting:
    """Raises `NotMet`."""
    if answer.status in (404, 405):
        raise NotMet("its version is older than the balancer's: update the agent", certain=True)
    _insist_on_200(answer)
    try:
        said: HelloAnswer = wire.parse_hello_answer(answer.body)
    except wire.WireError as error:
        raise NotMet(f"how it introduces itself is not usable: {error}", certain=True) from None
    transcript = Transcript(
        balancer=hello.balancer,
        agent=said.id,
        balancer_nonce=hello.nonce,
        agent_nonce=said.nonce,
        fingerprint=answer.fingerprint,
        wire=hello.wire,
    )
    return Greeting(transcript, said.by)


def proof_of(transcript: Transcript, key: bytes) -> wire.Proof:
    """The balancer's half."""
    return wire.Proof(
        wire=transcript.wire,
        balancer=transcript.balancer,
        nonce=transcript.balancer_nonce,
        agent_nonce=transcript.agent_nonce,
        proof=transcript.proof(key, Role.BALANCER),
    )


def session_of(transcript: Transcript, key: bytes, answer: Answer) -> str:
    """The secret that both have now. Raises `KeyRefused` and `NotMet`."""
    if answer.status == 403 and said_code(answer.body) in ("cluster_key_wrong", "code_wrong"):
        raise KeyRefused(OTHER_KEY, certain=True)
    _insist_on_200(answer)
    try:
        said = wire.parse_proof_answer(answer.body)
    except wire.WireError:
        raise NotMet(NO_KEY_HELD, certain=True) from None
    if not is_proof(transcript, key, Role.AGENT, said.proof):
        raise NotMet(NO_KEY_HELD, certain=True)
    return transcript.session(key)


def is_session_unknown(status: int, body: bytes) -> bool:
    """The agent has forgotten the session, or was started again."""
    return status == 401 and said_code(body) == wire.SESSION_UNKNOWN


def said_code(body: bytes) -> str:
    """Of an error; empty where there is none."""
    try:
        answer: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    error = answer.get("error") if isinstance(answer, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""


def _insist_on_200(answer: Answer) -> None:
    if answer.status != 200:
        said = said_in(answer.body)
        raise NotMet(f"it answered with status {answer.status}{f': {said}' if said else ''}")
