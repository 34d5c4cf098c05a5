"""The ops that take rows one by one: embedding, norm, rotation table, a recurrent layer, and the way from logits to a token."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from inference_pio.native import ops
from inference_pio.native.dtype import DType

if TYPE_CHECKING:
    from inference_pio.native.bench.bench_ops import Bench, Line, Shape

EPS = 1e-6


def rows(bench: Bench, model: str, s: Shape, dtype: DType, n: int) -> Iterator[Line]:
    ids = bench.integers([i * 7919 % s.v for i in range(n)])
    places, x, norm = bench.integers([n - 1 - i for i in range(n)]), bench.tensor(n, s.d), bench.tensor(s.d)
    out, both, activated = bench.tensor(n, s.d), bench.tensor(n, 2 * s.i), bench.tensor(n, s.i)
    table, inv_freq = bench.tensor(n, s.p // 2, 2), bench.tensor(s.p // 2)
    embedding = bench.weights(dtype, (s.v,), s.d)[0]
    yield bench.line(model, "embed", dtype.name, n, n * embedding.nbytes / s.v, 0, [lambda: ops.embed(out, embedding, ids, n)])
    yield bench.line(model, "gather_rows", "f32", n, out.nbytes, 0, [lambda: ops.gather_rows(out, x, places, n)])
    yield bench.line(model, "rms_norm", "f32", n, x.nbytes, 4 * n * s.d, [lambda: ops.rms_norm(out, x, norm, n, EPS)])
    yield bench.line(model, "silu_mul", "f32", n, both.nbytes, 4 * n * s.i, [lambda: ops.silu_mul(activated, both, n)])
    yield bench.line(model, "rope_table", "f32", n, 4 * n, 2 * n * s.p, [lambda: ops.rope_table(table, places, inv_freq, n)])


def sampling(bench: Bench, model: str, s: Shape) -> Iterator[Line]:
    """One row of logits: greedy, and drawn from those that top_p keeps."""
    logits, token, position = bench.tensor(1, s.v), bench.integers([0]), bench.integers([5])
    history, length = bench.integers(range(64), (1, 64)), bench.integers([64])
    for label, temperature, top_p in (("greedy", 0.0, 1.0), ("top_p", 1.0, 0.9)):
        record = bench.tensor(1, 32, dtype=DType.U8)
        bench.backend.copy_in(record, struct.pack("5fiQ", temperature, top_p, 0.0, 1.1, 0.0, 0, 1))
        yield bench.line(model, f"sample ({label})", "f32", 1, logits.nbytes, s.v, [lambda: ops.sample(token, None, logits, record, position, 1)])
    yield bench.line(model, "restrict_logits", "f32", 1, 4 * 64, 64,
                     [lambda: ops.restrict_logits(logits, None, record, history, length, 1, s.v)])


def recurrent(bench: Bench, model: str, s: Shape, n: int) -> Iterator[Line]:
    """A layer of the gated delta rule; its state is read and written."""
    r = s.recurrent
    if r is None:
        return
    channels, backend = 2 * r.hk * r.pk + r.hv * r.pv, bench.backend
    _, layers = backend.states(1, 2, r.hk, r.hv, r.pk, r.pv, r.taps)
    batch = backend.batch(n, 1, 1, 1)
    batch.resize(n, 1, 1)
    for tensor, values in ((batch.query_starts, [0, n]), (batch.states_in, [0]), (batch.states_out, [-1] * (n - 1) + [1])):
        backend.copy_in(tensor, array("i", values))
    x, out = bench.tensor(n, channels + r.hv * r.pv + 2 * r.hv), bench.tensor(n, r.hv * r.pv)
    conv, dt_bias, norm = bench.tensor(channels * r.taps), bench.tensor(r.hv), bench.tensor(r.pv)
    decay = bench.tensor(r.hv)
    backend.copy_in(decay, array("f", [-1.0] * r.hv))
    yield bench.line(model, "gated_delta_rule", "f32", n, x.nbytes + 4 * r.hv * r.pk * r.pv, n * (8 * r.hv * r.pk * r.pv + 2 * channels * r.taps),
                     [lambda: ops.gated_delta_rule(out, x, conv, decay, dt_bias, norm, layers[0], batch, EPS)])
