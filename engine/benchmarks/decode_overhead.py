"""What a decode step costs beside its recorded calls, which are the model's ops and the drawing of the token: scheduling, filling the
batch, accepting the token.

    python engine/benchmarks/decode_overhead.py [--model smollm2-135m]

The engine decodes as it always does, with a clock around the launch of the recorded calls. Of each step it tells the time in those calls
and the rest, which is the host's overhead. Nobody reads the tokens before the last: waking a reader for each is the reader's cost.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time

from inference_pio.engine import Engine, SamplingParams, TokenPrompt
from inference_pio.native.backend import Graph

PROMPT, DECODE = 64, 64


class TimedLaunches:
    """Seconds in Graph.launch, summed, while it is entered."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def __enter__(self) -> TimedLaunches:
        self.seconds, self._launch = 0.0, Graph.launch

        def launch(graph: Graph) -> None:
            start = self._clock()
            self._launch(graph)
            graph.backend.synchronize()
            self.seconds += self._clock() - start

        Graph.launch = launch
        return self

    def __exit__(self, *exception) -> None:
        Graph.launch = self._launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a .gguf file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true", help="count the process's seconds of CPU; sensible with --threads 1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args()
    clock = process_time if options.cpu_time else perf_counter
    prompt, params = TokenPrompt(tuple(range(1000, 1000 + PROMPT))), SamplingParams(max_tokens=DECODE + 1, ignore_eos=True)
    steps, inside = [], []
    with Engine.open(options.model, device=options.device, threads=options.threads, context=4 * (PROMPT + DECODE)) as engine:
        engine.generate(prompt, params)   # records the step
        for _ in range(options.rounds):
            start = clock()
            with TimedLaunches(clock) as launches:
                engine.generate(prompt, params)
            # The first token's step is a launch too, because the prompt is in the cache but for its last token.
            steps.append((clock() - start) / (DECODE + 1))
            inside.append(launches.seconds / (DECODE + 1))
        result = {"model": engine.info.name, "build": engine.info.build, "step_us": median(steps) * 1e6, "calls_us": median(inside) * 1e6,
                  "overhead": median(1 - ops / step for step, ops in zip(steps, inside))}
    print(json.dumps(result) if options.json else
          f"{result['model']} ({result['build']}): a step takes {result['step_us']:.0f} us, {result['calls_us']:.0f} of them in its "
          f"recorded calls: host overhead {result['overhead']:.1%}.")


if __name__ == "__main__":
    main()
