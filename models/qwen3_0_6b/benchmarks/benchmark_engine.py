"""Decoding through the engine (scheduler, sampler, stream and all), and how soon a closed stream leaves it idle:

    python models/qwen3_0_6b/benchmarks/random_gguf.py OUT.gguf --weights Q4_0
    python models/qwen3_0_6b/benchmarks/benchmark_engine.py OUT.gguf --device cuda

What benchmark_inference.py measures is a step by itself; the difference is the engine's own time.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter, sleep

from inference_pio.engine import Engine, SamplingParams, TokenPrompt


def cancel_to_idle(engine: Engine, prompt: TokenPrompt, most: int) -> float:
    """Milliseconds from the closing of a stream in the middle of its answer until no request is left."""
    stream = engine.submit(prompt, SamplingParams(max_tokens=most, ignore_eos=True))
    while stream.stats.generated_tokens < 4:
        sleep(1e-4)
    begin = perf_counter()
    stream.close()
    while engine.status().running or engine.status().waiting:
        sleep(2e-5)
    return (perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a plugin's name, a folder or a .gguf file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    options = parser.parse_args()
    begin = perf_counter()
    with Engine.open(options.model, device=options.device, context=options.context + options.tokens) as engine:
        seconds = perf_counter() - begin
        prompt = TokenPrompt(tuple(t * 7919 % 10_000 + 100 for t in range(options.context)))
        greedy = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
        stats = [engine.generate(prompt, greedy).stats for _ in range(6)][1:]
        token_ms = median((s.total_ms - s.first_token_ms) / (options.tokens - 1) for s in stats)
        cancelled = sorted(cancel_to_idle(engine, prompt, options.tokens) for _ in range(50))
        print(json.dumps({
            "device": engine.info.device_name, "weight_bytes": engine.info.weight_bytes, "load_seconds": seconds,
            "token_ms": token_ms, "tokens_per_second": 1e3 / token_ms, "warm_first_token_ms": median(s.first_token_ms for s in stats),
            "cancel_to_idle_ms": {"p50": cancelled[24], "p99": cancelled[49]}}))


if __name__ == "__main__":
    main()
