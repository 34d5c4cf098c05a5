"""Replays traces against a real server and collects one record for each completion."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from inference_pio.lsp_server.bench.client import Client, ServerFailed
from inference_pio.lsp_server.bench.trace import Event, Trace
from inference_pio.lsp_server.documents import Document

__all__ = ["Record", "Run", "ServerFailed", "replay"]
_READY_PATIENCE = 1800.0   # seconds: a first start may download the model


@dataclass(frozen=True)
class Record:
    """One completion. Milliseconds; tokens of the prompt."""

    trace: str
    kind: str
    total_ms: float                  # from the request to the answer, as the editor sees it
    first_token_ms: float | None     # inside the engine; None where no model was asked
    source: str
    shown: bool
    prompt_tokens: int
    reused_tokens: int
    computed_tokens: int
    tokens_per_second: float | None


@dataclass
class Run:
    info: dict[str, Any]
    initialize_ms: float
    ready_ms: float
    read_bandwidth: float            # bytes per second
    records: list[Record] = field(default_factory=list)
    cancel_ms: list[float] = field(default_factory=list)
    round_trip_ms: list[float] = field(default_factory=list)


async def replay(traces: list[Trace], options: list[str], title: str) -> Run:
    begin = perf_counter()
    client = await Client.start(options)
    try:
        await client.request("initialize", {"processId": None, "rootUri": None, "capabilities": {
            "general": {"positionEncodings": ["utf-32"]}}})
        initialize_ms = (perf_counter() - begin) * 1000
        client.notify("initialized", {})
        steps = sum(len(event.text) if event.do == "type" else 1 for trace in traces for event in trace.events)
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task("starting the server", total=steps)
            status = await _ready(client, lambda text: progress.update(task, description=text))
            ready_ms = (perf_counter() - begin) * 1000
            bandwidth = (await client.request("pio/measure", {}))["readBandwidth"]
            run = Run(status["info"], initialize_ms, ready_ms, bandwidth)
            for trace in traces:
                progress.update(task, description=f"{trace.name}, {title}")
                await _Player(client, trace, run, lambda: progress.advance(task)).play()
        for _ in range(200):
            start = perf_counter()
            await client.request("pio/status", {})
            run.round_trip_ms.append((perf_counter() - start) * 1000)
        return run
    finally:
        await client.stop()


async def _ready(client: Client, show: Any) -> dict[str, Any]:
    end = perf_counter() + _READY_PATIENCE
    while perf_counter() < end:
        status = await client.request("pio/status", {})
        if status["state"] == "ready":
            return status
        if status["state"] == "error":
            raise ServerFailed(status["error"])
        if status["progress"]:
            p = status["progress"]
            show(f"{'downloading' if p['stage'] == 'download' else 'loading'} {p['done'] / 1e6:.0f} of {p['total'] / 1e6:.0f} MB")
        await asyncio.sleep(0.05)
    raise ServerFailed("the model was not ready after half an hour")


class _Player:
    def __init__(self, client: Client, trace: Trace, run: Run, advance: Any):
        self._client, self._trace, self._run, self._advance = client, trace, run, advance
        self._documents: dict[str, Document] = {}
        self._cursor: dict[str, int] = {}
        self._suggested = ""

    async def play(self) -> None:
        for event in self._trace.events:
            self._open(event.file)
            if event.at is not None:
                self._cursor[event.file] = self._place(event)
            if event.do == "type":
                for key in event.text:
                    self._edit(event.file, 0, key)
                    await self._ask(event)
                    self._advance()
                continue
            if event.do == "insert":
                self._edit(event.file, 0, event.text)
            elif event.do == "accept":
                self._edit(event.file, 0, self._suggested)
            elif event.do == "delete":
                self._edit(event.file, len(event.text), "")
            await (self._cancel(event) if event.do == "cancel" else self._ask(event))
            self._advance()
        for name in self._documents:
            self._client.notify("textDocument/didClose", {"textDocument": {"uri": self._uri(name)}})

    def _uri(self, name: str) -> str:
        return f"file:///bench/{self._trace.name.replace(' ', '-')}/{name}"

    def _open(self, name: str) -> None:
        if name not in self._documents:
            language, text = self._trace.files[name]
            self._documents[name] = Document.of(self._uri(name), language, 1, text)
            self._cursor[name] = len(text)
            self._client.notify("textDocument/didOpen", {"textDocument": {"uri": self._uri(name), "languageId": language, "version": 1, "text": text}})

    def _place(self, event: Event) -> int:
        at = self._documents[event.file].text.find(event.at)
        if at < 0:
            raise ServerFailed(f"trace {self._trace.name!r}: {event.at!r} is not in {event.file}")
        return at + len(event.at)

    def _position(self, name: str, offset: int) -> dict[str, int]:
        line, character = self._documents[name].position(offset, "utf-32")
        return {"line": line, "character": character}

    def _edit(self, name: str, delete: int, text: str) -> None:
        document, at = self._documents[name], self._cursor[name]
        span = {"start": self._position(name, at), "end": self._position(name, at + delete)}
        self._documents[name] = document.edited(at, at + delete, text, document.version + 1)
        self._cursor[name] = at + len(text)
        self._client.notify("textDocument/didChange", {"textDocument": {"uri": document.uri, "version": document.version + 1},
                                                       "contentChanges": [{"range": span, "text": text}]})

    def _request(self, event: Event) -> tuple[int, asyncio.Future]:
        return self._client.begin("textDocument/inlineCompletion", {
            "textDocument": {"uri": self._uri(event.file)}, "position": self._position(event.file, self._cursor[event.file]),
            "context": {"triggerKind": 2}})

    async def _ask(self, event: Event) -> None:
        start = perf_counter()
        result = await self._request(event)[1]
        total_ms = (perf_counter() - start) * 1000
        self._suggested = result["items"][0]["insertText"] if result["items"] else ""
        last = (await self._client.request("pio/status", {}))["last"]
        stats = last["stats"]
        first, all_ms, tokens = stats.get("first_token_ms"), stats.get("total_ms"), stats.get("generated_tokens", 0)
        speed = (tokens - 1) / (all_ms - first) * 1000 if first and all_ms and tokens > 8 and all_ms > first else None
        kind = "type-through" if last["source"] == "type-through" else event.kind
        self._run.records.append(Record(
            self._trace.name, kind, total_ms, first, last["source"], bool(self._suggested), stats.get("prompt_tokens", 0),
            stats.get("reused_tokens", 0), stats.get("computed_tokens", 0), speed))
        await asyncio.sleep(event.pause_ms / 1000)

    async def _cancel(self, event: Event) -> None:
        number, future = self._request(event)
        await asyncio.sleep(0.03)
        if future.done():
            return
        start = perf_counter()
        self._client.notify("$/cancelRequest", {"id": number})
        try:
            await future
        except ServerFailed:
            pass   # the answer to a cancelled request is an error
        while True:
            engine = (await self._client.request("pio/status", {}))["engine"]
            if not engine["running"] and not engine["waiting"]:
                break
        self._run.cancel_ms.append((perf_counter() - start) * 1000)
