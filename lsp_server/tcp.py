"""Several editor windows over TCP: each connection has a server and a session of its own, and they share the engines they have in common."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pygls.io_ import run_async

from inference_pio.lsp_server.server import Server
from inference_pio.lsp_server.session import OpenEngine


class Engines:
    """Opens a model once for all who ask for the same, and closes it when the last of them has closed theirs. May be used by any thread."""

    def __init__(self, open_engine: OpenEngine):
        self._open_engine = open_engine
        self._lock = threading.Lock()
        self._shared: dict[tuple, _Shared] = {}

    def open(self, model: str, *, progress: Callable[[Any], None], **options: Any) -> Lease:
        """What open_engine gives; whoever comes second waits for it, without its progress."""
        key = (model, *sorted(options.items()))
        with self._lock:
            first = key not in self._shared
            shared = self._shared.setdefault(key, _Shared())
            shared.users += 1
        if first:
            try:
                shared.engine.set_result(self._open_engine(model, progress=progress, **options))
            except BaseException as error:
                with self._lock:
                    self._shared.pop(key)
                shared.engine.set_exception(error)
        return Lease(shared.engine.result(), lambda: self._give_back(key))

    def _give_back(self, key: tuple) -> None:
        with self._lock:
            shared = self._shared[key]
            shared.users -= 1
            if shared.users == 0:
                del self._shared[key]
        if shared.users == 0:
            shared.engine.result().close()


class _Shared:
    def __init__(self) -> None:
        self.engine: Future = Future()
        self.users = 0


class Lease:
    """An engine that others may use, too: closing it closes it for this user."""

    def __init__(self, engine: Any, give_back: Callable[[], None]):
        self._engine, self._give_back = engine, give_back

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        give_back, self._give_back = self._give_back, lambda: None
        give_back()


def serve(port: int, make_server: Callable[[OpenEngine], Server], open_engine: OpenEngine) -> None:
    """On the loopback interface, until the last client has gone. make_server is given what opens engines."""
    try:
        asyncio.run(_serve(port, make_server, Engines(open_engine)))
    except asyncio.CancelledError:
        pass


async def _serve(port: int, make_server: Callable[[OpenEngine], Server], engines: Engines) -> None:
    clients = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal clients
        clients += 1
        server = make_server(engines.open)
        server.protocol.set_writer(writer)
        try:
            await run_async(threading.Event(), reader, server.protocol, error_handler=server.report_server_error)
        except ConnectionError:
            pass   # gone without a word
        finally:
            server.hang_up()
            writer.close()
            clients -= 1
            if not clients:
                listener.close()

    listener = await asyncio.start_server(connected, "127.0.0.1", port)
    async with listener:
        await listener.serve_forever()
