"""An LSP client of the plainest kind, for tests: it can send anything, well-formed or not, and keeps everything that comes back."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from typing import Any, BinaryIO

from scripted_engine import Script, ScriptedEngine

from inference_pio.lsp_server.server import Server
from inference_pio.lsp_server.settings import Settings

PATIENCE = 60.0   # seconds until something counts as hanging, on a machine that does other things, too
URI = "file:///tmp/pio-test/a.py"


class Client:
    """Reads in a thread of its own; `answers` and `notifications` grow as messages come."""

    def __init__(self, to_server: BinaryIO, from_server: BinaryIO):
        self._out, self._in = to_server, from_server
        self.answers: dict[Any, dict] = {}
        self.notifications: list[dict] = []
        self.requests: list[dict] = []          # of the server; answered with null
        self.ended = False
        self._next = 0
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    # ---- sending ---------------------------------------------------------------------------------------------------------

    def raw(self, data: bytes) -> None:
        self._out.write(data)
        self._out.flush()

    @staticmethod
    def frame(message: dict) -> bytes:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)

    def notify(self, method: str, params: Any = None) -> None:
        self.raw(self.frame({"method": method, "params": params}))

    def send(self, method: str, params: Any = None) -> int:
        self._next += 1
        self.raw(self.frame({"id": self._next, "method": method, "params": params}))
        return self._next

    def request(self, method: str, params: Any = None) -> Any:
        answer = self.answer(self.send(method, params))
        assert "error" not in answer, answer
        return answer["result"]

    # ---- receiving -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while header := self._in.readline():
                assert header.lower().startswith(b"content-length: "), f"not LSP: {header!r}"
                length = int(header.split(b":")[1])
                while self._in.readline() not in (b"\r\n", b""):
                    pass
                self._receive(json.loads(self._in.read(length)))
        except (ValueError, OSError):
            pass
        with self._news:
            self.ended = True
            self._news.notify_all()

    def _receive(self, message: dict) -> None:
        with self._news:
            if "method" not in message:
                assert message.get("id") is None or message["id"] not in self.answers, f"answered twice: {message}"
                self.answers[message.get("id")] = message
            else:
                (self.requests if "id" in message else self.notifications).append(message)
            self._news.notify_all()
        if "method" in message and "id" in message:
            self.raw(self.frame({"id": message["id"], "result": None}))

    def wait(self, condition, what: str, seconds: float = PATIENCE) -> None:
        """For what a message brings, and for what happens in this process."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
            with self._news:
                self._news.wait(0.005)

    def answer(self, number: Any) -> dict:
        self.wait(lambda: number in self.answers or self.ended, f"the answer to {number}")
        assert number in self.answers, "the server has ended"
        return self.answers[number]

    def progress(self, token: str) -> list:
        return [n["params"]["value"] for n in self.notifications if n["method"] == "$/progress" and n["params"]["token"] == token]

    # ---- what most tests do ----------------------------------------------------------------------------------------------

    def initialize(self, encodings: list[str] | None = None, window: dict | None = None, options: Any = None, text_document: dict | None = None) -> dict:
        general = {"positionEncodings": encodings} if encodings else {}
        result = self.request("initialize", {"processId": None, "rootUri": None, "initializationOptions": options,
                                             "capabilities": {"general": general, "window": window or {}, "textDocument": text_document or {}}})
        self.notify("initialized", {})
        return result

    def wait_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.request("pio/status", {})["state"] == "loading":
            assert time.monotonic() < deadline, "still loading"
            time.sleep(0.01)

    def open(self, text: str, uri: str = URI, language: str = "python", version: int = 1) -> None:
        self.notify("textDocument/didOpen", {"textDocument": {"uri": uri, "languageId": language, "version": version, "text": text}})

    def change(self, version: int, *changes: tuple, uri: str = URI) -> None:
        """Changes are (line, character, line, character, text) or (text,)."""
        events = [{"text": c[0]} if len(c) == 1 else
                  {"range": {"start": {"line": c[0], "character": c[1]}, "end": {"line": c[2], "character": c[3]}}, "text": c[4]} for c in changes]
        self.notify("textDocument/didChange", {"textDocument": {"uri": uri, "version": version}, "contentChanges": events})

    def send_inline(self, line: int, character: int, uri: str = URI) -> int:
        return self.send("textDocument/inlineCompletion", {"textDocument": {"uri": uri}, "position": {"line": line, "character": character},
                                                           "context": {"triggerKind": 2}})

    def inline(self, line: int, character: int, uri: str = URI) -> str | None:
        """The suggested text; None if there is none."""
        answer = self.answer(self.send_inline(line, character, uri))
        items = answer["result"]["items"]
        return items[0]["insertText"] if items else None


class Served:
    """A server in this process on threads of its own, its scripted engine, and a client."""

    def __init__(self, script: Script | None = None):
        self.script = script or Script()
        self.engines: list[ScriptedEngine] = []
        to_server, from_server = os.pipe(), os.pipe()
        self.server = Server(Settings(), "test", ScriptedEngine.opener(self.script, self.engines))
        self._streams = os.fdopen(to_server[0], "rb"), os.fdopen(from_server[1], "wb")
        self._thread = threading.Thread(target=lambda: self.server.start_io(*self._streams), daemon=True)
        self._thread.start()
        self.client = Client(os.fdopen(to_server[1], "wb"), os.fdopen(from_server[0], "rb"))

    @property
    def engine(self) -> ScriptedEngine:
        return self.engines[-1]

    def end(self) -> None:
        if self._thread.is_alive():
            self.client.request("shutdown")
            self.client.notify("exit")
            self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server does not end"


class Process:
    """A command that speaks LSP on stdio."""

    def __init__(self, *command: str, **options: Any):
        self.started = time.perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        self.client = Client(self.process.stdin, self.process.stdout)

    def end(self) -> tuple[int, bytes]:
        """(exit code, stderr)"""
        if self.process.poll() is None:
            self.client.request("shutdown")
            self.client.notify("exit")
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
        return self.process.returncode, self.process.stderr.read()
