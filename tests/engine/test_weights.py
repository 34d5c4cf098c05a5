"""Tensors on their way to a device: values kept, shapes checked by name, nothing left over."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from checkpoint_files import plain, write_safetensors
from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.safetensors import open_folder
from inference_pio.engine.weights import WeightStore
from inference_pio.models.contract import Rows
from inference_pio.native import ops
from inference_pio.native.backend import Backend
from inference_pio.native.dtype import DType


@pytest.fixture(scope="module")
def backend():
    backend = Backend.open("cpu", 1)
    backend.reserve(n=4, widest=256, h=1, p=32)
    yield backend
    backend.close()


@pytest.fixture
def store(tmp_path, backend):
    def build(tensors, progress=None):
        return WeightStore("model", "safetensors", open_folder(write_safetensors(tmp_path / "model", {}, tensors)), backend, DType.F32, progress)

    return build


def product(backend, weight, x):
    """x [n, cols] times the packed weight, f32 [n, rows]."""
    n = len(x)
    source, out = backend.tensor((n, weight.cols), DType.F32), backend.tensor((n, weight.rows), DType.F32)
    backend.copy_in(source, np.ascontiguousarray(x, np.float32))
    ops.linear(out, source, weight, n)
    return np.frombuffer(backend.copy_out(out), np.float32).reshape(n, weight.rows)


def floats(backend, tensor):
    return np.frombuffer(backend.copy_out(tensor), np.float32)


def test_matrices_are_stacked_by_rows(backend, store, rng):
    a, b = rng.normal(size=(6, 32)).astype("f4"), rng.normal(size=(10, 32)).astype("f4")
    source = store(plain({"a": a, "b": b}))
    weight = source.weight("a", Rows("b", (range(4, 10), range(0, 2))), rows=14, cols=32)
    x = rng.normal(size=(3, 32))
    np.testing.assert_allclose(product(backend, weight, x), x @ np.concatenate([a, b[4:], b[:2]]).T, atol=1e-4)
    source.finish()


def test_block_fp8_with_its_scales(backend, store, rng):
    codes = rng.integers(0, 120, (256, 256), np.uint8) | rng.integers(0, 2, (256, 256), np.uint8) << 7
    exponent, fraction, sign = codes >> 3 & 15, codes & 7, np.where(codes >> 7, -1.0, 1.0)
    values = sign * np.where(exponent, 2.0 ** (exponent.astype(float) - 7) * (1 + fraction / 8), fraction / 8 * 2.0**-6)
    scales = rng.uniform(0.001, 0.01, (2, 2)).astype("f4")
    source = store({"w": (DType.FP8_E4M3, (256, 256), codes.tobytes()), **plain({"w_scale_inv": scales})})
    x = rng.normal(size=(2, 256))
    wanted = values * np.repeat(np.repeat(scales, 128, 0), 128, 1)
    np.testing.assert_allclose(product(backend, source.weight("w", rows=256, cols=256), x), x @ wanted.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(product(backend, source.weight(Rows("w", (range(128, 256),)), cols=256), x), x @ wanted[128:].T, rtol=1e-4, atol=1e-3)
    with pytest.raises(BadCheckpoint, match="'w'.*block"):
        source.weight(Rows("w", (range(1, 129),)), cols=256)
    source.finish()


def test_vectors_become_f32(backend, store, rng):
    values = rng.normal(size=12).astype("f4")
    half, bf16 = values.astype("f2"), (values.view("u4") >> 16).astype("u2")
    source = store({"f32": (DType.F32, (3, 1, 4), values.tobytes()), "f16": (DType.F16, (12,), half.tobytes()), "bf16": (DType.BF16, (12,), bf16.tobytes())})
    np.testing.assert_array_equal(floats(backend, source.vector("f32", 12)), values)
    np.testing.assert_array_equal(floats(backend, source.vector("f16", 12)), half.astype("f4"))
    np.testing.assert_array_equal(floats(backend, source.vector("bf16", 12)), (bf16.astype("u4") << 16).view("f4"))
    np.testing.assert_allclose(floats(backend, source.vector("f32", 12, math.exp)), np.exp(values), rtol=1e-6)


def test_progress_counts_the_files_bytes(store):
    seen = []
    source = store(plain({"a": np.ones((4, 32)), "b": np.ones((8, 32))}), lambda done, total: seen.append((done, total)))
    source.weight("a", cols=32), source.weight("b", cols=32)
    assert seen == [(512, 1536), (1536, 1536)] and source.nbytes >= 1536


@pytest.mark.parametrize("take,names", [
    (lambda s: s.weight("gone", cols=32), "lacks the tensor 'gone'"), (lambda s: s.weight("m", cols=16), r"'m'.*\[rows, 16\].*\[4, 32\]"),
    (lambda s: s.weight("m", rows=5, cols=32), "'m'.*5 rows.*4"), (lambda s: s.weight("cube", cols=32), "'cube'"),
    (lambda s: s.weight(Rows("m", (range(2, 5),)), cols=32), "'m' has 4 rows"), (lambda s: s.weight(Rows("m", (range(0, 4, 2),)), cols=32), "'m' has 4 rows"),
    (lambda s: s.vector("v", 5), r"'v' must have 5 values"), (lambda s: s.vector("gone", 5), "'gone'"), (lambda s: s.vector("ints", 2), "'ints'.*I64"),
    (lambda s: s.vector("v", 4, lambda x: math.exp(x * 1e9)), "'v' holds a value"), (lambda s: s.vector("v", 4, math.log), "'v' holds a value"),
    (lambda s: s.vector("v", 4, lambda x: 1e300), "'v' holds a value"), (lambda s: s.weight("fp8", cols=128), "'fp8'.*lacks its scales 'fp8_scale_inv'"),
    (lambda s: s.weight("odd", cols=128), r"'odd_scale_inv' must be \[1, 1\]"), (lambda s: s.vector("fp8", 128), "'fp8' must be f32"),
    (lambda s: s.experts(["m"], e=2, rows=4, cols=32), "2 experts, not 1"), (lambda s: s.experts("cube", e=3, rows=4, cols=32), r"'cube' must be \[3, rows, 32\]"),
    (lambda s: s.experts("cube", e=2, rows=5, cols=32), "'cube' must give 5 rows"),
])
def test_what_does_not_fit_is_refused_by_name(tmp_path, backend, take, names):
    folder = write_safetensors(tmp_path / "model", {}, {
        **plain({"m": np.ones((4, 32)), "cube": np.ones((2, 4, 32)), "v": np.array([1, 0, -1, 2]), "odd_scale_inv": np.ones((2, 1))}),
        "fp8": (DType.FP8_E4M3, (1, 128), bytes(128)), "odd": (DType.FP8_E4M3, (1, 128), bytes(128))})
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    at = len(content) - 8 - length
    header = content[8:8 + length][:-1] + b', "ints": {"dtype": "I64", "shape": [2], "data_offsets": [%d, %d]}}' % (at, at + 16)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length:] + bytes(16))
    source = WeightStore("model", "safetensors", open_folder(folder), backend, DType.F32)
    with pytest.raises(BadCheckpoint, match=f"model.*{names}"):
        take(source)


def test_leftovers_are_an_error_unless_ignored(store):
    source = store(plain({"a": np.ones((4, 32)), "mtp.0.w": np.ones(3), "mtp.1.w": np.ones(3)}))
    source.weight("a", cols=32)
    with pytest.raises(BadCheckpoint, match="'mtp.0.w' and 1 more"):
        source.finish()
    source.ignore("mtp.*.w", "not.there")
    source.finish()
