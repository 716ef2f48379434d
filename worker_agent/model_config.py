"""What a model folder's `config.json` says of its model. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from worker_agent.models.local import Facts

_WIDE = ("float32", "torch.float32")
_MOST = 2**30


def facts(config: Mapping[str, object]) -> Facts:
    """What it says, as the hub's models say it; what it does not say is None.

    The cache is counted as if every layer kept every token: where some look at a window only, less is taken.
    """
    text = config.get("text_config")
    language = text if isinstance(text, Mapping) else config  # a model that sees has one of each
    return Facts(
        cache_bytes_per_token=_cache_bytes_per_token(language, config),
        context_tokens=_count(language, "max_position_embeddings")
        or _count(config, "max_position_embeddings"),
        quantization=_quantization(config),
    )


def _cache_bytes_per_token(language: Mapping[str, object], config: Mapping[str, object]) -> int | None:
    layers, heads = _count(language, "num_hidden_layers"), _count(language, "num_attention_heads")
    if layers is None or heads is None:
        return None
    number_bytes = 4 if _number_type(language, config) in _WIDE else 2
    latent, rope = _count(language, "kv_lora_rank"), _count(language, "qk_rope_head_dim")
    if latent is not None and rope is not None:
        # Latent attention keeps one narrow row for all heads. Twice that: not every engine keeps it once.
        return 2 * layers * (latent + rope) * number_bytes
    width = _count(language, "hidden_size")
    head = _count(language, "head_dim") or (None if width is None else width // heads)
    kv_heads = _count(language, "num_key_value_heads") or heads
    return None if head is None else 2 * layers * kv_heads * head * number_bytes


def _number_type(language: Mapping[str, object], config: Mapping[str, object]) -> object:
    places = (language, config)
    return next((place[key] for place in places for key in ("dtype", "torch_dtype") if place.get(key)), None)


def _quantization(config: Mapping[str, object]) -> str:
    """`4-bit` as MLX has it, `awq` or `gptq 4-bit` as others have; empty: not quantised."""
    for key in ("quantization", "quantization_config"):
        told = config.get(key)
        if isinstance(told, Mapping):
            method, bits = told.get("quant_method"), told.get("bits")
            words = (
                method if isinstance(method, str) else "",
                f"{bits}-bit" if isinstance(bits, int) and not isinstance(bits, bool) else "",
            )
            return " ".join(filter(None, words))[:32]
    return ""


def _count(place: Mapping[str, object], key: str) -> int | None:
    value = place.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST else None
