"""Who may ask this agent anything: balancers that have met it (`handshake`), and nobody else.

A balancer proves that it holds the cluster key, and is then known by a session, a secret that comes with each
of its requests. An agent that was given no key yet shows a code; whoever types it on a balancer has that one
meet the agent and give it the key. No key, proof or session is ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel

from worker_agent import handshake, wire
from worker_agent.cluster_key import ClusterKey
from worker_agent.exchange import Refused
from worker_agent.handshake import NONCE_SECONDS, PLAIN, Role, Transcript
from worker_agent.private_files import FileFault
from worker_agent.sources import is_loopback

_LOG = logging.getLogger(__name__)
BODY_BYTES = 64 * 1024
_BODY_SECONDS = 10.0
_LOG_SECONDS = 60.0
_LONGEST_REST_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePolicy:
    """Bounds of what is remembered, and of guessing."""

    sessions: int = 64
    """Balancers at once; the one that met us longest ago is forgotten for one more."""
    former_seconds: float = 60.0
    """So long a session is good beside the next one, whose requests may arrive before its own."""
    used_nonces: int = 4096
    wrong_codes: int = 5
    """After so many wrong proofs a code is good no longer."""
    code_seconds: float = 600.0
    look_seconds: float = 2.0
    """While there is no key: how often its file is looked for, which `worker-agent join` may have made."""
    rest_seconds: float = 1.0
    """From a code that was guessed at to the next; doubled each time, so that guessing fills no log."""
    silence_seconds: float = 15.0
    """Whom no balancer has met so long after the start says so."""


class Challenges:
    """Nonces that nobody has to remember: each bears a mark that only this agent can make.

    So whoever asks for a million pushes no balancer's out. Those that led to a session are remembered until
    they are too old anyway. Pure: chance and time are arguments.
    """

    def __init__(self, secret: bytes, most_used: int) -> None:
        """`secret`: 32 bytes of chance. `most_used`: so many are remembered; while they are, no other is
        good."""
        self._secret = secret
        self._most = most_used
        self._used: OrderedDict[str, float] = OrderedDict()

    def give(self, chance: str, now: float) -> str:
        """A nonce with this much chance in it, which holds no dot."""
        stamped = f"{int(now * 1000):x}.{chance}"
        return f"{stamped}.{self._mark(stamped)}"

    def is_good(self, nonce: str, now: float) -> bool:
        """Whether it was given out here, lately, and not used up."""
        stamped, _, mark = nonce.rpartition(".")
        if not hmac.compare_digest(mark.encode(), self._mark(stamped).encode()):
            return False
        given = int(stamped.partition(".")[0], 16) / 1000
        self._forget_those_before(now - NONCE_SECONDS)
        return now - given <= NONCE_SECONDS and nonce not in self._used and len(self._used) < self._most

    def use_up(self, nonce: str, now: float) -> None:
        """It is good no more."""
        self._used[nonce] = now

    def _mark(self, stamped: str) -> str:
        return hmac.digest(self._secret, stamped.encode(), "sha256").hex()[:32]

    def _forget_those_before(self, then: float) -> None:
        while self._used and next(iter(self._used.values())) < then:
            self._used.popitem(last=False)


class Sessions:
    """Which secrets balancers may come with. Pure: the time is an argument.

    They are looked up by their digests: how long that takes says nothing of a secret.
    """

    def __init__(self, policy: GatePolicy) -> None:
        self._policy = policy
        self._newest: OrderedDict[str, bytes] = OrderedDict()
        self._balancers: dict[bytes, str] = {}
        self._former: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._balancers) + len(self._former)

    def begin(self, balancer: str, secret: str, now: float) -> None:
        """The balancer's session is this one; its last one is good a little longer. No two are the same."""
        if (last := self._newest.pop(balancer, None)) is not None:
            del self._balancers[last]
            self._former[last] = balancer, now + self._policy.former_seconds
        self._newest[balancer] = digest = _digest(secret)
        self._former.pop(digest, None)
        self._balancers[digest] = balancer
        while len(self._newest) > self._policy.sessions:
            del self._balancers[self._newest.popitem(last=False)[1]]
        while len(self._former) > self._policy.sessions:
            self._former.popitem(last=False)

    def whose(self, secret: str, now: float) -> str | None:
        """The balancer's id; None: nobody's."""
        digest = _digest(secret)
        if (balancer := self._balancers.get(digest)) is not None:
            return balancer
        former, until = self._former.get(digest, ("", 0.0))
        return former if now < until else None

    def end_all_but(self, secret: str) -> None:
        """Of all that there are, only this one is good from now on."""
        digest = _digest(secret)
        balancer = self._balancers.get(digest)
        former = self._former.get(digest)
        self._newest = OrderedDict() if balancer is None else OrderedDict({balancer: digest})
        self._balancers = {} if balancer is None else {digest: balancer}
        self._former = OrderedDict() if former is None else OrderedDict({digest: former})


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


@dataclass(slots=True)
class _Code:
    """What is shown while there is no key."""

    key: bytes
    """That it stands for."""
    wrong: int = 0


