"""Embedding, gathering, norm, SiLU product, conversions and copies."""

from __future__ import annotations

import numpy as np
import pytest

from arrays import Guarded, error, get, put, round_to
from inference_pio.native import ops
from inference_pio.native.dtype import DType
from weights import FLOATS, QUANTISED, random_weight

STORAGES = pytest.mark.parametrize("storage", [DType.F32, DType.BF16], ids=lambda d: d.name)
LIMIT = {DType.F32: 3e-6, DType.BF16: 5e-3}


@STORAGES
@pytest.mark.parametrize("dtype", [*FLOATS, *QUANTISED], ids=lambda d: d.name)
def test_embed(backend, rng, storage, dtype):
    data, values, _ = random_weight(rng, dtype, 50, 256)
    w = backend.pack([(data, dtype, 50, 256, None)], DType.F32)
    for ids in ([], [0], [49, 3, 3, 50, -1, 17, 1 << 30]):
        out = Guarded(backend, len(ids), 256, storage)
        ops.embed(out.tensor, w, put(backend, np.array(ids, np.int32), DType.I32), len(ids))
        expected = np.array([values[i] if 0 <= i < 50 else np.zeros(256) for i in ids]).reshape(len(ids), 256)
        assert np.array_equal(out.read(), round_to(expected, storage))


@STORAGES
@pytest.mark.parametrize("d", [1, 7, 576, 1000])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_rms_norm_silu_and_gather(backend, rng, storage, n, d):
    x, weight = round_to(rng.standard_normal((n, d)) * 4, storage), rng.uniform(-2, 2, d).astype(np.float32)
    out = Guarded(backend, n, d, storage)
    ops.rms_norm(out.tensor, put(backend, x, storage), put(backend, weight), n, 1e-6)
    assert error(out.read(), x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6) * weight) < LIMIT[storage]

    both = round_to(rng.standard_normal((n, 2 * d)) * 20, storage)
    out = Guarded(backend, n, d, storage)
    ops.silu_mul(out.tensor, put(backend, both, storage), n)
    gate, up = both[:, :d], both[:, d:]
    assert error(out.read(), gate / (1 + np.exp(-gate)) * up) < LIMIT[storage]

    source, rows = round_to(rng.standard_normal((9, d)), storage), rng.integers(0, 9, n)
    out = Guarded(backend, n, d, storage)
    ops.gather_rows(out.tensor, put(backend, source, storage), put(backend, rows, DType.I32), n)
    assert np.array_equal(out.read(), source[rows])


def test_silu_at_the_ends_of_the_range(backend):
    gate = np.array([[-1e30, -200, -88, -1e-30, 0, 1e-30, 88, 200, 1e30]], np.float32)
    out = Guarded(backend, 1, 9)
    ops.silu_mul(out.tensor, put(backend, np.concatenate([gate, np.ones_like(gate)], 1)), 1)
    with np.errstate(over="ignore"):
        expected = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))
    assert np.allclose(out.read(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 1001])
def test_convert_rounds_to_nearest_even(backend, rng, count):
    x = (rng.standard_normal(count) * 10.0 ** rng.integers(-9, 5, count)).astype(np.float32)
    specials = np.array([0, -0.0, np.inf, -np.inf, 65504, 65520, 6e-8, 2.9e-8, 1 + 2**-9, 1 + 3 * 2**-9], np.float32)
    x[: min(count, len(specials))] = specials[:count]
    source = put(backend, x)
    for dtype in (DType.F16, DType.BF16):
        half, back = backend.tensor((count,), dtype), backend.tensor((count,), DType.F32)
        ops.convert(half, source, count)
        ops.convert(back, half, count)
        with np.errstate(over="ignore"):
            assert np.array_equal(get(backend, back).astype(np.float64), round_to(x, dtype)), dtype


def test_copies(backend, rng):
    data = rng.integers(0, 256, (6, 10), dtype=np.uint8)
    source, out = put(backend, data, DType.U8), backend.tensor((6, 10), DType.U8)
    backend.copy_2d(out, 3, 20, source, 11, 10, 5, 2)
    expected = np.zeros(60, np.uint8)
    for row in range(2):
        expected[3 + 20 * row: 8 + 20 * row] = data.reshape(-1)[11 + 10 * row: 16 + 10 * row]
    assert np.array_equal(get(backend, out).reshape(-1), expected)
    pinned = backend.host_buffer(60)
    pinned[:] = bytes(range(60))
    backend.copy_in_async(out, pinned)
    assert bytes(backend.copy_out(out)) == bytes(range(60))
    backend.zero(out)
    assert not any(backend.copy_out(out))
    with pytest.raises(ValueError, match="bytes 55..65"):
        backend.copy_in(out, bytes(10), offset=55)


def test_read_sums_everything(backend, rng):
    block, total = put(backend, np.ones((1 << 21) + 5, np.uint8), DType.U8), backend.tensor((1,), DType.F32)
    backend.check(backend.lib.tops_read(backend.stream, total.pointer, block.pointer, block.nbytes))
    assert get(backend, total)[0] != 0
