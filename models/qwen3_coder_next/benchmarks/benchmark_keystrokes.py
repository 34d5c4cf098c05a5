"""What a keystroke costs with Qwen3-Coder-Next at its true shapes and random weights, through the engine, caches and all:
python benchmark_keystrokes.py --device cuda --layers 48. With --tiny a small model of the same kind, for a look on a CPU.

Somebody types, presses Enter, accepts suggestions and jumps to edit in the middle of a file, --context tokens in the
fill-in-the-middle layout: [context] <prefix> text before the anchor <suffix> text behind the cursor <middle> what was typed. Times go
from submission to the first token. The cold ones are requests of the same session, asked once more with an emptied cache.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, sleep

from benchmark_inference import true_config
from random_weights import RandomExperts

from inference_pio.engine import Engine, EngineInfo
from inference_pio.engine.loading import Checkpoint
from inference_pio.engine.prompts import PromptRenderer
from inference_pio.engine.request import Priority, SamplingParams, TokenPrompt
from inference_pio.engine.runner import PAGE_SIZE, Runner
from inference_pio.models.qwen3_coder_next.config import Config
from inference_pio.models.qwen3_coder_next.plugin import PLUGIN
from inference_pio.native.backend import Backend
from inference_pio.native.dtype import BLOCKS, DType

PREFIX, SUFFIX, MIDDLE = 1, 2, 3    # ids that stand for the special tokens of a prompt
FIRST = 16                          # the smallest id of text
CONTEXT, BEHIND = 0.25, 0.125       # shares of a prompt: other files, text behind the cursor
KINDS = ("same line", "new line", "after accept", "edit in the middle")


def tiny_config(layers: int) -> Config:
    return replace(true_config(layers), vocab_size=2048, hidden_size=128, num_attention_heads=4, head_dim=32, rotary_dim=16,
                   linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32, num_experts=16,
                   num_experts_per_tok=4, moe_intermediate_size=64)


def open_engine(device: str, config: Config, format: DType, context: int, checkpoints: int) -> Engine:
    """An engine around random weights. context: tokens; checkpoints: slots for them, beside those of four running requests."""
    backend = Backend.open(device)
    cuda = backend.kind == "cuda"
    storage, cache_dtype = (DType.BF16, DType.BF16) if cuda else (DType.F32, DType.F16)
    source = RandomExperts(backend, format, DType.BF16 if cuda else DType.Q8_0)
    weights = PLUGIN.load(config, source, backend)
    pages, slots, layout = 4 * (context // PAGE_SIZE) + 2, 4 + checkpoints, PLUGIN.cache_layout(config)
    runner = Runner(backend, PLUGIN, config, weights, storage=storage, cache_dtype=cache_dtype, pages=pages, slots=slots, context=context, vocabulary=0)
    renderer = PromptRenderer(PLUGIN.prompts, None, None, "random weights")
    renderer.boundaries = frozenset((PREFIX, SUFFIX, MIDDLE))
    where = Path("random weights")
    info = EngineInfo(
        name=PLUGIN.name, architecture=PLUGIN.architectures[0], path=where, device=backend.device, device_name=backend.name, build=backend.build,
        activations="bf16" if cuda else "q8", context=context, fim=True, has_tokenizer=False, weight_bytes=source.nbytes,
        page_bytes=Runner.page_bytes(PLUGIN, config, cache_dtype), page_count=pages, page_size=PAGE_SIZE, state_bytes=layout.states.nbytes,
        state_count=slots, host_state_count=0)
    return Engine(runner, Checkpoint(where, PLUGIN, config, {}, "safetensors", None, renderer, context), info, reuse=True)


class Session:
    """A file under edit, as tokens. `keys` yields what kind of edit came; `prompt` is what is asked then."""

    def __init__(self, length: int, vocabulary: int, seed: int = 1):
        self._draw = random.Random(seed)
        self._vocabulary = vocabulary
        self.context = self._text(int(length * CONTEXT))
        self._behind = int(length * BEHIND)
        self.file = self._text(length - len(self.context))
        self.anchor = len(self.file) - self._behind
        self.typed: list[int] = []
        self.answer: tuple[int, ...] = ()     # what was suggested last

    def _text(self, count: int) -> list[int]:
        return [self._draw.randrange(FIRST, self._vocabulary) for _ in range(count)]

    @property
    def prompt(self) -> TokenPrompt:
        behind = self.file[self.anchor:self.anchor + self._behind]
        return TokenPrompt((*self.context, PREFIX, *self.file[:self.anchor], SUFFIX, *behind, MIDDLE, *self.typed))

    def keys(self, rounds: int) -> Iterator[str]:
        """A round: two lines are typed with an accepted suggestion between them, then comes a jump of up to 2,048 tokens."""
        for _ in range(rounds):
            for key in range(9):
                if key % 3 == 2 and self.typed:
                    self.typed.pop()              # the word grows: its last token is another one now
                self.typed += self._text(1)
                yield KINDS[0]
            self.typed += self.answer
            yield KINDS[2]
            self.typed += self._text(3)
            yield KINDS[1]
            self._jump()
            yield KINDS[3]

    def _jump(self) -> None:
        self.file[self.anchor:self.anchor] = self.typed
        end = len(self.file) - self._behind
        self.anchor = self._draw.randrange(max(1, end - 2048), end)
        self.typed = self._text(2)


@dataclass(frozen=True)
class Key:
    kind: str
    first_ms: float
    computed: int      # tokens of the prompt
    recomputed: int    # of those, tokens before the edit: from the checkpoint on
    token_ms: float    # of each token behind the first


def ask(engine: Engine, kind: str, prompt: TokenPrompt, tokens: int) -> tuple[Key, tuple[int, ...]]:
    answer = engine.generate(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), Priority.COMPLETION)
    s = answer.stats
    return Key(kind, s.first_token_ms, s.computed_tokens, s.recomputed_tokens, (s.total_ms - s.first_token_ms) / max(1, tokens - 1)), answer.token_ids


def measure(engine: Engine, session: Session, rounds: int, tokens: int, pause: float, cold: int) -> tuple[list[Key], list[Key]]:
    """(the session's keys, `cold` of its prompts again with an emptied cache)"""
    warm, asked = [], []
    ask(engine, "", session.prompt, tokens)      # the file was opened, and every kind of step has run once
    for kind in session.keys(rounds):
        sleep(pause)
        asked.append((kind, session.prompt))
        key, session.answer = ask(engine, *asked[-1], tokens)
        warm.append(key)
    again = []
    for kind, prompt in asked[::max(1, len(asked) // cold)][:cold]:
        engine.clear_cache()
        again.append(ask(engine, kind, prompt, 1)[0])
    return warm, again


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in (50, 90, 99)} | {"max": ordered[-1]}


def report(warm: list[Key], cold: list[Key], length: int) -> dict:
    kinds = {kind: {"keys": len(keys), "first_token_ms": spread([k.first_ms for k in keys]), "computed": spread([k.computed for k in keys]),
                    "recomputed": spread([k.recomputed for k in keys])}
             for kind in KINDS if (keys := [k for k in warm if k.kind == kind])}
    typing = spread([k.first_ms for k in warm if k.kind in KINDS[:3]])
    nothing = spread([k.first_ms for k in cold])
    return {"prompt_tokens": length, "kinds": kinds, "typing_ms": typing, "cold": {"keys": len(cold), "first_token_ms": nothing},
            "token_ms": spread([k.token_ms for k in warm]), "p99_over_p50": typing["p99"] / typing["p50"], "warm_over_cold": typing["p50"] / nothing["p50"]}


def show(r: dict) -> None:
    def row(name: str, keys: int, ms: dict, computed: str, recomputed: str) -> None:
        print(f"{name:20}{keys:5}" + "".join(f"{ms[p]:9.2f}" for p in ("p50", "p90", "p99", "max")) + f"{computed:>14}{recomputed:>14}")

    print(f"{'to the first token':20}{'keys':>5}{'p50 ms':>9}{'p90':>9}{'p99':>9}{'max':>9}{'computed':>14}{'before edit':>14}   (tokens, p50/max)")
    for kind, k in r["kinds"].items():
        row(kind, k["keys"], k["first_token_ms"], *(f"{k[name]['p50']}/{k[name]['max']}" for name in ("computed", "recomputed")))
    row("without reuse", r["cold"]["keys"], r["cold"]["first_token_ms"], str(r["prompt_tokens"]), "")
    print(f"typing: p50 {r['typing_ms']['p50']:.2f} ms, p99 {r['p99_over_p50']:.2f} times that; warm/cold {r['warm_over_cold']:.3f}; "
          f"a token behind the first: p50 {r['token_ms']['p50']:.3f} ms")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="narrow layers and few experts")
    parser.add_argument("--format", default="Q4_0", choices=[d.name for d in DType if d in BLOCKS and d < 1000])
    parser.add_argument("--context", type=int, default=8192, help="tokens of the prompt when the session begins")
    parser.add_argument("--rounds", type=int, default=16, help="of 12 keys each")
    parser.add_argument("--tokens", type=int, default=8, help="of each suggestion")
    parser.add_argument("--pause-ms", type=float, default=10.0, help="between an answer and the next key")
    parser.add_argument("--cold", type=int, default=8, help="prompts that are asked again with an emptied cache")
    parser.add_argument("--checkpoints", type=int, default=64, help="slots for checkpoints of the recurrent states")
    options = parser.parse_args(argv)
    config = (tiny_config if options.tiny else true_config)(options.layers)
    begin = perf_counter()
    room = options.rounds * (24 + options.tokens) + options.tokens + 64
    with open_engine(options.device, config, DType[options.format], options.context + room, options.checkpoints) as engine:
        about = {"device": engine.info.device_name, "layers": options.layers, "format": options.format, "load_seconds": perf_counter() - begin,
                 "weight_bytes": engine.info.weight_bytes, "state_bytes": engine.info.state_bytes}
        print(json.dumps(about), flush=True)
        begin = perf_counter()
        warm, cold = measure(engine, Session(options.context, config.vocab_size), options.rounds, options.tokens, options.pause_ms / 1e3, options.cold)
        found = about | report(warm, cold, options.context) | {"seconds": perf_counter() - begin}
        found["checkpoints"] = {"taken": engine.status().checkpoints_taken, "skipped": engine.status().checkpoints_skipped}
    show(found)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
