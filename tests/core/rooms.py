"""A dispatcher in a test: what happens to it is a call, what it wants done is the answer."""

import random
from collections.abc import Iterable, Sequence

from balancer.core.dispatcher import Dispatcher, DispatchPolicy, WorkerView
from balancer.core.model import (
    BLOCK_CHARS,
    Abandon,
    Arrived,
    Ask,
    Began,
    Command,
    Condition,
    Ended,
    Endpoint,
    Grant,
    Measures,
    ModelName,
    ModelOffer,
    Needs,
    Probe,
    Prompt,
    Refusal,
    Refuse,
    Reported,
    Seen,
    ServiceClass,
    Tick,
    Ticket,
    Verdict,
    Worker,
    WorkerId,
)
from balancer.core.placement import PlacementPolicy

M = ModelName("m")
CHAT = Endpoint.CHAT
LONG = 1e9
"""Seconds: nobody's patience ends."""
BLOCK_TOKENS = BLOCK_CHARS // 4


def worker(name: str, cap: int | None = None, port: int = 1, **more) -> Worker:
    return Worker(id=WorkerId(name), type="agent", url=f"http://{name}:{port}", cap=cap, **more)


def condition(*, slots: int | None = 4, memory: int | None = None, cache: int | None = None, **more):
    """Of a worker that serves model m."""
    offer = ModelOffer(name=M, memory_tokens=memory, cache_tokens=cache)
    return Condition(models=(offer,), slots=slots, **more)


def vllm(**more) -> Condition:
    """4 000 tokens/s of prompt, until something else is learned; requests share a prefix in use."""
    return condition(**{"slots": 16, "engine": "vllm", "shares_prefixes": True, "memory": 90_000, **more})


def llama_cpp(**more) -> Condition:
    """2 500 tokens/s of prompt, until something else is learned."""
    return condition(**{"slots": 4, "engine": "llama.cpp", "hardware": "NVIDIA", **more})


def old_cpu(**more) -> Condition:
    """60 tokens/s of prompt, until something else is learned."""
    return condition(**{"slots": 4, "engine": "llama.cpp", "hardware": "", **more})


def paper(number: int, blocks: int) -> tuple[int, ...]:
    """The blocks of a document that no other number has."""
    return tuple(number * 10_000 + block for block in range(blocks))


class Room:
    """Time stands still between calls unless `now` is moved."""

    def __init__(self, policy: str = "expected_latency", seed: int = 1, **more) -> None:
        self.dispatcher = Dispatcher(
            DispatchPolicy(**{"placement": PlacementPolicy(policy), "settle_seconds": 0, **more}),
            random.Random(seed),
            started=0.0,
        )
        self.now = 0.0
        self._taught = -1_000_000

    def tell(self, event) -> list[Command]:
        return self.dispatcher.handle(event, self.now)

    def add(self, name: str, condition: Condition, cap: int | None = None, **more) -> list[Command]:
        return self.tell(Seen(worker(name, cap, **more))) + self.report(name, condition)

    def report(self, name: str, condition: Condition) -> list[Command]:
        return self.tell(Reported(WorkerId(name), condition))

    def ask(
        self,
        number: int,
        *,
        tokens: int | None = None,
        blocks: Sequence[int] = (),
        avoid: Iterable[str] = (),
        endpoint: Endpoint = CHAT,
        model: str = "m",
        batch: bool = False,
        patience: float = LONG,
        conversation: int | None = None,
        continues: int | None = None,
        kin: str | None = None,
        since: float | None = None,
        local_only: bool = False,
        failed_here: bool = False,
        **more,
    ) -> list[Command]:
        """A prompt of so many tokens: at least those of its blocks and a question after them. `since`: when
        the request arrived first, if that is not now."""
        needs = Needs(
            model=ModelName(model),
            endpoint=endpoint,
            avoid=frozenset(map(WorkerId, avoid)),
            kin=kin,
            local_only=local_only,
            failed_here=failed_here,
        )
        prompt = Prompt(
            chars=4 * max(tokens or 0, BLOCK_TOKENS * len(blocks) + 40),
            blocks=tuple(blocks),
            conversation=conversation,
            continues=continues,
        )
        asked = Ask(
            needs=needs,
            arrived=self.now if since is None else since,
            deadline=self.now + patience,
            prompt=prompt,
            service_class=ServiceClass.BATCH if batch else ServiceClass.INTERACTIVE,
            **more,
        )
        return self.tell(Arrived(Ticket(number), asked))

    def begin(self, number: int, after: float = 0.0) -> list[Command]:
        self.now += after
        return self.tell(Began(Ticket(number)))

    def end(
        self,
        number: int,
        verdict: Verdict = Verdict.GOOD,
        *,
        after: float = 0.0,
        seconds: float = 1.0,
        prompt: int | None = None,
        output: int | None = None,
        cached: int | None = None,
        **more,
    ) -> list[Command]:
        self.now += after
        measures = Measures(seconds=seconds, prompt_tokens=prompt, output_tokens=output, cached_tokens=cached)
        return self.tell(Ended(Ticket(number), verdict, measures, **more))

    def teach(self, name: str, *, prefill: float, token: float, answers: int = 4) -> None:
        """Lets this worker answer until its speeds are known: tokens of prompt a second, seconds for one
        token of an answer. Nothing else may be running."""
        others = [v.worker.id for v in self.dispatcher.snapshot(self.now).workers if v.worker.id != name]
        for _ in range(answers):
            self._taught += 1
            ((ticket, where),) = granted(self.ask(self._taught, tokens=1000, avoid=others))
            assert where == name
            self.begin(ticket, after=1000 / prefill)
            self.end(ticket, after=100 * token, prompt=1000, output=101, cached=0, seconds=1.0)

    def tick(self, seconds: float = 0.0) -> list[Command]:
        self.now += seconds
        return self.tell(Tick())

    def ticks(self, seconds: float, step: float = 0.5) -> list[Command]:
        """Commands of all that time."""
        commands: list[Command] = []
        for _ in range(round(seconds / step)):
            commands += self.tick(step)
        return commands

    def view(self, name: str) -> WorkerView:
        return next(v for v in self.dispatcher.snapshot(self.now).workers if v.worker.id == name)

    @property
    def waiting(self) -> int:
        return self.dispatcher.snapshot(self.now).waiting


def granted(commands: Iterable[Command]) -> list[tuple[int, str]]:
    return [(c.ticket, c.worker.id) for c in commands if isinstance(c, Grant)]


def grants(commands: Iterable[Command]) -> list[Grant]:
    return [c for c in commands if isinstance(c, Grant)]


def refused(commands: Iterable[Command]) -> list[Refusal]:
    return [c.refusal for c in commands if isinstance(c, Refuse)]


def probes(commands: Iterable[Command]) -> list[Probe]:
    return [c for c in commands if isinstance(c, Probe)]


def abandoned(commands: Iterable[Command]) -> list[int]:
    return [c.ticket for c in commands if isinstance(c, Abandon)]
