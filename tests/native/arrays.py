"""Between numpy, which the tests use as their oracle, and the library's memory."""

from __future__ import annotations

import numpy as np

from inference_pio.native.backend import Backend, Tensor
from inference_pio.native.dtype import DType

NUMPY = {DType.F32: np.float32, DType.I32: np.int32, DType.U32: np.uint32, DType.U8: np.uint8, DType.F16: np.float16}


def round_to(x: np.ndarray, dtype: DType) -> np.ndarray:
    """x as `dtype` stores it, as float64; in Q8_0 a row as the cache keeps it."""
    if dtype == DType.Q8_0:
        codes, scale = _codes(x)
        return codes * scale.astype(np.float64)
    if dtype == DType.BF16:
        return from_bf16(to_bf16(x)).astype(np.float64)
    return np.asarray(x).astype(NUMPY[dtype]).astype(np.float64)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-bit codes of rows, and the scale f32 [..., 1] of each."""
    x = np.asarray(x, np.float32)
    most = np.abs(x).max(-1, keepdims=True, initial=0)
    return np.rint(x / np.where(most > 0, most, 1) * 127).astype(np.int8), (most / 127).astype(np.float32)


def put_cached(backend: Backend, whole: Tensor, x: np.ndarray, dtype: DType) -> None:
    """Into a cache, all of it: x [..., p]."""
    if dtype == DType.Q8_0:
        codes, scale = _codes(x)
        x, dtype = np.concatenate([codes.view(np.uint8), np.ascontiguousarray(scale).view(np.uint8)], -1), DType.U8
    backend.copy_2d(whole, 0, 1, put(backend, x, dtype), 0, 1, whole.nbytes, 1)


def get_cached(backend: Backend, whole: Tensor, dtype: DType) -> np.ndarray:
    """[..., p]"""
    data = get(backend, whole)
    if dtype != DType.Q8_0:
        return data
    return data[..., :-4].view(np.int8) * np.ascontiguousarray(data[..., -4:]).view(np.float32).astype(np.float64)


def put(backend: Backend, x: np.ndarray, dtype: DType = DType.F32) -> Tensor:
    tensor = backend.tensor(x.shape, dtype)
    data = to_bf16(x) if dtype == DType.BF16 else np.ascontiguousarray(x, NUMPY[dtype])
    backend.copy_in(tensor, data.tobytes())
    return tensor


def get(backend: Backend, tensor: Tensor) -> np.ndarray:
    data = backend.copy_out(tensor)
    if tensor.dtype == DType.BF16:
        return from_bf16(np.frombuffer(data, np.uint16)).reshape(tensor.shape)
    return np.frombuffer(data, NUMPY[tensor.dtype]).reshape(tensor.shape)


GUARD = -77.0   # exact in bf16


class Guarded:
    """An output with a guard row behind it, which no op may touch."""

    def __init__(self, backend: Backend, rows: int, cols: int, dtype: DType = DType.F32, fill: np.ndarray | None = None):
        self.backend, self.rows = backend, rows
        whole = np.full((rows + 1, cols), GUARD, np.float32)
        if fill is not None:
            whole[:rows] = fill
        self.tensor = put(backend, whole, dtype)

    def read(self) -> np.ndarray:
        whole = get(self.backend, self.tensor)
        assert (whole[self.rows:] == GUARD).all(), "the row behind the output was written"
        return whole[: self.rows].astype(np.float64)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value."""
    if expected.size == 0:
        return 0.0
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))
