"""Speed of a model with random weights of its true shapes, made on the spot: what each model's benchmarks/benchmark_inference.py runs.

Reports tokens per second, the bytes that a token must read, GB/s, and the share of the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
from array import array
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

from inference_pio.models.contract import ModelPlugin, Rows
from inference_pio.native import ops
from inference_pio.native.backend import Backend, Batch, Tensor, Weight
from inference_pio.native.bandwidth import read_bandwidth
from inference_pio.native.dtype import BLOCKS, DType, cached_row_bytes, row_bytes

PAGE = 16
_BLOCKS_WITH_SCALES = {DType.Q4_0: (0,), DType.Q4_1: (0, 2), DType.Q5_0: (0,), DType.Q5_1: (0, 2), DType.Q8_0: (0,), DType.Q4_K: (0, 2),
                       DType.Q5_K: (0, 2), DType.Q6_K: (208,)}


class RandomSource:
    """A TensorSource that invents every tensor: matrices in `dtype` where their width allows it, else in Q8_0 or bf16."""

    format = "safetensors"

    def __init__(self, backend: Backend, dtype: DType, activations: DType):
        self._backend, self._dtype, self._activations = backend, dtype, activations
        self._bytes: dict[DType, bytes] = {}
        self.nbytes = 0

    def has(self, name: str) -> bool:
        return not name.startswith("lm_head") and name != "output.weight"

    def ignore(self, *names: str) -> None:
        pass

    def finish(self) -> None:
        pass

    def vector(self, name: str, d: int, transform: Callable[[float], float] | None = None) -> Tensor:
        out = self._backend.tensor((d,), DType.F32)
        self._backend.copy_in(out, struct.pack(f"{d}f", *[1.0] * d))
        return out

    def weight(self, *names: str | Rows, rows: int | None = None, cols: int) -> Weight:
        # The parts' own sizes are not known here: one matrix of all rows costs the same to read. Pairs stay pairs.
        parts = 2 if len(names) == 2 else 1
        return self._packed([self._matrix(rows // parts, cols) for _ in range(parts)])

    def _matrix(self, rows: int, cols: int) -> tuple:
        dtype = self._dtype if cols % BLOCKS[self._dtype][0] == 0 else DType.Q8_0 if cols % 32 == 0 else DType.BF16
        size = rows * row_bytes(dtype, cols)
        pattern = self._pattern(dtype)
        scales = struct.pack("f", 0.01) * (-(-rows // 128) * -(-cols // 128)) if dtype == DType.FP8_E4M3 else None
        return (pattern * (size // len(pattern) + 1))[:size], dtype, rows, cols, scales

    def _packed(self, parts: Sequence[tuple]) -> Weight:
        weight = self._backend.pack(parts, self._activations)
        self.nbytes += weight.nbytes
        return weight

    def _pattern(self, dtype: DType) -> bytes:
        """Some thousand random blocks of small values."""
        if dtype not in self._bytes:
            generator, (_, size) = random.Random(1), BLOCKS[dtype]
            if dtype in (DType.F32, DType.F16, DType.BF16):
                values = [generator.gauss(0, 0.02) for _ in range(8192)]
                floats = struct.pack("8192f", *values)
                data = {DType.F32: lambda: floats, DType.F16: lambda: struct.pack("8192e", *values),
                        DType.BF16: lambda: b"".join(floats[i + 2:i + 4] for i in range(0, len(floats), 4))}[dtype]()
            elif dtype == DType.FP8_E4M3:
                data = bytes(generator.choice(range(0x70)) | generator.choice((0, 0x80)) for _ in range(8192))
            else:
                blocks = [bytearray(generator.randbytes(size)) for _ in range(4096)]
                for block in blocks:
                    for at in _BLOCKS_WITH_SCALES[dtype]:
                        block[at:at + 2] = struct.pack("e", generator.uniform(0.0005, 0.002))
                data = b"".join(blocks)
            self._bytes[dtype] = data
        return self._bytes[dtype]


class Bench:
    """A model with random weights on a device, and steps at any place of any context."""

    def __init__(self, plugin: ModelPlugin, config: Any, device: str, threads: int, dtype: DType, activations: DType, context: int, cache: str = "auto"):
        self.backend = backend = Backend.open(device, threads)
        self.plugin, self.config = plugin, config
        self.storage = DType.F32 if backend.kind == "cpu" else DType.BF16
        self.source = RandomSource(backend, dtype, activations)
        self.weights = plugin.load(config, self.source, backend)
        layout, self.most = plugin.cache_layout(config), 2048 if backend.kind != "cpu" else 512
        cache_dtype = DType.Q8_0 if cache == "q8" else DType.F16 if backend.kind == "cpu" else DType.BF16
        self.max_pages = -(-context // PAGE) + 1
        self.pages = 16 * self.max_pages + 1 if backend.kind != "cpu" else 4 * self.max_pages + 1
        whole, self.cache = backend.kv_cache(layout.layers, self.pages, layout.g, PAGE, layout.p, cache_dtype)
        backend.zero(whole)   # memory that was never written is all one page of zeros, and fast to read
        self.token_bytes = 2 * layout.layers * layout.g * cached_row_bytes(cache_dtype, layout.p)
        self.workspace = plugin.workspace(config, backend, self.most, 16, self.storage)
        self.batch: Batch = backend.batch(self.most, 16, self.max_pages, 16)

    def place(self, b: int, first: int, count: int, logits: int) -> None:
        """The next step: b sequences, each with `count` tokens from position `first`."""
        n, per = b * count, self.max_pages
        positions = [first + i for _ in range(b) for i in range(count)]
        pages = [[1 + (s * per + i) % (self.pages - 1) for i in range(per)] for s in range(b)]
        slots = [pages[s][(first + i) // PAGE] * PAGE + (first + i) % PAGE for s in range(b) for i in range(count)]
        for tensor, values in ((self.batch.ids, [7] * n), (self.batch.positions, positions), (self.batch.slots, slots),
                               (self.batch.sequences, [s for s in range(b) for _ in range(count)]),
                               (self.batch.query_starts, [s * count for s in range(b + 1)]), (self.batch.page_table, sum(pages, [])),
                               (self.batch.logit_rows, [s * count + count - 1 for s in range(b)])):
            self.backend.copy_in(tensor, array("i", values))
        self.batch.resize(n, b, logits)

    def forward(self) -> Tensor:
        return self.plugin.forward(self.config, self.weights, self.workspace, self.batch, self.cache)

    def decode(self, b: int, context: int, steps: int) -> tuple[float, float]:
        """(seconds of a step, seconds of the host's part of it), medians of five rounds."""
        self.place(b, context, 1, b)
        self.forward()
        with self.backend.capture() as graph:
            self.forward()
        rounds = []
        for _ in range(5):
            self.backend.synchronize()
            start = perf_counter()
            for _ in range(steps):
                graph.launch()
            host = perf_counter() - start
            self.backend.synchronize()
            rounds.append(((perf_counter() - start) / steps, host / steps))
        return median(r[0] for r in rounds), median(r[1] for r in rounds)

    def prompt(self, first: int, count: int, rounds: int = 5) -> float:
        """Seconds to compute `count` tokens behind `first` cached ones and to draw the next, until the host has it."""
        times, v = [], self.workspace.logits.shape[1]
        drawn, greedy, position = (self.backend.tensor(shape, dtype) for shape, dtype in (((1,), DType.I32), ((1, 32), DType.U8), ((1,), DType.I32)))
        for _ in range(rounds + 1):
            self.backend.synchronize()
            start = perf_counter()
            for at in range(0, count, self.most):
                part = min(self.most, count - at)
                self.place(1, first + at, part, 1)
                logits = self.forward()
            ops.sample(drawn, None, logits, greedy, position, 1)
            if not 0 <= int.from_bytes(self.backend.copy_out(drawn), "little") < v:
                raise RuntimeError("the drawn token is outside the vocabulary")
            times.append(perf_counter() - start)
        return median(times[1:])


def main(plugin: ModelPlugin, config: Any, argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU team; 0: one for each physical core")
    parser.add_argument("--weights", default="bf16", help="f32, f16, bf16, fp8_e4m3, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k or q6_k")
    parser.add_argument("--activations", default="auto", help="f32, bf16 or q8: how inputs of linear layers are rounded")
    parser.add_argument("--cache", default="auto", choices=("auto", "q8"), help="keys and values in 16 or 8 bits")
    parser.add_argument("--context", type=int, default=1024, help="tokens before the decoded one")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of the measured prompt (default: 2048 on a GPU, 512 on a CPU)")
    parser.add_argument("--cached", type=int, default=4096, help="tokens before 16 new ones")
    parser.add_argument("--batches", default="1", help="numbers of sequences to decode at once, by commas")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    a = parser.parse_args(argv)
    dtype = next(d for d in DType if d.name.lower() == a.weights.lower())
    quantised = BLOCKS[dtype][0] > 1
    cpu = a.device == "cpu"
    chosen = a.activations if a.activations != "auto" else "bf16" if not cpu or dtype == DType.BF16 else "q8" if quantised else "f32"
    activations = {"f32": DType.F32, "bf16": DType.BF16, "q8": DType.Q8_0}[chosen]
    count, steps = a.prompt or (512 if cpu else 2048), 20 if cpu else 100
    bench = Bench(plugin, config, a.device, a.threads, dtype, activations, max(a.context, a.cached, count) + 64, a.cache)
    bandwidth = read_bandwidth(bench.backend, 1 << 28 if cpu else 1 << 32)
    result: dict[str, Any] = {"model": plugin.name, "device": bench.backend.name, "build": bench.backend.build, "weights": dtype.name,
                              "activations": chosen, "weight_bytes": bench.source.nbytes, "read_bandwidth": bandwidth, "decode": []}
    for b in map(int, a.batches.split(",")):
        seconds, host = bench.decode(b, a.context, steps)
        read = bench.source.nbytes + b * a.context * bench.token_bytes
        result["decode"].append({"batch": b, "context": a.context, "step_ms": seconds * 1e3, "tokens_per_second": b / seconds, "host_us": host * 1e6,
                                 "bytes_read": read, "share_of_bandwidth": read / seconds / bandwidth})
    seconds = bench.prompt(0, count)
    result["prefill"] = {"tokens": count, "ms": seconds * 1e3, "tokens_per_second": count / seconds}
    seconds = bench.prompt(a.cached, 16)
    result["append"] = {"cached": a.cached, "tokens": 16, "ms": seconds * 1e3}
    bench.backend.close()
    print(json.dumps(result) if a.json else _text(result))
    return 0


def _text(r: dict[str, Any]) -> str:
    lines = [f"{r['model']} {r['weights']} ({r['activations']} activations) on {r['device']}, {r['build']}: weights {r['weight_bytes'] / 1e9:.2f} GB, "
             f"read bandwidth {r['read_bandwidth'] / 1e9:.1f} GB/s"]
    lines += [f"decode  batch {d['batch']:2} at {d['context']}: {d['tokens_per_second']:8.1f} tok/s, {d['step_ms']:.3f} ms a step, "
              f"{d['bytes_read'] / d['step_ms'] / 1e6:.1f} GB/s = {d['share_of_bandwidth']:.2f} of the bandwidth; host {d['host_us']:.1f} us" for d in r["decode"]]
    p, x = r["prefill"], r["append"]
    lines.append(f"prefill {p['tokens']} tokens: {p['tokens_per_second']:.0f} tok/s, {p['ms']:.1f} ms")
    lines.append(f"append  {x['tokens']} tokens behind {x['cached']} cached: {x['ms']:.2f} ms to the first token")
    return "\n".join(lines)
