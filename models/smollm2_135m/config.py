"""The hyper-parameters of a llama-architecture checkpoint, from config.json or from a GGUF's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """Names as in config.json. `interleaved`: rotation pairs are neighbours, because GGUF converters reorder the rows of q and k."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    interleaved: bool


def parse_config(fields: Mapping[str, Any], format: str) -> Config:
    """ValueError names a field that is missing or has a value that this model does not do."""
    return _from_gguf(fields) if format == "gguf" else _from_json(fields)


def _from_json(fields: Mapping[str, Any]) -> Config:
    def required(name: str, kind: type = int) -> Any:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"config.json: {name} must be {'a number' if kind is float else 'an integer'}, not {value!r}")
        return value

    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"config.json: rope type {rope.get('rope_type', rope.get('type'))!r} is not supported")
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise ValueError(f"config.json: {name} must be false")
    heads = required("num_attention_heads")
    return Config(
        hidden_size=required("hidden_size"), intermediate_size=required("intermediate_size"),
        num_hidden_layers=required("num_hidden_layers"), num_attention_heads=heads,
        num_key_value_heads=fields.get("num_key_value_heads") or heads, head_dim=fields.get("head_dim") or required("hidden_size") // heads,
        vocab_size=required("vocab_size"), max_position_embeddings=required("max_position_embeddings"),
        rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0), rms_norm_eps=required("rms_norm_eps", float),
        interleaved=False)


def _from_gguf(fields: Mapping[str, Any]) -> Config:
    def required(name: str) -> Any:
        if name not in fields:
            raise ValueError(f"the GGUF metadata lacks {name}")
        return fields[name]

    heads, width = required("llama.attention.head_count"), required("llama.embedding_length")
    return Config(
        hidden_size=width, intermediate_size=required("llama.feed_forward_length"), num_hidden_layers=required("llama.block_count"),
        num_attention_heads=heads, num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.attention.key_length") or fields.get("llama.rope.dimension_count") or width // heads,
        vocab_size=fields.get("llama.vocab_size") or len(required("tokenizer.ggml.tokens")),
        max_position_embeddings=required("llama.context_length"), rope_theta=fields.get("llama.rope.freq_base", 10000.0),
        rms_norm_eps=required("llama.attention.layer_norm_rms_epsilon"), interleaved=True)
