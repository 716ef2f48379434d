"""The values that the core speaks in. Pure.

Those of which each request makes many are named tuples: a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple, NewType

WorkerId = NewType("WorkerId", str)
ModelName = NewType("ModelName", str)
Ticket = NewType("Ticket", int)
"""The number of one ask while it waits and runs; never used twice in a process."""


class Endpoint(StrEnum):
    """What is asked of a model; a worker may be able to do some of it only."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"


class ServiceClass(StrEnum):
    """Who waits for whom: `batch` soaks up the room that `interactive` leaves."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


BLOCK_CHARS = 1024
"""A prompt is known by the hashes of blocks of so many characters, some 250 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The size of a prompt, and what tells prompts with a common beginning. Never its text."""

    chars: int = 0
    """Of all its messages together."""
    tokens: int | None = None
    """Where it came as tokens; else they are estimated from the characters."""
    blocks: tuple[int, ...] = ()
    """Hashes, each over the one before and the next BLOCK_CHARS characters: two prompts whose first n
    hashes are equal begin with the same n blocks. An incomplete last block is left out."""
    conversation: int | None = None
    """Hash of all messages; None: no conversation."""
    continues: int | None = None
    """The `conversation` of the turn before: of all messages before the last answer."""


class Needs(NamedTuple):
    """What a worker must offer to be given an ask. Asks with equal needs may go to the same workers."""

    model: ModelName
    endpoint: Endpoint
    avoid: frozenset[WorkerId] = frozenset()
    """Workers that failed this request before; they are asked again only when no other one is well."""
    kin: str | None = None
    """The answer was begun elsewhere and is to go on: only workers whose model is of this kin
    (`ModelOffer.kin`), and that can go on with an answer. None: from the beginning, on any."""
    local_only: bool = False
    """It must not leave the room (`Worker.fallback`)."""
    failed_here: bool = False
    """The workers that it is to avoid failed at it, and none was only busy: where no other one is well, a
    fallback may answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What routing needs to know of a request. Never its text."""

    needs: Needs
    arrived: float
    """Seconds on the caller's clock; a retry keeps its first arrival, and with it its place in line."""
    deadline: float
    """When waiting for room ends in a refusal, on the same clock."""
    admitted: bool = False
    """It was let in before (this is a retry): a line that is full by now does not turn it away."""
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    client: str = ""
    """Who asks, for fairness: a digest of the API key, else the address."""
    prompt: Prompt = Prompt()
    max_output: int | None = None
    """The most tokens that the answer may have; None: as many as fit."""
    replayable: bool = False
    """Nothing reaches the client before the whole answer: it may run on two workers at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One serving endpoint as it was configured or found: the unit of routing, health and breaking."""

    id: WorkerId
    type: str
    """A row of `worker_types.WORKER_TYPES`; the core does not look inside."""
    url: str
    """`http://host:port`; of one without an agent it may have a path, which stands for `/v1` there."""
    cap: int | None = None
    """At most so many requests at once, whatever the worker says of itself; None: its own word."""
    only: frozenset[ModelName] = frozenset()
    """The models that it is configured to serve; empty: all that it reports."""
    aliases: tuple[tuple[ModelName, ModelName], ...] = ()
    """Public names with the name by which this worker knows the model: `("qwen", "qwen2.5:7b-q4")`. It is
    offered under its own name too."""
    continues: bool | None = None
    """It is known to go on with chat answers that another worker began, or not to; None: it says so itself,
    or it is found out when it matters."""
    fallback: bool = False
    """Outside of the room (a paid API): asked only where no worker of the room can answer, and never for an
    ask that is `Needs.local_only`. It offers its models under their aliases only."""
    ca_file: str | None = None
    """Whose certificates its own is verified by, over https; None: those that the system trusts."""
    api_version: str | None = None
    """Of Azure's dated APIs: the one to speak; None: the newer one, which has no date."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOffer:
    """One model on one worker."""

    name: ModelName
    """The public one, by which clients ask for it."""
    endpoints: frozenset[Endpoint] = frozenset(Endpoint)
    context_tokens: int | None = None
    known_as: ModelName | None = None
    """What this worker calls it; None: the same."""
    identity: str = ""
    """Base model and quantisation as the worker tells them (`qwen2.5-7b-instruct q4_k_m`); empty: unknown.
    Two offers of one name whose identities differ are different models under one name."""
    automatic: bool = False
    """The name was made from the identity. It is listed where it brings models of several names together."""
    loaded: bool = True
    """It answers without loading the model first."""
    loading: bool = False
    """It is not loaded, and being loaded now."""
    load_seconds: float = 0.0
    """If it is not loaded: the seconds until it answers, from the moment of this report; where nobody loads
    it yet, from the moment that somebody asks for it."""
    progress: float | None = None
    """While it is loading, the share that is done; None: not known."""
    failed: str | None = None
    """Why the worker cannot serve it at present, for people; None: it can."""
    slots: int | None = None
    """How many requests for it the worker works on at once; None: as many as for all its models together."""
    memory_tokens: int | None = None
    """Tokens that all requests which run at once may hold together (vLLM's KV cache); None: slots alone
    bound them."""
    cache_tokens: int | None = None
    """Tokens of earlier prompts that it remembers; None: not known."""
    continues: bool | None = None
    """It goes on with a chat answer that another worker began; None: to be found out when it matters. A
    plain completion goes on anywhere: what has come is a part of the next prompt."""

    @property
    def kin(self) -> str:
        """Equal for two workers where an answer that one began can go on at the other: base model and
        quantisation, as far as they are known, else what the worker calls the model."""
        return self.identity or self.own_name

    @property
    def own_name(self) -> ModelName:
        """What the worker calls it."""
        return self.known_as or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """How a worker was when it was last seen."""

    models: tuple[ModelOffer, ...] = ()
    ready: bool = True
    """It can generate now. False: it answers, but is loading or has failed."""
    slots: int | None = None
    """How many requests it works on at once; None: it does not say."""
    running: int | None = None
    """Requests that it holds, whoever sent them; None: it does not say."""
    tells_loads: bool = False
    """What it says of loads under way can be believed; else they are known only by first tokens."""
    calibrates: bool = False
    """Its speeds may be measured with a prompt of our own when it is new: that costs nobody anything."""
    shares_prefixes: bool = False
    """A prefix that one request is using can serve another at the same time (vLLM); else only afterwards."""
    engine: str = ""
    state: str = "ready"
    detail: str = ""
    hardware: str = ""
    advice: tuple[str, ...] = ()


class Verdict(Enum):
    """What one attempt says about the worker that ran it."""

    GOOD = "good"
    BAD = "bad"
    UNKNOWN = "unknown"
    """Nothing was learned: the client left, or the request itself was wrong."""


class Loading(NamedTuple):
    """A model that a worker is loading, or will when it is asked for it."""

    worker_id: WorkerId
    progress: float | None
    """The share that is done; None: not known."""
    eta_seconds: float | None
    """Until it answers; None: not known."""


class Measures(NamedTuple):
    """What was measured of one attempt, in seconds and tokens; None: did not happen, or is not known."""

    seconds: float
    first_byte: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Of the prompt's, those that the engine did not have to compute; None: it does not say."""
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One relay of a request to one worker, after the fact."""

    worker_id: WorkerId
    choice: Choice
    """Why this worker."""
    waited: float
    """Seconds in line before it."""
    cause: str | None
    """A `retry.Cause` value; None: answered."""
    detail: str
    """For people: what happened to the connection. Never a part of prompt or answer."""
    measures: Measures
    fallback: bool = False
    """The worker is none of the room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The record left of a finished request: metrics, access log and dashboards read only this."""

    request_id: str
    model: ModelName
    endpoint: Endpoint
    stream: bool
    client: str
    """The address it came from."""
    attempts: tuple[Attempt, ...]
    queue_seconds: float
    seconds: float
    """From the whole body's arrival to the last byte handed to the client's connection."""
    status: int
    """As sent; 499 for a client that left (nginx's convention; nobody received it)."""
    error: str = ""
    """The error's code, for counting; empty: none."""
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    warm_ups: int = 0
    """How often a worker read a part of the prompt ahead. They are not among the attempts."""
    continued: int = 0
    """How often a streamed answer went on at another worker."""

    @property
    def fallback(self) -> bool:
        """A worker outside of the room had it last."""
        return bool(self.attempts) and self.attempts[-1].fallback


# What happens to the dispatcher ...


@dataclass(frozen=True, slots=True)
class Arrived:
    ticket: Ticket
    ask: Ask


@dataclass(frozen=True, slots=True)
class Began:
    """The first token of a ticket's answer has come."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Ended:
    """The holder of a ticket is through with it: it was served, it failed, or the client left the line."""

    ticket: Ticket
    verdict: Verdict = Verdict.UNKNOWN
    measures: Measures | None = None
    unreachable: bool = False
    """No connection came about: the worker gets nothing more until it is `Reported`."""
    hold_seconds: float | None = None
    """The worker asked to be left alone for so long (Retry-After)."""
    silent: bool = False
    """What was bad is that nothing came for as long as one waits for it."""
    loading: Loading | None = None
    """The worker has to load the model first, and that takes longer than the ask could wait: it begins all
    the same."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker belongs to the room (or its description changed). It gets nothing before it is `Reported`."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker does not belong to the room any more. What runs on it may finish."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class Reported:
    """A worker was heard of: it is alive, and this is its condition."""

    worker_id: WorkerId
    condition: Condition


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker does not answer. It gets nothing new until it is `Reported` again."""

    worker_id: WorkerId
    reason: str
    """For people: `connection refused`, `no report for 3 s`."""
    abandon: bool = False
    """True: what runs on it is lost too (an agent fell silent). A poll that failed proves less."""


@dataclass(frozen=True, slots=True)
class Draining:
    """Somebody wants a worker to get nothing new (and takes that back). What runs on it may finish. Holds
    whatever the worker reports, until it is `Gone`."""

    worker_id: WorkerId
    on: bool = True


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: somebody may have waited long enough, some breaker rested long enough."""

    received: Mapping[Ticket, int] = field(default_factory=dict)
    """Tokens that have come until now, of tickets whose answer has grown since the last tick."""
    held: frozenset[Ticket] = frozenset()
    """Those whose answer does not grow since its reader is slow: that is not its worker's silence."""


Event = Arrived | Began | Ended | Seen | Gone | Reported | Lost | Draining | Tick

# ... and what it wants done.


class Candidate(NamedTuple):
    """One worker that could have been picked, and why it was as likely as it was."""

    worker_id: WorkerId
    scores: Mapping[str, float]
    """By scorer name, each 0 to 1."""
    weight: float
    expected_seconds: float | None = None
    """What the ask was expected to cost here (ROUTING 2, T); None: the policy does not estimate."""
    cached_tokens: int = 0
    """Of its prompt, what this worker was thought to remember."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A decision with its reasons: what the log line, the `why` view and the tests read."""

    worker_id: WorkerId
    candidates: tuple[Candidate, ...]
    excluded: Mapping[WorkerId, str] = field(default_factory=dict)
    """Workers of the room that were out of the question, with the reason."""
    because: str = ""
    """For people, in a few words: `the paper's first prompt`, `a copy of a straggler`."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The ticket now holds a slot on this worker, until it is `Ended`."""

    ticket: Ticket
    worker: Worker
    choice: Choice
    model: ModelName | None = None
    """By which name to ask this worker for the model; None: by the client's."""
    warm_chars: int | None = None
    """Not the ask itself: only so much of its prompt is to be read, with an answer of one token, so that the
    engine remembers it. Then the ticket is `Ended`, and the ask arrives again."""
    kin: str = ""
    """Of the model there (`ModelOffer.kin`): where an answer that it begins could go on."""
    copy_of: Ticket | None = None
    """A second attempt at the ask of that ticket, under a ticket of its own; the first whole answer counts
    and the other attempt is ended. Who has no use for it ends it at once."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Let this worker generate something that nobody asked for; the ticket is `Ended` with verdict and
    measures. Nobody's request is risked on a worker that failed, or whose speeds are not known at all."""

    ticket: Ticket
    worker: Worker
    endpoint: Endpoint
    model: ModelName
    """As this worker calls it."""
    prompt_tokens: int = 1
    """About so long a prompt, of a text that it cannot have in a cache."""
    output_tokens: int = 1
    measures: bool = False
    """It is to find out how fast the worker is, not whether it is well."""


class Refusal(Enum):
    """Why an ask is turned away."""

    MODEL_NOT_FOUND = "model_not_found"
    MODEL_AWAY = "model_away"
    """Nobody serves it; but some worker that never said what it serves does not answer at present."""
    ROOM_EMPTY = "room_empty"
    ENDPOINT_NOT_SERVED = "endpoint_not_served"
    QUEUE_FULL = "queue_full"
    WOULD_WAIT_TOO_LONG = "would_wait_too_long"
    """As things stand its turn would come after its deadline."""
    WAITED_TOO_LONG = "waited_too_long"
    MODEL_LOADING = "model_loading"
    """It is being loaded, and nobody will have it before the deadline."""
    MODEL_FAILED = "model_failed"
    """Each worker that has it says that it cannot load it."""
    LOCAL_ONLY = "local_only"
    """Only a fallback serves it, and the ask must not leave the room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The ticket is out of the line and gets no slot."""

    ticket: Ticket
    refusal: Refusal
    models: tuple[ModelName, ...] = ()
    """What could be asked for instead, sorted."""
    retry_after: float = 1.0
    """Seconds after which a new try has a fair chance."""
    detail: str = ""
    """For people: the state of the workers that serve the model, at the moment of refusing."""
    loading: Loading | None = None
    """With MODEL_LOADING: who will have it first."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """The worker that holds this ticket is lost, or says nothing any more: stop waiting for its answer."""

    ticket: Ticket
    reason: str


Command = Grant | Refuse | Abandon | Probe


@dataclass(frozen=True, slots=True)
class Standing:
    """How it stands with an ask that waits in line."""

    position: int
    """1: the next one of its class that wants this model."""
    eta_seconds: float | None
    """Until it is likely to be its turn; None: nothing was measured yet."""
    loading: Loading | None = None
    """Nobody has the model loaded; who will have it first."""
