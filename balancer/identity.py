"""Which models are the same one: base model and quantisation, out of what workers tell. Pure.

Servers name one model in many ways: `Qwen2.5-7B-Instruct-Q4_K_M.gguf`, `qwen2.5:7b-instruct-q4_K_M`. An
identity is the common form of these, `qwen2.5-7b-instruct q4_k_m`. It is made only of what is told: a name
without a size (`model.gguf`, `gpt-4o`), or a model whose quantisation nobody tells, has none, since to take
two different models for one gives wrong answers and to miss that two are one costs a little speed.

What follows the quantisation in a name (`4bit-DWQ`, `GPTQ-Int4`) is a part of it. Organisations are left
out: those in model names are mostly of who converted it. Ollama's own names do not tell a chat model from
the base model under it (its `llama3.2:3b` is the chat model, that name on the hub is not), so that without
such a word they get `ollama/` before them and are equal to each other only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from balancer.core.model import Condition, ModelName, ModelOffer

MAX_CHARACTERS = 120

_QUANTISATION = re.compile(
    r"(?:^|(?<=[-. ]))(?:"
    r"(?:ud-)?[it]?q[1-8](?:_[a-z0-9]{1,4}){0,4}"  # llama.cpp's; ud: Unsloth's mixtures under the same names
    r"|mxfp[468]|nvfp4|fp8|bf16|fp?16|fp?32|int[48]|w[48]a(?:8|16)"
    r"|awq|gptq|bnb|exl[23]|hqq|aqlm|[1-8]-?bit"
    r")(?=[-. ]|$)"
)
_SIZE = re.compile(r"e?\d+(?:\.\d+)?[bm]|\d+x\d+(?:\.\d+)?b")
_VERSION = re.compile(r"\d+(?:\.\d+)?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_WORD = re.compile(r"[a-z0-9.+]+")
_FORMATS = frozenset({"", "gguf", "mlx", "hf"})
_VARIANTS = frozenset({"instruct", "chat", "it", "base"})


def identity(name: str, quantisation: str = "") -> str:
    """`qwen2.5-7b-instruct q4_k_m`, from a model's name, file or hub path; "" when it does not tell enough.

    `quantisation`: as the server tells it apart (`Q4_K_M`, `4bit`, `Q4_K - Medium`); the name's own counts
    more, since it knows finer kinds.
    """
    base, named = _parsed(name)
    return _joined(base, named or _told(quantisation)) if _sized(base) else ""


def ollama_identity(name: str, parameter_size: str, quantisation: str) -> str:
    """The same for a model of Ollama, with the `details` that its `/api/tags` tells."""
    base, named = _parsed(name)
    size = parameter_size.lower()
    if base and not _VARIANTS.intersection(base):
        if _SIZE.fullmatch(size):  # the same whether the tag says `3b` or nothing
            base = [*(word for word in base if not _SIZE.fullmatch(word)), size]
        base = [f"ollama/{base[0]}", *base[1:]]
    return _joined(base, named or _told(quantisation)) if _sized(base) else ""


def automatic_name(identity: str) -> ModelName:
    """The public name under which equal models of all workers can be asked for: `qwen2.5-7b-instruct~q4_k_m`.

    No hub or server uses a tilde in a model's name: Hugging Face takes letters, digits, `-`, `_`, `.` and
    `/`, Ollama a `:` besides and LM Studio an `@`. It needs no escape in a URL, and no quotes in a shell.
    """
    return ModelName(identity.replace(" ", "~"))


def with_automatic_names(condition: Condition) -> Condition:
    """The condition with one more offer for each identity, under its automatic name.

    Where a worker has one model under several names, the loaded one is taken. A name that the worker uses
    itself stays its own.
    """
    names = {offer.name for offer in condition.models}
    further: dict[ModelName, ModelOffer] = {}
    for offer in sorted(condition.models, key=lambda offer: not offer.loaded):
        name = automatic_name(offer.identity)
        if offer.identity and name not in names:
            known_as = offer.own_name
            further.setdefault(name, dataclasses.replace(offer, name=name, known_as=known_as, automatic=True))
    return dataclasses.replace(condition, models=(*condition.models, *further.values()))


def conflicts(models: Mapping[ModelName, Iterable[ModelOffer]]) -> list[str]:
    """A sentence for each public name under which workers serve different models, by name.

    Offers of unknown identity accuse nobody.
    """
    return [
        f'"{name}" is not the same model on all workers: {", ".join(known)}. {_advice(known, models)}'
        for name, offers in sorted(models.items())
        if _differ(known := sorted({offer.identity for offer in offers if offer.identity}))
    ]


def _advice(identities: list[str], models: Mapping[ModelName, object]) -> str:
    names = [name for name in map(automatic_name, identities) if name in models]
    if not names:
        return 'Name them apart with "aliases".'
    return f'Ask for {" or ".join(names)} to get that one alone, or name them apart with "aliases".'


def _differ(identities: list[str]) -> bool:
    """An Ollama name without a variant may be any variant: beside others only its quantisation counts."""
    bases = {identity.partition(" ")[0] for identity in identities}
    quantisations = {identity.partition(" ")[2] for identity in identities}
    owns = {base for base in bases if base.startswith("ollama/")}
    return len(quantisations) > 1 or len(owns) > 1 or len(bases - owns) > 1


def _parsed(name: str) -> tuple[list[str], str]:
    """The words of the base model, and the quantisation; each empty if the name does not tell it."""
    text = re.split(r"[/\\]", name.lower())[-1].removesuffix(".gguf").removesuffix(":latest")
    text = re.sub(r"[:@~]", "-", _SHARD.sub("", text))
    found = _QUANTISATION.search(text)
    before = text[: found.start()] if found else text
    words = [word for word in re.split(r"[-_ ]+", before.rstrip("-_. ")) if word not in _FORMATS]
    if not all(_WORD.fullmatch(word) for word in words):
        return [], ""
    return _family(words), _quantisation(text[found.start() :]) if found else ""


def _family(words: list[str]) -> list[str]:
    """`meta-llama-3.2-...` and `llama3.2-...` are written both ways: the second is taken."""
    if words[:1] == ["meta"] and "".join(words[1:2]).startswith("llama"):
        words = words[1:]
    if len(words) > 1 and words[0].isalpha() and _VERSION.fullmatch(words[1]):
        words = [words[0] + words[1], *words[2:]]
    return words


def _told(quantisation: str) -> str:
    """A server's own word for it; llama.cpp writes `Q4_K - Medium`, and more for people behind a dash."""
    text = quantisation.lower().removeprefix("(guessed) ").removeprefix("all ")
    kind, _, rest = text.partition(" - ")
    text = kind + {"small": "_s", "medium": "_m", "large": "_l"}.get(rest, "")
    return _quantisation(text) if _QUANTISATION.match(text) else ""


def _quantisation(text: str) -> str:
    words = [word for word in re.split(r"[-. ]+", text.replace("-bit", "bit")) if word not in _FORMATS]
    if not all(re.fullmatch(r"[a-z0-9_]+", word) for word in words):
        return ""
    return "-".join({"fp16": "f16", "fp32": "f32"}.get(word, word) for word in words)


def _sized(base: Iterable[str]) -> bool:
    return any(_SIZE.fullmatch(word) for word in base)


def _joined(base: Iterable[str], quantisation: str) -> str:
    whole = f"{'-'.join(base)} {quantisation}"
    return whole if quantisation and len(whole) <= MAX_CHARACTERS else ""
