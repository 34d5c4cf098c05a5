"""Linear layers against x W^T in float64, for every weight format, activation and shape."""

from __future__ import annotations

import numpy as np
import pytest

from arrays import Guarded, error, get, put, round_to
from inference_pio.native import ops
from inference_pio.native.backend import TensorOpsError
from inference_pio.native.dtype import DType
from weights import FLOATS, QUANTISED, random_weight

EPS = 1e-5
ALL = (*FLOATS, DType.FP8_E4M3, *QUANTISED)
TOLERANCE = {DType.F32: 2e-6, DType.BF16: 6e-3}


def pack(backend, rng, dtype, rows, cols, activations=DType.F32):
    data, values, scales = random_weight(rng, dtype, rows, cols)
    return backend.pack([(data, dtype, rows, cols, None if scales is None else scales.tobytes())], activations), values


def shapes(dtype):
    wide = 256 if dtype in (DType.Q4_K, DType.Q5_K, DType.Q6_K) else 32
    if dtype in QUANTISED:
        return [(1, wide), (16, wide), (17, 3 * wide), (200, 512)]
    return [(1, 1), (16, 32), (17, 33), (130, 257), (200, 512)]


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
def test_packed_weights_decode_to_the_files_values_bit_for_bit(backend, rng, dtype):
    for rows, cols in shapes(dtype):
        w, values = pack(backend, rng, dtype, rows, cols)
        out = Guarded(backend, rows, cols)
        ops.unpack_rows(out.tensor, w, 0, rows)
        assert np.array_equal(out.read(), values.astype(np.float32)), (rows, cols)


