"""Every op at the shapes of the models: time, bytes, GB/s beside the read bandwidth measured in the same run, GFLOP/s.

    python native/bench/bench_ops.py [--device cpu] [--model smollm2-135m ...] [--weights Q4_1 ...] [--json FILE]

Weights are random and stand in as many copies as it takes to leave the last cache; each call takes the next copy, as a step through
the layers does. A line's bytes are what the op must read: weights, keys and values, or rows, which lie in a cache as they do in a step.
"""

from __future__ import annotations

import argparse
import json
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from math import ceil
from random import Random
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from inference_pio.native import ops
from inference_pio.native.backend import Backend, Tensor, Weight
from inference_pio.native.bandwidth import read_bandwidth
from inference_pio.native.bench.experts import experts
from inference_pio.native.bench.rows import recurrent, rows, sampling
from inference_pio.native.dtype import BLOCKS, DType

OUTSIDE_CACHE = 128 << 20   # bytes of weights that a line goes through
PAGE_SIZE, EPS = 16, 1e-6


@dataclass(frozen=True)
class Recurrent:
    hk: int
    hv: int
    pk: int
    pv: int
    taps: int


@dataclass(frozen=True)
class Mixture:
    e: int
    k: int
    i: int    # width of an expert


@dataclass(frozen=True)
class Shape:
    d: int
    i: int
    h: int
    g: int
    p: int
    v: int
    mixture: Mixture | None = None
    recurrent: Recurrent | None = None


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 9, 3, 64, 49152),
    "qwen3-0.6b": Shape(1024, 3072, 16, 8, 128, 151936),
    "qwen3-4b": Shape(2560, 9728, 32, 8, 128, 151936),
    "qwen3-vl-2b": Shape(2048, 6144, 16, 8, 128, 151936),
    "glm-4.7-flash": Shape(2048, 10240, 20, 20, 256, 154880, Mixture(64, 4, 1536)),
    "qwen3-coder-next": Shape(2048, 512, 16, 2, 256, 151936, Mixture(512, 10, 512), Recurrent(16, 32, 128, 128, 4)),
}


@dataclass(frozen=True)
class Line:
    model: str
    op: str
    weights: str
    n: int
    microseconds: float
    megabytes: float
    gigabytes_per_second: float
    share: float             # of the read bandwidth
    gigaflops: float


