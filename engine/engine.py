"""The facade and the step thread. One thread owns every tensor; callers hand in requests and get streams."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from inference_pio.engine import hub, loading
from inference_pio.engine.checkpoints import Checkpoints
from inference_pio.engine.errors import DeviceError, EngineError
from inference_pio.engine.page_pool import PagePool
from inference_pio.engine.radix_cache import RadixCache
from inference_pio.engine.request import Priority, Prompt, SamplingParams
from inference_pio.engine.runner import MOST_ROWS, PAGE_SIZE, SCORED_ROWS, Row, Runner
from inference_pio.engine.scheduler import Scheduler, Work
from inference_pio.engine.sequence import Sequence
from inference_pio.engine.stream import StreamStats, TokenStream
from inference_pio.native.backend import Backend, DeviceFailed, TensorOpsError
from inference_pio.native.bandwidth import read_bandwidth


@dataclass(frozen=True)
class LoadProgress:
    stage: str      # download, quantize, load, ready
    done: int       # bytes
    total: int      # bytes, 0 if not known
    detail: str


@dataclass(frozen=True)
class EngineInfo:
    name: str
    architecture: str
    path: Path
    device: str              # cpu, cuda:0
    device_name: str
    build: str               # of the kernel library
    activations: str
    context: int             # tokens
    fim: bool                # trained to fill in the middle
    has_tokenizer: bool
    weight_bytes: int
    page_bytes: int          # of PAGE_SIZE tokens in all layers
    page_count: int
    page_size: int
    state_bytes: int         # of a recurrent state in all layers; 0: the model has none
    state_count: int         # slots for them: one for each running request, the rest for checkpoints


@dataclass(frozen=True)
class EngineStatus:
    waiting: int             # requests whose prompt is not computed
    running: int             # requests that decode
    pages_free: int
    pages_cached: int        # held by the cache alone
    pages_in_use: int        # held by requests
    states_free: int
    states_cached: int       # checkpoints, held by the cache alone
    states_in_use: int
    checkpoints_taken: int   # since the model was loaded
    checkpoints_skipped: int # for want of a slot
    steps: int
    chunk: int               # prompt tokens in a step
    reused_tokens: int       # totals since the model was loaded
    computed_tokens: int
    generated_tokens: int
    last_error: str | None


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
        self._reuse = reuse
        self._pool = PagePool(info.page_count)
        slots = PagePool(info.state_count, first=0) if info.state_count else None
        self._cache = RadixCache(self._pool, PAGE_SIZE, slots)
        self._checkpoints = Checkpoints(slots, self._cache, checkpoint.renderer.boundaries) if slots else None
        self._scheduler = Scheduler(runner.most_tokens(runner.backend), MOST_ROWS)
        self._arrivals: deque[Sequence | tuple[Callable[[], Any], Future]] = deque()
        self._condition = threading.Condition()
        self._closing, self._failed = False, ""
        self._steps = self._reused = self._computed = self._generated = 0
        self._last_error: str | None = None
        self._thread = threading.Thread(target=self._run, name="pio-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, model: str | Path, *, device: str = "auto", weights: str = "auto", activations: str = "auto", memory: int | None = None,
             context: int | None = None, checkpoints: int | None = None, threads: int = 0, reuse: bool = True,
             progress: Callable[[LoadProgress], None] | None = None) -> Engine:
        """Locate (or fetch) and load a model.

        model: a plugin's name, a Hugging Face id, a folder or a .gguf file. device: auto, cpu, cuda or cuda:N. weights: auto
        (as the checkpoint has them), q8 or q4 (matrices of floats rounded to 8 or 4 bits, kept on disk). activations: how inputs of
        linear layers are rounded: f32 (exact), bf16, q8 (8-bit integers, for quantised weights), auto. memory: bytes for weights and
        cache, default what is free. context: tokens, default the model's up to 8192. checkpoints: bytes of them for recurrent states of
        models that have such, default 64 of them where memory allows; with 0 the slots of running requests are all there is. threads: CPU threads, 0 for one per physical core.
        reuse: False computes every prompt anew (to measure what the cache is worth). Raises an EngineError that says what to do.
        """
        report = progress or (lambda _: None)
        located = hub.locate(model, lambda done, total: report(LoadProgress("download", done, total, str(model))))
        checkpoint = loading.open_checkpoint(located)
        backend = loading.open_backend(device, threads)
        try:
            checkpoint = loading.quantize(checkpoint, weights, backend, lambda done, total: report(LoadProgress("quantize", done, total, str(model))))
            plan = loading.plan(checkpoint, backend, activations, memory, context, checkpoints)
            detail = f"{checkpoint.plugin.name} on {backend.device}: weights {sum(t.nbytes for t in checkpoint.tensors.values()) / 1e6:.0f} MB, " \
                     f"{plan.workspace_bytes / 1e6:.0f} MB to compute in, cache up to {plan.pages * plan.page_bytes / 1e6:.0f} MB ({plan.pages * PAGE_SIZE} tokens)" + (
                         f", {plan.states} recurrent states of {plan.state_bytes / 1e6:.1f} MB" if plan.states else "")
            runner, weight_bytes = loading.load(checkpoint, backend, plan, lambda done, total: report(LoadProgress("load", done, total, detail)))
        except BaseException:
            backend.close()
            raise
        info = EngineInfo(
            name=checkpoint.plugin.name, architecture=checkpoint.plugin.architectures[0], path=checkpoint.path, device=backend.device,
            device_name=backend.name, build=backend.build, activations=plan.activations.name.lower().replace("q8_0", "q8"),
            context=plan.context, fim=checkpoint.renderer.has_fim, has_tokenizer=checkpoint.tokenizer is not None, weight_bytes=weight_bytes,
            page_bytes=plan.page_bytes, page_count=plan.pages, page_size=PAGE_SIZE, state_bytes=plan.state_bytes, state_count=plan.states)
        report(LoadProgress("ready", 1, 1, detail))
        return cls(runner, checkpoint, info, reuse=reuse)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End all requests, stop the step thread and free everything."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    # ---- requests --------------------------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, params: SamplingParams = SamplingParams(), priority: Priority = Priority.COMPLETION) -> TokenStream:
        """Begin to answer. An error of the prompt itself (no tokenizer, too long, empty) is raised here."""
        stream = TokenStream(self._wake)
        ids, required = self._renderer.render(prompt)
        if not ids:
            raise EngineError("the prompt is empty: there is nothing to continue")
        if len(ids) + params.max_tokens > self.info.context:
            raise EngineError(f"the prompt has {len(ids)} tokens and may be answered with {params.max_tokens}, the context holds "
                              f"{self.info.context}: shorten the prompt or open the model with a larger context")
        self._require_ids(ids)
        stop = self._renderer.fim_stop_ids if self.info.fim else self._renderer.stop_ids
        self._arrive(Sequence(ids, params, priority, stream, stop, self._tokenizer, required), stream)
        return stream

    def generate(self, prompt: Prompt, params: SamplingParams = SamplingParams(), priority: Priority = Priority.CHAT) -> Completion:
        """Answer and wait for the end."""
        stream = self.submit(prompt, params, priority)
        for _ in stream:
            pass
        return Completion(stream.text, stream.token_ids, stream.stats.finish_reason or "error", stream.stats)

    def score(self, token_ids: Items[int], chunk: int = SCORED_ROWS) -> Logits:
        """All logits of a text, computed from nothing in steps of `chunk` tokens (at most 64): f32 [n, v]."""
        ids = list(token_ids)
        if not 1 <= chunk <= SCORED_ROWS:
            raise ValueError(f"chunk must be in 1..{SCORED_ROWS}, not {chunk}")
        if not 0 < len(ids) <= self.info.context:
            raise EngineError(f"score takes 1..{self.info.context} tokens, not {len(ids)}")
        self._require_ids(ids)
        return self._call(lambda: self._score(ids, chunk))

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
        sequences = list(self._scheduler.sequences)
        free, evictable, states = self._pool.free, self._cache.evictable, self._checkpoints
        cached = self._cache.evictable_checkpoints if states else 0
        return EngineStatus(
            waiting=sum(s.waiting_tokens > 1 or not s.started for s in sequences), running=sum(s.started and s.waiting_tokens == 1 for s in sequences),
            pages_free=free, pages_cached=evictable, pages_in_use=self._pool.usable - free - evictable, steps=self._steps,
            states_free=states.pool.free if states else 0, states_cached=cached, checkpoints_taken=states.taken if states else 0,
            states_in_use=states.pool.usable - states.pool.free - cached if states else 0,
            checkpoints_skipped=states.skipped if states else 0, chunk=self._scheduler.chunk, reused_tokens=self._reused, computed_tokens=self._computed, generated_tokens=self._generated,
            last_error=self._last_error)

    def read_bandwidth(self) -> float:
        """Bytes per second that the device reads from its memory, measured now: the roof of decoding. Takes a fraction of a second."""
        return self._call(lambda: read_bandwidth(self._runner.backend))

    def clear_cache(self) -> None:
        """Forget every prefix that no request holds."""
        self._call(self._cache.clear)

    # ---- between threads -------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    def _arrive(self, item: Any, stream: TokenStream | None = None) -> None:
        with self._condition:
            if self._failed:
                raise DeviceError(self._failed)
            if self._closing:
                raise EngineError("the engine is closed")
            self._arrivals.append(item)
            self._condition.notify()

    def _call(self, function: Callable[[], Any]) -> Any:
        """Run function on the step thread, between two steps."""
        future: Future = Future()
        self._arrive((function, future))
        return future.result()

    # ---- the step thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._receive():
                self._drop_closed()
                work = self._scheduler.next_step()
                if work:
                    self._step(work)
        finally:
            for sequence in list(self._scheduler.sequences):
                self._finish(sequence, "closed")
            self._cache.clear()
            self._runner.backend.close()

    def _receive(self) -> bool:
        """Take in what has arrived; sleep while there is nothing to do. False when the engine closes."""
        while True:
            with self._condition:
                while not self._arrivals and not self._scheduler.sequences and not self._closing:
                    self._condition.wait()
                if self._closing:
                    for item in self._arrivals:
                        if isinstance(item, Sequence):
                            item.stream.end("closed")
                        else:
                            item[1].set_exception(EngineError("the engine is closed"))
                    self._arrivals.clear()
                    return False
                arrivals = list(self._arrivals)
                self._arrivals.clear()
            for item in arrivals:
                if isinstance(item, Sequence):
                    self._scheduler.add(item)
                    continue
                function, future = item
                try:
                    future.set_result(function())
                except BaseException as error:   # belongs to the caller, whatever it is
                    future.set_exception(error)
            if self._scheduler.sequences:
                return True

    def _drop_closed(self) -> None:
        for sequence in list(self._scheduler.sequences):
            deadline = sequence.params.deadline_ms
            if sequence.stream.closed:
                self._finish(sequence, "closed")
            elif deadline is not None and sequence.stream.elapsed_ms() > deadline:
                self._finish(sequence, "deadline")

    def _step(self, work: list[Work]) -> None:
        try:
            while fresh := [sequence for sequence, _ in work if not sequence.started]:
                for sequence in fresh:
                    self._start(sequence)
                work = self._scheduler.next_step()   # what is reused has changed what is left to do
            work = [w for w in work if self._provide(w)]
            work = [w for w in work if w.sequence.started]   # one may have lost its pages to another
            if work:
                self._compute(work)
        except DeviceFailed as error:
            self._fail(f"{self.info.device} failed: {error}. Load the model again, or use --device cpu")
        except Exception as error:   # a defect must not take the server with it
            self._last_error = f"{type(error).__name__}: {error}"
            for sequence, _ in work:
                if sequence in self._scheduler.sequences:
                    self._finish(sequence, "error", EngineError(f"the step failed: {self._last_error}"))

    def _start(self, sequence: Sequence) -> None:
        """Take over the longest cached prefix. At least one token is computed, because its logits are wanted."""
        sequence.started = True
        stats = sequence.stream.stats
        stats.queued_ms = sequence.stream.elapsed_ms()
        if not self._reuse:
            return
        match = self._cache.match(sequence.ids[:-1])
        for page in match.pages:
            self._pool.hold(page)
        sequence.pages = list(match.pages)
        sequence.computed = len(match.pages) * PAGE_SIZE
        if self._checkpoints:
            self._checkpoints.begin(sequence, match.slot, sequence.computed + match.partial)
        if match.partial:
            self._pool.hold(match.partial_page)   # so that making room cannot take it
            if self._make_room(sequence, 1):
                own = self._pool.take()
                self._runner.copy_page(own, match.partial_page)
                sequence.pages.append(own)
                sequence.computed += match.partial
            elif self._checkpoints:               # the state is of no use without the tokens before it
                self._release(sequence)
                sequence.computed = 0
            self._pool.release(match.partial_page)
        stats.reused_tokens = min(sequence.computed, sequence.prompt_length)
        stats.recomputed_tokens = min(match.known, sequence.prompt_length) - stats.reused_tokens
        self._reused += stats.reused_tokens

    def _provide(self, work: Work) -> bool:
        """Pages for the tokens of this step; False if the sequence cannot go on now."""
        sequence, count = work
        needed = -(-(sequence.computed + count) // PAGE_SIZE) - len(sequence.pages)
        if not self._make_room(sequence, needed) or not self._provide_states(sequence, count):
            if not any(s.pages for s in self._scheduler.sequences if s is not sequence):
                self._finish(sequence, "error", EngineError(
                    f"{sequence.computed + count} tokens do not fit into the cache of {self._pool.usable * PAGE_SIZE}: "
                    "open the model with more memory or shorten the prompt"))
            return False
        sequence.pages += [self._pool.take() for _ in range(needed)]
        return True

    def _provide_states(self, sequence: Sequence, count: int) -> bool:
        if self._checkpoints is None:
            return True
        while not self._checkpoints.provide(sequence, count):
            victim = self._scheduler.least_urgent(than=sequence)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _make_room(self, sequence: Sequence, pages: int) -> bool:
        """Have that many pages free: from the cache first, then from requests that are less urgent, which will begin again."""
        while self._pool.free < pages:
            if self._cache.evict(pages - self._pool.free):
                continue
            victim = self._scheduler.least_urgent(than=sequence)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a request; it begins again from what the cache still has then."""
        self._release(sequence)
        sequence.started, sequence.computed = False, 0

    def _compute(self, work: list[Work]) -> None:
        begin = perf_counter()
        # Rows that give logits come first, so that theirs are the first rows of the result.
        ready = [w for w in work if w.count == w.sequence.waiting_tokens and w.sequence.wants_logits]
        others = [w for w in work if w not in ready]
        rows = [Row(s.ids, s.computed, count, s.pages, int(w in ready), *s.keep) for w in ready + others for s, count in (w,)]
        logits = self._runner.forward(rows)
        tokens = self._runner.sample(logits, [s for s, _ in ready], self._allowed) if ready else []
        if not ready:
            self._runner.backend.synchronize()
        prompt_tokens = 0
        for sequence, count in work:
            new = max(0, min(sequence.prompt_length - sequence.computed, count))
            sequence.stream.stats.computed_tokens += new
            prompt_tokens += new
            if self._checkpoints:
                self._checkpoints.settle(sequence)
            sequence.computed += count
        self._steps += 1
        self._computed += prompt_tokens
        self._generated += len(tokens)
        if prompt_tokens > len(work):
            self._scheduler.learn(sum(count for _, count in work), perf_counter() - begin)
        for (sequence, _), token in zip(ready, tokens):
            if reason := sequence.accept(token):
                self._finish(sequence, reason)
        for sequence, _ in others:
            if sequence.waiting_tokens == 0:
                self._finish(sequence, "length")

    def _allowed(self, sequence: Sequence) -> bytes | None:
        return self._tokenizer.allowed(sequence.required, self._runner.mask_words) if sequence.required and self._tokenizer else None

    def _release(self, sequence: Sequence) -> None:
        """Give the sequence's pages and states to the cache."""
        if self._reuse and sequence.pages:
            self._cache.insert(sequence.ids[:sequence.computed], sequence.pages[:-(-sequence.computed // PAGE_SIZE)],
                               self._checkpoints.finished(sequence) if self._checkpoints else ())
        if self._checkpoints:
            self._checkpoints.release(sequence)
        for page in sequence.pages:
            self._pool.release(page)
        sequence.pages = []

    def _finish(self, sequence: Sequence, reason: str, error: EngineError | None = None) -> None:
        self._scheduler.remove(sequence)
        self._release(sequence)
        if error is not None:
            self._last_error = str(error)
            sequence.stream.end(reason, error=error)
        else:
            sequence.finish(reason)

    def _fail(self, message: str) -> None:
        """The device is lost: every request ends with the error, and so does every later one."""
        with self._condition:
            self._failed = message
            arrivals, waiting = list(self._arrivals), list(self._scheduler.sequences)
            self._arrivals.clear()
        self._last_error = message
        for sequence in waiting:
            self._scheduler.remove(sequence)
        for item in [*waiting, *arrivals]:
            if isinstance(item, Sequence):
                item.stream.end("error", error=DeviceError(message))
            else:
                item[1].set_exception(DeviceError(message))

    def _score(self, ids: list[int], chunk: int) -> Logits:
        v, needed = self._runner.width, -(-len(ids) // PAGE_SIZE)
        if self._pool.free < needed:
            self._cache.evict(needed - self._pool.free)
        if self._pool.free < needed:
            raise EngineError("there are no free pages to score in: wait for the requests that run")
        slot = self._checkpoints.take() if self._checkpoints else None
        pages, out = [self._pool.take() for _ in range(needed)], bytearray(4 * len(ids) * v)
        try:
            for first in range(0, len(ids), chunk):
                count = min(chunk, len(ids) - first)
                keep = {} if slot is None else {count - 1: slot}
                logits = self._runner.forward([Row(ids, first, count, pages, count, slot if first and keep else -1, keep)])
                self._runner.backend.copy_out_into(memoryview(out)[4 * first * v:4 * (first + count) * v], logits)
        finally:
            for page in pages:
                self._pool.release(page)
            if slot is not None:
                self._checkpoints.pool.release(slot)
        return Logits(out, (len(ids), v))


