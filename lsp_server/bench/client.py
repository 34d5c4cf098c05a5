"""The smallest LSP client that measures: JSON-RPC over a child's stdin and stdout."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any


class ServerFailed(Exception):
    """The server died or answered with an error."""


class Client:
    """Start with `await Client.start(options)`, end with `await client.stop()`."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process
        self._number = 0
        self._waiting: dict[int, asyncio.Future] = {}
        self.notifications: list[dict[str, Any]] = []
        self._reader = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def start(cls, options: list[str]) -> Client:
        return cls(await asyncio.create_subprocess_exec(
            sys.executable, "-m", "inference_pio.lsp_server", *options, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26))

    async def _read(self) -> None:
        out = self._process.stdout
        try:
            while True:
                length = 0
                while (line := (await out.readline()).strip()):
                    name, _, value = line.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                if not length:
                    break
                self._receive(json.loads(await out.readexactly(length)))
        except asyncio.IncompleteReadError:
            pass
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ServerFailed("the server ended"))

    def _receive(self, message: dict[str, Any]) -> None:
        if "method" in message:
            self.notifications.append(message)
            if "id" in message:
                self._send({"id": message["id"], "result": None})
        elif (future := self._waiting.pop(message["id"], None)) is not None and not future.done():
            if "error" in message:
                future.set_exception(ServerFailed(f"{message['error'].get('message')}"))
            else:
                future.set_result(message["result"])

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def notify(self, method: str, params: Any) -> None:
        self._send({"method": method, "params": params})

    def begin(self, method: str, params: Any) -> tuple[int, asyncio.Future]:
        """(id, future of the result)"""
        self._number += 1
        future = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        self._send({"id": self._number, "method": method, "params": params})
        return self._number, future

    async def request(self, method: str, params: Any) -> Any:
        return await self.begin(method, params)[1]

    async def stop(self) -> None:
        try:
            await asyncio.wait_for(self.request("shutdown", None), 10)
            self.notify("exit", None)
            await asyncio.wait_for(self._process.wait(), 10)
        except (ServerFailed, TimeoutError, ConnectionError):
            self._process.kill()
            await self._process.wait()
        self._reader.cancel()
