"""The roof that decode speed is measured against: how fast the device reads memory."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

from inference_pio.native.backend import Backend
from inference_pio.native.dtype import DType


def read_bandwidth(backend: Backend, nbytes: int = 1 << 28, repeats: int = 9, clock: Callable[[], float] = perf_counter) -> float:
    """Bytes per second of a sum over nbytes of the library's memory, by all of the backend's threads: median of `repeats`.

    nbytes must be well above the last cache (256 MiB is, on desktops) for the result to be memory's.
    """
    block, total = backend.tensor((nbytes,), DType.U8), backend.tensor((1,), DType.F32)
    backend.zero(block)   # memory that was never written may all be one page
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        backend.check(backend.lib.tops_read(backend.stream, total.pointer, block.pointer, nbytes))
        backend.synchronize()
        seconds.append(clock() - start)
    backend.free(block)
    backend.free(total)
    return nbytes / median(seconds[1:])
