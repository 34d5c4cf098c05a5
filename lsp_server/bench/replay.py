"""Trace and server in, samples out: plays a typing session as a person with an editor would, and keeps the time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from inference_pio.lsp_server.bench.buffer import Buffer, end_of
from inference_pio.lsp_server.bench.trace import THROUGH, Change, Event, Position, Trace, TraceError


@dataclass
class Answer:
    """What a server said to one request. Times are milliseconds since it was asked; tokens are the server's own count."""

    text: str = ""                        # what the editor would show at the cursor
    first_token_ms: float | None = None   # None: no token was generated or shown
    answer_ms: float = 0.0
    source: str = "model"                 # or where else the text came from: type-through, adopted, prefetch, none
    reason: str = ""                      # why nothing was shown
    prompt_tokens: int = 0
    reused_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0            # of those, known before the edit: the distance to the last checkpoint
    generated_tokens: int = 0
    tokens_per_second: float | None = None   # of decoding
    server_ms: float | None = None        # what the server itself took for the whole request


@dataclass(frozen=True)
class Sample:
    """One measured request."""

    trace: str
    document: str
    kind: str
    at_s: float                           # since the replay began
    answer: Answer


@dataclass
class Recording:
    """What one replay of some traces gave."""

    samples: list[Sample] = field(default_factory=list)
    idle_ms: list[float] = field(default_factory=list)      # from a cancel until the engine rests
    requests: int = 0                                       # all that were sent, also those nobody waited for
    skipped: int = 0                                        # type-through and accept with nothing shown
    events_left: int = 0                                    # not played because the time was up
    seconds: float = 0.0


class Suggestion(Protocol):
    """A request on its way."""

    async def answer(self) -> Answer: ...

    def abandon(self) -> None:
        """Nobody waits any more, and the server is not told: the next keystroke supersedes this one."""


class Target(Protocol):
    """A server under test, as the replay sees it."""

    remembers_shown: bool    # whether typing along a suggestion asks the server at all

    def open(self, document: str, language: str, buffer: Buffer) -> None: ...

    def change(self, document: str, change: Change, buffer: Buffer) -> None: ...

    def suggest(self, document: str, cursor: Position, buffer: Buffer) -> Suggestion:
        """Asks for a suggestion at the cursor."""

    async def cancel(self, suggestion: Suggestion) -> float | None:
        """Cancels it and returns the milliseconds until the server's engine does nothing; None if it was answered before."""


class Replay:
    """One trace on one target. Text the model suggested and the trace accepts is taken back before the next recorded change,
    so that every model, and every server, sees the same documents."""

    def __init__(self, trace: Trace, target: Target, recording: Recording, began: float) -> None:
        self.trace, self.target, self.recording, self.began = trace, target, recording, began
        self._buffers: dict[str, Buffer] = {}
        self._reverts: dict[str, list[Change]] = {name: [] for name in trace.documents}
        self._shown = ""                       # the suggestion on the screen
        self._cursor: Position = (0, 0)        # where it was asked for

    async def run(self, deadline: float, progress: Callable[[], None]) -> None:
        """Plays events until the last one or `deadline` (perf_counter)."""
        key = perf_counter()
        for index, event in enumerate(self.trace.events):
            if perf_counter() > deadline:
                self.recording.events_left += len(self.trace.events) - index
                return
            await asyncio.sleep(max(0.0, key + event.pause_ms / 1e3 - perf_counter()))
            key = perf_counter()
            try:
                await self._play(event)
            except ValueError as e:
                raise TraceError(f"trace {self.trace.name}, event {index}: {e}") from e
            progress()

    async def _play(self, event: Event) -> None:
        document = event.document
        if document not in self._buffers:
            source = self.trace.documents[document]
            self._buffers[document] = Buffer(source.text)
            self.target.open(document, source.language, self._buffers[document])
        buffer = self._buffers[document]
        typed = self._shown[:event.take] if event.take else self._shown if event.accept else ""
        if (event.take or event.accept) and (not typed or event.take and not self.target.remembers_shown):
            self.recording.skipped += 1
            return
        if not typed:
            self._take_back(document)
        change = Change(self._cursor, self._cursor, typed) if typed else event.change
        if change:
            revert = buffer.apply(change)
            self.target.change(document, change, buffer)
            if typed:
                self._reverts[document].append(revert)
            self._cursor = end_of(change.start, change.text)
        if not event.request:
            self._shown = ""
            return
        if isinstance(event.request, tuple):
            buffer.offset(event.request)
            self._cursor = event.request
        await asyncio.sleep(event.ask_after_ms / 1e3)
        await self._ask(event, buffer)

    async def _ask(self, event: Event, buffer: Buffer) -> None:
        self.recording.requests += 1
        asked_at = perf_counter() - self.began
        suggestion = self.target.suggest(event.document, self._cursor, buffer)
        if event.cancel_after_ms is not None:
            self._shown = ""
            await asyncio.sleep(event.cancel_after_ms / 1e3)
            if (idle := await self.target.cancel(suggestion)) is not None:
                self.recording.idle_ms.append(idle)
        elif not event.wait:
            self._shown = ""
            suggestion.abandon()
        else:
            answer = await suggestion.answer()
            self._shown = answer.text
            # Also what was recorded as another kind may agree with the suggestion on the screen, and then costs nothing.
            kind = THROUGH if answer.source == THROUGH else event.kind
            self.recording.samples.append(Sample(self.trace.name, event.document, kind, asked_at, answer))

    def _take_back(self, document: str) -> None:
        buffer = self._buffers[document]
        for revert in reversed(self._reverts[document]):
            buffer.apply(revert)
            self.target.change(document, revert, buffer)
        self._reverts[document].clear()


async def replay(traces: list[Trace], target: Target, seconds: float,
                 progress: Callable[[Trace, Recording], None]) -> Recording:
    """All traces, one after another. Each may take its share of `seconds`, by its events; what one leaves over, the next ones have."""
    recording, began = Recording(), perf_counter()
    to_play = sum(len(trace.events) for trace in traces)
    for trace in traces:
        now = perf_counter()
        share = (began + seconds - now) * len(trace.events) / to_play
        to_play -= len(trace.events)
        await Replay(trace, target, recording, began).run(now + share, lambda: progress(trace, recording))
    recording.seconds = perf_counter() - began
    return recording