class Bench:
    def __init__(self, backend: Backend, seconds: float, bandwidth: float):
        self.backend, self._seconds, self._random, self._bandwidth = backend, seconds, Random(1), bandwidth

    def tensor(self, *shape: int, dtype: DType = DType.F32) -> Tensor:
        """Small random numbers that stay until the backend is closed."""
        tensor = self.backend.tensor(shape, dtype)
        if dtype == DType.F32:
            values = array("f", (self._random.uniform(-1, 1) for _ in range(509)))
            self.backend.copy_in(tensor, (values * (tensor.nbytes // 4 // 509 + 1)).tobytes()[:tensor.nbytes])
        return tensor

    def integers(self, values: Iterable[int], shape: tuple[int, ...] | None = None) -> Tensor:
        data = array("i", values)
        tensor = self.tensor(*(shape or (len(data),)), dtype=DType.I32)
        self.backend.copy_in(tensor, data)
        return tensor

    @staticmethod
    def activations(dtype: DType) -> DType:
        """What a CPU rounds a product's inputs to, by the format of the weights."""
        return dtype if dtype in (DType.F32, DType.BF16) else DType.Q8_0

    def row(self, dtype: DType, cols: int) -> bytes:
        """A matrix's row as files hold it."""
        values, size = BLOCKS[dtype]
        row = bytearray(self._random.randbytes(cols // values * size))
        for block in range(0, len(row), size):   # sane scales: no NaN, no subnormal sums
            for place in {DType.Q4_1: (0, 2), DType.Q5_1: (0, 2), DType.Q4_K: (0, 2), DType.Q5_K: (0, 2), DType.Q6_K: (208,)}.get(dtype, (0,)):
                if values > 1:
                    row[block + place:block + place + 2] = struct.pack("e", 0.01)
        if values == 1:
            pattern = array("f", (self._random.uniform(-1, 1) for _ in range(cols)))
            source, target = self.tensor(cols), self.tensor(cols, dtype=dtype)
            self.backend.copy_in(source, pattern.tobytes())
            ops.convert(target, source, cols)
            row = self.backend.copy_out(target)
        return bytes(row)

    def weights(self, dtype: DType, rows: tuple[int, ...], cols: int) -> list[Weight]:
        row = self.row(dtype, cols)
        parts = [(row * count, dtype, count, cols, None) for count in rows]
        copies = max(2, ceil(OUTSIDE_CACHE / (sum(rows) * len(row))))
        return [self.backend.pack(parts, self.activations(dtype)) for _ in range(copies)]

    def line(self, model: str, op: str, weights: str, n: int, nbytes: int, flops: float, calls: list[Callable[[], None]]) -> Line:
        """Median over rounds through `calls`, of the time of one. They are recorded, as decode steps are."""
        calls[0]()   # whatever a library sets up when an op first runs cannot be recorded
        with self.backend.capture() as graph:
            for call in calls:
                call()
        times: list[float] = []
        while sum(times) < self._seconds or len(times) < 3:
            self.backend.synchronize()
            start = perf_counter()
            graph.launch()
            self.backend.synchronize()
            times.append(perf_counter() - start)
        seconds = median(times[1:]) / len(calls)
        rate = nbytes / seconds
        return Line(model, op, weights, n, seconds * 1e6, nbytes / 1e6, rate / 1e9, rate / self._bandwidth, flops / seconds / 1e9)

    def linears(self, model: str, s: Shape, dtype: DType, n: int) -> Iterator[Line]:
        qkv = (s.h * s.p, s.g * s.p, s.g * s.p)
        norm, name = self.tensor(max(s.d, s.i)), dtype.name
        layers = {
            "rms_norm_linear (qkv)": (qkv, s.d, lambda out, x, w: ops.rms_norm_linear(out, x, norm.rows(0, s.d), w, n, EPS)),
            "linear_add (o)": ((s.d,), s.h * s.p, lambda out, x, w: ops.linear_add(out, x, w, n)),
            "rms_norm_gate_up_silu": ((s.i, s.i), s.d, lambda out, x, w: ops.rms_norm_gate_up_silu(out, x, norm.rows(0, s.d), w, n, EPS)),
            "linear_add (down)": ((s.d,), s.i, lambda out, x, w: ops.linear_add(out, x, w, n)),
        }
        if n == 1:
            layers["rms_norm_linear_f32 (logits)"] = (
                (s.v,), s.d, lambda out, x, w: ops.rms_norm_linear_f32(out, x, norm.rows(0, s.d), w, n, EPS))
        for op, (rows, cols, call) in layers.items():
            weights, x = self.weights(dtype, rows, cols), self.tensor(n, cols)
            out = self.tensor(n, s.i if "gate" in op else sum(rows))
            yield self.line(model, op, name, n, weights[0].nbytes, 2 * n * sum(rows) * cols, [lambda w=w: call(out, x, w) for w in weights])

    def attention(self, model: str, s: Shape, n: int, past: int) -> Iterator[Line]:
        """n rows after `past` positions, by keys and values in f16."""
        pages = ceil((past + n) / PAGE_SIZE)
        layers = max(2, ceil(OUTSIDE_CACHE / (2 * pages * PAGE_SIZE * s.g * s.p * 2)))
        whole, caches = self.backend.kv_cache(layers, pages, s.g, PAGE_SIZE, s.p, DType.F16)
        batch = self.backend.batch(n, 1, pages, 1)
        batch.resize(n, 1, 1)
        positions = array("i", range(past, past + n))
        for tensor, values in ((batch.positions, positions), (batch.slots, positions), (batch.page_table, array("i", range(pages))),
                               (batch.query_starts, array("i", (0, n)))):
            self.backend.copy_in(tensor, values)
        qkv, out = self.tensor(n, (s.h + 2 * s.g) * s.p), self.tensor(n, s.h * s.p)
        table, inv_freq = self.tensor(n, s.p // 2, 2), self.tensor(s.p // 2)
        ops.rope_table(table, batch.positions, inv_freq, n)
        seen = n * past + n * (n + 1) // 2
        yield self.line(model, f"paged_attention at {past}", "f16", n, 2 * (past + n) * s.g * s.p * 2, 4 * seen * s.h * s.p,
                        [lambda kv=kv: ops.paged_attention(out, qkv, kv, batch, s.h, s.p**-0.5) for kv in caches])
        yield self.line(model, f"qk_norm_rope_store at {past}", "f16", n, qkv.nbytes, 6 * n * (s.h + s.g) * s.p,
                        [lambda kv=kv: ops.qk_norm_rope_store(qkv, kv, batch, table, None, None, s.h, 0, EPS) for kv in caches])


def measure(open_bench: Callable[[], Bench], models: list[str], weights: list[DType], sizes: list[int]) -> Iterator[Line]:
    """A backend for each group of lines: packed weights stay until it is closed."""
    for model, n in product(models, sizes):
        shape = SHAPES[model]
        for dtype in weights:
            if shape.d % BLOCKS[dtype][0] == shape.i % BLOCKS[dtype][0] == 0:
                for group in (Bench.linears, experts):
                    with reserved(open_bench(), shape, n) as bench:
                        yield from group(bench, model, shape, dtype, n)
        with reserved(open_bench(), shape, n) as bench:
            yield from rows(bench, model, shape, DType.Q8_0, n)
            yield from recurrent(bench, model, shape, n)
            if n == 1:
                yield from sampling(bench, model, shape)
            for past in (512, 4096) if n == 1 else (0,):
                yield from bench.attention(model, shape, n, past)


@contextmanager
def reserved(bench: Bench, s: Shape, n: int) -> Iterator[Bench]:
    with bench.backend:
        rows_of_experts = n * (1 + s.mixture.k) if s.mixture else n
        bench.backend.reserve(rows_of_experts, max(s.d, s.i, s.h * s.p), s.h, s.p)
        yield bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--model", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--weights", nargs="*", choices=[d.name for d in BLOCKS], default=["Q4_0", "Q4_1", "Q8_0", "Q4_K", "BF16"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 512], help="sizes of a step")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each line")
    parser.add_argument("--json", help="also write the lines to this file")
    arguments = parser.parse_args()
    with Backend.open(arguments.device, arguments.threads) as backend:
        roof, name, build = read_bandwidth(backend), backend.name, backend.build

    def open_bench() -> Bench:
        return Bench(Backend.open(arguments.device, arguments.threads), arguments.seconds, roof)

    table = Table("model", "op", "weights", "n", "us", "MB", "GB/s", "of roof", "GFLOP/s", title=f"{name}, {build}: reads {roof / 1e9:.1f} GB/s")
    lines = []
    for line in measure(open_bench, arguments.model, [DType[name] for name in arguments.weights], arguments.tokens):
        lines.append(line)
        table.add_row(line.model, line.op, line.weights, str(line.n), f"{line.microseconds:.1f}", f"{line.megabytes:.2f}",
                      f"{line.gigabytes_per_second:.1f}", f"{line.share:.2f}", f"{line.gigaflops:.0f}")
    Console(width=140).print(table)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"device": name, "build": build, "read_bytes_per_second": roof, "lines": [asdict(x) for x in lines]}, file)


if __name__ == "__main__":
    main()