@pytest.mark.parametrize("activations", [DType.F32, DType.BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("n", [1, 8, 29])
def test_products_with_unit_vectors_are_the_files_values_bit_for_bit(backend, rng, n, dtype, activations):
    """What a tile of any instruction set decodes is what the file says: nothing is rounded before the activations are."""
    if backend.kind != "cpu":
        return   # tensor cores round weights, too
    for rows, cols in shapes(dtype):
        w, values = pack(backend, rng, dtype, rows, cols, activations)
        unit, decoded = np.eye(cols, dtype=np.float32), []
        for first in range(0, cols, n):
            count = min(n, cols - first)
            out = Guarded(backend, count, rows)
            ops.linear(out.tensor, put(backend, unit[first:first + count]), w, count)
            decoded.append(out.read())
        assert np.array_equal(np.concatenate(decoded).T, values.astype(np.float32)), (rows, cols)


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("storage", [DType.F32, DType.BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("n", [0, 1, 3, 8, 9, 33])
def test_linear(backend, rng, dtype, storage, n):
    for rows, cols in shapes(dtype):
        w, values = pack(backend, rng, dtype, rows, cols)
        x = round_to(rng.standard_normal((n, cols)), storage)
        out = Guarded(backend, n, rows, storage)
        ops.linear(out.tensor, put(backend, x, storage), w, n)
        # Sums may cancel, so the error is measured against the sum of the products' sizes.
        scale = max((np.abs(x) @ np.abs(values.T)).max(initial=0), 1e-30)
        assert np.abs(out.read() - x @ values.T).max(initial=0) < TOLERANCE[storage] * scale, (rows, cols)


@pytest.mark.parametrize("dtype", QUANTISED, ids=lambda d: d.name)
@pytest.mark.parametrize("n", [1, 2, 5, 8, 19, 64, 65])
def test_linear_with_8_bit_activations(backend, rng, dtype, n):
    for rows, cols in shapes(dtype):
        w, values = pack(backend, rng, dtype, rows, cols, DType.Q8_0)
        x = rng.standard_normal((n, cols)).astype(np.float32)
        groups = x.reshape(n, -1, 32)
        scale = np.abs(groups).max(2, keepdims=True) / np.float32(127)
        rounded = (np.rint(groups * (np.float32(1) / scale)) * scale).reshape(n, cols).astype(np.float64)
        out = Guarded(backend, n, rows)
        ops.linear(out.tensor, put(backend, x), w, n)
        difference, size = np.abs(out.read() - rounded @ values.T), np.abs(rounded) @ np.abs(values.T)
        # An input that lies between two codes may round either way: one step of one column is what may differ, and seldom does.
        assert (difference <= 3e-6 * size + scale.max() * np.abs(values).max() * 1.01).all(), (rows, cols)
        assert (difference > 3e-6 * size).any(axis=1).sum() <= 2 + n // 16, (rows, cols)


@pytest.mark.parametrize("activations", [DType.F32, DType.BF16, DType.Q8_0], ids=lambda d: d.name)
@pytest.mark.parametrize("n", [0, 1, 7, 16, 50])
def test_rms_norm_linear_of_stacked_parts_in_mixed_formats(backend, rng, activations, n):
    d = 256
    parts, values = [], []
    mixture = ((DType.Q4_1, 48), (DType.BF16, 52), (DType.Q8_0, 20), (DType.BF16, 7), (DType.Q6_K, 33), (DType.F32, 5))
    for dtype, rows in mixture[: None if backend.kind == "cpu" else 4]:   # a GPU takes four
        data, value, _ = random_weight(rng, dtype, rows, d)
        parts.append((data, dtype, rows, d, None))
        values.append(value)
    w, x, norm = backend.pack(parts, activations), rng.standard_normal((n, d)) * 3, rng.uniform(0.5, 1.5, d)
    out = Guarded(backend, n, w.rows)
    ops.rms_norm_linear(out.tensor, put(backend, x), put(backend, norm), w, n, EPS)
    normed = x / np.sqrt((x * x).mean(1, keepdims=True) + EPS) * norm
    limit = {DType.F32: 3e-6, DType.BF16: 1e-2, DType.Q8_0: 3e-2}[activations]   # one row may be a small sum of large terms
    assert error(out.read(), normed @ np.concatenate(values).T) < limit


@pytest.mark.parametrize("storage", [DType.F32, DType.BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype,activations", [(DType.F32, DType.F32), (DType.BF16, DType.F32), (DType.BF16, DType.BF16), (DType.Q8_0, DType.F32),
                                               (DType.Q4_K, DType.F32)], ids=lambda d: d.name)
@pytest.mark.parametrize("n", [0, 1, 9, 150])
def test_gate_up_silu_residual_and_logits(backend, rng, storage, dtype, activations, n):
    d, i, limit = 256, 512, TOLERANCE[DType.BF16 if DType.BF16 in (storage, activations) else DType.F32]
    x, norm = round_to(rng.standard_normal((n, d)), storage), rng.uniform(0.5, 1.5, d).astype(np.float32)
    parts = [random_weight(rng, dtype, i, d) for _ in range(2)]
    gate_up = backend.pack([(data, dtype, i, d, None) for data, _, _ in parts], activations)
    normed = x / np.sqrt((x * x).mean(1, keepdims=True) + EPS) * norm
    gate, up = (normed @ values.T for _, values, _ in parts)
    expected = gate / (1 + np.exp(-gate)) * up
    out = Guarded(backend, n, i, storage)
    ops.rms_norm_gate_up_silu(out.tensor, put(backend, x, storage), put(backend, norm), gate_up, n, EPS)
    assert error(out.read(), expected) < limit * 3

    down, values = pack(backend, rng, dtype, d, i, activations)
    activated, residual = round_to(expected, storage), round_to(rng.standard_normal((n, d)), storage)
    out = Guarded(backend, n, d, storage, residual)
    ops.linear_add(out.tensor, put(backend, activated, storage), down, n)
    assert error(out.read(), residual + activated @ values.T) < limit * 2

    head, values = pack(backend, rng, dtype, 77, d, activations)
    out = Guarded(backend, n, 77)
    ops.rms_norm_linear_f32(out.tensor, put(backend, x, storage), put(backend, norm), head, n, EPS)
    assert error(out.read(), normed @ values.T) < max(limit, 1e-5)   # the input may be rounded to its storage


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("n", [1, 3])
def test_so_many_rows_that_each_worker_has_several_tiles(backend, rng, dtype, n):
    cols = 512
    x, norm = round_to(rng.standard_normal((n, cols)), DType.BF16), rng.uniform(0.5, 1.5, cols).astype(np.float32)
    normed = x / np.sqrt((x * x).mean(1, keepdims=True) + EPS) * norm
    parts = [random_weight(rng, dtype, 5120, cols) for _ in range(2)]
    w = backend.pack([(data, dtype, 5120, cols, None if scales is None else scales.tobytes()) for data, _, scales in parts], DType.BF16)
    gate, up = (normed @ values.T for _, values, _ in parts)
    out = Guarded(backend, n, 5120, DType.BF16)
    ops.rms_norm_gate_up_silu(out.tensor, put(backend, x, DType.BF16), put(backend, norm), w, n, EPS)
    assert error(out.read(), gate / (1 + np.exp(-np.clip(gate, -700, None))) * up) < 3 * TOLERANCE[DType.BF16]
    out = Guarded(backend, n, 10240, DType.BF16)
    ops.linear(out.tensor, put(backend, x, DType.BF16), w, n)
    assert error(out.read(), x @ np.concatenate([values for _, values, _ in parts]).T) < TOLERANCE[DType.BF16]


@pytest.mark.parametrize("activations", [DType.F32, DType.BF16, DType.Q8_0], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", ALL, ids=lambda d: d.name)
def test_a_row_does_not_depend_on_its_batch(backend, rng, dtype, activations):
    """Prefill and decode may be mixed freely; on a CPU they agree to the last bit."""
    w, _ = pack(backend, rng, dtype, 200, 512, activations)
    x = put(backend, rng.standard_normal((79, 512)))
    whole = Guarded(backend, 79, 200)
    ops.linear(whole.tensor, x, w, 79)
    for first, count in ((0, 1), (31, 2), (64, 4), (72, 7), (30, 21)):
        part = Guarded(backend, count, 200)
        ops.linear(part.tensor, x.rows(first, count), w, count)
        expected = whole.read()[first:first + count]
        assert np.array_equal(part.read(), expected) if backend.kind == "cpu" else np.allclose(part.read(), expected, rtol=1e-5, atol=1e-4)


def test_quantize_rounds_to_nearest(backend, rng):
    x = rng.standard_normal((5, 128)).astype(np.float32)
    for dtype, size, step in ((DType.Q8_0, 34, 1 / 127), (DType.Q4_0, 18, 1 / 8), (DType.BF16, 64, 2**-7), (DType.F16, 64, 2**-10)):
        out = backend.tensor((5 * 4 * size,), DType.U8)
        ops.quantize(out, put(backend, x), dtype, 5, 128)
        w = backend.pack([(bytes(backend.copy_out(out)), dtype, 5, 128, None)], DType.F32)
        back = backend.tensor((5, 128), DType.F32)
        ops.unpack_rows(back, w, 0, 5)
        limit = np.abs(x.reshape(5, 4, 32)).max(2, keepdims=True) * step * 0.55 + 1e-4
        if dtype == DType.Q4_0:
            limit *= 2   # the end of the range opposite to the largest value is clipped by one code
        assert (np.abs(get(backend, back) - x).reshape(5, 4, 32) <= limit).all(), dtype


def test_errors_name_the_argument(backend, rng):
    w, _ = pack(backend, rng, DType.F32, 4, 8)
    x = put(backend, rng.standard_normal((2, 8)))
    with pytest.raises(ValueError, match="out must be"):
        ops.linear(backend.tensor((2, 5), DType.F32), x, w, 2)
    with pytest.raises(ValueError, match="x must be"):
        ops.linear(backend.tensor((2, 4), DType.F32), backend.tensor((2, 9), DType.F32), w, 2)
    with pytest.raises(ValueError, match="multiple of 32"):
        backend.pack([(b"", DType.Q8_0, 1, 33, None)], DType.F32)
    with pytest.raises(TensorOpsError, match="count|rows"):
        backend.check(backend.lib.tops_unpack_rows(backend.stream, x.pointer, w.struct, 3, 2))
