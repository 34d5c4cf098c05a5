"""Qwen3-Coder-Next: three gated DeltaNet layers to one of gated attention, each followed by a mixture of experts.

Sources: the architecture's description in transformers (qwen3_next); Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024);
Qiu et al., "Gated Attention for Large Language Models" (2025).

Letters: n tokens, r rows of logits, d width, v vocabulary; h query heads, g key-value heads of p; hk key heads of pk and hv value
heads of pv in the recurrent layers; e experts of width i, k of them for each token.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from inference_pio.models.contract import CacheLayout, StateLayout
from inference_pio.models.qwen3_coder_next.config import Config
from inference_pio.native import ops
from inference_pio.native.backend import KV, Backend, Batch, States, Tensor, Weight
from inference_pio.native.dtype import DType


@dataclass(frozen=True)
class DeltaNet:
    norm: Tensor
    proj: Weight         # x -> [q | k | v | z | b | a]
    conv: Tensor         # [c, taps]
    decay: Tensor        # [hv] -exp(A_log)
    dt_bias: Tensor      # [hv]
    head_norm: Tensor    # [pv]
    out: Weight


@dataclass(frozen=True)
class Attention:
    norm: Tensor
    qkvg: Weight         # x -> [q | k | v | gate]
    q_norm: Tensor       # [p]
    k_norm: Tensor
    out: Weight


@dataclass(frozen=True)
class Experts:
    norm: Tensor
    router: Weight       # {router [e, d], gate of the shared expert [1, d]}
    gate_up: Weight      # {gate, up}, stacks of e
    shared_gate_up: Weight
    down: Weight         # a stack of e
    shared_down: Weight


@dataclass(frozen=True)
class Layer:
    mixer: DeltaNet | Attention
    experts: Experts


@dataclass(frozen=True)
class Weights:
    embedding: Weight
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Weight
    inv_freq: Tensor


@dataclass(frozen=True)
class Workspace:
    x: Tensor            # [n, d] the residual stream
    table: Tensor        # [n, rotary / 2, 2]
    proj: Tensor         # [n, c + hv pv + 2 hv]
    mixed: Tensor        # [n, hv pv]
    qkvg: Tensor         # [n, (2 h + 2 g) p]
    attended: Tensor     # [n, h p]
    normed: Tensor       # [n, d]
    routes: Tensor       # [n, e + 1] logits of the router
    experts: Tensor      # [n, k]
    shares: Tensor       # [n, k + 1]
    act: Tensor          # [n, (k + 1) i]
    last: Tensor         # [r, d]
    logits: Tensor       # [r, v]


def cache_layout(c: Config) -> CacheLayout:
    states = StateLayout(sum(c.recurrent), c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim,
                         c.linear_value_head_dim, c.linear_conv_kernel_dim)
    return CacheLayout(c.num_hidden_layers - sum(c.recurrent), c.num_key_value_heads, c.head_dim, states, c.recurrent)


def inverse_frequencies(c: Config, backend: Backend) -> Tensor:
    """[rotary / 2] theta^(-2 j / rotary)"""
    values = array("f", (c.rope_theta ** (-2 * j / c.rotary_dim) for j in range(c.rotary_dim // 2)))
    tensor = backend.tensor((len(values),), DType.F32)
    backend.copy_in(tensor, values)
    return tensor


def workspace(c: Config, backend: Backend, n: int, r: int, dtype: DType) -> Workspace:
    d, k, i = c.hidden_size, c.num_experts_per_tok, c.moe_intermediate_size
    backend.reserve(n, (k + 1) * max(d, i), max(c.num_attention_heads, c.linear_num_value_heads), max(c.head_dim, c.linear_value_head_dim))
    mixed = c.linear_num_value_heads * c.linear_value_head_dim
    channels = 2 * c.linear_num_key_heads * c.linear_key_head_dim + mixed
    h, g, p = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    return Workspace(
        x=backend.tensor((n, d), dtype), table=backend.tensor((n, c.rotary_dim // 2, 2), DType.F32),
        proj=backend.tensor((n, channels + mixed + 2 * c.linear_num_value_heads), dtype), mixed=backend.tensor((n, mixed), dtype),
        qkvg=backend.tensor((n, (2 * h + 2 * g) * p), dtype), attended=backend.tensor((n, h * p), dtype),
        normed=backend.tensor((n, d), dtype), routes=backend.tensor((n, c.num_experts + 1), DType.F32), experts=backend.tensor((n, k), DType.I32),
        shares=backend.tensor((n, k + 1), DType.F32), act=backend.tensor((n, (k + 1) * i), dtype),
        last=backend.tensor((r, d), dtype), logits=backend.tensor((r, c.vocab_size), DType.F32))


def forward(c: Config, w: Weights, s: Workspace, batch: Batch, cache: tuple[KV | States, ...]) -> Tensor:
    n, r, eps = batch.n, batch.r, c.rms_norm_eps
    ops.embed(s.x, w.embedding, batch.ids, n)
    ops.rope_table(s.table, batch.positions, w.inv_freq, n)
    for layer, memory in zip(w.layers, cache, strict=True):
        if isinstance(layer.mixer, DeltaNet):
            recur(c, layer.mixer, s, batch, memory)
        else:
            attend(c, layer.mixer, s, batch, memory)
        mix_experts(c, layer.experts, s, n)
    ops.gather_rows(s.last, s.x, batch.logit_rows, r)
    ops.rms_norm_linear_f32(s.logits, s.last, w.norm, w.head, r, eps)
    return s.logits


def recur(c: Config, w: DeltaNet, s: Workspace, batch: Batch, states: States) -> None:
    ops.rms_norm_linear(s.proj, s.x, w.norm, w.proj, batch.n, c.rms_norm_eps)
    ops.gated_delta_rule(s.mixed, s.proj, w.conv, w.decay, w.dt_bias, w.head_norm, states, batch, c.rms_norm_eps)
    ops.linear_add(s.x, s.mixed, w.out, batch.n)


def attend(c: Config, w: Attention, s: Workspace, batch: Batch, kv: KV) -> None:
    h = c.num_attention_heads
    ops.rms_norm_linear(s.qkvg, s.x, w.norm, w.qkvg, batch.n, c.rms_norm_eps)
    ops.rope_attention(s.attended, s.qkvg, kv, batch, s.table, w.q_norm, w.k_norm, h, pairs=0, scale=c.head_dim ** -0.5, eps=c.rms_norm_eps, gated=True)
    ops.linear_add(s.x, s.attended, w.out, batch.n)


def mix_experts(c: Config, w: Experts, s: Workspace, n: int) -> None:
    ops.rms_norm_route(s.normed, s.routes, s.experts, s.shares, s.x, w.norm, w.router, n, c.norm_topk_prob, c.rms_norm_eps)
    ops.experts_gate_up_silu(s.act, s.normed, s.experts, w.gate_up, w.shared_gate_up, n)
    ops.experts_down_add(s.x, s.act, s.experts, s.shares, w.down, w.shared_down, n)