class Gate:
    """The agent's side of meeting balancers."""

    def __init__(
        self,
        agent_id: str,
        key: ClusterKey,
        fingerprint: str = PLAIN,
        policy: GatePolicy | None = None,
        show: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`fingerprint`: of the certificate that we serve with; `PLAIN`: without TLS. `show` is told what to
        type on a balancer, for whoever sits before this machine; the log says it besides."""
        self._agent_id = agent_id
        self._key = key
        self._fingerprint = fingerprint
        self._policy = policy or GatePolicy()
        self._show = show
        self._challenges = Challenges(secrets.token_bytes(32), self._policy.used_nonces)
        self._sessions = Sessions(self._policy)
        self._code: _Code | None = None
        self._woken = asyncio.Event()  # by a key, or by a code's end
        self._met = asyncio.Event()  # by any balancer, once
        self._keeping = asyncio.Lock()
        self._told = -_LOG_SECONDS
        self._fault = ""
        self._tag = _tag_of(key)
        self.wrong_proofs = 0
        """Since the start."""

    @property
    def tag(self) -> str:
        """`handshake.cluster_tag` of the key; empty: there is none yet."""
        return self._tag

    def routes(self) -> list[web.RouteDef]:
        """`OPEN` ones answer to everybody, the others only within a session."""
        return [
            web.post(wire.HELLO_PATH, self._hello),
            web.post(wire.PROVE_PATH, self._prove),
            web.post(wire.KEY_PATH, self._take_key),
        ]

    OPEN = frozenset({("POST", wire.HELLO_PATH), ("POST", wire.PROVE_PATH)})
    """Which of the routes are asked without a session: that is what they are for."""

    def has_met(self, request: web.Request) -> bool:
        """Whether the request comes within a session."""
        return self._whose(request) is not None

    def insist(self, request: web.Request) -> None:
        """Raises `Refused` without a session. Asked before anything of a request's body is read."""
        if not self.has_met(request):
            raise Refused(
                401,
                wire.SESSION_UNKNOWN,
                "an agent answers only to balancers that it has met, and that hold its cluster key: ask the"
                " balancer",
            )

    def _whose(self, request: web.Request) -> str | None:
        return self._sessions.whose(request.headers.get(wire.SESSION_HEADER, ""), _now())

    # The handshake ...

    async def _hello(self, request: web.Request) -> web.Response:
        await _parsed(request, wire.parse_hello)
        by = wire.ProvenBy.CODE if self._key.value is None else wire.ProvenBy.KEY
        nonce = self._challenges.give(secrets.token_urlsafe(24), _now())
        return _answer(wire.HelloAnswer(id=self._agent_id, nonce=nonce, by=by))

    async def _prove(self, request: web.Request) -> web.Response:
        said = await _parsed(request, wire.parse_proof)
        now = _now()
        if not self._challenges.is_good(said.agent_nonce, now):
            raise Refused(
                403, "nonce_unknown", f"the nonce is too old, or was used: ask {wire.HELLO_PATH} again"
            )
        key = self._expected()
        transcript = Transcript(
            balancer=said.balancer,
            agent=self._agent_id,
            balancer_nonce=said.nonce,
            agent_nonce=said.agent_nonce,
            fingerprint=self._fingerprint,
            wire=wire.WIRE_VERSION,
        )
        if not handshake.is_proof(transcript, key, Role.BALANCER, said.proof):
            raise self._wrong(said.balancer, request.remote or "")
        self._challenges.use_up(said.agent_nonce, now)
        self._sessions.begin(said.balancer, transcript.session(key), now)
        self._met.set()
        _LOG.info("met the balancer %s at %s", said.balancer, request.remote)
        return _answer(wire.ProofAnswer(proof=transcript.proof(key, Role.AGENT)))

    def _expected(self) -> bytes:
        """The key that is to be proved. Raises `Refused` while there is none."""
        if self._key.value is not None:
            return handshake.key_bytes(self._key.value)
        if self._code is None:
            raise Refused(
                503, "no_code_yet", f"{self._agent_id} shows a new code soon: type that one", retry_after=2
            )
        return self._code.key

    def _wrong(self, balancer: str, address: str) -> Refused:
        self.wrong_proofs += 1
        if (now := _now()) - self._told >= _LOG_SECONDS:
            self._told = now
            _LOG.warning(
                "who calls itself the balancer %s, at %s, does not hold %s; %d wrong proofs so far",
                *(balancer, address),
                "the code that is shown here" if self._key.value is None else "the cluster key",
                self.wrong_proofs,
            )
        if self._key.value is not None:
            return Refused(
                403,
                "cluster_key_wrong",
                f"{self._agent_id} holds another cluster key: join it again with what `balancer cluster"
                " invite` shows, or remove the key from its data folder and approve it",
            )
        assert self._code is not None
        self._code.wrong += 1
        if self._code.wrong >= self._policy.wrong_codes:
            self._code = None
            self._woken.set()
        return Refused(
            403, "code_wrong", f"this is not the code that {self._agent_id} shows now, in its log or terminal"
        )

    # ... and the key that comes of it.

    async def _take_key(self, request: web.Request) -> web.Response:
        if self._fingerprint == PLAIN and not is_loopback(request.remote or ""):
            raise Refused(
                403,
                "tls_needed",
                f"{self._agent_id} speaks no TLS, and others could read the key on its way: give it the key"
                " by cluster_key_file, or set tls to true",
            )
        new = await _parsed(request, wire.parse_new_key)
        # To its end: a balancer that leaves in between must not leave sessions of the former key behind.
        await asyncio.shield(self._taken(request, new.key))
        return web.Response(status=204)

    async def _taken(self, request: web.Request, key: str) -> None:
        async with self._keeping:
            self.insist(request)  # still: another balancer's key may have come first, and ended this session
            balancer = self._whose(request)
            try:
                await asyncio.to_thread(self._key.keep, key)
            except FileFault as fault:
                raise Refused(500, "key_not_kept", str(fault)) from None
            self._has_key()
            self._sessions.end_all_but(request.headers.get(wire.SESSION_HEADER, ""))
        _LOG.info("the balancer %s at %s gave this machine its cluster key", balancer, request.remote)

    def _has_key(self) -> None:
        self._tag, self._code = _tag_of(self._key), None
        self._woken.set()

    async def show_codes(self) -> None:
        """Shows a code while there is no key, and a new one when that is used up or old; ends with a key."""
        rest = self._policy.rest_seconds
        while self._key.value is None:
            self._woken.clear()
            letters = "".join(secrets.choice(handshake.CODE_LETTERS) for _ in range(handshake.CODE_LENGTH))
            # Slow on purpose, and done once: to try a code costs us nothing of it.
            key = await asyncio.to_thread(handshake.key_of_code, letters, self._agent_id, self._fingerprint)
            if self._key.value is not None:
                return
            self._code = _Code(key)
            self._tell(handshake.shown_code(letters))
            await self._woken_within(self._policy.code_seconds)
            if self._key.value is not None:
                return
            guessed, self._code = self._code is None, None
            if not guessed:
                rest = self._policy.rest_seconds
                continue
            _LOG.warning("the code was guessed at %d times; another one follows", self._policy.wrong_codes)
            self._woken.clear()
            await self._woken_within(rest)
            rest = min(2 * rest, _LONGEST_REST_SECONDS)

    async def tell_of_silence(self) -> None:
        """Warns once where no balancer comes; ends when one has, or with that. Where a code is shown, that
        says what is waited for."""
        try:
            async with asyncio.timeout(self._policy.silence_seconds):
                await self._met.wait()
        except TimeoutError:
            if self._key.value is not None:
                _LOG.warning(
                    "no balancer has met this machine yet: none knows of it or reaches it, or one knows %s by"
                    " another certificate (`balancer cluster show` there tells);"
                    " `worker-agent doctor --network` says why",
                    self._agent_id,
                )

    async def _woken_within(self, seconds: float) -> None:
        end = _now() + seconds
        while not self._woken.is_set() and (left := end - _now()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, self._policy.look_seconds)):
                    await self._woken.wait()
            await self._look_for_key()

    async def _look_for_key(self) -> None:
        async with self._keeping:
            if self._key.value is not None:
                return
            try:
                if not await asyncio.to_thread(self._key.look):
                    return
            except FileFault as fault:
                if (told := str(fault)) != self._fault:
                    self._fault = told
                    _LOG.warning("%s", told)
                return
            self._has_key()
            self._sessions.end_all_but("")  # whoever came by the code may be of another room
        _LOG.info("the cluster key is in %s now", self._key.file)

    def _tell(self, code: str) -> None:
        text = (
            f"waiting to be let in; on the balancer, type: balancer workers approve {self._agent_id} {code}"
        )
        _LOG.info("%s", text)
        self._show(text)


def _tag_of(key: ClusterKey) -> str:
    return "" if key.value is None else handshake.cluster_tag(key.value)


_Message = TypeVar("_Message", bound=BaseModel)


async def read_message(request: web.Request) -> bytes:
    """The body of a request that is small by nature. Raises `Refused`."""
    if (request.content_length or 0) > BODY_BYTES or "Transfer-Encoding" in request.headers:
        raise Refused(413, "body_too_large", f"send at most {BODY_BYTES} bytes, with a Content-Length")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except web.RequestPayloadError:
        raise Refused(400, "body_broken", "the body came to no end") from None
    except TimeoutError:
        raise Refused(408, "body_too_slow", "the body did not arrive in time") from None


async def _parsed(request: web.Request, parse: Callable[[bytes], _Message]) -> _Message:
    data = await read_message(request)
    try:
        return parse(data)
    except wire.WireError as error:
        raise Refused(400, "not_understood", f"this is not understood: {error}") from None


def _answer(message: BaseModel) -> web.Response:
    return web.Response(body=message.model_dump_json().encode(), content_type="application/json")


def _now() -> float:
    return asyncio.get_running_loop().time()
