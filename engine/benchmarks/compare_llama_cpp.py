"""Decode and prefill beside llama.cpp: the same file, the same machine, the same number of threads, one run.

    pip install '.[bench]' && python engine/benchmarks/compare_llama_cpp.py [--model FILE.gguf] [--depths 64 4096]

The two take turns, round by round, so that a machine that slows down slows both; medians are compared. Ours is measured through the
engine, with scheduling and sampling; llama.cpp's through llama_decode alone, without a sampler. Bytes a token are the file's weights and
the keys and values before it, for both; the roof is what the engine's own threads read from memory in the same minute. On a machine
that other programs use, `--threads 1 --cpu-time` counts the seconds that this process computed instead of those that passed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep

from rich.console import Console
from rich.table import Table

from inference_pio.engine import Engine, SamplingParams, TokenPrompt

PREFILL, DECODE, REST_SECONDS = 512, 64, 0.2   # tokens, tokens, and a pause in which the other's threads go to sleep


def tokens(count: int, seed: int = 0) -> list[int]:
    """Any tokens cost the same; another seed shares no prefix."""
    return [(7 * i + 131 * seed) % 997 + 1000 for i in range(count)]


class LlamaCpp:
    """llama.cpp through its C interface, as llama-cpp-python carries it. A context for each prompt, which stays in it."""

    def __init__(self, path: Path, threads: int, depths: list[int], clock: Callable[[], float]) -> None:
        import llama_cpp

        self.c, self._clock = llama_cpp, clock
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)   # kept: C holds only the pointer
        llama_cpp.llama_log_set(self._quiet, None)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot open {path}")
        self._contexts = {depth: self._context(depth + DECODE, threads) for depth in depths}
        self._empty = self._context(PREFILL, threads)
        for depth, context in self._contexts.items():
            for first in range(0, depth, PREFILL):
                self._decode(context, tokens(depth)[first:first + PREFILL])

    def _context(self, size: int, threads: int):
        options = self.c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = (size + 255) // 256 * 256, PREFILL, PREFILL
        options.n_threads = options.n_threads_batch = threads
        return self.c.llama_init_from_model(self._model, options)

    def prefill(self, seed: int) -> float:
        """Seconds of a prompt of PREFILL tokens."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self._empty), True)
        return self._decode(self._empty, tokens(PREFILL, seed))

    def decode(self, depth: int) -> float:
        """Seconds of a token, of DECODE behind `depth`."""
        context = self._contexts[depth]
        self.c.llama_memory_seq_rm(self.c.llama_get_memory(context), 0, depth, -1)
        return sum(self._decode(context, [token]) for token in tokens(DECODE)) / DECODE

    def _decode(self, context, ids: list[int]) -> float:
        array = (self.c.llama_token * len(ids))(*ids)
        start = self._clock()
        if self.c.llama_decode(context, self.c.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")
        self.c.llama_synchronize(context)
        ctypes.c_float.from_address(ctypes.addressof(self.c.llama_get_logits(context).contents))   # they are there
        return self._clock() - start


class Pio:
    """This engine. A prompt that was decoded from before is in its cache."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine, self._clock = engine, clock

    def prefill(self, seed: int) -> float:
        return self._seconds(tokens(PREFILL, seed), 1)

    def decode(self, depth: int) -> float:
        """The first token is a step like the others: of the prompt, all but one token is in the cache."""
        return self._seconds(tokens(depth), DECODE) / DECODE

    def _seconds(self, ids: list[int], count: int) -> float:
        start = self._clock()
        self._engine.generate(TokenPrompt(tuple(ids)), SamplingParams(max_tokens=count, ignore_eos=True))
        return self._clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a .gguf file; llama.cpp must be able to open it")
    parser.add_argument("--depths", type=int, nargs="+", default=[64, 512], metavar="N", help="tokens before the decoded ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="count the process's seconds of CPU; sensible with --threads 1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    clock = process_time if options.cpu_time else perf_counter
    with Engine.open(options.model, device="cpu", threads=options.threads, context=max(PREFILL, *options.depths) + 2 * DECODE) as engine:
        try:
            contestants = {"pio": Pio(engine, clock), "llama.cpp": LlamaCpp(engine.info.path, options.threads, options.depths, clock)}
        except ImportError:
            sys.exit("llama-cpp-python is not installed: pip install '.[bench]'")
        result = measure(engine, contestants, options.depths, options.rounds, clock)
    show(result, f"{options.threads} threads" + ", CPU time" * options.cpu_time)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(engine: Engine, contestants: dict, depths: list[int], rounds: int, clock: Callable[[], float]) -> dict:
    """Medians of tokens/s over the rounds, by contestant; the first round warms up and does not count."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    roof = []
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            runs = {f"decode_{depth}": lambda depth=depth: contestant.decode(depth) for depth in depths}
            runs[f"prefill_{PREFILL}"] = lambda: contestant.prefill(number + 1)
            for key, run in runs.items():
                sleep(REST_SECONDS)
                taken = run()
                if number:
                    seconds[name].setdefault(key, []).append(taken)
        roof.append(engine.read_bandwidth(clock))
    info, cached = engine.info, engine.info.page_bytes / engine.info.page_size
    result: dict = {"model": info.name, "build": info.build, "activations": info.activations, "file": info.path.name, "rounds": rounds,
                    "depths": depths, "read_gb_per_second": median(roof) / 1e9}
    for name, runs in seconds.items():
        entry = result[name] = {f"prefill_{PREFILL}": PREFILL / median(runs[f"prefill_{PREFILL}"])}
        for depth in depths:
            entry[f"decode_{depth}"] = speed = 1 / median(runs[f"decode_{depth}"])
            entry[f"decode_{depth}_gb_per_second"] = speed * (info.weight_bytes + (depth + DECODE / 2) * cached) / 1e9
    return result


def show(result: dict, conditions: str) -> None:
    table = Table(title=f"{result['file']}, {conditions}, medians of {result['rounds']} rounds in turns", box=None, padding=(0, 2))
    for i, column in enumerate(("", "pio", "llama.cpp", "ratio")):
        table.add_column(column, justify="right" if i else "left")
    ours, theirs, depths, read = result["pio"], result["llama.cpp"], result["depths"], result["read_gb_per_second"]
    rows = [(f"decode after {depth} tokens, tok/s", f"decode_{depth}") for depth in depths]
    for label, key in (*rows, (f"prefill of {PREFILL} tokens, tok/s", f"prefill_{PREFILL}")):
        table.add_row(label, f"{ours[key]:.1f}", f"{theirs[key]:.1f}", f"{ours[key] / theirs[key]:.2f}")
    for depth in depths:
        mine, other = (side[f"decode_{depth}_gb_per_second"] for side in (ours, theirs))
        table.add_row(f"decode after {depth} tokens, GB/s", f"{mine:.1f} ({mine / read:.0%})", f"{other:.1f} ({other / read:.0%})", "")
    console = Console()
    console.print(table)
    console.print(f" shares are of the measured read bandwidth, {read:.1f} GB/s   ({result['build']}, {result['activations']} activations)", style="dim")


if __name__ == "__main__":
    main()
