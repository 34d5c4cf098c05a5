"""From a checkpoint's names to the model's weights: safetensors (per expert or fused) and both generations of GGUF files.

All norms of this model but the heads' multiply by 1 + weight; GGUF files hold the sum, and -exp(A_log) under `ssm_a`.
"""

from __future__ import annotations

from math import exp

from inference_pio.models.contract import Rows, TensorSource
from inference_pio.models.qwen3_coder_next.config import Config
from inference_pio.models.qwen3_coder_next.model import Attention, DeltaNet, Experts, Layer, Weights, inverse_frequencies
from inference_pio.native.backend import Backend


def load(c: Config, source: TensorSource, backend: Backend) -> Weights:
    layer, embedding, norm, head = ((_gguf_layer, "token_embd.weight", "output_norm.weight", "output.weight")
                                    if source.format == "gguf" else
                                    (_safetensors_layer, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"))
    rows, d = c.vocab_size, c.hidden_size
    weights = Weights(
        embedding=source.weight(embedding, rows=rows, cols=d),
        layers=tuple(layer(c, source, index) for index in range(c.num_hidden_layers)),
        norm=source.vector(norm, d, _one_plus if source.format != "gguf" else None),
        head=source.weight(embedding if c.tie_word_embeddings else head, rows=rows, cols=d),
        inv_freq=inverse_frequencies(c, backend))
    source.ignore("mtp.*")
    return weights


def _one_plus(value: float) -> float:
    return 1.0 + value


def _widths(c: Config) -> tuple[int, int, int]:
    """(q or k, v or z, channels) of a recurrent layer."""
    keys, values = c.linear_num_key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
    return keys, values, 2 * keys + values


def _grouped(groups: int, *widths: int) -> tuple[tuple[range, ...], ...]:
    """Rows of `groups` groups, each with parts of these widths: by part, the ranges of that part in every group."""
    pitch, parts, first = sum(widths), [], 0
    for width in widths:
        parts.append(tuple(range(group * pitch + first, group * pitch + first + width) for group in range(groups)))
        first += width
    return tuple(parts)


def _by_key_head(c: Config, name: str) -> Rows:
    """in_proj_qkvz holds [q | k | v | z] of one key head after the other; we want q of all heads, then k, v, z."""
    values = c.linear_num_value_heads // c.linear_num_key_heads * c.linear_value_head_dim
    parts = _grouped(c.linear_num_key_heads, c.linear_key_head_dim, c.linear_key_head_dim, values, values)
    return Rows(name, sum(parts, ()))


def _gates(c: Config, name: str) -> Rows:
    """in_proj_ba holds [b | a] of one key head after the other."""
    values = c.linear_num_value_heads // c.linear_num_key_heads
    return Rows(name, sum(_grouped(c.linear_num_key_heads, values, values), ()))


def _queries(c: Config, name: str) -> tuple[Rows, Rows]:
    """q_proj holds [q | gate] of one head after the other: (q, gate) of all heads."""
    q, gate = _grouped(c.num_attention_heads, c.head_dim, c.head_dim)
    return Rows(name, q), Rows(name, gate)


def _safetensors_layer(c: Config, source: TensorSource, index: int) -> Layer:
    prefix, d = f"model.layers.{index}.", c.hidden_size
    norm = source.vector(prefix + "input_layernorm.weight", d, _one_plus)
    if c.recurrent[index]:
        p = prefix + "linear_attn."
        _, values, channels = _widths(c)
        gates = c.linear_num_value_heads
        names = ((p + "in_proj_qkv.weight", p + "in_proj_z.weight", p + "in_proj_b.weight", p + "in_proj_a.weight")
                 if source.has(p + "in_proj_qkv.weight") else
                 (_by_key_head(c, p + "in_proj_qkvz.weight"), _gates(c, p + "in_proj_ba.weight")))
        mixer: DeltaNet | Attention = DeltaNet(
            norm=norm,
            proj=source.weight(*names, rows=channels + values + 2 * gates, cols=d),
            conv=source.vector(p + "conv1d.weight", channels * c.linear_conv_kernel_dim),
            decay=source.vector(p + "A_log", gates, lambda value: -exp(value)),
            dt_bias=source.vector(p + "dt_bias", gates),
            head_norm=source.vector(p + "norm.weight", c.linear_value_head_dim),
            out=source.weight(p + "out_proj.weight", rows=d, cols=values))
    else:
        p = prefix + "self_attn."
        h, g, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q, gate = _queries(c, p + "q_proj.weight")
        mixer = Attention(
            norm=norm,
            qkvg=source.weight(q, p + "k_proj.weight", p + "v_proj.weight", gate, rows=(2 * h + 2 * g) * width, cols=d),
            q_norm=source.vector(p + "q_norm.weight", width, _one_plus),
            k_norm=source.vector(p + "k_norm.weight", width, _one_plus),
            out=source.weight(p + "o_proj.weight", rows=d, cols=h * width))
    return Layer(mixer, _safetensors_experts(c, source, prefix))


def _safetensors_experts(c: Config, source: TensorSource, prefix: str) -> Experts:
    p, d, e, i = prefix + "mlp.", c.hidden_size, c.num_experts, c.moe_intermediate_size
    if source.has(p + "experts.gate_up_proj"):
        gate, up = (Rows(p + "experts.gate_up_proj", (rows,)) for rows in (range(i), range(i, 2 * i)))
        down: str | list[str] = p + "experts.down_proj"
    else:
        gate, up, down = ([f"{p}experts.{expert}.{part}_proj.weight" for expert in range(e)] for part in ("gate", "up", "down"))
    return Experts(
        norm=source.vector(prefix + "post_attention_layernorm.weight", d, _one_plus),
        router=source.weight(p + "gate.weight", p + "shared_expert_gate.weight", rows=e + 1, cols=d),
        gate_up=source.experts(gate, up, e=e, rows=i, cols=d),
        shared_gate_up=source.experts([p + "shared_expert.gate_proj.weight"], [p + "shared_expert.up_proj.weight"], e=1, rows=i, cols=d),
        down=source.experts(down, e=e, rows=d, cols=i),
        shared_down=source.experts([p + "shared_expert.down_proj.weight"], e=1, rows=d, cols=i))


def _gguf_layer(c: Config, source: TensorSource, index: int) -> Layer:
    p, d = f"blk.{index}.", c.hidden_size
    norm = source.vector(p + "attn_norm.weight", d)
    if c.recurrent[index]:
        _, values, channels = _widths(c)
        gates = c.linear_num_value_heads
        names = ((_by_key_head(c, p + "ssm_in.weight"),) if source.has(p + "ssm_in.weight")
                 else (p + "attn_qkv.weight", p + "attn_gate.weight"))
        mixer: DeltaNet | Attention = DeltaNet(
            norm=norm,
            proj=source.weight(*names, _gates(c, p + "ssm_ba.weight"), rows=channels + values + 2 * gates, cols=d),
            conv=source.vector(p + "ssm_conv1d.weight", channels * c.linear_conv_kernel_dim),
            decay=source.vector(p + "ssm_a", gates),
            dt_bias=source.vector(p + "ssm_dt.bias", gates),
            head_norm=source.vector(p + "ssm_norm.weight", c.linear_value_head_dim),
            out=source.weight(p + "ssm_out.weight", rows=d, cols=values))
    else:
        h, g, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q, gate = _queries(c, p + "attn_q.weight")
        mixer = Attention(
            norm=norm,
            qkvg=source.weight(q, p + "attn_k.weight", p + "attn_v.weight", gate, rows=(2 * h + 2 * g) * width, cols=d),
            q_norm=source.vector(p + "attn_q_norm.weight", width),
            k_norm=source.vector(p + "attn_k_norm.weight", width),
            out=source.weight(p + "attn_output.weight", rows=d, cols=h * width))
    return Layer(mixer, _gguf_experts(c, source, p))


def _gguf_experts(c: Config, source: TensorSource, p: str) -> Experts:
    d, e, i = c.hidden_size, c.num_experts, c.moe_intermediate_size
    fused = p + "ffn_gate_up_exps.weight"
    gate, up = ((Rows(fused, (range(i),)), Rows(fused, (range(i, 2 * i),))) if source.has(fused)
                else (p + "ffn_gate_exps.weight", p + "ffn_up_exps.weight"))
    return Experts(
        norm=source.vector(p + "post_attention_norm.weight", d),
        router=source.weight(p + "ffn_gate_inp.weight", p + "ffn_gate_inp_shexp.weight", rows=e + 1, cols=d),
        gate_up=source.experts(gate, up, e=e, rows=i, cols=d),
        shared_gate_up=source.experts([p + "ffn_gate_shexp.weight"], [p + "ffn_up_shexp.weight"], e=1, rows=i, cols=d),
        down=source.experts(p + "ffn_down_exps.weight", e=e, rows=d, cols=i),
        shared_down=source.experts([p + "ffn_down_shexp.weight"], e=1, rows=d, cols=i))
