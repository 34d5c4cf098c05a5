"""The answer to a request, as it comes. Closing it is the only cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from inference_pio.engine.errors import EngineError


@dataclass
class StreamStats:
    """Times are in milliseconds since submission."""

    prompt_tokens: int = 0
    reused_tokens: int = 0       # of the prompt, found in the cache
    computed_tokens: int = 0     # of the prompt, computed for this request
    recomputed_tokens: int = 0   # of those, known before, but with no checkpoint to go on from: the price of a recurrent state
    generated_tokens: int = 0
    queued_ms: float = 0.0
    first_token_ms: float | None = None
    total_ms: float | None = None
    finish_reason: str | None = None   # stop, length, deadline, closed, error


class TokenStream:
    """Iterate over it, in a thread or in an event loop: pieces of text that never split a character. One consumer."""

    def __init__(self, on_close: Callable[[], None]):
        self.stats = StreamStats()
        self._pieces: deque[str] = deque()
        self._text: list[str] = []
        self._ids: list[int] = []
        self._waiting: deque[Callable[[], object]] = deque()   # what wakes who waits for the next piece
        self._waiting_for_end: deque[Callable[[], object]] = deque()
        self._ended = False
        self._error: EngineError | None = None
        self._on_close = on_close
        self.first_logits: memoryview | None = None   # f32 [v], of SamplingParams.keep_logits
        self.submitted = perf_counter()
        self.closed = False

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self._text)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self._ids)

    @property
    def done(self) -> bool:
        return self._ended

    def close(self) -> None:
        """Nobody wants more: the step in flight ends, and what was computed stays in the cache. May be called more than once."""
        if not self.closed and not self._ended:
            self.closed = True
            self.stats.total_ms = self.elapsed_ms()
            self._on_close()

    # ---- the consumer's side ---------------------------------------------------------------------------------------------

    def __iter__(self) -> TokenStream:
        return self

    # Nothing is locked, because that would cost the step thread more than all else here. The consumer says how to wake it and then looks
    # once more; the engine puts a piece there and then wakes who has said so. So one of the two always sees the other, and at worst
    # somebody is woken who is awake.

    def __next__(self) -> str:
        while not self._pieces and not self._ended:
            asleep = threading.Lock()
            asleep.acquire()
            self._waiting.append(asleep.release)
            if not self._pieces and not self._ended:
                asleep.acquire()
        return self._next(StopIteration)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> str:
        while not self._pieces and not self._ended:
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._waiting.append(lambda: loop.call_soon_threadsafe(_resolve, future))
            if not self._pieces and not self._ended:
                await future
        return self._next(StopAsyncIteration)

    def wait(self) -> None:
        """Until the end, in a thread, without being woken for the pieces. Raises what ended it, if that was an error."""
        asleep = threading.Lock()
        asleep.acquire()
        self._waiting_for_end.append(asleep.release)
        if not self._ended:
            asleep.acquire()
        self._pieces.clear()
        if self._error is not None:
            self._next(StopIteration)

    def _next(self, end: type[Exception]) -> str:
        if self._pieces:
            return self._pieces.popleft()
        error, self._error = self._error, None   # raised once
        raise error or end

    # ---- the engine's side -----------------------------------------------------------------------------------------------

    def elapsed_ms(self) -> float:
        return (perf_counter() - self.submitted) * 1000

    def put(self, token_id: int, piece: str) -> None:
        self.stats.generated_tokens += 1
        if self.stats.first_token_ms is None:
            self.stats.first_token_ms = self.elapsed_ms()
        self._ids.append(token_id)
        if piece:
            self._add(piece)

    def end(self, reason: str, piece: str = "", error: EngineError | None = None) -> None:
        if self._ended:
            return
        self.stats.total_ms = self.elapsed_ms()
        self.stats.finish_reason = reason
        self._error = error
        if piece:
            self._add(piece)
        self._ended = True
        _wake(self._waiting)
        _wake(self._waiting_for_end)

    def _add(self, piece: str) -> None:
        self._text.append(piece)
        self._pieces.append(piece)
        if self._waiting:
            _wake(self._waiting)


def _wake(waiting: deque[Callable[[], object]]) -> None:
    while waiting:
        try:
            waiting.popleft()()
        except RuntimeError:
            pass   # the loop is gone, and with it whoever waited


def _resolve(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
