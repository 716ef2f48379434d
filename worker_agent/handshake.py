"""Proof that the sender of a request holds the cluster key, without sending it.

The receiver gives out a nonce; the sender answers with an HMAC of the key over the nonce and everything that
the request would do, so that a proof that is overheard is good for nothing else, and for no second time.
`prove` and `Nonces` are pure: chance and time are arguments.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from hashlib import sha256

NONCE_SECONDS = 30.0
"""For so long a nonce is good."""
MAX_NONCES = 256
"""At once; the oldest is forgotten for one more."""
LEAST_KEY_CHARACTERS = 16


def prove(key: str, nonce: str, agent_id: str, method: str, path: str, body: bytes) -> str:
    """The value of `wire.PROOF_HEADER` for one request to the agent of that id.

    The id is proved too: else an agent that does not hold the key could hand on another one's nonce, and have
    that one carry out what was meant for itself.
    """
    said = "\n".join(("llm-cluster-1", nonce, agent_id, method.upper(), path, sha256(body).hexdigest()))
    return f"{nonce}:{hmac.new(key.encode(), said.encode(), sha256).hexdigest()}"


class Nonces:
    """Those that were given out and not used yet."""

    def __init__(self) -> None:
        self._given: OrderedDict[str, float] = OrderedDict()

    def give(self, nonce: str, now: float) -> str:
        """The nonce, which is now good for one proof. `nonce`: at least 128 bits of chance, as text without
        a colon."""
        while len(self._given) >= MAX_NONCES:
            self._given.popitem(last=False)
        self._given[nonce] = now
        return nonce

    def accepts(
        self, key: str, header: str, agent_id: str, method: str, path: str, body: bytes, now: float
    ) -> bool:
        """Whether this is a proof for this request. Its nonce is used up, whatever the outcome."""
        nonce, _, _ = header.partition(":")
        given = self._given.pop(nonce, None)
        if given is None or now - given > NONCE_SECONDS:
            return False
        # Compared as bytes: a header may hold anything, and not in a time that depends on what is equal.
        said = header.encode(errors="surrogateescape")
        return hmac.compare_digest(prove(key, nonce, agent_id, method, path, body).encode(), said)
