"""Decode and prefill beside llama.cpp: the same file, the same machine, the same number of threads, one run.

    pip install '.[bench]' && python models/smollm2_135m/benchmarks/compare_llama_cpp.py

The two take turns, round by round, so that a machine that slows down slows both; medians are compared. Ours is measured through the
engine, with scheduling and sampling; llama.cpp's through llama_decode alone, without a sampler. Bytes a token are the file's weights and
the keys and values before it, for both; the roof is what the engine's own threads read from memory in the same minute.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

from rich.console import Console
from rich.table import Table

from inference_pio.engine import Engine, SamplingParams, TokenPrompt

PREFILL, DECODE, REST_SECONDS = 512, 64, 0.2   # tokens, tokens, and a pause in which the other's threads go to sleep


class LlamaCpp:
    """llama.cpp through its C interface, as llama-cpp-python carries it."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.c = llama_cpp
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)   # kept: C holds only the pointer
        llama_cpp.llama_log_set(self._quiet, None)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 2048, PREFILL, PREFILL
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot open {path}")

    def run(self, ids: list[int]) -> tuple[float, float]:
        """(seconds of the prompt, seconds of a decoded token behind it)"""
        self.c.llama_memory_clear(self.c.llama_get_memory(self._context), True)
        prompt = self._decode(ids)
        start = perf_counter()
        for token in ids[:DECODE]:
            self._decode([token])
        return prompt, (perf_counter() - start) / min(DECODE, len(ids))

    def _decode(self, ids: list[int]) -> float:
        array = (self.c.llama_token * len(ids))(*ids)
        start = perf_counter()
        if self.c.llama_decode(self._context, self.c.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")
        self.c.llama_synchronize(self._context)
        ctypes.c_float.from_address(ctypes.addressof(self.c.llama_get_logits(self._context).contents))   # they are there
        return perf_counter() - start


class Ours:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def run(self, ids: list[int]) -> tuple[float, float]:
        self.engine.clear_cache()
        stats = self.engine.generate(TokenPrompt(tuple(ids)), SamplingParams(max_tokens=DECODE + 1, ignore_eos=True)).stats
        return stats.first_token_ms / 1e3, (stats.total_ms - stats.first_token_ms) / 1e3 / DECODE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a .gguf file; llama.cpp must be able to open it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with Engine.open(options.model, device="cpu", threads=options.threads, context=2048) as engine:
        try:
            contestants = {"pio": Ours(engine), "llama.cpp": LlamaCpp(engine.info.path, options.threads)}
        except ImportError:
            sys.exit("llama-cpp-python is not installed: pip install '.[bench]'")
        result = measure(engine, contestants, options.rounds)
    show(result, options.threads)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(engine: Engine, contestants: dict, rounds: int) -> dict:
    """Medians of tokens/s over the rounds, by contestant; the first round warms up and does not count."""
    ids = [7 * i % 997 + 1000 for i in range(PREFILL)]   # any tokens cost the same
    prompts = {"64": ids[:DECODE], "512": ids}
    seconds: dict[str, dict[str, list]] = {name: {depth: [] for depth in prompts} for name in contestants}
    roof = []
    for round_number in range(rounds + 1):
        for name, contestant in contestants.items():
            for depth, prompt in prompts.items():
                sleep(REST_SECONDS)
                if round_number:
                    seconds[name][depth].append(contestant.run(prompt))
                else:
                    contestant.run(prompt)
        roof.append(engine.read_bandwidth())
    info, cached = engine.info, engine.info.page_bytes / engine.info.page_size
    result: dict = {"model": info.name, "build": info.build, "file": info.path.name, "rounds": rounds, "read_gb_per_second": median(roof) / 1e9}
    for name, runs in seconds.items():
        entry = {"prefill_512": PREFILL / median(prompt for prompt, _ in runs["512"])}
        for depth, before in (("64", DECODE * 1.5), ("512", PREFILL + DECODE / 2)):
            speed = 1 / median(token for _, token in runs[depth])
            entry[f"decode_{depth}"] = speed
            entry[f"decode_{depth}_gb_per_second"] = speed * (info.weight_bytes + before * cached) / 1e9
        result[name] = entry
    return result


def show(result: dict, threads: int) -> None:
    table = Table(title=f"{result['file']}, {threads} threads, medians of {result['rounds']} rounds in turns", box=None, padding=(0, 2))
    for i, column in enumerate(("", "pio", "llama.cpp", "ratio")):
        table.add_column(column, justify="right" if i else "left")
    ours, theirs = result["pio"], result["llama.cpp"]
    for label, key in (("decode after 64 tokens, tok/s", "decode_64"), ("decode after 512 tokens, tok/s", "decode_512"), ("prefill of 512 tokens, tok/s", "prefill_512")):
        table.add_row(label, f"{ours[key]:.0f}", f"{theirs[key]:.0f}", f"{ours[key] / theirs[key]:.2f}")
    for label, key in (("decode after 64 tokens, GB/s", "decode_64_gb_per_second"), ("decode after 512 tokens, GB/s", "decode_512_gb_per_second")):
        table.add_row(label, f"{ours[key]:.1f}", f"{theirs[key]:.1f}", "")
    console = Console()
    console.print(table)
    read = result["read_gb_per_second"]
    console.print(f" measured read bandwidth {read:.1f} GB/s: pio decodes at {ours['decode_64_gb_per_second'] / read:.0%} of it, "
                  f"llama.cpp at {theirs['decode_64_gb_per_second'] / read:.0%}   ({result['build']})", style="dim")


if __name__ == "__main__":
    main()
