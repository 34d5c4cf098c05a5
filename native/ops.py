"""The ops of tensor_ops.h: shapes checked, then one call.

The output comes first and its backend (library and stream) does the work. Tensors are workspaces that may be taller than the
step: the number of rows to work on is an argument. Letters as in the header; the formulas stand there.
"""

from __future__ import annotations

from typing import Any

from inference_pio.native.dtype import DType
from inference_pio.native.tensor import KV, Batch, States, Tensor, Weight


def embed(out: Tensor, w: Weight, ids: Tensor, n: int) -> None:
    """out[t] = row ids[t] of w.  out [>=n, d], ids i32 [>=n]"""
    _matrix("out", out, n, w.cols)
    _vector("ids", ids, n, DType.I32)
    _run(out, "tops_embed", out.pointer, w.struct, ids.pointer, n, out.dtype)


def gather_rows(out: Tensor, x: Tensor, rows: Tensor, n: int) -> None:
    """out[t] = x[rows[t]].  out [>=n, d], x [*, d], rows i32 [>=n]"""
    d = x.shape[1]
    _matrix("out", out, n, d, x.dtype)
    _vector("rows", rows, n, DType.I32)
    _run(out, "tops_gather_rows", out.pointer, x.pointer, rows.pointer, n, d, out.dtype)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, n: int, eps: float) -> None:
    """out = x * rsqrt(mean(x^2) + eps) * weight.  out, x [>=n, d], weight f32 [d]"""
    d = x.shape[1]
    _matrix("out", out, n, d, x.dtype)
    _matrix("x", x, n, d)
    _vector("weight", weight, d, DType.F32)
    _run(out, "tops_rms_norm", out.pointer, x.pointer, weight.pointer, n, d, eps, out.dtype)


def silu_mul(out: Tensor, x: Tensor, n: int) -> None:
    """out = silu(gate) * up.  x [>=n, 2 i] = [gate | up], out [>=n, i]"""
    i = x.shape[1] // 2
    _matrix("out", out, n, i, x.dtype)
    _matrix("x", x, n, 2 * i)
    _run(out, "tops_silu_mul", out.pointer, x.pointer, n, i, out.dtype)


def linear(out: Tensor, x: Tensor, w: Weight, n: int) -> None:
    """out = x W^T.  x [>=n, cols], out [>=n, rows]"""
    _matrix("out", out, n, w.rows, x.dtype)
    _matrix("x", x, n, w.cols)
    _run(out, "tops_linear", out.pointer, x.pointer, w.struct, w.parts, n, out.dtype)


def linear_add(out: Tensor, x: Tensor, w: Weight, n: int) -> None:
    """out += x W^T; w is one matrix.  x [>=n, cols], out [>=n, rows]"""
    _require(w.parts == 1, "w", "one matrix", w)
    _matrix("out", out, n, w.rows, x.dtype)
    _matrix("x", x, n, w.cols)
    _run(out, "tops_linear_add", out.pointer, x.pointer, w.struct, n, out.dtype)


def rms_norm_linear(out: Tensor, x: Tensor, norm: Tensor, w: Weight, n: int, eps: float) -> None:
    """out = rms_norm(x) W^T.  x [>=n, cols], norm f32 [cols], out [>=n, rows]"""
    _matrix("out", out, n, w.rows, x.dtype)
    _matrix("x", x, n, w.cols)
    _vector("norm", norm, w.cols, DType.F32)
    _run(out, "tops_rms_norm_linear", out.pointer, x.pointer, norm.pointer, w.struct, w.parts, n, eps, out.dtype)


def rms_norm_linear_f32(out: Tensor, x: Tensor, norm: Tensor, w: Weight, n: int, eps: float) -> None:
    """Logits: rms_norm_linear that writes f32 whatever x is stored in.  out f32 [>=n, rows]"""
    _matrix("out", out, n, w.rows, DType.F32)
    _matrix("x", x, n, w.cols)
    _vector("norm", norm, w.cols, DType.F32)
    _run(out, "tops_rms_norm_linear_f32", out.pointer, x.pointer, norm.pointer, w.struct, w.parts, n, eps, x.dtype)


def rms_norm_gate_up_silu(out: Tensor, x: Tensor, norm: Tensor, w: Weight, n: int, eps: float) -> None:
    """out = silu(rms_norm(x) Wgate^T) * (rms_norm(x) Wup^T); w = {gate, up}.  x [>=n, cols], out [>=n, i]"""
    _require(w.parts == 2 and w.part_rows[0] == w.part_rows[1], "w", "two matrices of equal shape", w)
    _matrix("out", out, n, w.part_rows[0], x.dtype)
    _matrix("x", x, n, w.cols)
    _vector("norm", norm, w.cols, DType.F32)
    _run(out, "tops_rms_norm_gate_up_silu", out.pointer, x.pointer, norm.pointer, w.struct, n, eps, out.dtype)


