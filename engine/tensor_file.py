"""Memory-mapped files of tensors. Nothing is copied: a tensor's data is a view of the map."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

from inference_pio.engine.errors import BadCheckpoint
from inference_pio.native.dtype import BLOCKS, DType


class MappedFile:
    """A file mapped read-only. BadCheckpoint if it cannot be read or is empty."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise BadCheckpoint(f"{path} is empty: fetch it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}") from None
        self.data = memoryview(self._map)

    def require_whole(self) -> None:
        """BadCheckpoint if the file has become shorter: what is mapped behind its new end cannot be read, and trying ends the process."""
        if (size := self._map.size()) < self.size:
            raise BadCheckpoint(f"{self.path} was cut from {self.size} to {size} bytes while the model reads it: load the model again")

    def close(self) -> None:
        """Unmap. Views of it must be gone."""
        self.data.release()
        self._map.close()


SCALE = "_scale_inv"   # ends the name of block-FP8's scales: despite it they multiply


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. dtype is None where the file uses a number format that no kernel knows; `type_name` is the file's word."""

    name: str
    file: MappedFile
    dtype: DType | None
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def named(self, patterns: Iterable[str]) -> bool:
        """Whether the name matches one of them, as file names do."""
        return any(fnmatchcase(self.name, pattern) for pattern in patterns)

    @property
    def data(self) -> memoryview:
        return self.file.data[self.offset:self.offset + self.nbytes]

    def floats(self) -> list[float]:
        """Its values, for the few that Python looks at. BadCheckpoint if they are in blocks."""
        count = prod(self.shape)
        if self.dtype == DType.F32:
            return list(struct.unpack(f"<{count}f", self.data))
        if self.dtype == DType.F16:
            return list(struct.unpack(f"<{count}e", self.data))
        if self.dtype == DType.BF16:
            words = struct.unpack(f"<{count}H", self.data)
            return list(struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(word << 16 for word in words))))
        raise BadCheckpoint(f"{self.file.path}: tensor {self.name!r} must be f32, f16 or bf16, not {self.type_name}")

    def block_scales(self, scale: TensorInfo | None, rows: int, cols: int) -> list[float]:
        """Of an FP8 matrix, row by row: the values of `scale`, of which there must be one for each block of 128 x 128."""
        shape = (-(-rows // 128), -(-cols // 128))
        if scale is None:
            raise BadCheckpoint(f"{self.file.path}: tensor {self.name!r} is FP8 and lacks its scales {self.name + SCALE!r} of {list(shape)}")
        if scale.shape != shape:
            raise BadCheckpoint(f"{self.file.path}: tensor {scale.name!r} must be {list(shape)}, not {list(scale.shape)}")
        return scale.floats()


def tensor_bytes(dtype: DType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor whose last dimension is stored in blocks. ValueError if it is not a whole number of them."""
    block, size = BLOCKS[dtype]
    width = shape[-1] if shape else 1
    if width % block:
        raise ValueError(f"rows of {width} values are not whole blocks of {block}")
    return prod(shape) // block * size


def require_disjoint(path: Path, tensors: Iterable[TensorInfo]) -> None:
    """Two tensors that share bytes mean a damaged or a malicious header."""
    end, last = 0, ""
    for tensor in sorted((t for t in tensors if t.nbytes), key=lambda t: t.offset):
        if tensor.offset < end:
            raise BadCheckpoint(f"{path}: tensors {last!r} and {tensor.name!r} overlap")
        end, last = tensor.offset + tensor.nbytes, tensor.name
