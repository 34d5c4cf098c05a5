"""The ops of a mixture of experts: routing, the experts' products, and sorting and adding by index."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING

from inference_pio.native import ops
from inference_pio.native.dtype import DType, row_bytes

if TYPE_CHECKING:
    from inference_pio.native.bench.bench_ops import Bench, Line, Shape

EPS, STACK = 1e-6, 256 << 20   # bytes of an expert stack: as many experts as that takes stand for all of them


def experts(bench: Bench, model: str, s: Shape, dtype: DType, n: int) -> Iterator[Line]:
    """n tokens, each with k experts of its own choice; a call's bytes are the experts that somebody chose, each once."""
    m = s.mixture
    if m is None:
        return
    backend, pairs = bench.backend, n * m.k
    count = min(m.e, ceil(STACK / (2 * m.i * row_bytes(dtype, s.d))))
    x, norm, normed = bench.tensor(n, s.d), bench.tensor(s.d), bench.tensor(n, s.d)
    router = backend.pack([(bench.row(DType.F32, s.d) * m.e, DType.F32, m.e, s.d, None), (bench.row(DType.F32, s.d), DType.F32, 1, s.d, None)],
                          DType.F32)
    logits, shares, chosen = bench.tensor(n, m.e + 1), bench.tensor(n, m.k + 1), bench.tensor(n, m.k, dtype=DType.I32)
    yield bench.line(model, "rms_norm_route", "F32", n, router.nbytes, 2 * n * (m.e + 1) * s.d,
                     [lambda: ops.rms_norm_route(normed, logits, chosen, shares, x, norm, router, n, True, EPS)])

    def stack(rows: int, cols: int, parts: int, e: int):
        matrix = (bench.row(dtype, cols) * rows, dtype, rows, cols, None)
        return backend.pack_experts([[matrix] * e for _ in range(parts)], bench.activations(dtype))

    gate_up, down = stack(m.i, s.d, 2, count), stack(s.d, m.i, 1, count)
    shared_gate_up, shared_down = stack(m.i, s.d, 2, 1), stack(s.d, m.i, 1, 1)
    # Neighbouring tokens' experts, then the next ones, so that a single token's calls go round the whole stack.
    choices = [bench.integers([(first + t * m.k + j) % count for t in range(n) for j in range(m.k)], (n, m.k))
               for first in range(0, count if n == 1 else 1, m.k)]
    active = min(count, pairs)
    hidden, out = bench.tensor(n, (m.k + 1) * m.i), bench.tensor(n, s.d)
    yield bench.line(model, "experts_gate_up_silu", dtype.name, n, shared_gate_up.nbytes * (active + 1), 4 * (pairs + n) * m.i * s.d,
                     [lambda ids=ids: ops.experts_gate_up_silu(hidden, x, ids, gate_up, shared_gate_up, n) for ids in choices])
    yield bench.line(model, "experts_down_add", dtype.name, n, shared_down.nbytes * (active + 1), 2 * (pairs + n) * m.i * s.d,
                     [lambda ids=ids: ops.experts_down_add(out, hidden, ids, shares, down, shared_down, n) for ids in choices])

    values, order, starts = bench.integers([i * 31 % m.e for i in range(pairs)]), bench.integers(range(pairs)), bench.integers(range(m.e + 1))
    yield bench.line(model, "gather_by_value", "i32", pairs, 4 * pairs, 0, [lambda: ops.gather_by_value(order, starts, values, pairs)])
    wide, index, scale = bench.tensor(pairs, s.d), bench.integers([i // m.k for i in range(pairs)]), bench.tensor(pairs)
    yield bench.line(model, "scatter_add_by_index", "f32", pairs, wide.nbytes, 2 * pairs * s.d,
                     [lambda: ops.scatter_add_by_index(out, wide, index, scale, pairs)])
