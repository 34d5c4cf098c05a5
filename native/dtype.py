"""Number formats, by the numbers of tensor_ops.h (which are GGUF's where GGUF has the format)."""

from __future__ import annotations

from enum import IntEnum


class DType(IntEnum):
    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30
    FP8_E4M3 = 100
    # Only on the Python side: what index arrays and opaque records hold.
    I32 = 1000
    U32 = 1001
    U8 = 1002


# Values in a block of a file's row, bytes of that block.
BLOCKS: dict[DType, tuple[int, int]] = {
    DType.F32: (1, 4), DType.F16: (1, 2), DType.BF16: (1, 2), DType.FP8_E4M3: (1, 1),
    DType.Q4_0: (32, 18), DType.Q4_1: (32, 20), DType.Q5_0: (32, 22), DType.Q5_1: (32, 24), DType.Q8_0: (32, 34),
    DType.Q4_K: (256, 144), DType.Q5_K: (256, 176), DType.Q6_K: (256, 210),
    DType.I32: (1, 4), DType.U32: (1, 4), DType.U8: (1, 1),
}


def cached_row_bytes(dtype: DType, p: int) -> int:
    """Bytes of a head's key or value in the cache; in Q8_0 p codes and an f32 scale."""
    return p + 4 if dtype == DType.Q8_0 else p * BLOCKS[dtype][1]


def row_bytes(dtype: DType, cols: int) -> int:
    """Bytes of one row of `cols` values as files hold it. ValueError if cols is not a whole number of blocks."""
    values, size = BLOCKS[dtype]
    if cols % values:
        raise ValueError(f"a {dtype.name} row must be a multiple of {values} values wide, not {cols}")
    return cols // values * size