def rope_table(table: Tensor, positions: Tensor, inv_freq: Tensor, n: int) -> None:
    """table[t, j] = (cos, sin) of positions[t] * inv_freq[j].  table f32 [>=n, r/2, 2], inv_freq f32 [r/2]"""
    half = inv_freq.shape[0]
    _require(table.shape[1:] == (half, 2) and table.shape[0] >= n and table.dtype == DType.F32, "table", f"f32 [{n}, {half}, 2]", table)
    _vector("positions", positions, n, DType.I32)
    _vector("inv_freq", inv_freq, half, DType.F32)
    _run(table, "tops_rope_table", table.pointer, positions.pointer, inv_freq.pointer, n, 2 * half)


def qk_norm_rope_store(qkv: Tensor, kv: KV, batch: Batch, table: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
                       h: int, pairs: int, eps: float, gated: bool = False) -> None:
    """Norm (where q_norm, k_norm f32 [p] are given) and rotate q and k by head, store k and v in their slots, leave q in place.

    qkv [>=n, (h + 2 g) p], and h p more in a row if gated; table as rope_table left it for the step; pairs 0: half-split rotation,
    1: interleaved.
    """
    norms = _rope(qkv, kv, batch, table, q_norm, k_norm, h, gated)
    _run(qkv, "tops_qk_norm_rope_store", qkv.pointer, kv.struct, batch.struct, table.pointer, *norms,
         h, kv.g, kv.p, 2 * table.shape[1], pairs, gated, eps, qkv.dtype)


def _rope(qkv: Tensor, kv: KV, batch: Batch, table: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, h: int, gated: bool) -> list[Any]:
    """Pointers of the two norms, after the shapes are checked."""
    g, p, n = kv.g, kv.p, batch.n
    _matrix("qkv", qkv, n, (h + 2 * g + h * gated) * p)
    _require(table.shape[0] >= n and 2 * table.shape[1] <= p, "table", f"[{n}, r/2, 2] with r <= {p}", table)
    for norm_name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            _vector(norm_name, norm, p, DType.F32)
    return [qkv.backend.ffi.NULL if norm is None else norm.pointer for norm in (q_norm, k_norm)]


def paged_attention(out: Tensor, qkv: Tensor, kv: KV, batch: Batch, h: int, scale: float, gated: bool = False) -> None:
    """out = softmax(scale q k^T) v, causal, times sigmoid(gate) if gated.

    out [>=n, h p], qkv rows as qk_norm_rope_store left them
    """
    g, p, n = kv.g, kv.p, batch.n
    _require(g > 0 and h % g == 0, "h", f"a multiple of {g} key-value heads", h)
    _matrix("out", out, n, h * p, qkv.dtype)
    _matrix("qkv", qkv, n, (h + 2 * g + h * gated) * p)
    _run(out, "tops_paged_attention", out.pointer, qkv.pointer, kv.struct, batch.struct, h, g, p, scale, gated, out.dtype)


def rope_attention(out: Tensor, qkv: Tensor, kv: KV, batch: Batch, table: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
                   h: int, pairs: int, scale: float, eps: float, gated: bool = False) -> None:
    """qk_norm_rope_store, then paged_attention: out [>=n, h p]. qkv may change."""
    _require(kv.g > 0 and h % kv.g == 0, "h", f"a multiple of {kv.g} key-value heads", h)
    _matrix("out", out, batch.n, h * kv.p, qkv.dtype)
    norms = _rope(qkv, kv, batch, table, q_norm, k_norm, h, gated)
    _run(out, "tops_rope_attention", out.pointer, qkv.pointer, kv.struct, batch.struct, table.pointer, *norms,
         h, kv.g, kv.p, 2 * table.shape[1], pairs, gated, scale, eps, out.dtype)


def gated_delta_rule(out: Tensor, x: Tensor, conv: Tensor, decay: Tensor, dt_bias: Tensor, norm: Tensor, states: States,
                     batch: Batch, eps: float) -> None:
    """Convolution, gated delta rule and gated norm of a recurrent layer; states go from batch.states_in to batch.states_out.

    x [>=n, c + hv pv + 2 hv] = [q | k | v | z | b | a], conv f32 [c taps], decay, dt_bias f32 [hv], norm f32 [pv],
    out [>=n, hv pv]
    """
    c, hv, pv = states.channels, states.hv, states.pv
    _matrix("out", out, batch.n, hv * pv, x.dtype)
    _matrix("x", x, batch.n, c + hv * pv + 2 * hv)
    for name, vector, d in (("conv", conv, c * states.taps), ("decay", decay, hv), ("dt_bias", dt_bias, hv), ("norm", norm, pv)):
        _vector(name, vector, d, DType.F32)
    _run(out, "tops_gated_delta_rule", out.pointer, x.pointer, conv.pointer, decay.pointer, dt_bias.pointer, norm.pointer,
         states.struct, batch.struct, eps, out.dtype)


