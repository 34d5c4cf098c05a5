"""Handles of device memory: Tensor, Mirror, Weight, KV, States and Batch. They own nothing; the Backend that made them does."""

from __future__ import annotations

from array import array
from math import prod
from typing import TYPE_CHECKING

from inference_pio.native.dtype import BLOCKS, DType

if TYPE_CHECKING:
    from inference_pio.native.backend import Backend


class Tensor:
    """Row-major numbers in the library's memory."""

    __slots__ = ("backend", "pointer", "shape", "dtype")

    def __init__(self, backend: Backend, pointer, shape: tuple[int, ...], dtype: DType):
        self.backend, self.pointer, self.shape, self.dtype = backend, pointer, shape, dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BLOCKS[self.dtype][1]

    def rows(self, first: int, count: int) -> Tensor:
        """Rows first .. first + count - 1 along the leading dimension: a view."""
        if not 0 <= first <= first + count <= self.shape[0]:
            raise ValueError(f"rows {first}..{first + count} of a tensor of {self.shape[0]}")
        row = prod(self.shape[1:]) * BLOCKS[self.dtype][1]
        address = self.backend.ffi.cast("char *", self.pointer) + first * row
        return Tensor(self.backend, self.backend.ffi.cast("void *", address), (count, *self.shape[1:]), self.dtype)

    def reshaped(self, shape: tuple[int, ...]) -> Tensor:
        """The first values in another shape: a view."""
        if prod(shape) > prod(self.shape):
            raise ValueError(f"a tensor of {list(self.shape)} has fewer values than {list(shape)}")
        return Tensor(self.backend, self.pointer, shape, self.dtype)

    def __repr__(self) -> str:
        return f"Tensor({list(self.shape)}, {self.dtype.name}, {self.backend.device})"


class Mirror:
    """A tensor of 32-bit integers that the host writes or reads in every step, as `values`. On a CPU they are the tensor itself; for
    another device they are pinned, and `upload` and `fetch` copy them behind the work before."""

    __slots__ = ("tensor", "values", "_shared")

    def __init__(self, backend: Backend, tensor: Tensor):
        self.tensor, self._shared = tensor, backend.kind == "cpu"
        memory = memoryview(backend.ffi.buffer(tensor.pointer, tensor.nbytes)) if self._shared else backend.host_buffer(tensor.nbytes)
        self.values = memory.cast("B").cast("i")
        self.values[:] = array("i", [0]) * len(self.values)   # what is never written is copied, too

    def upload(self, count: int) -> None:
        """The first `count` values, which stay as they are until the copy is done."""
        if not self._shared:
            self.tensor.backend.copy_in_async(self.tensor, self.values[:count])

    def fetch(self, count: int) -> list[int]:
        """The first `count` values, when the work before is done."""
        if not self._shared:
            backend = self.tensor.backend
            backend.copy_out_async(self.values[:count], self.tensor)
            backend.synchronize()
        return self.values[:count].tolist()


class Weight:
    """Matrices with equal cols whose rows follow each other in the output of a linear layer, packed for the device."""

    __slots__ = ("struct", "parts", "rows", "cols", "nbytes", "dtypes", "part_rows", "keep")

    def __init__(self, struct, part_rows: tuple[int, ...], cols: int, nbytes: int, dtypes: tuple[DType, ...], keep: tuple):
        self.struct, self.part_rows, self.cols, self.nbytes, self.dtypes = struct, part_rows, cols, nbytes, dtypes
        self.parts, self.rows = len(part_rows), sum(part_rows)
        self.keep = keep   # scale tensors and rows left in place, which the struct only points to

    def __repr__(self) -> str:
        return f"Weight({list(self.part_rows)} x {self.cols}, {'/'.join(d.name for d in self.dtypes)})"


class KV:
    """One layer's keys and values, [pages, g, page_size, p] each; in Q8_0 the tensors are of bytes."""

    __slots__ = ("struct", "k", "v", "pages", "g", "page_size", "p", "dtype")

    def __init__(self, struct, k: Tensor, v: Tensor, p: int, dtype: DType):
        self.struct, self.k, self.v, self.p, self.dtype = struct, k, v, p, dtype
        self.pages, self.g, self.page_size, _ = k.shape


class States:
    """One layer's recurrent states: by slot, the convolution's last inputs [taps - 1, c] and the memory [hv, pk, pv], f32."""

    __slots__ = ("struct", "slots", "hk", "hv", "pk", "pv", "taps", "keep")

    def __init__(self, struct, keep: Tensor):
        self.struct, self.keep = struct, keep
        for name in ("slots", "hk", "hv", "pk", "pv", "taps"):
            setattr(self, name, getattr(struct, name))

    @property
    def channels(self) -> int:
        return 2 * self.hk * self.pk + self.hv * self.pv


class Batch:
    """Where the tokens of a step stand; tops_batch with the memory behind it.

    `n`, `b` and `r` (tokens, sequences, rows of logits) are set by `resize`; everything else is read by the kernels from
    `ids`, `positions`, `slots`, `sequences`, `states_out` [max_n], `logit_rows` and the `next_positions` that those logits are for
    [max_r], `query_starts` [max_b + 1], `states_in` [max_b] and `page_table` [max_b, max_pages]. They lie in one block, so that a step
    uploads it with one copy.
    """

    __slots__ = ("struct", "block", "ids", "positions", "slots", "sequences", "states_out", "logit_rows", "next_positions",
                 "query_starts", "states_in", "page_table", "n", "b", "r", "max_n", "max_b", "max_r", "max_pages")

    def __init__(self, backend: Backend, max_n: int, max_b: int, max_pages: int, max_r: int):
        self.max_n, self.max_b, self.max_r, self.max_pages = max_n, max_b, max_r, max_pages
        sizes = [("ids", (max_n,)), ("positions", (max_n,)), ("slots", (max_n,)), ("sequences", (max_n,)),
                 ("states_out", (max_n,)), ("logit_rows", (max_r,)), ("next_positions", (max_r,)), ("query_starts", (max_b + 1,)),
                 ("states_in", (max_b,)), ("page_table", (max_b, max_pages))]
        self.block = backend.tensor((sum(prod(shape) for _, shape in sizes),), DType.I32)
        first = 0
        for name, shape in sizes:
            view = self.block.rows(first, prod(shape))
            setattr(self, name, Tensor(backend, view.pointer, shape, DType.I32))
            first += prod(shape)
        self.struct = backend.ffi.new("tops_batch *")
        for name in ("positions", "slots", "sequences", "page_table", "query_starts", "states_in", "states_out"):
            setattr(self.struct, name, backend.ffi.cast("int32_t *", getattr(self, name).pointer))
        self.struct.max_pages = max_pages
        self.resize(0, 0, 0)

    def resize(self, n: int, b: int, r: int) -> None:
        """The step has n tokens of b sequences and wants r rows of logits."""
        for name, value, most in (("n", n, self.max_n), ("b", b, self.max_b), ("r", r, self.max_r)):
            if not 0 <= value <= most:
                raise ValueError(f"{name} must be in 0..{most}, not {value}")
        self.n = self.struct.n = n
        self.b = self.struct.b = b
        self.r = r
