"""The facade: a model is opened, requests go in, streams and logits come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from inference_pio.engine import hub, loading
from inference_pio.engine.errors import EngineError
from inference_pio.engine.info import EngineInfo, EngineStatus, LoadProgress
from inference_pio.engine.request import FimPrompt, Priority, Prompt, SamplingParams
from inference_pio.engine.runner import PAGE_SIZE, SCORED_ROWS, Runner
from inference_pio.engine.sequence import Sequence
from inference_pio.engine.step_thread import StepThread
from inference_pio.engine.stepper import Stepper
from inference_pio.engine.stream import StreamStats, TokenStream
from inference_pio.native.backend import Backend
from inference_pio.native.bandwidth import read_bandwidth


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stats: StreamStats


class Logits:
    """f32 [n, v]: `data` is a flat memoryview of n * v values."""

    def __init__(self, data: bytearray, shape: tuple[int, int]):
        self.shape, self.data = shape, memoryview(data).cast("f")

    def row(self, index: int) -> list[float]:
        v = self.shape[1]
        return self.data[index * v:(index + 1) * v].tolist()


class Engine:
    """A loaded model. Use it as a context manager, or close it. Its methods may be called from any thread."""

    def __init__(self, runner: Runner, checkpoint: loading.Checkpoint, info: EngineInfo, *, reuse: bool):
        self.info = info
        self._runner, self._renderer, self._tokenizer = runner, checkpoint.renderer, checkpoint.tokenizer
        self._stepper = Stepper(runner, checkpoint.tokenizer, checkpoint.renderer.boundaries, info, reuse=reuse)
        self._thread = StepThread(self._stepper, runner.backend)

    @classmethod
    def open(cls, model: str | Path, *, device: str = "auto", weights: str = "auto", activations: str = "auto", cache: str = "auto", experts: str = "auto",
             memory: int | None = None,
             context: int | None = None, checkpoints: int | None = None, host_checkpoints: int | None = None, threads: int = 0,
             reuse: bool = True, progress: Callable[[LoadProgress], None] | None = None) -> Engine:
        """Locate (or fetch) and load a model. Raises an EngineError that says what to do.

        model            a plugin's name, a Hugging Face id, a folder or a .gguf file; a folder without a tokenizer takes token ids only
        device           auto, cpu, cuda or cuda:N
        weights          auto (as the checkpoint has them); q8 or q4: matrices of floats rounded to 8 or 4 bits, kept on disk
        activations      how inputs of linear layers are rounded: f32 (exact), bf16, q8 (8-bit integers, for quantised weights), auto
        cache            how keys and values are kept: auto (in 16 bits, for exact activations in 32) or q8 (8 bits; on a CPU)
        experts          where a CPU has those of a mixture: memory (repacked), file (read where they are), auto (in memory if they fit)
        memory           bytes for weights and cache; default: what is free
        context          tokens; default: the model's, up to 8192
        checkpoints      bytes for kept recurrent states, of models that have such; default: 64 states where memory allows
        host_checkpoints bytes of main memory for those that a GPU has no room for; default: up to 2 GB beside a GPU
        threads          CPU threads; 0: one for each physical core
        reuse            False computes every prompt anew, to measure what the cache is worth
        progress         called on this thread, with what is done so far
        """
        report = progress or (lambda _: None)
        located = hub.locate(model, lambda done, total: report(LoadProgress("download", done, total, str(model))))
        checkpoint, backend = loading.open_both(located, device, threads)
        try:
            checkpoint = loading.quantize(checkpoint, weights, backend, lambda done, total: report(LoadProgress("quantize", done, total, str(model))))
            plan = loading.plan(checkpoint, backend, activations, cache, experts, memory, context, checkpoints, host_checkpoints)
            detail = loading.summary(checkpoint, backend, plan)
            runner, weight_bytes = loading.load(checkpoint, backend, plan, lambda done, total: report(LoadProgress("load", done, total, detail)))
        except BaseException:
            backend.close()
            raise
        report(LoadProgress("ready", 1, 1, detail))
        return cls(runner, checkpoint, _info(checkpoint, backend, plan, weight_bytes), reuse=reuse)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End all requests, stop the step thread and free everything."""
        self._thread.close()

    # ---- requests --------------------------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, params: SamplingParams = SamplingParams(), priority: Priority = Priority.COMPLETION) -> TokenStream:
        """Begin to answer. An error of the prompt itself (no tokenizer, too long, empty) is raised here."""
        stream = TokenStream(self._thread.wake)
        ids, required = self._renderer.render(prompt)
        if not ids:
            raise EngineError("the prompt is empty: there is nothing to continue")
        if len(ids) + params.max_tokens > self.info.context:
            raise EngineError(f"the prompt has {len(ids)} tokens and may be answered with {params.max_tokens}, the context holds "
                              f"{self.info.context}: shorten the prompt or open the model with a larger context")
        self._require_ids(ids)
        stop = self._renderer.fim_stop_ids if self.info.fim else self._renderer.stop_ids
        self._thread.submit(Sequence(ids, params, priority, stream, stop, self._tokenizer, required))
        return stream

    def prompt_length(self, prompt: Prompt) -> int:
        """Tokens."""
        return len(self._renderer.render(prompt)[0])

    def prompt_text(self, prompt: FimPrompt) -> str:
        """What the model sees of it, special tokens by name: to be shown to people."""
        return self._renderer.text(prompt)

    def generate(self, prompt: Prompt, params: SamplingParams = SamplingParams(), priority: Priority = Priority.CHAT) -> Completion:
        """Answer and wait for the end."""
        stream = self.submit(prompt, params, priority)
        stream.wait()
        return Completion(stream.text, stream.token_ids, stream.stats.finish_reason or "error", stream.stats)

    def score(self, token_ids: Items[int], chunk: int = SCORED_ROWS) -> Logits:
        """All logits of a text, computed from nothing in steps of `chunk` tokens (at most 64): f32 [n, v]."""
        ids = list(token_ids)
        if not 1 <= chunk <= SCORED_ROWS:
            raise ValueError(f"chunk must be in 1..{SCORED_ROWS}, not {chunk}")
        if not 0 < len(ids) <= self.info.context:
            raise EngineError(f"score takes 1..{self.info.context} tokens, not {len(ids)}")
        self._require_ids(ids)
        return Logits(self._thread.call(lambda: self._stepper.score(ids, chunk)), (len(ids), self._runner.width))

    def _require_ids(self, ids: list[int]) -> None:
        if max(ids) >= self._runner.width or min(ids) < 0:
            raise EngineError(f"token ids must be in 0..{self._runner.width - 1}")

    def count_tokens(self, text: str) -> int:
        return len(self.tokenize(text))

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._require_tokenizer().encode(text)

    def detokenize(self, ids: Items[int]) -> str:
        return self._require_tokenizer().decode(ids)

    def _require_tokenizer(self):
        if self._tokenizer is None:
            raise EngineError(f"{self.info.path} has no tokenizer")
        return self._tokenizer

    def status(self) -> EngineStatus:
        return self._stepper.status()

    def read_bandwidth(self, clock: Callable[[], float] = perf_counter) -> float:
        """Bytes per second that the device reads from its memory, measured now: the roof of decoding. Takes a fraction of a second."""
        return self._thread.call(lambda: read_bandwidth(self._runner.backend, clock=clock))

    def clear_cache(self) -> None:
        """Forget every prefix that no request holds."""
        self._thread.call(self._stepper.clear_cache)


def _info(checkpoint: loading.Checkpoint, backend: Backend, plan: loading.Plan, weight_bytes: int) -> EngineInfo:
    return EngineInfo(
        name=checkpoint.plugin.name, architecture=checkpoint.plugin.architectures[0], path=checkpoint.path, device=backend.device,
        device_name=backend.name, build=backend.build, activations=plan.activations.name.lower().replace("q8_0", "q8"),
        context=plan.context, fim=checkpoint.renderer.has_fim, has_tokenizer=checkpoint.tokenizer is not None, weight_bytes=weight_bytes,
        page_bytes=plan.page_bytes, page_count=plan.pages, page_size=PAGE_SIZE, state_bytes=plan.state_bytes, state_count=plan.states,
        host_state_count=plan.host_states)
