"""What an agent says of itself and of its models, out of how they stand now."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from worker_agent import wire
from worker_agent.engines.spec import Capacity
from worker_agent.residency import Phase
from worker_agent.residents import Standing
from worker_agent.wire import EngineState, ModelState, ServedModel

_LINE_CHARACTERS = 400  # of a `wire.Line`
_MOST_SECONDS = 1_000_000.0  # of a wire's time

_WORST_LAST = (
    EngineState.READY,
    EngineState.STARTING,
    EngineState.RESTING,
    EngineState.STOPPING,
    EngineState.FAILED,
)


def state_of(standings: Collection[Standing]) -> EngineState:
    """Of the whole agent: READY where a model answers, or would be loaded for somebody who asks; else what
    comes nearest to that."""
    return min(map(_state, standings), key=_WORST_LAST.index, default=EngineState.FAILED)


def detail_of(standings: Sequence[Standing]) -> str:
    """Why the agent is in that state: what is said of the first model that is."""
    state = state_of(standings)
    if state is EngineState.READY:
        return ""  # models say themselves what there is to say of them
    return next((each.detail for each in standings if _state(each) is state), "")


def _state(standing: Standing) -> EngineState:
    """What one model would make of an agent that had no other."""
    if standing.resident is not None and standing.resident.serving is not None:
        return EngineState.READY
    if standing.engine is None or standing.phase in (Phase.CLOSING, Phase.LEAVING):
        return EngineState.READY  # it is loaded for somebody who asks
    on_demand = standing.phase is Phase.LOADING and not standing.at_start
    return EngineState.READY if on_demand and standing.engine is EngineState.STARTING else standing.engine


def served_model(standing: Standing) -> ServedModel:
    """One model, for balancers and for people."""
    model, plan, resident = standing.offer.model, standing.plan, standing.resident
    serving = None if resident is None else resident.serving
    capacity = serving.capacity if serving is not None else Capacity()
    size = model.size_bytes if plan is None or plan.size_bytes is None else plan.size_bytes
    planned = None if plan is None else plan.context_tokens
    return ServedModel(
        name=model.name,
        context_tokens=planned if serving is None else serving.context_tokens,
        paths=wire.INFERENCE_PATHS[:2] if plan is None else plan.spec.paths,
        identity=line(_identity(model.origin, model.path if plan is None else plan.model)),
        memory_tokens=_held(capacity.memory_tokens),
        cache_tokens=_held(capacity.cache_tokens),
        continues=resident is not None and resident.watch.continues,
        state=_model_state(standing),
        engine="" if plan is None else plan.spec.name,
        slots=None if plan is None else plan.slots,
        progress=standing.progress,
        eta_seconds=_seconds(standing.eta_seconds),
        load_seconds=_seconds(standing.load_seconds),
        size_bytes=size,
        memory_bytes=None if plan is None or plan.need is None else plan.need.total_bytes,
        detail=line(standing.detail),
    )


def _model_state(standing: Standing) -> ModelState:
    if standing.fault:
        return ModelState.FAILED
    if standing.resident is None or standing.phase in (Phase.CLOSING, Phase.LEAVING):
        return ModelState.LOADING if standing.at_start else ModelState.UNLOADED
    return ModelState.LOADED if standing.resident.serving is not None else ModelState.LOADING


def _identity(origin: str, path: str) -> str:
    """By which copies of one model are known: as the hub calls it, or by its file."""
    source, _, name = origin.partition(":")
    if source == "hub" and not path.lower().endswith(".gguf"):
        return name.partition("@")[0]
    return file_or_hub_name(path)


def file_or_hub_name(model: str) -> str:
    """`Qwen/Qwen2.5-7B-Instruct-AWQ` as it is, of a path its end: which folders a machine has is its own."""
    parts = model.rstrip("/").split("/")
    return model if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") else parts[-1]


def line(text: str) -> str:
    """A `wire.Line`: what other programs told us is made printable and short."""
    return "".join(c if c.isprintable() else " " for c in text)[:_LINE_CHARACTERS]


def _held(tokens: int | None) -> int | None:
    return None if tokens is None else min(tokens, wire.MAX_TOKENS_HELD)


def _seconds(seconds: float | None) -> float | None:
    """To a tenth: no more of it is known."""
    return None if seconds is None else round(min(max(0.0, seconds), _MOST_SECONDS), 1)
