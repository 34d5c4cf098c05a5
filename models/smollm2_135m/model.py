"""SmolLM2 (Allal et al. 2025): the llama architecture (Touvron et al. 2023) with grouped-query attention and a tied output.

n tokens in the step, d width, i feed-forward width, h query heads, g key-value heads, p head width, v vocabulary, r rows of logits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from inference_pio.models.contract import CacheLayout, TensorSource
from inference_pio.models.smollm2_135m.config import Config
from inference_pio.native import ops
from inference_pio.native.backend import KV, Backend, Batch, Tensor, Weight
from inference_pio.native.dtype import DType

# Names of a layer's tensors: (safetensors, GGUF).
_NAMES = {
    "attention_norm": ("input_layernorm.weight", "attn_norm.weight"), "q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "k": ("self_attn.k_proj.weight", "attn_k.weight"), "v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "o": ("self_attn.o_proj.weight", "attn_output.weight"), "mlp_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"), "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
}


@dataclass(frozen=True)
class Layer:
    attention_norm: Tensor   # [d]
    qkv: Weight              # [h p + 2 g p, d]
    o: Weight                # [d, h p]
    mlp_norm: Tensor         # [d]
    gate_up: Weight          # [i + i, d]
    down: Weight             # [d, i]


@dataclass(frozen=True)
class Weights:
    embedding: Weight        # [v, d]
    layers: tuple[Layer, ...]
    norm: Tensor             # [d]
    output: Weight           # [v, d]: the embedding, where it is tied
    inv_freq: Tensor         # [p / 2]


@dataclass(frozen=True)
class Workspace:
    x: Tensor                # [n, d] the residual stream
    qkv: Tensor              # [n, h p + 2 g p]
    attention: Tensor        # [n, h p]
    mlp: Tensor              # [n, i]
    rope: Tensor             # [n, p / 2, 2]
    last: Tensor             # [r, d]
    logits: Tensor           # [r, v]


def cache_layout(c: Config) -> CacheLayout:
    return CacheLayout(layers=c.num_hidden_layers, g=c.num_key_value_heads, p=c.head_dim)


def load(c: Config, source: TensorSource, backend: Backend) -> Weights:
    gguf = source.format == "gguf"
    d, i, h, g, p, v = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.vocab_size
    embedding_name, norm_name, output_name = (("token_embd.weight", "output_norm.weight", "output.weight") if gguf else
                                              ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"))
    layers = []
    for number in range(c.num_hidden_layers):
        prefix = f"blk.{number}." if gguf else f"model.layers.{number}."
        name = {part: prefix + names[gguf] for part, names in _NAMES.items()}
        layers.append(Layer(
            attention_norm=source.vector(name["attention_norm"], d),
            qkv=source.weight(name["q"], name["k"], name["v"], rows=(h + 2 * g) * p, cols=d),
            o=source.weight(name["o"], rows=d, cols=h * p),
            mlp_norm=source.vector(name["mlp_norm"], d),
            gate_up=source.weight(name["gate"], name["up"], rows=2 * i, cols=d),
            down=source.weight(name["down"], rows=d, cols=i)))
    embedding = source.weight(embedding_name, rows=v, cols=d)
    inv_freq = backend.tensor((p // 2,), DType.F32)
    backend.copy_in(inv_freq, struct.pack(f"{p // 2}f", *(c.rope_theta ** (-2 * j / p) for j in range(p // 2))))
    return Weights(embedding=embedding, layers=tuple(layers), norm=source.vector(norm_name, d),
                   output=source.weight(output_name, rows=v, cols=d) if source.has(output_name) else embedding, inv_freq=inv_freq)


def workspace(c: Config, backend: Backend, n: int, r: int, dtype: DType) -> Workspace:
    d, i, h, g, p, v = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.vocab_size
    backend.reserve(n, max(d, i, h * p), h, p)
    return Workspace(
        x=backend.tensor((n, d), dtype), qkv=backend.tensor((n, (h + 2 * g) * p), dtype), attention=backend.tensor((n, h * p), dtype),
        mlp=backend.tensor((n, i), dtype), rope=backend.tensor((n, p // 2, 2), DType.F32), last=backend.tensor((r, d), dtype),
        logits=backend.tensor((r, v), DType.F32))


def forward(c: Config, w: Weights, ws: Workspace, batch: Batch, cache: tuple[KV, ...]) -> Tensor:
    """Logits f32 [r, v] of the step's logit rows."""
    n, r, h, eps, scale = batch.n, batch.r, c.num_attention_heads, c.rms_norm_eps, c.head_dim**-0.5
    ops.embed(ws.x, w.embedding, batch.ids, n)
    ops.rope_table(ws.rope, batch.positions, w.inv_freq, n)
    for layer, kv in zip(w.layers, cache, strict=True):
        ops.rms_norm_linear(ws.qkv, ws.x, layer.attention_norm, layer.qkv, n, eps)
        ops.rope_attention(ws.attention, ws.qkv, kv, batch, ws.rope, None, None, h, int(c.interleaved), scale, eps)
        ops.linear_add(ws.x, ws.attention, layer.o, n)
        ops.rms_norm_gate_up_silu(ws.mlp, ws.x, layer.mlp_norm, layer.gate_up, n, eps)
        ops.linear_add(ws.x, ws.mlp, layer.down, n)
    ops.gather_rows(ws.last, ws.x, batch.logit_rows, r)
    ops.rms_norm_linear_f32(ws.logits, ws.last, w.norm, w.output, r, eps)
    return ws.logits
