"""Which files of a repository are fetched. Pure.

An allowlist: weights as safetensors or GGUF, the tokenizer, templates and configurations. What could hold
code (pickles, Python) is never fetched, whatever else the repository offers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from worker_agent.models.local import Format
from worker_agent.models.names import is_file_name, leaves_its_folder

_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".tiktoken")
_EXACTLY = ("merges.txt", "vocab.txt")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Loading one runs the code that is in it."""
_MODULE = re.compile(r"[0-9]+_[A-Za-z]+")
"""A folder of an embedding model's further layers, such as `1_Pooling`."""
_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.(gguf|safetensors)", re.IGNORECASE
)
_NO_LANGUAGE_MODEL = re.compile(r"mmproj|imatrix|(^|[-_.])draft([-_.]|$)", re.IGNORECASE)
_QUANTIZATION = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q[1-9](?:_[A-Z0-9]+)*|TQ[0-9]_[0-9]|BF16|FP?16|FP?32|MXFP4(?:_MOE)?))"
    r"(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_BEST_FIRST = (
    *("Q4_K_M", "UD-Q4_K_XL", "Q4_K_L", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "MXFP4", "MXFP4_MOE"),
    *("Q5_K_M", "UD-Q5_K_XL", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "Q6_K_L", "Q8_0"),
    *("Q3_K_L", "UD-Q3_K_XL", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS"),
    *("UD-Q2_K_XL", "Q2_K", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "BF16", "F16", "F32"),
)
"""Q4_K_M keeps nearly all of a model's ability at little more than half a byte per parameter; then others of
about its size, then the larger ones, which fit less often, then those that lose ability."""
MOST_FILES = 2000
"""Of one model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file as the hub tells of it, at one commit."""

    name: str
    size: int
    sha256: str | None = None
    """Of its content; None where the hub keeps it in git itself."""
    blob_id: str | None = None
    """git's: SHA-1 of `blob <size>\\0` and the content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is fetched."""

    format: Format
    files: tuple[HubFile, ...]
    main: str = ""
    """The GGUF file to load; empty: the folder."""
    quantization: str = ""


class NothingToFetch(Exception):
    """The repository has nothing for us; the sentence says what it has and what would do."""


def select(
    repo: str,
    files: Sequence[HubFile],
    *,
    tags: Iterable[str] = (),
    formats: Sequence[Format],
    wanted: str | None = None,
    limit_bytes: int | None = None,
) -> Selection:
    """What to fetch of a repository.

    `formats`: what the engines here read, best first. `wanted`: a GGUF file's name or a quantisation.
    `limit_bytes`: what weights may take here; None: anything. Raises `NothingToFetch`.
    """
    _check_names(repo, files)
    usable = [file for file in files if is_file_name(file.name) and _is_allowed(file.name)]
    _check_sizes(repo, usable)
    if wanted is not None:
        return _wanted(repo, usable, wanted)
    offered = _offered(usable, frozenset(tags))
    candidates = [choice for form in formats for choice in offered.get(form, [])]
    if not candidates:
        raise NothingToFetch(_nothing_readable(repo, files, offered, formats))
    for choice in candidates:
        if limit_bytes is None or weights_bytes(choice) <= limit_bytes:
            return choice
    least = min(candidates, key=weights_bytes)
    raise NothingToFetch(
        f"the smallest that {repo} offers takes {_gib(weights_bytes(least))}, and models may take"
        f" {_gib(limit_bytes or 0)} here: choose a smaller model,"
        " or name a file with --file to fetch it all the same"
    )


def weights_bytes(selection: Selection) -> int:
    """Of the files that hold weights."""
    return sum(file.size for file in selection.files if file.name.lower().endswith((".gguf", ".safetensors")))


