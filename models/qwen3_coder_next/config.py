"""The numbers of a `qwen3_next` checkpoint, from config.json (old and new spelling) or from a GGUF's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass(frozen=True)
class Config:
    """Fields are named as in config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rms_norm_eps: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    max_position_embeddings: int
    tie_word_embeddings: bool
    recurrent: tuple[bool, ...]      # for each layer: gated DeltaNet rather than attention

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                     "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
                     "linear_conv_kernel_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if not 0 < getattr(self, name) < 1 << 24:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for many, few in (("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads")):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many} must be a multiple of {few}, not {getattr(self, many)} of {getattr(self, few)}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok must be at most num_experts ({self.num_experts}), not {self.num_experts_per_tok}")
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(f"the rotated part of a head must be even and at most head_dim ({self.head_dim}), not {self.rotary_dim}")
        if len(self.recurrent) != self.num_hidden_layers:
            raise ValueError(f"layer_types must name {self.num_hidden_layers} layers, not {len(self.recurrent)}")


def parse_config(fields: Mapping[str, Any], format: str) -> Config:
    """ValueError names a field that is missing or that asks for what this model does not have."""
    return _from_gguf(fields) if format == "gguf" else _from_json(fields)


def _from_json(fields: Mapping[str, Any]) -> Config:
    get = _reader(fields, "config.json")
    for name, only in (("decoder_sparse_step", 1), ("mlp_only_layers", []), ("attention_bias", False), ("hidden_act", "silu")):
        if get(name, only) != only:
            raise ValueError(f"config.json: {name} must be {only}, not {get(name)!r}")
    if get("rope_scaling", None) is not None:
        raise ValueError("config.json: rope_scaling is not supported, it must be null")
    layers = get("num_hidden_layers")
    rope = get("rope_parameters", None) or fields
    head_dim = get("head_dim")
    if get("shared_expert_intermediate_size") != get("moe_intermediate_size"):
        raise ValueError("config.json: shared_expert_intermediate_size must equal moe_intermediate_size")
    return Config(
        recurrent=_layer_kinds(get("layer_types", None), layers, get("full_attention_interval", 4)),
        rotary_dim=int(head_dim * _reader(rope, "config.json")("partial_rotary_factor", get("partial_rotary_factor", 0.25))),
        rope_theta=float(_reader(rope, "config.json")("rope_theta")),
        norm_topk_prob=get("norm_topk_prob", True), tie_word_embeddings=get("tie_word_embeddings", False),
        num_hidden_layers=layers, head_dim=head_dim,
        **{name: get(name) for name in (
            "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "linear_num_key_heads",
            "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim", "num_experts",
            "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings")})


def _from_gguf(fields: Mapping[str, Any]) -> Config:
    architecture = fields.get("general.architecture", "qwen3next")
    get = _reader({key.removeprefix(f"{architecture}."): value for key, value in fields.items()}, "the GGUF's metadata")
    layers = get("block_count")
    value_heads = get("ssm.time_step_rank")
    if get("ssm.inner_size") % value_heads:
        raise ValueError(f"the GGUF's metadata: ssm.inner_size must be a multiple of ssm.time_step_rank ({value_heads})")
    if get("expert_shared_feed_forward_length", get("expert_feed_forward_length")) != get("expert_feed_forward_length"):
        raise ValueError("the GGUF's metadata: expert_shared_feed_forward_length must equal expert_feed_forward_length")
    return Config(
        vocab_size=len(get("tokenizer.ggml.tokens", ())) or get("vocab_size"),
        hidden_size=get("embedding_length"), num_hidden_layers=layers, num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"), head_dim=get("attention.key_length"),
        rotary_dim=get("rope.dimension_count"), rope_theta=get("rope.freq_base"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"), linear_num_key_heads=get("ssm.group_count"),
        linear_num_value_heads=value_heads, linear_key_head_dim=get("ssm.state_size"),
        linear_value_head_dim=get("ssm.inner_size") // value_heads, linear_conv_kernel_dim=get("ssm.conv_kernel"),
        num_experts=get("expert_count"), num_experts_per_tok=get("expert_used_count"),
        moe_intermediate_size=get("expert_feed_forward_length"), norm_topk_prob=True,
        max_position_embeddings=get("context_length"), tie_word_embeddings=False,
        recurrent=_layer_kinds(None, layers, get("full_attention_interval", 4)))


def _layer_kinds(layer_types: list[str] | None, layers: int, interval: int) -> tuple[bool, ...]:
    if layer_types is None:
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if unknown := set(layer_types) - {"linear_attention", "full_attention"}:
        raise ValueError(f"config.json: layer_types may be linear_attention or full_attention, not {sorted(unknown)[0]!r}")
    return tuple(kind == "linear_attention" for kind in layer_types)


def _reader(fields: Mapping[str, Any], where: str):
    def get(name: str, default: Any = _MISSING) -> Any:
        value = fields.get(name, default)
        if value is _MISSING:
            raise ValueError(f"{where}: {name} is missing")
        return value
    return get
