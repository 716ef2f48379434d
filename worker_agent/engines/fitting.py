"""How many slots, of how long a context, on which memory: what an engine gets of a machine. Pure.

Slots and context that nobody wished are raised and lowered in one order:

1. the engine's own number of slots at a context of 4096 tokens (or the model's own, where that is less);
2. longer contexts up to 32768, the longest first, while the model then needs no more than the engine's
   `generous_share` of what models may take; then more slots, for engines that make use of them;
3. where the first does not fit: half as many slots, and again, down to one; then half the context, down to
   2048 tokens. What the user wished stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from worker_agent.engines.llama_cpp import LLAMA_CPP
from worker_agent.engines.spec import EngineSpec
from worker_agent.engines.vllm import VLLM, batch_tokens
from worker_agent.hardware import Hardware
from worker_agent.memory import DeviceNow, Load, MemoryNow, Need, Pool

DEFAULT_CONTEXT = 4096
_LONGER_CONTEXTS = (32768, 16384, 8192)
_LEAST_CONTEXT = 2048
_GROUPS = (1, 2, 4, 8)
"""GPUs that one model is spread over: its heads are shared out evenly, and their number is even."""
_ALIKE = 0.95
_MOST_GPU_SHARE = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Memory that a model could be loaded into."""

    pool: Pool
    room_bytes: int
    """What it may take there at most."""
    gpus: tuple[DeviceNow, ...] = ()
    indexed: bool = False
    """The GPUs' numbers are the driver's own."""
    offload: bool = True
    """Every layer goes to the GPU, where the engine has one."""

    @property
    def gpu_bytes(self) -> int:
        """Of the smallest of its GPUs."""
        return min((gpu.total_bytes for gpu in self.gpus), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the model is, and what the user wished; None: nothing."""

    weights_bytes: int
    cache_bytes_per_token: int | None
    trained_tokens: int | None
    slots: int | None
    context_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What it gets."""

    place: Place
    slots: int
    context_tokens: int
    need: Need
    lowered: bool = False
    """It is less than the default or the wish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLarge:
    """It does not fit anywhere: what the least of it would take in the place with the most room."""

    place: Place
    slots: int
    context_tokens: int
    need: Need


def places(
    spec: EngineSpec, hardware: Hardware, pools: Mapping[Pool, MemoryNow], *, llama_cpp_gpu: bool
) -> tuple[Place, ...]:
    """Where this engine could load a model, best first."""
    ram = Place(pool=Pool.RAM, room_bytes=pools[Pool.RAM].available_bytes)
    vram = pools.get(Pool.VRAM)
    if vram is None or not hardware.gpus:
        return (ram,)
    gpus = _shares(vram) if vram.devices else _as_one_sees_them(hardware, vram)
    indexed = bool(vram.devices)
    if spec is VLLM:
        return tuple(
            Place(
                pool=Pool.VRAM,
                room_bytes=min(len(group) * min(gpu.available_bytes for gpu in group), vram.available_bytes),
                gpus=group,
                indexed=indexed and len(group) < len(gpus),
            )
            for group in _groups(gpus)
        )
    if spec is LLAMA_CPP and llama_cpp_gpu:
        # It spreads the layers over all of them by itself.
        whole = Place(pool=Pool.VRAM, room_bytes=vram.available_bytes, gpus=gpus)
        return (whole, Place(pool=Pool.RAM, room_bytes=ram.room_bytes, offload=False))
    return (ram,)


def _shares(vram: MemoryNow) -> tuple[DeviceNow, ...]:
    """What models may take of all GPUs together, shared out as the GPUs are free."""
    free = sum(gpu.available_bytes for gpu in vram.devices) or 1
    if len(vram.devices) == 1:
        return (replace(vram.devices[0], available_bytes=vram.available_bytes),)
    share = min(1.0, vram.available_bytes / free)
    return tuple(replace(gpu, available_bytes=int(share * gpu.available_bytes)) for gpu in vram.devices)


def _as_one_sees_them(hardware: Hardware, vram: MemoryNow) -> tuple[DeviceNow, ...]:
    """Where what is free is known of all together only: each has its part."""
    total = sum(gpu.memory_bytes for gpu in hardware.gpus) or 1
    return tuple(
        DeviceNow(
            index=index,
            total_bytes=gpu.memory_bytes,
            available_bytes=vram.available_bytes * gpu.memory_bytes // total,
        )
        for index, gpu in enumerate(hardware.gpus)
    )


def _groups(gpus: Sequence[DeviceNow]) -> Iterator[tuple[DeviceNow, ...]]:
    """The freest one, then the freest two of a kind, then four ..."""
    freest = sorted(gpus, key=lambda gpu: -gpu.available_bytes)
    for count in _GROUPS:
        for first in freest:
            alike = [gpu for gpu in freest if _are_alike(first, gpu)]
            if len(alike) >= count:
                yield tuple(sorted(alike[:count], key=lambda gpu: gpu.index))
                break


def _are_alike(one: DeviceNow, other: DeviceNow) -> bool:
    smaller, larger = sorted((one.total_bytes, other.total_bytes))
    return smaller >= _ALIKE * larger


def fit(spec: EngineSpec, wishes: Wishes, where: Sequence[Place]) -> Size | TooLarge:
    """What a model gets: in the first place where nothing has to be lowered; else in the last of the first
    kind of memory where it fits at all, which has the most GPUs."""
    found: Size | None = None
    for place in where:
        if found is not None and place.pool is not found.place.pool:
            break
        size = _fit_in(spec, wishes, place)
        found = size or found
        if size is not None and not size.lowered:
            break
    if found is not None:
        return found
    roomiest = max(where, key=lambda place: place.room_bytes)
    *_, (slots, context) = _steps(spec, wishes)
    return TooLarge(
        place=roomiest,
        slots=slots,
        context_tokens=context,
        need=_need(spec, wishes, roomiest, slots, context, bounded=True),
    )


def _fit_in(spec: EngineSpec, wishes: Wishes, place: Place) -> Size | None:
    for number, (slots, context) in enumerate(_steps(spec, wishes)):
        need = _need(spec, wishes, place, slots, context, bounded=True)
        if need.total_bytes <= place.room_bytes:
            if number > 0:
                return Size(place=place, slots=slots, context_tokens=context, need=need, lowered=True)
            slots, context = _raised(spec, wishes, place, slots, context)
            need = _need(spec, wishes, place, slots, context, bounded=True)
            return Size(place=place, slots=slots, context_tokens=context, need=need)
    return None


def _raised(spec: EngineSpec, wishes: Wishes, place: Place, slots: int, context: int) -> tuple[int, int]:
    share = spec.generous_share if place.pool is Pool.VRAM else min(spec.generous_share, 0.5)
    room = share * place.room_bytes

    def is_generous(slots: int, context: int) -> bool:
        return _need(spec, wishes, place, slots, context, bounded=False).total_bytes <= room

    own = wishes.trained_tokens or 0
    if wishes.context_tokens is None:
        longer = (tokens for tokens in sorted({*_LONGER_CONTEXTS, own}, reverse=True) if context < tokens)
        fitting = (tokens for tokens in longer if tokens <= min(own, _LONGER_CONTEXTS[0]))
        context = next((tokens for tokens in fitting if is_generous(slots, tokens)), context)
    if wishes.slots is None and context >= min(own, _LONGER_CONTEXTS[0]):
        while slots < spec.roomy_slots and is_generous(2 * slots, context):
            slots *= 2
    return slots, context


def _steps(spec: EngineSpec, wishes: Wishes) -> Iterator[tuple[int, int]]:
    """Slots and context to try: what is wished or default, then less and less of what was not wished."""
    slots = min(wishes.slots or spec.default_slots, spec.most_slots)
    context = wishes.context_tokens or min(
        spec.default_context_tokens or DEFAULT_CONTEXT, wishes.trained_tokens or DEFAULT_CONTEXT
    )
    yield slots, context
    while wishes.slots is None and slots > 1:
        slots //= 2
        yield slots, context
    while wishes.context_tokens is None and context > _LEAST_CONTEXT:
        context = max(context // 2, _LEAST_CONTEXT)
        yield slots, context


def _need(spec: EngineSpec, wishes: Wishes, place: Place, slots: int, context: int, *, bounded: bool) -> Need:
    return spec.need(
        Load(
            weights_bytes=wishes.weights_bytes,
            slots=slots,
            context_tokens=context,
            cache_bytes_per_token=wishes.cache_bytes_per_token,
            pool=place.pool,
            devices=max(1, len(place.gpus)),
            batch_tokens=batch_tokens(place.gpu_bytes),
            room_bytes=place.room_bytes if bounded else None,
        )
    )


def gpu_share(place: Place, need: Need | None) -> float | None:
    """Of each GPU's memory what it may take, in hundredths: what it needs; where that is not known, all that
    there is room for."""
    if place.pool is not Pool.VRAM or not place.gpu_bytes:
        return None
    whole = len(place.gpus) * place.gpu_bytes
    room = math.floor(100 * place.room_bytes / whole) / 100
    wanted = room if need is None else min(room, math.ceil(100 * need.total_bytes / whole) / 100)
    return max(0.01, min(wanted, _MOST_GPU_SHARE))
