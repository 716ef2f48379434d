"""How a balancer and an agent show each other that both hold the cluster key, without either sending it.

The balancer, which connects, says hello with a nonce; the agent answers with one of its own. The balancer
proves first, so that whoever merely connects gets nothing to guess at; then the agent proves. Both proofs are
HMACs over everything that the two said and over the fingerprint of the agent's certificate, each as it sees
that one: whoever sits in between with a certificate of his own has both fail. What comes out is a session, a
secret that the balancer sends along with every request, inside of TLS to that same certificate.

A new agent that was given no key shows a code instead. Whoever types it on the balancer has the two do the
same handshake with a key made from the code, and the agent is then given the cluster's.

Pure: chance and time are arguments.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from urllib.parse import quote, unquote

NONCE_SECONDS = 30.0
"""For so long a nonce is good."""
LEAST_KEY_CHARACTERS = 16
MOST_KEY_CHARACTERS = 512

CODE_LETTERS = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"
"""Of the code that a new agent shows: none that is taken for another one when read aloud or typed."""
CODE_LENGTH = 8
"""About 40 bits. A guess costs a scrypt (16 MiB, some 50 ms) and the agent makes a new code after a few wrong
ones or ten minutes, so that neither asking nor searching finds it in its time."""

PLAIN = ""
"""The fingerprint where there is no TLS."""


class Role(Enum):
    """Who proves. Part of what is proved: else one's proof could be handed back to it."""

    BALANCER = "balancer"
    AGENT = "agent"


@dataclass(frozen=True, slots=True)
class Transcript:
    """What both sides have said, as one of them saw it."""

    balancer: str
    """Its id."""
    agent: str
    """Its id."""
    balancer_nonce: str
    agent_nonce: str
    fingerprint: str
    """SHA-256 of the agent's certificate (DER) in lower-case hex, as the TLS connection has it; `PLAIN`."""
    wire: int
    """The version of the protocol."""

    def proof(self, key: bytes, role: Role) -> str:
        """That `role` holds the key; 64 hex digits."""
        return _tagged(key, f"proof of the {role.value}", self._fields())

    def session(self, key: bytes) -> str:
        """The secret that both have from now on; 64 hex digits."""
        return _tagged(key, "session", self._fields())

    def _fields(self) -> tuple[str, ...]:
        nonces = self.balancer_nonce, self.agent_nonce
        return str(self.wire), self.balancer, self.agent, *nonces, self.fingerprint


def is_proof(transcript: Transcript, key: bytes, role: Role, given: str) -> bool:
    """Compared in a time that does not depend on what is equal."""
    return hmac.compare_digest(transcript.proof(key, role).encode(), given.encode("utf-8", "surrogateescape"))


def is_cluster_key(text: str) -> bool:
    """Whether it can be a cluster key: one word, which any file, variable or shell leaves as it is."""
    is_long_enough = LEAST_KEY_CHARACTERS <= len(text) <= MOST_KEY_CHARACTERS
    return is_long_enough and text.isprintable() and " " not in text


def key_bytes(key: str) -> bytes:
    """A cluster key as it is used for proofs."""
    return key.encode("utf-8", "surrogateescape")


def key_of_code(code: str, agent_id: str, fingerprint: str) -> bytes:
    """The key that a code stands for, for this agent and no other; slow on purpose: not for the event loop.

    Upper and lower case, hyphens and blanks make no difference.
    """
    salt = hashlib.sha256("\0".join(("llm-cluster-code", agent_id, fingerprint)).encode()).digest()
    return hashlib.scrypt(plain_code(code).encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)


def plain_code(code: str) -> str:
    """A code as it was meant, however it was typed."""
    return "".join(letter for letter in code.upper() if letter.isalnum())[: 2 * CODE_LENGTH]


def shown_code(letters: str) -> str:
    """`7KQ2-M9XD`."""
    half = CODE_LENGTH // 2
    return f"{letters[:half]}-{letters[half:]}"


def cluster_tag(key: str) -> str:
    """By which those who hold the key know each other's announcements; 16 hex digits, which tell nothing of
    a key that was made by chance."""
    return _tagged(key_bytes(key), "tag", ())[:16]


def _tagged(key: bytes, purpose: str, fields: Sequence[str]) -> str:
    # With its length before it, no field can run over into the next.
    parts = (field.encode("utf-8", "surrogateescape") for field in ("llm-cluster-2", purpose, *fields))
    return hmac.digest(key, b"".join(len(part).to_bytes(4, "big") + part for part in parts), "sha256").hex()


# The line that is pasted on a new machine ...


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a machine needs to join: the key, and where the balancer is."""

    key: str
    balancers: tuple[str, ...]
    """Each `host:port`, or with `https://` before it; none where they are found by mDNS."""

    def __str__(self) -> str:
        """`lb2.KEY.CHECK@192.168.1.10:4000`, one word for any shell."""
        return f"lb2.{quote(self.key, safe='')}.{cluster_tag(self.key)[:8]}@{','.join(self.balancers)}"


_QUOTES = "'\"`"


def is_invitation(text: str) -> bool:
    """Whether it is meant to be one, or the whole line that shows one."""
    return bool(_word(text))


def _word(text: str) -> str:
    """The invitation in what was pasted; empty: there is none."""
    words = (word.lstrip(_QUOTES) for word in text.split())
    return next((word for word in words if word.startswith("lb2.")), "")


def parse_invitation(text: str) -> Invitation:
    """Raises `ValueError` with a sentence for people, which holds nothing of the key."""
    secret, at, places = _word(text).partition("@")
    version, _, rest = secret.partition(".")
    quoted, _, check = rest.rpartition(".")
    key = unquote(quoted)
    whole = version == "lb2" and at and is_cluster_key(key)
    if not whole or not hmac.compare_digest(check.encode(), cluster_tag(key)[:8].encode()):
        raise ValueError(
            "the invitation is not whole: copy all of it, from `lb2.` to the end of its line, as "
            "`balancer cluster invite` shows it"
        )
    stripped = (place.strip(_QUOTES) for place in places.split(","))
    return Invitation(key, tuple(place for place in stripped if place))
