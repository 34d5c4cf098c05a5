"""Weights on their way from a file to the layout that a device's kernels read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from inference_pio.native.dtype import DType, row_bytes
from inference_pio.native.library import TensorOpsError
from inference_pio.native.tensor import Tensor, Weight

if TYPE_CHECKING:
    from inference_pio.native.backend import Backend

_ARENA = 32 << 20    # weights share blocks of this size: a 2 MB page for every small matrix would double a small model
_STAGED = 64 << 20   # bytes of a file's matrices that a GPU gets at once


class Packer:
    """A backend's. A matrix is (rows as files hold them, dtype, rows, cols, f32 block scales or None)."""

    def __init__(self, backend: Backend):
        self._backend, self._ffi, self._lib = backend, backend.ffi, backend.lib
        self._arena, self._arena_used = 0, 0
        self._passed: dict[str, Tensor] = {}   # what matrices pass through on their way, by stage

    def pack(self, parts: Sequence[Sequence[tuple]], activations: DType, packed_bytes: Callable, pack: Callable) -> Weight:
        """Stacks of matrices of one shape and format each."""
        struct, keep = self._ffi.new("tops_weight[]", len(parts)), []
        total = 0
        for entry, matrices in zip(struct, parts, strict=True):
            dtype, rows, cols = _alike(matrices)
            nbytes = packed_bytes(dtype, rows, cols)
            if nbytes < 0:
                raise TensorOpsError(f"{self._backend.device} has no kernels for a {dtype.name} matrix of {rows} x {cols}")
            entry.data = self._arena_take(nbytes * len(matrices))
            self._pack_each(pack, entry.data, nbytes, [matrix[0] for matrix in matrices], dtype, rows, cols)
            total += nbytes * len(matrices)
            self._describe(entry, matrices, activations, keep)
        return _weight(struct, parts, total, keep)

    def leave(self, parts: Sequence[Sequence[tuple]], activations: DType) -> Weight:
        struct, keep = self._ffi.new("tops_weight[]", len(parts)), []
        total = 0
        for entry, matrices in zip(struct, parts, strict=True):
            dtype, rows, cols = _alike(matrices)
            if not self._backend.reads_in_place(dtype, cols):
                raise TensorOpsError(f"{self._backend.device} cannot read {dtype.name} rows of {cols} where a file has them")
            # What is kept are the buffers themselves: cffi's views of them crash when a garbage collection ends both.
            pointers = self._ffi.new("void *[]", [self._ffi.from_buffer(matrix[0]) for matrix in matrices])
            entry.in_place = pointers
            keep += [pointers, *(matrix[0] for matrix in matrices)]
            total += len(matrices) * rows * row_bytes(dtype, cols)
            self._describe(entry, matrices, activations, keep)
        return _weight(struct, parts, total, keep)

    def _describe(self, entry, matrices: Sequence[tuple], activations: DType, keep: list) -> None:
        """Everything of a stack but where its values are."""
        _, dtype, rows, cols, scales = matrices[0]
        entry.rows, entry.cols, entry.dtype, entry.activations = rows * len(matrices), cols, dtype, activations
        if scales is None:
            return
        blocks = self._backend.tensor((len(matrices), -(-rows // 128), -(-cols // 128)), DType.F32)
        for index, matrix in enumerate(matrices):
            self._backend.copy_in(blocks.rows(index, 1), matrix[4])
        entry.scales = self._ffi.cast("float *", blocks.pointer)
        keep.append(blocks)

    def decode(self, out: Tensor, data, dtype: DType, rows: int, cols: int, scales) -> None:
        packed = self._passing("packed", self._lib.tops_packed_bytes(dtype, rows, cols))
        weight = self._ffi.new("tops_weight *", {"data": packed.pointer, "rows": rows, "cols": cols, "dtype": dtype, "activations": DType.F32})
        if scales is not None:
            blocks = self._passing("scales", len(memoryview(scales).cast("B")))
            self._backend.copy_in(blocks, scales)
            weight.scales = self._ffi.cast("float *", blocks.pointer)
        self._pack_each(self._lib.tops_pack, packed.pointer, 0, [data], dtype, rows, cols)
        self._backend.check(self._lib.tops_unpack_rows(self._backend.stream, out.pointer, weight, 0, rows))

    def end(self) -> None:
        for tensor in self._passed.values():
            self._backend.free(tensor)
        self._passed.clear()

    def _pack_each(self, pack: Callable, out, pitch: int, matrices: Sequence, dtype: DType, rows: int, cols: int) -> None:
        """Matrices of one format and shape, each packed `pitch` bytes after the one before."""
        backend, size, out = self._backend, rows * row_bytes(dtype, cols), self._ffi.cast("char *", out)
        if backend.kind == "cpu":
            for index, data in enumerate(matrices):
                backend.check(pack(backend.stream, out + index * pitch, self._ffi.from_buffer(data), dtype, rows, cols))
            return
        together = max(1, _STAGED // max(size, 1))
        for first in range(0, len(matrices), together):
            hosts = [self._ffi.from_buffer(data) for data in matrices[first:first + together]]
            staged = self._ffi.cast("char *", self._passing("staged", size * len(hosts)).pointer)
            backend.check(self._lib.tops_copy_in_pieces(backend.stream, staged, self._ffi.new("void *[]", hosts), len(hosts), size))
            for index in range(len(hosts)):
                backend.check(pack(backend.stream, out + (first + index) * pitch, staged + index * size, dtype, rows, cols))

    def _passing(self, stage: str, nbytes: int) -> Tensor:
        """At least nbytes for matrices to pass through, kept for the next one."""
        if stage not in self._passed or self._passed[stage].nbytes < nbytes:
            if stage in self._passed:
                self._backend.free(self._passed.pop(stage))
            self._passed[stage] = self._backend.tensor((nbytes,), DType.U8)
        return self._passed[stage]

    def _arena_take(self, nbytes: int):
        nbytes = -(-nbytes // 256) * 256
        if nbytes > _ARENA // 4:
            return self._backend.allocate(nbytes)
        if not self._arena or self._arena_used + nbytes > _ARENA:
            self._arena, self._arena_used = self._backend.allocate(_ARENA), 0
        self._arena_used += nbytes
        return self._ffi.cast("char *", self._arena) + (self._arena_used - nbytes)


def _alike(matrices: Sequence[tuple]) -> tuple[DType, int, int]:
    """(dtype, rows, cols) of all of them. ValueError if one differs."""
    _, dtype, rows, cols, scales = matrices[0]
    if any(matrix[1:4] != (dtype, rows, cols) or (matrix[4] is None) != (scales is None) for matrix in matrices):
        raise ValueError(f"the experts of a layer must all be {DType(dtype).name} of {rows} x {cols}")
    expected = rows * row_bytes(dtype, cols)
    for data in (memoryview(matrix[0]).cast("B") for matrix in matrices):
        if len(data) != expected:
            raise ValueError(f"a {DType(dtype).name} matrix of {rows} x {cols} has {expected} bytes, not {len(data)}")
    return DType(dtype), rows, cols


def _weight(struct, parts: Sequence[Sequence[tuple]], nbytes: int, keep: list) -> Weight:
    (cols,) = {part[0][3] for part in parts}
    return Weight(struct, tuple(len(part) * part[0][2] for part in parts), cols, nbytes, tuple(DType(part[0][1]) for part in parts), tuple(keep))
