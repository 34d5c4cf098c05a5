"""The editor's side of LSP over a child process's stdio: frames, answers, and the clock beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from time import perf_counter
from typing import Any

INITIALIZE_SECONDS, ANSWER_SECONDS, EXIT_SECONDS = 30.0, 300.0, 10.0


class ServerError(Exception):
    """The server died, answered with an error or not at all; the message says which and shows its last words."""


class Pending:
    """A request on its way."""

    def __init__(self, id: int, method: str) -> None:
        self.id, self.method = id, method
        self.sent = perf_counter()
        self.answered: float | None = None
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def ms(self) -> float:
        """From sending to receiving the answer."""
        assert self.answered is not None
        return 1e3 * (self.answered - self.sent)


class LspClient:
    """Use as an async context manager: it starts the command, and at the end shuts the server down or kills it."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.started = perf_counter()
        self.notifications: dict[str, Any] = {}    # method -> the last one's params
        self._waiting: dict[int, Pending] = {}
        self._next_id = 0
        self._last_words: deque[str] = deque(maxlen=12)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> LspClient:
        pipe = asyncio.subprocess.PIPE
        self.started = perf_counter()
        try:
            self.process = await asyncio.create_subprocess_exec(*self.command, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as e:
            raise ServerError(f"{self.command[0]} cannot be started: {e}") from e
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._read_stderr())]
        return self

    async def __aexit__(self, *exception: object) -> None:
        try:
            if self.process.returncode is None and exception[0] is None:
                await self.request("shutdown", None, EXIT_SECONDS)
                self.notify("exit", None)
                await asyncio.wait_for(self.process.wait(), EXIT_SECONDS)
        except (ServerError, TimeoutError):
            pass    # what was measured is worth more than a tidy end; the process is killed below
        finally:
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def notify(self, method: str, params: Any) -> None:
        self._send({"method": method, "params": params})

    def send(self, method: str, params: Any) -> Pending:
        """Sends a request; await `pending.future`, or `request` for both."""
        self._next_id += 1
        pending = self._waiting[self._next_id] = Pending(self._next_id, method)
        self._send({"id": pending.id, "method": method, "params": params})
        return pending

    async def request(self, method: str, params: Any, seconds: float = ANSWER_SECONDS) -> Any:
        return await self.result(self.send(method, params), seconds)

    async def result(self, pending: Pending, seconds: float = ANSWER_SECONDS) -> Any:
        try:
            return await asyncio.wait_for(asyncio.shield(pending.future), seconds)
        except TimeoutError:
            raise ServerError(f"{pending.method} was not answered within {seconds:g} s{self._words()}") from None

    def cancel(self, pending: Pending) -> None:
        self.notify("$/cancelRequest", {"id": pending.id})

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        if self.process.returncode is not None:
            raise ServerError(f"the server has ended with exit code {self.process.returncode}{self._words()}")
        body = json.dumps({"jsonrpc": "2.0", **message}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))

    async def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            while True:
                header = (await self.process.stdout.readuntil(b"\r\n\r\n")).decode("ascii")
                fields = dict(line.lower().split(": ", 1) for line in header.strip().split("\r\n"))
                self._receive(json.loads(await self.process.stdout.readexactly(int(fields["content-length"])), strict=False))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, KeyError, ValueError) as e:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), 2)
            code = self.process.returncode
            ended = f"ended with exit code {code}" if code is not None else f"wrote something that is not LSP: {e}"
            for pending in self._waiting.values():
                if not pending.future.done():
                    pending.future.set_exception(ServerError(f"the server {ended} before it answered {pending.method}{self._words()}"))
                    pending.future.exception()   # nobody may be waiting for this one

    def _receive(self, message: dict[str, Any]) -> None:
        now = perf_counter()
        if "method" in message:
            self.notifications[message["method"]] = message.get("params")
            if "id" in message:    # the server asks: an editor without opinions
                items = (message.get("params") or {}).get("items")
                self._send({"id": message["id"], "result": [None] * len(items) if isinstance(items, list) else None})
            return
        pending = self._waiting.pop(message.get("id"), None)
        if pending is None or pending.future.done():
            return
        pending.answered = now
        if error := message.get("error"):
            pending.future.set_exception(ServerError(f"{pending.method}: error {error.get('code')}: {error.get('message')}"))
            pending.future.exception()
        else:
            pending.future.set_result(message.get("result"))

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self._last_words.append(line.decode("utf-8", "replace").rstrip())

    def _words(self) -> str:
        return "; it wrote:\n" + "\n".join(self._last_words) if self._last_words else ""
