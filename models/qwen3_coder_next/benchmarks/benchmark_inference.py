"""Speed of Qwen3-Coder-Next at its true shapes with random weights: python benchmark_inference.py --device cuda --layers 48.

Decode is measured as the engine runs it (a recorded step), prefill in steps of --chunk tokens. The floor is the bytes that a token
reads (weights of the chosen experts, states, keys and values) over the bandwidth that the device shows in the same run.
"""

from __future__ import annotations

import argparse
import json
from array import array
from statistics import median
from time import perf_counter

from random_weights import RandomExperts

from inference_pio.models.qwen3_coder_next.config import Config
from inference_pio.models.qwen3_coder_next.plugin import PLUGIN
from inference_pio.native.backend import Backend, Graph
from inference_pio.native.bandwidth import read_bandwidth
from inference_pio.native.dtype import BLOCKS, DType

PAGE = 16


def true_config(layers: int) -> Config:
    return Config(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=2, head_dim=256,
        rotary_dim=64, rope_theta=5e6, rms_norm_eps=1e-6, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_conv_kernel_dim=4, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
        norm_topk_prob=True, max_position_embeddings=262144, tie_word_embeddings=False,
        recurrent=tuple((layer + 1) % 4 != 0 for layer in range(layers)))


class Bench:
    def __init__(self, device: str, layers: int, format: DType, context: int, chunk: int):
        self.backend = Backend.open(device)
        cuda = self.backend.kind == "cuda"
        self.storage, self.chunk = (DType.BF16 if cuda else DType.F32), chunk
        self.config, self.format = true_config(layers), format
        begin = perf_counter()
        self.source = RandomExperts(self.backend, format, DType.BF16 if cuda else DType.Q8_0)
        self.weights = PLUGIN.load(self.config, self.source, self.backend)
        self.backend.synchronize()
        self.load_seconds = perf_counter() - begin
        layout = PLUGIN.cache_layout(self.config)
        pages, s = context // PAGE + 2, layout.states
        _, kv = self.backend.kv_cache(layout.layers, pages, layout.g, PAGE, layout.p, DType.BF16 if cuda else DType.F16)
        self.slots, states = self.backend.states(s.layers, 4, s.hk, s.hv, s.pk, s.pv, s.taps)
        self.state_bytes = s.nbytes
        self.cache = layout.in_order(kv, states)
        self.workspace = PLUGIN.workspace(self.config, self.backend, chunk, 16, self.storage)
        self.batch = self.backend.batch(chunk, 1, pages, 16)
        self._put("page_table", range(1, pages))

    def _put(self, name: str, values) -> None:
        self.backend.copy_in(getattr(self.batch, name), array("i", values))

    def fill(self, first: int, n: int) -> None:
        self.batch.resize(n, 1, 1)
        self._put("ids", ((first + t) * 7919 % 151000 for t in range(n)))
        self._put("positions", range(first, first + n))
        self._put("slots", range(PAGE + first, PAGE + first + n))
        self._put("sequences", [0] * n)
        self._put("query_starts", [0, n])
        self._put("logit_rows", [n - 1])
        self._put("states_in", [1 if first else -1])
        self._put("states_out", [-1] * (n - 1) + [1])

    def forward(self) -> None:
        PLUGIN.forward(self.config, self.weights, self.workspace, self.batch, self.cache)

    def prefill(self, n: int) -> float:
        """Seconds for n tokens from nothing."""
        best = float("inf")
        for _ in range(3):
            begin = perf_counter()
            for first in range(0, n, self.chunk):
                self.fill(first, min(self.chunk, n - first))
                self.forward()
            self.backend.synchronize()
            best = min(best, perf_counter() - begin)
        return best

    def record(self, context: int, n: int) -> Graph:
        """A step of n tokens behind `context` tokens, which has run once."""
        self.fill(context, n)
        self.forward()
        with self.backend.capture() as graph:
            self.forward()
        return graph

    def launch(self, graph: Graph, steps: int) -> float:
        """Seconds of one of `steps` launches."""
        self.backend.synchronize()
        begin = perf_counter()
        for _ in range(steps):
            graph.launch()
        self.backend.synchronize()
        return (perf_counter() - begin) / steps

    def step(self, context: int, n: int, steps: int) -> float:
        """Seconds for a recorded step of n tokens behind `context` tokens; the median of five runs of `steps`."""
        graph = self.record(context, n)
        return median(self.launch(graph, steps) for _ in range(5))

    def checkpoint(self, context: int, steps: int) -> float:
        """Seconds that a step of 16 tokens takes longer if it keeps the state after its eighth token, too. The graph is the same."""
        graph = self.record(context, 16)
        seconds: dict[int, list[float]] = {-1: [], 2: []}
        for _ in range(5):
            for slot, times in seconds.items():
                self._put("states_out", [-1] * 7 + [slot] + [-1] * 7 + [1])
                times.append(self.launch(graph, steps))
        return median(seconds[2]) - median(seconds[-1])

    def token_bytes(self, context: int) -> int:
        """What one token reads and writes at least."""
        c, layout = self.config, PLUGIN.cache_layout(self.config)
        values, size = BLOCKS[self.format]
        experts = c.num_hidden_layers * (c.num_experts_per_tok + 1) * 3 * c.hidden_size * c.moe_intermediate_size
        inner = c.linear_num_value_heads * c.linear_value_head_dim
        recurrent = sum(c.recurrent) * c.hidden_size * (2 * c.linear_num_key_heads * c.linear_key_head_dim + 3 * inner)
        attention = layout.layers * c.hidden_size * c.head_dim * (3 * c.num_attention_heads + 2 * c.num_key_value_heads)
        kept = 2 * c.hidden_size * (c.num_hidden_layers * (c.num_experts + 1) + sum(c.recurrent) * 2 * c.linear_num_value_heads)
        matrices = (experts + recurrent + attention + c.vocab_size * c.hidden_size) * size // values
        cache = 2 if self.backend.kind == "cpu" or self.storage == DType.BF16 else 4
        return matrices + kept + 2 * self.state_bytes + 2 * layout.layers * layout.g * layout.p * cache * context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--format", default="Q4_0", choices=[d.name for d in DType if d in BLOCKS and d < 1000])
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    bench = Bench(options.device, options.layers, DType[options.format], max(*options.context, *options.prefill, 0) + 64, options.chunk)
    bandwidth = read_bandwidth(bench.backend, 1 << 28 if options.device == "cpu" else 1 << 32)
    report: dict = {"device": bench.backend.name, "layers": options.layers, "format": options.format, "load_seconds": bench.load_seconds,
                    "weight_bytes": bench.source.nbytes, "state_bytes": bench.state_bytes, "bandwidth": bandwidth}
    print(json.dumps(report), flush=True)
    for n in options.prefill:
        seconds = bench.prefill(n)
        print(json.dumps({"prefill": n, "seconds": seconds, "tokens_per_second": n / seconds}), flush=True)
    for context in options.context:
        for n in options.tokens:
            seconds = bench.step(context, n, options.steps)
            floor = bench.token_bytes(context) / bandwidth
            print(json.dumps({"context": context, "tokens": n, "milliseconds": seconds * 1e3, "tokens_per_second": n / seconds} | (
                {"floor_milliseconds": floor * 1e3, "microseconds_above_floor_a_layer": (seconds - floor) / options.layers * 1e6}
                if n == 1 else {})), flush=True)
    print(json.dumps({"checkpoint_milliseconds": bench.checkpoint(options.context[0], options.steps) * 1e3}), flush=True)
    bench.backend.close()


if __name__ == "__main__":
    main()
