"""Random matrices in every format: the bytes a file would hold and what they decode to, by the gguf package's own decoder."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from inference_pio.native.dtype import BLOCKS, DType

QUANTISED = (DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.Q8_0, DType.Q4_K, DType.Q5_K, DType.Q6_K)
FLOATS = (DType.F32, DType.F16, DType.BF16)
# Where a block's f16 scales stand.
_SCALES = {DType.Q4_0: (0,), DType.Q4_1: (0, 2), DType.Q5_0: (0,), DType.Q5_1: (0, 2), DType.Q8_0: (0,), DType.Q4_K: (0, 2),
           DType.Q5_K: (0, 2), DType.Q6_K: (208,)}


def random_weight(rng: np.random.Generator, dtype: DType, rows: int, cols: int) -> tuple[bytes, np.ndarray, np.ndarray | None]:
    """(file bytes, float64 values [rows, cols], fp8 block scales or None)"""
    if dtype in FLOATS:
        values = (rng.standard_normal((rows, cols)) / 8).astype(np.float32)
        if dtype == DType.BF16:
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            return bits.tobytes(), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64), None
        stored = values.astype(np.float16 if dtype == DType.F16 else np.float32)
        return stored.tobytes(), stored.astype(np.float64), None
    if dtype == DType.FP8_E4M3:
        codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
        codes[codes & 0x7F == 0x7F] = 0
        scales = rng.uniform(0.001, 0.01, (-(-rows // 128), -(-cols // 128))).astype(np.float32)
        spread = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:rows, :cols]
        return codes.tobytes(), (fp8_values()[codes].astype(np.float32) * spread).astype(np.float64), scales
    block, size = BLOCKS[dtype]
    raw = rng.integers(0, 256, (rows, cols // block, size), dtype=np.uint8)
    for at in _SCALES[dtype]:
        scales = rng.uniform(-0.02, 0.02, (rows, cols // block)).astype(np.float16)
        raw[:, :, at:at + 2] = scales.view(np.uint8).reshape(rows, cols // block, 2)
    raw = raw.reshape(rows, -1)
    values = dequantize(raw, GGMLQuantizationType(int(dtype))) if raw.size else np.zeros((rows, cols), np.float32)
    return raw.tobytes(), values.astype(np.float64).reshape(rows, cols), None


def fp8_values() -> np.ndarray:
    """All 256 values of e4m3 (Micikevicius et al. 2022): bias 7, no infinities, one NaN of each sign."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    value = np.where(code & 0x7F == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value)