def rms_norm_route(normed: Tensor, logits: Tensor, experts: Tensor, shares: Tensor, x: Tensor, norm: Tensor, w: Weight, n: int,
                   renormalize: bool, eps: float) -> None:
    """normed = rms_norm(x), its k experts and what each of them and the shared one contributes.

    x, normed [>=n, d], norm f32 [d], w = {router [e, d], gate of the shared expert [1, d]}, logits f32 [>=n, e + 1],
    experts i32 [>=n, k], shares f32 [>=n, k + 1]
    """
    k = experts.shape[1]
    _require(w.part_rows[1:] in ((), (1,)) and k <= w.part_rows[0], "w", f"a router of >= {k} rows and a gate of 1", w)
    _matrix("normed", normed, n, w.cols, x.dtype)
    _matrix("logits", logits, n, w.rows, DType.F32)
    _matrix("experts", experts, n, k, DType.I32)
    _matrix("shares", shares, n, k + 1, DType.F32)
    _matrix("x", x, n, w.cols)
    _vector("norm", norm, w.cols, DType.F32)
    _run(normed, "tops_rms_norm_route", normed.pointer, logits.pointer, experts.pointer, shares.pointer, x.pointer, norm.pointer,
         w.struct, w.parts, n, k, renormalize, eps, normed.dtype)


