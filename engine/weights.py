"""From an open checkpoint to packed weights on a device: what a model's `load` takes its tensors from."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from math import prod

from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.tensor_file import SCALE, MappedFile, TensorInfo
from inference_pio.models.contract import Rows
from inference_pio.native.backend import Backend, Tensor, Weight
from inference_pio.native.dtype import DType, row_bytes


class WeightStore:
    """Implements `models.contract.TensorSource`. Every tensor is taken once; `finish` makes what is left over an error.

    `activations` is how inputs of quantised layers are rounded; `progress(done, total)` counts bytes of the file; experts whose names
    match one of `in_place` are left where they are in the map.
    """

    def __init__(self, name: str, format: str, tensors: dict[str, TensorInfo], backend: Backend, activations: DType,
                 progress: Callable[[int, int], None] | None = None, in_place: Sequence[str] = ()):
        self.name, self.format, self._tensors, self._backend, self._activations = name, format, tensors, backend, activations
        self._progress, self._in_place = progress or (lambda done, total: None), in_place
        self.left: set[MappedFile] = set()   # files that hold what was left in them
        self._taken: set[str] = set()
        self._ignored: list[re.Pattern] = []
        self._done, self._total = 0, sum(t.nbytes for t in tensors.values())
        self.nbytes = 0   # on the device, or left in place

    def has(self, name: str) -> bool:
        return name in self._tensors

    def weight(self, *names: str | Rows, rows: int | None = None, cols: int) -> Weight:
        parts = [self._part(entry, cols) for entry in names]
        found = sum(part[2] for part in parts)
        if rows is not None and found != rows:
            raise self._bad(" + ".join(map(_name, names)), f"must have {rows} rows together, not {found}")
        return self._packed(self._backend.pack(parts, self._activations), names)

    def experts(self, *stacks: Sequence[str] | str | Rows, e: int, rows: int, cols: int) -> Weight:
        parts = []
        for stack in stacks:
            if isinstance(stack, (str, Rows)):
                parts.append(self._expert_slabs(stack, e, rows, cols))
                continue
            if len(stack) != e:
                raise self._bad(stack[0] if stack else "experts", f"there must be {e} experts, not {len(stack)}")
            parts.append([self._part(name, cols, rows) for name in stack])
        names = [n for stack in stacks for n in ([stack] if isinstance(stack, (str, Rows)) else stack)]
        tensors = [self._tensors[_name(entry)] for entry in names]
        if not all(tensor.named(self._in_place) for tensor in tensors) or not all(self._backend.reads_in_place(part[0][1], cols) for part in parts):
            return self._packed(self._backend.pack_experts(parts, self._activations), names)
        self.left |= {tensor.file for tensor in tensors}
        return self._packed(self._backend.leave_experts(parts, self._activations), names)

    def vector(self, name: str, d: int, transform: Callable[[float], float] | None = None) -> Tensor:
        info = self._take(name)
        if prod(info.shape) != d:
            raise self._bad(name, f"must have {d} values, not {list(info.shape)}")
        out = self._backend.tensor((d,), DType.F32)
        if info.dtype == DType.F32 and transform is None:
            self._backend.copy_in(out, info.data)
        else:
            values = info.floats()
            try:
                packed = struct.pack(f"<{d}f", *(map(transform, values) if transform else values))
            except (ArithmeticError, ValueError) as error:
                raise self._bad(name, f"holds a value that cannot be used: {error}") from None
            self._backend.copy_in(out, packed)
        self.nbytes += out.nbytes
        return out

    def ignore(self, *names: str) -> None:
        self._ignored += [re.compile(".*".join(map(re.escape, name.split("*")))) for name in names]

    def finish(self) -> None:
        """Everything was taken or is ignored, or BadCheckpoint."""
        left = [n for n in self._tensors if n not in self._taken and not any(p.fullmatch(n) for p in self._ignored)]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise BadCheckpoint(f"{self.name} holds tensors that the model does not have: {left[0]!r}{more}")

    # ---- one tensor ------------------------------------------------------------------------------------------------------

    def _bad(self, name: str, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.name}: tensor {name!r} {what}")

    def _take(self, name: str) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise BadCheckpoint(f"{self.name} lacks the tensor {name!r}")
        if info.dtype is None:
            raise self._bad(name, f"is stored as {info.type_name}, which has no kernel; use a file in Q4_K, Q8_0 or bf16")
        self._taken.add(name)
        return info

    def _packed(self, weight: Weight, names: Sequence[str | Rows]) -> Weight:
        self.nbytes += weight.nbytes
        self._done += sum(self._tensors[_name(entry)].nbytes for entry in names)
        self._progress(min(self._done, self._total), self._total)
        return weight

    def _part(self, entry: str | Rows, cols: int, rows: int | None = None) -> tuple:
        """(bytes, dtype, rows, cols, scales) of a matrix, or of some of its rows."""
        info = self._take(_name(entry))
        # A vector is a matrix of one row: some files squeeze it.
        shape = info.shape if len(info.shape) == 2 else (1, *info.shape) if len(info.shape) == 1 else info.shape
        if len(shape) != 2 or shape[1] != cols or (rows is not None and shape[0] != rows):
            raise self._bad(info.name, f"must be [{'rows' if rows is None else rows}, {cols}], not {list(info.shape)}")
        ranges = entry.ranges if isinstance(entry, Rows) else (range(shape[0]),)
        data, count = _rows(info.data, ranges, row_bytes(info.dtype, cols), shape[0], self, info.name)
        return data, info.dtype, count, cols, self._scales(info, shape[0], cols, ranges)

    def _expert_slabs(self, stack: str | Rows, e: int, rows: int, cols: int) -> list[tuple]:
        info = self._take(_name(stack))
        if len(info.shape) != 3 or info.shape[0] != e or info.shape[2] != cols:
            raise self._bad(info.name, f"must be [{e}, rows, {cols}], not {list(info.shape)}")
        per_row = row_bytes(info.dtype, cols)
        ranges = stack.ranges if isinstance(stack, Rows) else (range(info.shape[1]),)
        slab, parts = info.shape[1] * per_row, []
        for expert in range(e):
            data, count = _rows(info.data[expert * slab:(expert + 1) * slab], ranges, per_row, info.shape[1], self, info.name)
            if count != rows:
                raise self._bad(info.name, f"must give {rows} rows for each expert, not {count}")
            parts.append((data, info.dtype, rows, cols, None))
        return parts

    def _scales(self, info: TensorInfo, rows: int, cols: int, ranges: tuple[range, ...]) -> bytes | None:
        """f32 scales by blocks of 128 x 128 of the rows that are taken."""
        if info.dtype != DType.FP8_E4M3:
            return None
        name, wide = info.name + SCALE, -(-cols // 128)
        values = info.block_scales(self._tensors.get(name), rows, cols)
        self._taken.add(name)
        if any(r.start % 128 or (len(r) % 128 and r.stop != rows) for r in ranges):
            raise self._bad(info.name, "is FP8 and cannot be cut inside a block of 128 rows")
        return struct.pack(f"<{sum(-(-len(r) // 128) for r in ranges) * wide}f",
                           *(v for r in ranges for v in values[r.start // 128 * wide:-(-r.stop // 128) * wide]))


def _name(entry: str | Rows) -> str:
    return entry.name if isinstance(entry, Rows) else entry


def _rows(data: memoryview, ranges: tuple[range, ...], per_row: int, rows: int, store: WeightStore, name: str) -> tuple[memoryview | bytes, int]:
    for r in ranges:
        if r.step != 1 or not 0 <= r.start <= r.stop <= rows:
            raise BadCheckpoint(f"{store.name}: tensor {name!r} has {rows} rows, {r} are wanted")
    pieces = [data[r.start * per_row:r.stop * per_row] for r in ranges]
    return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), sum(map(len, ranges))
