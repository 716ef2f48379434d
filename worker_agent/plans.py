"""What shall run for a model: engine, numbers, memory, with every default filled in.

A thin shell over `engines.choice` and `engines.fitting`: it looks whether the model is still there.
What its files say of it is known by then (`models.catalog`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from worker_agent.engines.choice import DoesNotFit, Installed, NoChoice, engine_for, outdated
from worker_agent.engines.fitting import Place, Size, TooLarge, Wishes, fit, gpu_share, places
from worker_agent.engines.llama_cpp import LLAMA_CPP
from worker_agent.engines.spec import EngineSpec, Launch, refused_argument, refused_variable, spreads
from worker_agent.engines.vllm import VLLM, batch_tokens
from worker_agent.hardware import Hardware, gib
from worker_agent.memory import MemoryNow, Need, Pool
from worker_agent.models.local import Format, LocalModel

_USUAL_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user wishes for one model; None: chosen by engine, model and memory."""

    engine: str = "auto"
    slots: int | None = None
    context_tokens: int | None = None
    """Of prompt and answer together, per slot."""
    threads: int | None = None
    args: tuple[str, ...] = ()
    """More words for the engine's command line, after ours."""
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    """More variables for the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What shall run."""

    spec: EngineSpec
    model: str
    """A file, a folder or a hub name, as the engine takes it."""
    name: str
    """What clients ask for."""
    slots: int
    context_tokens: int | None
    threads: int
    program: str | None = None
    cache_bytes_per_token: int | None = None
    need: Need | None = None
    """None: not known (the engine fetches the model by itself)."""
    size_bytes: int | None = None
    args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    local: bool = False
    """The model is on this disk."""
    offload: bool = True
    devices: tuple[int, ...] = ()
    gpus: int = 0
    batch_tokens: int | None = None
    gpu_share: float | None = None
    why: str = ""
    """Why this engine, for people."""
    advice: tuple[str, ...] = ()
    """What was lowered so that it fits, and what should be renewed; for people."""

    def launch(self, port: int) -> Launch:
        """One start, on a port found for it."""
        return Launch(
            python=sys.executable,
            program=self.program,
            model=self.model,
            name=self.name,
            port=port,
            slots=self.slots,
            context_tokens=self.context_tokens,
            threads=self.threads,
            cache_bytes_per_token=self.cache_bytes_per_token,
            need=self.need,
            local=self.local,
            offload=self.offload,
            devices=self.devices,
            gpus=self.gpus,
            batch_tokens=self.batch_tokens,
            gpu_share=self.gpu_share,
            args=self.args,
        )


def plan_for(
    model: LocalModel,
    options: Options,
    hardware: Hardware,
    installed: Installed,
    memory: Mapping[Pool, MemoryNow] | None = None,
) -> Plan:
    """What shall run for this model, with every default filled in. Looks at the disk: call it in a thread.

    `memory`: what each pool may give to models (its `available_bytes`; the caller has taken its share off);
    slots and context that nobody wished are lowered until they fit, and raised where there is plenty
    (`engines.fitting` says in which order). None: as if the whole machine were free.
    Raises `NoChoice` with a sentence for people.
    """
    spec, why = engine_for(model, hardware, installed, options.engine)
    fault = refused_argument(spec, options.args) or refused_variable(spec, options.environment)
    if fault is not None:
        raise NoChoice(f"{model.name}: {fault}")
    model = _there(model)
    pools = _all_of(hardware) if memory is None else memory
    where = places(spec, hardware, pools, llama_cpp_gpu=installed.llama_cpp_gpu)
    if model.size_bytes is None or spreads(spec, options.args):
        return _unmeasured(model, options, hardware, installed, spec, why, where[0])
    wished_tokens, capped = _within_the_models_own(spec, model, options)
    wishes = Wishes(
        weights_bytes=model.size_bytes,
        cache_bytes_per_token=model.facts.cache_bytes_per_token,
        trained_tokens=model.facts.context_tokens,
        slots=options.slots,
        context_tokens=wished_tokens,
    )
    size = fit(spec, wishes, where)
    if isinstance(size, TooLarge):
        raise DoesNotFit(_too_large(model, size))
    advice = (
        capped,
        _lowered(model, options, spec, size),
        _beside_the_gpu(spec, hardware, installed),
        outdated(spec, installed),
    )
    plan = _plan(model, options, hardware, installed, spec, why, size.place, size.need)
    return replace(
        plan,
        slots=size.slots,
        context_tokens=size.context_tokens,
        cache_bytes_per_token=model.facts.cache_bytes_per_token,
        need=size.need,
        size_bytes=model.size_bytes,
        advice=tuple(filter(None, advice)),
    )