def experts_gate_up_silu(out: Tensor, x: Tensor, experts: Tensor, w: Weight, shared: Weight, n: int) -> None:
    """out[t, j] = silu(x[t] Wgate^T) * (x[t] Wup^T) of expert experts[t, j], the shared one last.

    x [>=n, d], experts i32 [>=n, k], w and shared = {gate, up}, w a stack of e experts, out [>=n, (k + 1) i]
    """
    k, i = experts.shape[1], shared.part_rows[0]
    _require(shared.part_rows == (i, i) and w.part_rows[0] == w.part_rows[1] and w.part_rows[0] % i == 0, "w",
             f"gate and up of {i} rows", w)
    _matrix("out", out, n, (k + 1) * i, x.dtype)
    _matrix("x", x, n, w.cols)
    _matrix("experts", experts, n, k, DType.I32)
    _run(out, "tops_experts_gate_up_silu", out.pointer, x.pointer, experts.pointer, w.struct, shared.struct,
         n, w.part_rows[0] // i, k, out.dtype)


def experts_down_add(out: Tensor, x: Tensor, experts: Tensor, shares: Tensor, w: Weight, shared: Weight, n: int) -> None:
    """out[t] += sum over j of shares[t, j] x[t, j] Wdown^T.  out [>=n, d], x [>=n, (k + 1) i]; the rest as above"""
    k, d = experts.shape[1], shared.rows
    _require(w.rows % d == 0 and w.cols == shared.cols, "w", f"matrices of {d} x {shared.cols}", w)
    _matrix("out", out, n, d, x.dtype)
    _matrix("x", x, n, (k + 1) * w.cols)
    _matrix("experts", experts, n, k, DType.I32)
    _matrix("shares", shares, n, k + 1, DType.F32)
    _run(out, "tops_experts_down_add", out.pointer, x.pointer, experts.pointer, shares.pointer, w.struct, shared.struct,
         n, w.rows // d, k, out.dtype)


def gather_by_value(order: Tensor, starts: Tensor, values: Tensor, n: int) -> None:
    """The indices of values, by value; those of value v are order[starts[v]:starts[v + 1]].  i32 [>=n], [e + 1], [>=n]"""
    _vector("order", order, n, DType.I32)
    _vector("values", values, n, DType.I32)
    _vector("starts", starts, 1, DType.I32)
    _run(order, "tops_gather_by_value", order.pointer, starts.pointer, values.pointer, n, starts.shape[0] - 1)


def scatter_add_by_index(out: Tensor, x: Tensor, index: Tensor, scale: Tensor | None, n: int) -> None:
    """out[index[t]] += scale[t] * x[t].  out [*, d], x [>=n, d], index i32 [>=n], scale f32 [>=n]"""
    _matrix("x", x, n, out.shape[1], out.dtype)
    _vector("index", index, n, DType.I32)
    if scale is not None:
        _vector("scale", scale, n, DType.F32)
    _run(out, "tops_scatter_add_by_index", out.pointer, x.pointer, index.pointer,
         out.backend.ffi.NULL if scale is None else scale.pointer, n, out.shape[0], out.shape[1], out.dtype)


def restrict_logits(logits: Tensor, allowed: Tensor | None, sampling: Tensor, history: Tensor, lengths: Tensor, n: int,
                    vocabulary: int) -> None:
    """-inf for tokens >= vocabulary and for those not allowed (u32 bits [>=n, ceil(v/32)]), then the penalties.

    logits f32 [>=n, v], sampling u8 [>=n, 32] (tops_sampling records), history i32 [>=n, capacity], lengths i32 [>=n]
    """
    v, capacity = logits.shape[1], history.shape[1]
    _matrix("logits", logits, n, v, DType.F32)
    _sampling(sampling, n)
    _matrix("history", history, n, capacity, DType.I32)
    _vector("lengths", lengths, n, DType.I32)
    _require(0 < vocabulary <= v, "vocabulary", f"in 1..{v}", vocabulary)
    if allowed is not None:
        _matrix("allowed", allowed, n, -(-v // 32), DType.U32)
    _run(logits, "tops_restrict_logits", logits.pointer, logits.backend.ffi.NULL if allowed is None else allowed.pointer,
         sampling.pointer, history.pointer, lengths.pointer, n, v, vocabulary, capacity)


def sample(ids: Tensor, logprobs: Tensor | None, logits: Tensor, sampling: Tensor, positions: Tensor, n: int) -> None:
    """ids[t] drawn from logits[t]; the draw depends on (seed, positions[t]) alone.  ids i32, logprobs f32, positions i32 [>=n]"""
    _matrix("logits", logits, n, logits.shape[1], DType.F32)
    _vector("ids", ids, n, DType.I32)
    _vector("positions", positions, n, DType.I32)
    _sampling(sampling, n)
    if logprobs is not None:
        _vector("logprobs", logprobs, n, DType.F32)
    _run(ids, "tops_sample", ids.pointer, ids.backend.ffi.NULL if logprobs is None else logprobs.pointer, logits.pointer,
         sampling.pointer, positions.pointer, n, logits.shape[1])


def unpack_rows(out: Tensor, w: Weight, first: int, count: int, part: int = 0) -> None:
    """Rows first .. first + count - 1 of a part of w, decoded exactly.  out f32 [>=count, cols]"""
    _matrix("out", out, count, w.cols, DType.F32)
    _require(0 <= first <= first + count <= w.part_rows[part], "rows", f"within {w.part_rows[part]}", (first, count))
    _run(out, "tops_unpack_rows", out.pointer, w.struct + part, first, count)


def quantize(out: Tensor, x: Tensor, dtype: DType, rows: int, cols: int) -> None:
    """f32 [rows, cols] to a file's rows of `dtype` (Q8_0, Q4_0, f16, bf16) in the bytes of out."""
    _matrix("x", x, rows, cols, DType.F32)
    _run(out, "tops_quantize", out.pointer, x.pointer, dtype, rows, cols)


def convert(out: Tensor, x: Tensor, count: int) -> None:
    """out[i] = x[i], rounded to out's storage (f32, f16, bf16)."""
    _run(out, "tops_convert", out.pointer, out.dtype, x.pointer, x.dtype, count)


# ---- checks ------------------------------------------------------------------------------------------------------------------


def _run(out: Tensor, name: str, pointer, *arguments) -> None:
    backend = out.backend
    backend.run(getattr(backend.lib, name), backend.stream, pointer, *arguments)


def _require(condition: bool, name: str, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {requirement}, not {value!r}")


def _matrix(name: str, tensor: Tensor, n: int, d: int, dtype: DType | None = None) -> None:
    shape = tensor.shape
    if len(shape) != 2 or not 0 <= n <= shape[0] or shape[1] != d or (dtype is not None and tensor.dtype != dtype):
        raise ValueError(f"{name} must be [at least {n}, {d}]{f' of {dtype.name}' if dtype is not None else ''}, not {tensor!r}")


def _vector(name: str, tensor: Tensor, n: int, dtype: DType) -> None:
    if len(tensor.shape) != 1 or not 0 <= n <= tensor.shape[0] or tensor.dtype != dtype:
        raise ValueError(f"{name} must be [at least {n}] of {dtype.name}, not {tensor!r}")


def _sampling(sampling: Tensor, n: int) -> None:
    _matrix("sampling", sampling, n, 32, DType.U8)
