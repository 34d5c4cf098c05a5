"""A llama-server under test: the same trace, asked for the way llama.vscode and llama.vim ask.

256 lines before the cursor, the line up to it as `prompt`, 64 lines behind it; the server's own prompt cache is on. A model that
was not trained to fill in the middle is asked to continue the text, as pio-lsp does with such models. A request that is superseded is
dropped by closing its connection, the fastest way the server offers.
"""

from __future__ import annotations

import asyncio
import json
from time import perf_counter
from typing import Any

from inference_pio.lsp_server.bench.buffer import Buffer
from inference_pio.lsp_server.bench.client import ServerError
from inference_pio.lsp_server.bench.http import HttpError, HttpServer
from inference_pio.lsp_server.bench.replay import Answer
from inference_pio.lsp_server.bench.trace import Change, Position

PREFIX_LINES, SUFFIX_LINES = 256, 64
IDLE_SECONDS = 30.0


class InfillTarget:
    """A target (see replay.Target) over HTTP."""

    remembers_shown = False    # typing along is the editor plugin's business; the server is not asked

    def __init__(self, url: str, most_tokens: int) -> None:
        self.server, self.most_tokens = HttpServer(url), most_tokens
        self.model = ""
        self.fim = True
        self._abandoned: list[InfillSuggestion] = []

    async def ready(self) -> None:
        """Asks what is served, and whether it can fill in the middle."""
        properties = await self.server.get("/props")
        self.model = str(properties.get("model_path") or properties.get("model_alias") or "unknown").rpartition("/")[2]
        try:
            await InfillSuggestion(self, "", "", " ", most_tokens=1).answer()
        except HttpError as e:
            if e.status not in (400, 404, 501):
                raise
            self.fim = False
            await InfillSuggestion(self, "", " ", "", most_tokens=1).answer()

    def open(self, document: str, language: str, buffer: Buffer) -> None:
        pass    # the server knows no documents

    def change(self, document: str, change: Change, buffer: Buffer) -> None:
        pass

    def suggest(self, document: str, cursor: Position, buffer: Buffer) -> InfillSuggestion:
        for suggestion in self._abandoned:
            suggestion.task.cancel()
        self._abandoned.clear()
        offset = buffer.offset(cursor)
        before = buffer.text[:offset].splitlines(keepends=True)[-PREFIX_LINES - 1:]
        line = before.pop() if before and not before[-1].endswith("\n") else ""
        after = "".join(buffer.text[offset:].splitlines(keepends=True)[:SUFFIX_LINES + 1])
        return InfillSuggestion(self, "".join(before), line, after)

    async def cancel(self, suggestion: InfillSuggestion) -> float | None:
        if suggestion.task.done():
            return None
        began = perf_counter()
        suggestion.task.cancel()
        while perf_counter() - began < IDLE_SECONDS:
            if not any(slot["is_processing"] for slot in await self.server.get("/slots")):
                return 1e3 * (perf_counter() - began)
        raise ServerError(f"{self.server.url}: still working {IDLE_SECONDS:g} s after its client was gone")


class InfillSuggestion:
    def __init__(self, target: InfillTarget, prefix: str, line: str, suffix: str, most_tokens: int | None = None) -> None:
        self.target, self.asked = target, perf_counter()
        common = {"n_predict": most_tokens or target.most_tokens, "temperature": 0, "cache_prompt": True, "stream": True, "id_slot": 0}
        if target.fim:
            self._path = "/infill"
            self._body: dict[str, Any] = {"input_prefix": prefix, "prompt": line, "input_suffix": suffix, "input_extra": [], **common}
        else:
            self._path, self._body = "/completion", {"prompt": prefix + line, **common}
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())   # it may be abandoned

    def abandon(self) -> None:
        self.target._abandoned.append(self)

    async def answer(self) -> Answer:
        return await self.task

    async def _run(self) -> Answer:
        answer, text = Answer(), []
        async for line in self.target.server.lines("POST", self._path, self._body):
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if answer.first_token_ms is None:
                answer.first_token_ms = 1e3 * (perf_counter() - self.asked)
            text.append(event.get("content", ""))
            if timings := event.get("timings"):
                answer.reused_tokens, answer.computed_tokens = timings.get("cache_n", 0), timings["prompt_n"]
                answer.prompt_tokens = answer.reused_tokens + answer.computed_tokens
                answer.generated_tokens = timings["predicted_n"]
        answer.answer_ms = 1e3 * (perf_counter() - self.asked)
        if answer.first_token_ms is not None and answer.answer_ms > answer.first_token_ms:
            answer.tokens_per_second = 1e3 * (answer.generated_tokens - 1) / (answer.answer_ms - answer.first_token_ms)
        answer.text = "".join(text)
        return answer
