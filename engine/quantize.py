"""Matrices rounded to 8 or 4 bits when a checkpoint is loaded, and kept on disk, so that the next start maps them.

What is kept is a GGUF file of the rounded matrices, under the names of the checkpoint that they come from; everything else is still
read from the checkpoint itself. Q8_0 and Q4_0 round to nearest in blocks of 32 (tops_quantize).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import BinaryIO

import platformdirs

from inference_pio.engine.errors import BadCheckpoint, EngineError
from inference_pio.engine.gguf import open_gguf
from inference_pio.engine.tensor_file import SCALE, TensorInfo, tensor_bytes
from inference_pio.native import ops
from inference_pio.native.backend import Backend
from inference_pio.native.dtype import DType, row_bytes

FORMATS = {"q8": DType.Q8_0, "q4": DType.Q4_0}
# A token's row is read as it is and its logit is not averaged over anything: 4 bits would show.
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight", "token_embd.weight", "output.weight")
_ROUNDED = (DType.F32, DType.F16, DType.BF16, DType.FP8_E4M3)   # formats of more bits, or that a smaller one is wanted of
_CHUNK = 64 << 20    # bytes of f32 that are rounded at once
_ALIGN = 32
_LAYOUT = 1          # of the kept file; another number makes older files useless


def quantized(name: str, tensors: dict[str, TensorInfo], weights: str, exact: Sequence[str], backend: Backend,
              progress: Callable[[int, int], None]) -> dict[str, TensorInfo]:
    """The checkpoint's tensors, with its matrices of floats in 8 or 4 bits (`weights`: q8 or q4).

    exact: patterns of names that stay as they are. progress(done, total) counts bytes written; it is not called if the file is here already.
    EngineError if the disk cannot hold the file.
    """
    chosen = {n: dtype for n, t in tensors.items() if (dtype := _format(t, FORMATS[weights], exact))}
    if not chosen:
        return tensors
    path = _path(name, tensors, weights, chosen)
    kept = _kept(path, tensors, chosen)
    if kept is None:
        _write(path, tensors, chosen, backend, progress)
        kept = _kept(path, tensors, chosen)
        if kept is None:
            raise EngineError(f"{path} was written and cannot be read back: is the disk failing?")
    scales = {n + SCALE for n in chosen}
    return {n: kept.get(n, t) for n, t in tensors.items() if n not in scales}


def _format(tensor: TensorInfo, wanted: DType, exact: Sequence[str]) -> DType | None:
    """What a tensor is rounded to; None if it stays."""
    if tensor.dtype not in _ROUNDED or len(tensor.shape) < 2 or tensor.shape[-1] % 32 or tensor.named(exact):
        return None
    dtype = DType.Q8_0 if tensor.name in _VOCABULARY else wanted
    return None if tensor.dtype == DType.FP8_E4M3 and dtype == DType.Q8_0 else dtype


def _path(name: str, tensors: dict[str, TensorInfo], weights: str, chosen: dict[str, DType]) -> Path:
    """One for each state of the checkpoint's files."""
    files = sorted({t.file.path for t in tensors.values()})
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr((_LAYOUT, state, sorted(chosen.items()))).encode()).hexdigest()
    return platformdirs.user_cache_path("pio-lsp") / "quantized" / f"{name}-{weights}-{digest[:16]}.gguf"


def _kept(path: Path, tensors: dict[str, TensorInfo], chosen: dict[str, DType]) -> dict[str, TensorInfo] | None:
    """The file's tensors; None if it is not there or not what is wanted."""
    if not path.exists():
        return None
    try:
        found = open_gguf(path)[1]
    except BadCheckpoint:
        return None
    same = {n: (t.dtype, prod(t.shape)) for n, t in found.items()} == {n: (dtype, prod(tensors[n].shape)) for n, dtype in chosen.items()}
    return found if same else None


def _write(path: Path, tensors: dict[str, TensorInfo], chosen: dict[str, DType], backend: Backend, progress: Callable[[int, int], None]) -> None:
    sizes = {n: tensor_bytes(dtype, tensors[n].shape) for n, dtype in chosen.items()}
    total, done = sum(sizes.values()), 0
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < total + (64 << 20):
            raise OSError(errno.ENOSPC, f"{free / 1e9:.1f} GB are free")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as file:
            partial = Path(file.name)
            file.write(_header(tensors, chosen, sizes))
            with closing(_Rounder(backend, [tensors[name] for name in chosen])) as rounder:
                for name, dtype in chosen.items():
                    rounder.write(file, tensors[name], tensors.get(name + SCALE), dtype)
                    file.write(bytes(-sizes[name] % _ALIGN))
                    done += sizes[name]
                    progress(done, total)
        os.replace(partial, path)   # whole or not at all, however many start at once
    except OSError as error:
        raise EngineError(f"the rounded weights take {total / 1e9:.1f} GB in {path.parent}: {error.strerror or error}. Make room there, or "
                          "choose weights \"auto\"") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _header(tensors: dict[str, TensorInfo], chosen: dict[str, DType], sizes: dict[str, int]) -> bytes:
    """GGUF version 3 without metadata; data begins behind it at a multiple of _ALIGN."""
    head, at = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(chosen), 0)), 0
    for name, dtype in chosen.items():
        text, shape = name.encode(), tensors[name].shape
        head += struct.pack("<Q", len(text)) + text + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), dtype, at)
        at += -(-sizes[name] // _ALIGN) * _ALIGN
    return bytes(head) + bytes(-len(head) % _ALIGN)


class _Rounder:
    """Rounds any of the tensors, some rows at a time, through the same memory."""

    def __init__(self, backend: Backend, tensors: Sequence[TensorInfo]):
        values = max(_rows_at_once(tensor) * tensor.shape[-1] for tensor in tensors)
        self._backend = backend
        self._exact = backend.tensor((values,), DType.F32)
        self._rounded = backend.tensor((row_bytes(DType.Q8_0, values),), DType.U8)   # the larger of the two formats

    def close(self) -> None:
        self._backend.free(self._rounded)
        self._backend.free(self._exact)
        self._backend.end_packing()

    def write(self, file: BinaryIO, tensor: TensorInfo, scale: TensorInfo | None, dtype: DType) -> None:
        cols, rows, at_once = tensor.shape[-1], prod(tensor.shape[:-1]), _rows_at_once(tensor)
        wide, scales = -(-cols // 128), None
        if tensor.dtype == DType.FP8_E4M3:
            scales = tensor.block_scales(scale, rows, cols)
        per_row, exact = row_bytes(tensor.dtype, cols), self._exact.reshaped((at_once, cols))
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            block = None if scales is None else struct.pack(f"<{-(-count // 128) * wide}f", *scales[first // 128 * wide:-(-(first + count) // 128) * wide])
            self._backend.decode(exact, tensor.data[first * per_row:(first + count) * per_row], tensor.dtype, count, cols, block)
            ops.quantize(self._rounded, exact, dtype, count, cols)
            file.write(self._backend.copy_out(self._rounded, count * row_bytes(dtype, cols)))


def _rows_at_once(tensor: TensorInfo) -> int:
    """Whole blocks of scales, if the tensor has more than one."""
    cols, rows = tensor.shape[-1], prod(tensor.shape[:-1])
    return min(rows, max(128, _CHUNK // (4 * cols) // 128 * 128))