def _unmeasured(
    model: LocalModel,
    options: Options,
    hardware: Hardware,
    installed: Installed,
    spec: EngineSpec,
    why: str,
    place: Place,
) -> Plan:
    """Of a model on the hub nothing is known here, nor what one that the user spreads takes of this machine:
    the engine finds out."""
    plan = _plan(model, options, hardware, installed, spec, why, place, None)
    advice = tuple(filter(None, (outdated(spec, installed),)))
    if spreads(spec, options.args):
        return replace(plan, devices=(), gpus=min(plan.gpus, 1), advice=advice)
    return replace(plan, advice=advice)


def _plan(
    model: LocalModel,
    options: Options,
    hardware: Hardware,
    installed: Installed,
    spec: EngineSpec,
    why: str,
    place: Place,
    need: Need | None,
) -> Plan:
    is_vllm = spec is VLLM
    return Plan(
        spec=spec,
        model=model.path,
        name=model.name,
        slots=min(options.slots or spec.default_slots, spec.most_slots),
        context_tokens=options.context_tokens or spec.default_context_tokens,
        threads=options.threads or hardware.cores,
        program=installed.llama_server if spec is LLAMA_CPP else None,
        args=options.args,
        environment=dict(options.environment),
        local=model.format is not Format.HUB,
        offload=place.offload,
        devices=tuple(gpu.index for gpu in place.gpus) if place.indexed else (),
        gpus=len(place.gpus),
        batch_tokens=batch_tokens(place.gpu_bytes) if is_vllm and place.pool is Pool.VRAM else None,
        gpu_share=gpu_share(place, need) if is_vllm else None,
        why=why,
    )


def _all_of(hardware: Hardware) -> Mapping[Pool, MemoryNow]:
    pools = {Pool.RAM: hardware.memory_bytes, Pool.VRAM: sum(gpu.memory_bytes for gpu in hardware.gpus)}
    return {
        pool: MemoryNow(total_bytes=total, available_bytes=int(_USUAL_SHARE * total))
        for pool, total in pools.items()
        if total
    }


def _within_the_models_own(
    spec: EngineSpec, model: LocalModel, options: Options
) -> tuple[int | None, str | None]:
    """vLLM does not start with a longer context than the model's own; who stretches it says so by `args`."""
    wished, own = options.context_tokens, model.facts.context_tokens
    if spec is not VLLM or options.args or wished is None or own is None or wished <= own:
        return wished, None
    return own, f"{model.name} was made for {own} tokens: context_tokens is that in place of {wished}"


def _lowered(model: LocalModel, options: Options, spec: EngineSpec, size: Size) -> str | None:
    if options.slots is not None and size.slots < options.slots and not size.lowered:
        return (
            f"{spec.name} works on {size.slots} request at a time: slots is that in place of {options.slots}"
        )
    if not size.lowered:
        return None
    return (
        f"{model.name} gets {_slots(size.slots)} of {size.context_tokens} tokens, which is what fits the"
        f" {gib(size.place.room_bytes)} that models may take here"
    )


def _beside_the_gpu(spec: EngineSpec, hardware: Hardware, installed: Installed) -> str | None:
    if spec is not LLAMA_CPP or not hardware.gpus or installed.llama_cpp_gpu:
        return None
    return (
        f"this llama.cpp does not use the {hardware.gpus[0].name}: put a llama-server built with CUDA on PATH"
    )


def _too_large(model: LocalModel, size: TooLarge) -> str:
    where = "the GPUs" if len(size.place.gpus) > 1 else "the GPU" if size.place.gpus else "this machine"
    return (
        f"{model.name} needs {size.need} with {_slots(size.slots)} of {size.context_tokens} tokens; models"
        f" may take {size.place.room_bytes / 2**30:.1f} GiB of {where} now: close other programs, or choose a"
        " smaller model or fewer bits per weight"
    )


def _slots(count: int) -> str:
    return "1 slot" if count == 1 else f"{count} slots"


def _there(model: LocalModel) -> LocalModel:
    """With its path as the engine takes it. Raises `NoChoice` for one that is gone."""
    if model.format is Format.HUB:
        return model
    path = Path(model.path).expanduser()
    if model.format is Format.GGUF:
        if not path.is_file():
            raise NoChoice(f"there is no file {path}")
    elif not path.is_dir():
        raise NoChoice(f"there is no folder {path}")
    return replace(model, path=str(path.absolute()))
