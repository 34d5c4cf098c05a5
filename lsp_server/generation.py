"""A suggestion that is being written. It belongs to a document rather than to a request: when somebody types on and what they type is
what is being written, the newer request takes it over instead of starting again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from time import perf_counter

from inference_pio.engine import EngineError, FimPrompt, TokenStream
from inference_pio.lsp_server.documents import Document
from inference_pio.lsp_server.trim import Place, Trimmed, block_ended, trim


@dataclass(frozen=True)
class Cursor:
    """A document as it was when somebody asked, and where."""

    document: Document
    offset: int

    @property
    def place(self) -> Place:
        text, starts = self.document.text, self.document.starts
        line = self.document.position(self.offset, "utf-32")[0]
        end = starts[line] + len(self.document.line(line))
        return Place(before=text[starts[line]:self.offset], after=text[self.offset:max(end, self.offset)], below=text[end:end + 4000])

    def typed_since(self, now: Cursor) -> str | None:
        """What was typed here until `now`; None if anything else was changed, or the cursor is elsewhere."""
        old, new = self.document.text, now.document.text
        if self.document.uri != now.document.uri or now.offset < self.offset or len(new) - now.offset != len(old) - self.offset:
            return None
        same = new.startswith(old[:self.offset]) and new.endswith(old[self.offset:])
        return new[self.offset:now.offset] if same else None


class Generation:
    """Reads `stream` to its end, or until nothing further could be shown. `owner` is the number of the request that waits for it; None
    while nobody has asked yet. `prefetched`: begun for a document that was not there yet."""

    def __init__(self, cursor: Cursor, stream: TokenStream, owner: int | None, prompt: FimPrompt, prefetched: bool = False) -> None:
        self.cursor, self.stream, self.owner, self.prompt, self.prefetched = cursor, stream, owner, prompt, prefetched
        self.text = ""                         # raw, so far
        self.tokens_per_second: float | None = None   # behind the first piece
        self.result: Trimmed | None = None     # at the end: what may be shown at `cursor`
        self.error: EngineError | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def ended(self) -> bool:
        return self.result is not None or self.error is not None

    def agrees(self, now: Cursor) -> bool:
        """Whether what was typed until `now` is what is being written, as far as one can tell."""
        typed = self.cursor.typed_since(now)
        return typed is not None and self.error is None and (
            self.text.startswith(typed) or self.result is None and typed.startswith(self.text))

    async def change(self) -> None:
        """Wait until there is more text, or the end."""
        await self._changed.wait()

    def stop(self) -> None:
        """Nobody wants it: the engine is free within a step, what it computed stays in its cache."""
        self.stream.close()

    async def _run(self) -> None:
        place, complete, stats = self.cursor.place, False, self.stream.stats
        first: tuple[float, int] | None = None
        try:
            async for piece in self.stream:
                self.text += piece
                now = perf_counter(), stats.generated_tokens
                first = first or now
                if now[0] > first[0]:
                    self.tokens_per_second = (now[1] - first[1]) / (now[0] - first[0])
                self._announce()
                if "\n" in piece and block_ended(self.text, place):
                    complete = True
                    break
            self.stream.close()
            cut = not complete and stats.finish_reason != "stop"
            self.result = trim(self.text, replace(place, cut=cut))
        except EngineError as error:
            self.error = error
        finally:
            self.stream.close()
            self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
