"""A device: an open kernel library, one stream of work on it, and the memory that was taken from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

from inference_pio.native import library
from inference_pio.native.dtype import BLOCKS, DType
from inference_pio.native.library import DeviceFailed, NoDevice, OutOfMemory, TensorOpsError
from inference_pio.native.packing import Packer
from inference_pio.native.tensor import KV, Batch, States, Tensor, Weight

__all__ = ["Backend", "Batch", "DeviceFailed", "Graph", "KV", "NoDevice", "OutOfMemory", "States", "Tensor",
           "TensorOpsError", "Weight"]


class Graph:
    """A recorded step, which the library keeps. It points to the tensors of the step and is of no use without them."""

    __slots__ = ("backend", "native")

    def __init__(self, backend: Backend):
        self.backend, self.native = backend, backend.ffi.NULL

    def launch(self) -> None:
        backend = self.backend
        if status := backend.lib.tops_graph_launch(backend.stream, self.native):
            backend.check(status)


class Backend:
    """Used by one thread at a time. Closing it frees everything that it made."""

    def __init__(self, kind: str, index: int, threads: int):
        self.ffi, self.lib = library.load(kind)
        self.kind, self.index = kind, index
        self.device = "cpu" if kind == "cpu" else f"cuda:{index}"
        self.asynchronous = kind != "cpu"   # ops run on after their calls have returned
        self.recording: list[tuple] | None = None
        self._owned: dict[int, int] = {}    # address -> bytes
        self._pinned: dict[int, int] = {}
        self._packer = Packer(self)
        self.build = self.ffi.string(self.lib.tops_build()).decode()
        name = self.ffi.new("char[256]")
        self.check(self.lib.tops_device_name(index, name, 256))
        self.name = self.ffi.string(name).decode("utf-8", "replace")
        handle = self.ffi.new("tops_stream **")
        self.check(self.lib.tops_stream_create(handle, index, threads))
        self.stream = handle[0]

    @classmethod
    def open(cls, device: str = "cpu", threads: int = 0) -> Backend:
        """device: "cpu", "cuda" or "cuda:N"; threads: of the CPU team, 0 for one per physical core. NoDevice if it cannot be had."""
        match = re.fullmatch(r"(cpu|cuda)(?::(\d{1,4}))?", device)
        if match is None or (match[1] == "cpu" and match[2]):
            raise ValueError(f"device must be cpu, cuda or cuda:N, not {device!r}")
        return cls(match[1], int(match[2] or 0), threads)

    def check(self, status: int) -> None:
        if status:
            library.raise_status(self.ffi, self.lib, status)

    def run(self, function, *arguments) -> None:
        """Call an op, or record it."""
        if self.recording is not None:
            self.recording.append((function, arguments))
        elif status := function(*arguments):
            self.check(status)

    def close(self) -> None:
        if self.stream is None:
            return
        self.lib.tops_stream_synchronize(self.stream)
        for address, nbytes in self._owned.items():
            self.lib.tops_free(self.stream, self.ffi.cast("void *", address), nbytes)
        for address, nbytes in self._pinned.items():
            self.lib.tops_free_host(self.stream, self.ffi.cast("void *", address), nbytes)
        self._owned.clear()
        self._pinned.clear()
        self.lib.tops_stream_destroy(self.stream)
        self.stream = None

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # ---- memory ----------------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int):
        """Zeros: a pointer to memory that is freed when the backend closes."""
        handle = self.ffi.new("void **")
        self.check(self.lib.tops_alloc(self.stream, handle, max(nbytes, 1)))
        self._owned[int(self.ffi.cast("uintptr_t", handle[0]))] = max(nbytes, 1)
        return handle[0]

    def tensor(self, shape: Sequence[int], dtype: DType) -> Tensor:
        """A tensor of zeros."""
        return Tensor(self, self.allocate(prod(shape) * BLOCKS[dtype][1]), tuple(shape), dtype)

    def free(self, tensor: Tensor) -> None:
        """Only for what `tensor` gave."""
        nbytes = self._owned.pop(int(self.ffi.cast("uintptr_t", tensor.pointer)))
        self.check(self.lib.tops_free(self.stream, tensor.pointer, nbytes))

    def host_buffer(self, nbytes: int) -> memoryview:
        """Host memory that the device copies from and to fastest, as writable bytes of any value."""
        handle = self.ffi.new("void **")
        self.check(self.lib.tops_alloc_host(self.stream, handle, max(nbytes, 1)))
        self._pinned[int(self.ffi.cast("uintptr_t", handle[0]))] = max(nbytes, 1)
        return memoryview(self.ffi.buffer(handle[0], nbytes)).cast("B")

    def copy_in(self, out: Tensor, data, offset: int = 0) -> None:
        """data (any buffer) into out from byte `offset`; data may be reused at once."""
        source = self.ffi.from_buffer(data)
        self.check(self.lib.tops_copy_in(self.stream, self.address(out, offset, len(source)), source, len(source)))

    def copy_in_async(self, out: Tensor, pinned: memoryview, offset: int = 0) -> None:
        """From a host_buffer that stays untouched until the copy is done."""
        source = self.ffi.from_buffer(pinned)
        self.check(self.lib.tops_copy_in_async(self.stream, self.address(out, offset, len(source)), source, len(source)))

    def copy_out(self, tensor: Tensor, nbytes: int | None = None, offset: int = 0) -> bytearray:
        """nbytes of the tensor from byte `offset` (all of it by default). Waits for the work before it."""
        data = bytearray(tensor.nbytes - offset if nbytes is None else nbytes)
        self.copy_out_into(data, tensor, offset)
        return data

    def copy_out_into(self, data, tensor: Tensor, offset: int = 0) -> None:
        target = self.ffi.from_buffer(data, require_writable=True)
        self.check(self.lib.tops_copy_out(self.stream, target, self.address(tensor, offset, len(target)), len(target)))

    def copy_out_async(self, pinned: memoryview, tensor: Tensor, offset: int = 0) -> None:
        """Into a host_buffer, readable after synchronize()."""
        target = self.ffi.from_buffer(pinned, require_writable=True)
        self.check(self.lib.tops_copy_out_async(self.stream, target, self.address(tensor, offset, len(target)), len(target)))

    def copy_2d(self, out: Tensor, out_offset: int, out_pitch: int, source: Tensor, offset: int, pitch: int,
                width: int, height: int) -> None:
        """height pieces of width bytes, each pitch bytes after the one before, from byte `offset` of source to `out_offset` of out."""
        if height == 0:
            return   # wherever it begins
        self.check(self.lib.tops_copy_2d(self.stream, self.address(out, out_offset, (height - 1) * out_pitch + width), out_pitch,
                                         self.address(source, offset, (height - 1) * pitch + width), pitch, width, height))

    def address(self, tensor: Tensor, offset: int, nbytes: int):
        """Pointer to byte `offset` of a tensor of which nbytes will be touched."""
        if not 0 <= offset <= offset + nbytes <= tensor.nbytes:
            raise ValueError(f"bytes {offset}..{offset + nbytes} of {tensor!r}, which has {tensor.nbytes}")
        return self.ffi.cast("char *", tensor.pointer) + offset

    def zero(self, tensor: Tensor) -> None:
        self.check(self.lib.tops_zero(self.stream, tensor.pointer, tensor.nbytes))

    def reserve(self, n: int, widest: int, h: int, p: int) -> None:
        """Scratch for any op of n tokens, `widest` the widest row or column of any weight."""
        self.check(self.lib.tops_stream_reserve(self.stream, self.lib.tops_scratch_bytes(n, widest, h, p)))

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
        free, total = self.ffi.new("int64_t *"), self.ffi.new("int64_t *")
        self.check(self.lib.tops_memory_info(self.index, free, total))
        return free[0], total[0]

    def synchronize(self) -> None:
        """Wait for all work. DeviceFailed if some of it failed."""
        self.check(self.lib.tops_stream_synchronize(self.stream))

    # ---- what models are made of -----------------------------------------------------------------------------------------

    def pack(self, parts: Sequence[tuple], activations: DType) -> Weight:
        """Matrices (rows as files hold them, dtype, rows, cols, f32 block scales or None) as one stacked Weight."""
        return self._packer.pack([[part] for part in parts], activations, self.lib.tops_packed_bytes, self.lib.tops_pack)

    def pack_experts(self, parts: Sequence[Sequence[tuple]], activations: DType) -> Weight:
        """Each part is a stack of matrices of one shape and format, which lie one after the other: one for each expert."""
        return self._packer.pack(parts, activations, self.lib.tops_packed_expert_bytes, self.lib.tops_pack_expert)

    def leave_experts(self, parts: Sequence[Sequence[tuple]], activations: DType) -> Weight:
        """The same, but the rows stay where they are and are packed whenever they are read: the buffers must not change."""
        return self._packer.leave(parts, activations)

    def reads_in_place(self, dtype: DType, cols: int) -> bool:
        """Whether `leave_experts` takes matrices of that format."""
        return bool(self.lib.tops_reads_in_place(dtype, cols))

    def decode(self, out: Tensor, data, dtype: DType, rows: int, cols: int, scales=None) -> None:
        """out f32 [>= rows, cols] = the values of rows as files hold them, exactly; scales: f32 of each block of 128 x 128, for fp8."""
        self._packer.decode(out, data, dtype, rows, cols, scales)

    def end_packing(self) -> None:
        """Free what is only needed while weights are packed or decoded."""
        self._packer.end()

    def kv_cache(self, layers: int, pages: int, g: int, page_size: int, p: int, dtype: DType) -> tuple[Tensor, tuple[KV, ...]]:
        """Keys and values of all layers in one tensor [layers, 2, pages, g, page_size, p]: a page of all layers is one copy_2d. In Q8_0 it
        is of bytes, p + 4 in a row."""
        if dtype not in (DType.F32, DType.F16, DType.BF16, DType.Q8_0):
            raise ValueError(f"keys and values are kept in F32, F16, BF16 or Q8_0, not {dtype.name}")
        whole = self.tensor((layers * 2, pages, g, page_size, p + 4), DType.U8) if dtype == DType.Q8_0 else \
            self.tensor((layers * 2, pages, g, page_size, p), dtype)
        caches = []
        for layer in range(layers):
            k, v = (Tensor(self, whole.rows(2 * layer + part, 1).pointer, whole.shape[1:], whole.dtype) for part in (0, 1))
            struct = self.ffi.new("tops_kv *", {"k": k.pointer, "v": v.pointer, "pages": pages, "page_size": page_size, "dtype": dtype})
            caches.append(KV(struct, k, v, p, dtype))
        return whole, tuple(caches)

    def states(self, layers: int, slots: int, hk: int, hv: int, pk: int, pv: int, taps: int) -> tuple[Tensor, tuple[States, ...]]:
        """Recurrent states of all layers in one tensor [slots, values]: a slot of all layers is one row."""
        inputs, memory = (taps - 1) * (2 * hk * pk + hv * pv), hv * pk * pv
        whole = self.tensor((slots, layers * (inputs + memory)), DType.F32)
        base, made = self.ffi.cast("float *", whole.pointer), []
        for layer in range(layers):
            first = base + layer * (inputs + memory)
            struct = self.ffi.new("tops_states *", (first, first + inputs, slots, whole.shape[1], hk, hv, pk, pv, taps))
            made.append(States(struct, whole))
        return whole, tuple(made)

    def batch(self, max_n: int, max_b: int, max_pages: int, max_r: int) -> Batch:
        return Batch(self, max_n, max_b, max_pages, max_r)

    # ---- recorded steps --------------------------------------------------------------------------------------------------

    @contextmanager
    def record(self) -> Iterator[list[tuple]]:
        """Ops called inside are kept as (function, arguments) and not run. Equal steps give equal calls."""
        self.recording = calls = []
        try:
            yield calls
        finally:
            self.recording = None

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Ops called inside are recorded by the library and not run, to be launched many times."""
        graph, handle = Graph(self), self.ffi.new("tops_graph **")
        self.check(self.lib.tops_graph_begin(self.stream))
        try:
            yield graph
        finally:
            status = self.lib.tops_graph_end(self.stream, handle)
        self.check(status)
        graph.native = self.ffi.gc(handle[0], lambda native: self.stream and self.lib.tops_graph_free(self.stream, native))
