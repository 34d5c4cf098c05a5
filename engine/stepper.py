"""Steps: which sequences get pages, states and a place in the next forward, and what becomes of its result.

Everything here happens on the step thread, except `status`, which may be asked for from any.
"""

from __future__ import annotations

from array import array
from time import perf_counter

from inference_pio.engine.checkpoints import COUNTS, Checkpoints, HostTier
from inference_pio.engine.errors import EngineError
from inference_pio.engine.info import EngineInfo, EngineStatus
from inference_pio.engine.page_pool import PagePool
from inference_pio.engine.radix_cache import RadixCache
from inference_pio.engine.runner import MOST_ROWS, PAGE_SIZE, Row, Runner
from inference_pio.engine.scheduler import Scheduler, Work
from inference_pio.engine.sequence import Sequence
from inference_pio.engine.tokenizer import Tokenizer
from inference_pio.native.backend import DeviceFailed


class Stepper:
    """A model's sequences, pages and recurrent states. boundaries: special tokens that end a segment of a prompt."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, boundaries: frozenset[int], info: EngineInfo, *, reuse: bool):
        self._runner, self._tokenizer, self._reuse = runner, tokenizer, reuse
        self._pool = PagePool(info.page_count)
        slots = PagePool(info.state_count, first=0) if info.state_count else None
        host = HostTier(PagePool(info.host_state_count, first=0), runner.save_state, runner.restore_state) if info.host_state_count else None
        self._cache = RadixCache(self._pool, PAGE_SIZE, slots, host.pool if host else None)
        self._checkpoints = Checkpoints(slots, self._cache, boundaries, host) if slots else None
        self._scheduler = Scheduler(runner.most_tokens(runner.backend), MOST_ROWS)
        self.sequences = self._scheduler.sequences   # none: there is nothing to do
        self._steps = self._reused = self._computed = self._recomputed = self._generated = 0
        self._last_error: str | None = None
        self._drawn: list[Sequence] = []     # whose newest token is not in their streams yet
        self._steady: list[Sequence] = []    # of the step before, if the next one may be the same, one token later

    def add(self, sequence: Sequence) -> None:
        self._steady = []
        self._scheduler.add(sequence)

    def status(self) -> EngineStatus:
        sequences = list(self._scheduler.sequences)
        free, evictable = self._pool.free, self._cache.evictable
        counts = self._checkpoints.counts() if self._checkpoints else dict.fromkeys(COUNTS, 0)
        return EngineStatus(
            waiting=sum(s.waiting_tokens > 1 or not s.started for s in sequences), running=sum(s.started and s.waiting_tokens == 1 for s in sequences),
            pages_free=free, pages_cached=evictable, pages_in_use=self._pool.usable - free - evictable, steps=self._steps,
            chunk=self._scheduler.chunk, reused_tokens=self._reused, computed_tokens=self._computed, recomputed_tokens=self._recomputed,
            generated_tokens=self._generated, last_error=self._last_error, **counts)

    def clear_cache(self) -> None:
        """Forget every prefix that no sequence holds."""
        self._cache.clear()

    def score(self, ids: list[int], chunk: int) -> bytearray:
        """Logits of a text, f32 [n, v], computed from nothing in steps of `chunk` tokens."""
        v, needed = self._runner.width, -(-len(ids) // PAGE_SIZE)
        self._steady = []
        if self._pool.free < needed:
            self._cache.evict(needed - self._pool.free)
        if self._pool.free < needed:
            raise EngineError("there are no free pages to score in: wait for the requests that run")
        slot = self._checkpoints.take() if self._checkpoints else None
        pages, out = array("i", [self._pool.take() for _ in range(needed)]), bytearray(4 * len(ids) * v)
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
        return out

    def end_all(self, error: EngineError | None = None) -> None:
        """End every sequence: with the error, if the device is lost, else because the engine closes."""
        self._steady = []
        for sequence in list(self._scheduler.sequences):
            if error is None:
                self._finish(sequence, "closed")
            else:
                self._scheduler.remove(sequence)
                sequence.deliver()
                sequence.stream.end("error", error=error)
        self._last_error = str(error) if error else self._last_error

    # ---- a step ----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """End what is closed or late, then compute the next step. Raises DeviceFailed: nothing can be computed any more."""
        work: list[Work] = []
        try:
            if self._steady and self._repeat():
                return
            self._steady = []
            self._drop_closed()
            work = self._scheduler.next_step()
            while fresh := [w.sequence for w in work if not w.sequence.started]:
                for sequence in fresh:
                    self._start(sequence)
                work = self._scheduler.next_step()   # what is reused has changed what is left to do
            # A sequence may lose its pages to another, before it is provided for or after.
            work = [w for w in work if w.sequence.started and self._provide(w)]
            work = [w for w in work if w.sequence.started]
            if work:
                self._compute(work)
            else:
                self._deliver()
        except DeviceFailed:
            raise
        except Exception as error:   # a defect must not take the server with it
            for sequence in [w.sequence for w in work] or self._steady:
                if sequence in self._scheduler.sequences:
                    self._finish(sequence, "error", EngineError(f"the step failed: {type(error).__name__}: {error}"))

    def _repeat(self) -> bool:
        """The step before once more, one token later. False if more than that is different now. Most tokens are drawn here, and what a
        step streams through the caches leaves none of this code there: its length is what the host takes of a step."""
        sequences, now = self._steady, perf_counter()
        for sequence in sequences:
            if sequence.stream.closed or now > sequence.deadline or sequence.computed == PAGE_SIZE * len(sequence.pages):
                return False
        self._runner.repeat(sequences)
        if self._drawn:
            self._deliver()
        self._steps += 1
        for sequence in sequences:
            sequence.computed += 1
        self._accept(sequences, self._runner.tokens(len(sequences)))
        return True

    def _drop_closed(self) -> None:
        for sequence in list(self._scheduler.sequences):
            if sequence.stream.closed:
                self._finish(sequence, "closed")
            elif perf_counter() > sequence.deadline:
                self._finish(sequence, "deadline")

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
        sequence.pages = array("i", match.pages)
        sequence.computed = len(match.pages) * PAGE_SIZE
        if self._checkpoints and not self._checkpoints.begin(sequence, match.checkpoint, sequence.computed + match.partial):
            self._release(sequence)               # the state stays where it is, and this request computes it again
            sequence.computed = 0
        elif match.partial:
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
        self._recomputed += stats.recomputed_tokens

    def _provide(self, work: Work) -> bool:
        """Pages for the tokens of this step; False if the sequence cannot go on now."""
        sequence, count = work
        needed = -(-(sequence.computed + count) // PAGE_SIZE) - len(sequence.pages)
        if needed <= 0 and self._checkpoints is None:
            return True
        if not self._make_room(sequence, needed) or not self._provide_states(sequence, count):
            if not any(s.pages for s in self._scheduler.sequences if s is not sequence):
                self._finish(sequence, "error", EngineError(
                    f"{sequence.computed + count} tokens do not fit into the cache of {self._pool.usable * PAGE_SIZE}: "
                    "open the model with more memory or shorten the prompt"))
            return False
        sequence.pages.extend(self._pool.take() for _ in range(needed))
        return True

    def _provide_states(self, sequence: Sequence, count: int) -> bool:
        while self._checkpoints and not self._checkpoints.provide(sequence, count):
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
        rows: list[Row] = []
        drawing: list[Sequence] = []
        masks: list[bytes | None] = []
        others: list[Work] = []
        kept: list[tuple[int, Sequence]] = []
        for sequence, count in work:   # rows that give logits come first, so that theirs are the first rows of the result
            if count == sequence.waiting_tokens and sequence.params.max_tokens > 0:
                rows.append(Row(sequence.ids, sequence.computed, count, sequence.pages, 1, *sequence.keep))
                if sequence.params.keep_logits and sequence.stream.first_logits is None:
                    kept.append((len(drawing), sequence))
                drawing.append(sequence)
                masks.append(self._allowed(sequence) if sequence.required else None)
            else:
                others.append(Work(sequence, count))
        rows += [Row(sequence.ids, sequence.computed, count, sequence.pages, 0, *sequence.keep) for sequence, count in others]
        logits = self._runner.forward(rows, drawing, masks)
        self._deliver()
        tokens = self._runner.tokens(len(drawing))
        for row, sequence in kept:
            sequence.stream.first_logits = self._runner.row_of(logits, row)
        prompt_tokens = computed = 0
        for sequence, count in work:
            if (left := sequence.prompt_length - sequence.computed) > 0:
                sequence.stream.stats.computed_tokens += min(left, count)
                prompt_tokens += min(left, count)
            if self._checkpoints:
                self._checkpoints.settle(sequence)
            sequence.computed += count
            computed += count
        self._steps += 1
        self._computed += prompt_tokens
        if prompt_tokens > len(work) or computed == 1:
            self._scheduler.learn(computed, perf_counter() - begin)
        if self._runner.repeatable and len(drawing) == len(work) and not self._checkpoints:
            self._steady = drawing
        self._accept(drawing, tokens)
        for sequence, _ in others:
            if sequence.waiting_tokens == 0:
                self._finish(sequence, "length")

    def _accept(self, sequences: list[Sequence], tokens: list[int]) -> None:
        self._generated += len(tokens)
        for sequence, token in zip(sequences, tokens):
            if reason := sequence.accept(token):
                self._finish(sequence, reason)
            elif self._runner.backend.asynchronous:
                self._drawn.append(sequence)
            else:
                sequence.deliver()

    def _deliver(self) -> None:
        """Hand out the tokens of the step before. Where a device computes on its own this is done while it does, because waking those
        who wait for a token takes longer than anything else between two steps."""
        for sequence in self._drawn:
            sequence.deliver()
        self._drawn.clear()

    def _allowed(self, sequence: Sequence) -> bytes | None:
        return self._tokenizer.allowed(sequence.required, self._runner.mask_words) if self._tokenizer else None

    def _release(self, sequence: Sequence) -> None:
        """Give the sequence's pages and states to the cache."""
        if self._reuse and sequence.pages:
            self._cache.insert(sequence.ids[:sequence.computed], sequence.pages[:-(-sequence.computed // PAGE_SIZE)],
                               self._checkpoints.finished(sequence) if self._checkpoints else ())
        if self._checkpoints:
            self._checkpoints.release(sequence)
        for page in sequence.pages:
            self._pool.release(page)
        sequence.pages = array("i")

    def _finish(self, sequence: Sequence, reason: str, error: EngineError | None = None) -> None:
        self._steady = []
        self._scheduler.remove(sequence)
        self._release(sequence)
        sequence.deliver()
        if error is not None:
            self._last_error = str(error)
            sequence.stream.end(reason, error=error)
        else:
            sequence.finish(reason)
