"""pio-lsp under test: the real server in a process of its own, spoken to as an editor speaks to it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from inference_pio.lsp_server.bench.buffer import Buffer, end_of
from inference_pio.lsp_server.bench.client import LspClient, Pending, ServerError
from inference_pio.lsp_server.bench.replay import Answer
from inference_pio.lsp_server.bench.trace import Change, Position

PULSE_SECONDS = 0.005    # between two questions that only the event loop has to answer
IDLE_SECONDS = 30.0
DEADLINE_MS = 120_000
ROUND_TRIPS = 200


def command(options: list[str]) -> list[str]:
    """The server as an editor starts it, but for the deadline: a time that ends at a deadline is not a measurement."""
    return [sys.executable, "-m", "inference_pio.lsp_server", "--stdio", "--deadline-ms", str(DEADLINE_MS), *options]


class PioTarget:
    """A target (see replay.Target) over an LSP client. `initialize` and `ready` come first."""

    remembers_shown = True

    def __init__(self, client: LspClient, workspace: Path) -> None:
        self.client, self.workspace = client, workspace
        self.initialize_ms = self.ready_ms = 0.0
        self.loading_ms: list[float] = []      # what a status took while the model was loaded
        self.model: dict[str, Any] = {}

    async def initialize(self) -> None:
        result = await self.client.request("initialize", {
            "processId": os.getpid(), "rootUri": self.workspace.as_uri(),
            "workspaceFolders": [{"uri": self.workspace.as_uri(), "name": self.workspace.name}],
            "clientInfo": {"name": "pio-lsp --bench"},
            "capabilities": {"general": {"positionEncodings": ["utf-16"]},
                             "textDocument": {"inlineCompletion": {"dynamicRegistration": False}}},
        })
        self.initialize_ms = 1e3 * (perf_counter() - self.client.started)
        if result["capabilities"].get("inlineCompletionProvider") in (None, False):    # {} is a yes
            raise ServerError("the server does not offer textDocument/inlineCompletion")
        self.client.notify("initialized", {})

    async def ready(self, progress: Callable[[dict[str, Any]], None]) -> None:
        """Waits until the model is loaded; `progress` is given the server's `stage`, `done`, `total`, `detail`."""
        while (status := await self._pulse(self.loading_ms))["state"] == "loading":
            progress(status.get("progress") or {})
            await asyncio.sleep(PULSE_SECONDS)
        if status["state"] != "ready":
            raise ServerError(f"the model could not be loaded: {status['error']}")
        self.ready_ms = 1e3 * (perf_counter() - self.client.started)
        self.model = status["info"]

    async def status(self) -> dict[str, Any]:
        return await self.client.request("pio/status", {})

    async def _pulse(self, took: list[float]) -> dict[str, Any]:
        """A status, and in `took` the milliseconds that it needed: as long as the event loop was held up."""
        pending = self.client.send("pio/status", {})
        status = await self.client.result(pending)
        took.append(pending.ms)
        return status

    async def working_ms(self, texts: list[str]) -> list[float]:
        """What a status takes while the engine computes a cold prompt and writes, for each text."""
        took: list[float] = []
        for number, text in enumerate(texts):
            name, buffer = f"pulse{number}.txt", Buffer(text)
            self.open(name, "plaintext", buffer)
            suggestion = self.suggest(name, end_of((0, 0), text), buffer)
            while not suggestion.pending.future.done():
                await self._pulse(took)
                await asyncio.sleep(PULSE_SECONDS)
        return took

    async def read_bandwidth(self) -> float:
        """Bytes per second that the server's device reads, measured by the server now."""
        return (await self.client.request("pio/measure", {}))["readBandwidth"]

    async def round_trip_ms(self) -> list[float]:
        """What a request costs that asks no model, from sending to receiving."""
        times = []
        for _ in range(ROUND_TRIPS):
            pending = self.client.send("pio/status", {})
            await self.client.result(pending)
            times.append(pending.ms)
        return times

    def open(self, document: str, language: str, buffer: Buffer) -> None:
        (self.workspace / document).write_text(buffer.text, "utf-8")
        item = {"uri": self._uri(document), "languageId": language, "version": buffer.version, "text": buffer.text}
        self.client.notify("textDocument/didOpen", {"textDocument": item})

    def change(self, document: str, change: Change, buffer: Buffer) -> None:
        span = {"start": _lsp(change.start), "end": _lsp(change.end)}
        self.client.notify("textDocument/didChange", {
            "textDocument": {"uri": self._uri(document), "version": buffer.version},
            "contentChanges": [{"range": span, "text": change.text}]})

    def suggest(self, document: str, cursor: Position, buffer: Buffer) -> PioSuggestion:
        pending = self.client.send("textDocument/inlineCompletion", {
            "textDocument": {"uri": self._uri(document)}, "position": _lsp(cursor), "context": {"triggerKind": 2}})
        return PioSuggestion(self, pending, cursor, buffer)

    async def cancel(self, suggestion: PioSuggestion) -> float | None:
        if suggestion.pending.future.done():
            return None
        began = perf_counter()
        self.client.cancel(suggestion.pending)
        while perf_counter() - began < IDLE_SECONDS:
            engine = (await self.status())["engine"]
            if not engine["running"] and not engine["waiting"]:
                return 1e3 * (perf_counter() - began)
        raise ServerError(f"the engine was still working {IDLE_SECONDS:g} s after a cancel")

    def _uri(self, document: str) -> str:
        return (self.workspace / document).as_uri()


class PioSuggestion:
    def __init__(self, target: PioTarget, pending: Pending, cursor: Position, buffer: Buffer) -> None:
        self.target, self.pending, self._cursor, self._buffer = target, pending, cursor, buffer

    def abandon(self) -> None:
        pass

    async def answer(self) -> Answer:
        result = await self.target.client.result(self.pending)
        elapsed = self.pending.ms
        last = (await self.target.status()).get("last") or {}
        answer = Answer(text=self._shown(result), answer_ms=elapsed, source=last.get("source", "model"), reason=last.get("reason") or "")
        stats = last.get("stats") or {}
        for name in ("prompt_tokens", "reused_tokens", "computed_tokens", "recomputed_tokens", "generated_tokens"):
            setattr(answer, name, stats.get(name) or 0)
        answer.tokens_per_second = stats.get("tokens_per_second")
        first, total = last.get("first_token_ms"), last.get("total_ms")
        answer.server_ms = total
        if first is not None and total is not None:
            # The client's clock for the whole, the server's for what came after the first token.
            answer.first_token_ms = elapsed - (total - first)
        elif answer.text:
            answer.first_token_ms = elapsed    # from memory: all of it at once
        return answer

    def _shown(self, result: Any) -> str:
        """The ghost text: what the first item inserts behind the cursor."""
        items = result.get("items", []) if isinstance(result, dict) else result or []
        if not items:
            return ""
        text, span = items[0]["insertText"], items[0].get("range")
        text = text if isinstance(text, str) else text["value"]
        if span is None:
            return text
        start = self._buffer.offset((span["start"]["line"], span["start"]["character"]))
        typed = self._buffer.text[start:self._buffer.offset(self._cursor)]
        return text[len(typed):] if text.startswith(typed) else ""


def _lsp(position: Position) -> dict[str, int]:
    return {"line": position[0], "character": position[1]}