def refused_config(name: str, content: bytes) -> str | None:
    """Why a model with this configuration is not served; None: it may be. `name`: of the JSON file.

    `auto_map` names Python code in the repository that engines would run, some of them even where they are
    told not to (CVE-2026-22807).
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return f"{name} is not JSON"
    if isinstance(found, dict) and "auto_map" in found:
        return f"{name} names code of its own (auto_map), which is never run here: choose a model without it"
    if name == "config.json" and not isinstance(found, dict):
        return f"{name} is no JSON object"
    return None


def is_config(name: str) -> bool:
    """Whether a file may say how, and with whose code, the model is to be loaded."""
    return "/" not in name and "config" in name.lower() and name.lower().endswith(".json")


def is_mlx(config: Mapping[str, object]) -> bool:
    """Whether the weights beside this config.json are quantised by MLX: only it writes the key so."""
    return "quantization" in config


def shard_names(name: str) -> tuple[str, ...]:
    """The names of all parts of a split file, of which `name` is one; of another file, its own."""
    match = _SHARD.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= MOST_FILES:
        return (name,)
    ending = name[match.end("count") :]
    count = int(match["count"])
    return tuple(f"{match['stem']}-{number:05}-of-{match['count']}{ending}" for number in range(1, count + 1))


def quantization(name: str) -> str:
    """`Q4_K_M` for `Qwen2.5-7B-Instruct-Q4_K_M.gguf`; empty: its name does not tell."""
    found = _QUANTIZATION.findall(name)
    return re.sub("^FP", "F", found[-1].upper()) if found else ""


def _is_allowed(name: str) -> bool:
    folder, _, last = name.rpartition("/")
    lower = last.lower()
    if lower.endswith(".gguf"):
        return True
    if folder and not _MODULE.fullmatch(folder):
        return False
    return lower.endswith(_SUFFIXES) or lower in _EXACTLY


def _check_names(repo: str, files: Sequence[HubFile]) -> None:
    if bad := next((file.name for file in files if leaves_its_folder(file.name)), None):
        raise NothingToFetch(
            f"{repo} lists a file named {bad[:80]!a}, which would lie outside of its folder:"
            " nothing of it is fetched"
        )


def _check_sizes(repo: str, files: Sequence[HubFile]) -> None:
    if len(files) > MOST_FILES:
        raise NothingToFetch(f"{repo} has {len(files)} files; at most {MOST_FILES} are fetched")
    seen: dict[str, str] = {}
    for file in files:
        # Where a disk does not tell case apart, one would replace the other.
        other = seen.setdefault(file.name.casefold(), file.name)
        if other != file.name:
            raise NothingToFetch(f"{repo} has both {other} and {file.name}, which some disks take for one")


def is_wanted(main: str, wanted: str) -> bool:
    """Whether this GGUF file is what `wanted` says: its name, that of one of its parts, or a quantisation."""
    return _has_name(main, wanted) or quantization(main) == wanted.upper()


def _has_name(main: str, wanted: str) -> bool:
    return wanted in (main, main.rpartition("/")[2], *shard_names(main))


def _wanted(repo: str, files: Sequence[HubFile], wanted: str) -> Selection:
    choices = _gguf(files, every=True)
    for choice in choices:
        if _has_name(choice.main, wanted):
            return choice
    for choice in choices:
        if choice.quantization == wanted.upper():
            return choice
    if not choices:
        raise NothingToFetch(f"{repo} has no GGUF file, so --file chooses nothing: leave it out")
    there = ", ".join(dict.fromkeys(choice.quantization or choice.main for choice in choices))
    raise NothingToFetch(f"{repo} has no GGUF file {wanted[:60]!a}; it has {there[:200]}")


def _offered(files: Sequence[HubFile], tags: frozenset[str]) -> dict[Format, list[Selection]]:
    offered: dict[Format, list[Selection]] = {}
    if gguf := _gguf(files):
        offered[Format.GGUF] = gguf
    if folder := _folder(files, Format.MLX if "mlx" in tags else Format.SAFETENSORS):
        offered[folder.format] = [folder]
    return offered


def _gguf(files: Sequence[HubFile], *, every: bool = False) -> list[Selection]:
    """The complete ones, best first. `every`: also those that are no language models by themselves."""
    by_name = {file.name: file for file in files if file.name.lower().endswith(".gguf")}
    choices = []
    for name in by_name:
        parts = shard_names(name)
        if name != parts[0] or not all(part in by_name for part in parts):
            continue
        if not every and _NO_LANGUAGE_MODEL.search(name):
            continue
        choices.append(
            Selection(
                format=Format.GGUF,
                files=tuple(by_name[part] for part in parts),
                main=name,
                quantization=quantization(name),
            )
        )
    return sorted(choices, key=_rank)


def _rank(choice: Selection) -> tuple[int, int, str]:
    known = choice.quantization in _BEST_FIRST
    return (
        _BEST_FIRST.index(choice.quantization) if known else len(_BEST_FIRST),
        weights_bytes(choice),
        choice.main,
    )


def _folder(files: Sequence[HubFile], form: Format) -> Selection | None:
    """A model as transformers lays it out: config.json and safetensors beside it."""
    kept = [file for file in files if not file.name.lower().endswith(".gguf")]
    names = {file.name for file in kept}
    weights = {name for name in names if name.endswith(".safetensors") and "/" not in name}
    # Some hold the same weights a second time in another layout (consolidated.safetensors).
    usual = {name for name in weights if name.startswith("model")}
    weights = usual or weights
    complete = all(part in names for name in weights for part in shard_names(name))
    if "config.json" not in names or not weights or not complete:
        return None
    chosen = [
        file
        for file in kept
        if not file.name.endswith(".safetensors") or file.name in weights or "/" in file.name
    ]
    return Selection(format=form, files=tuple(sorted(chosen, key=lambda file: file.name)))


def _nothing_readable(
    repo: str,
    files: Sequence[HubFile],
    offered: Mapping[Format, Sequence[Selection]],
    formats: Sequence[Format],
) -> str:
    ours = " or ".join(formats) or "nothing: install an engine first (worker-agent doctor says which)"
    if offered:
        return f"{repo} has its weights as {' and '.join(offered)}; the engines here read {ours}"
    if any(file.name.lower().endswith(PICKLES) for file in files):
        return (
            f"{repo} has its weights as pickle files only, which can run code when they are loaded:"
            f" choose a repository with {ours}"
        )
    return f"{repo} holds no weights that can be served here: choose a repository with {ours}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
