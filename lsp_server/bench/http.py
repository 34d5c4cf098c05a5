"""The little HTTP that a comparison needs: one request a connection, so that closing it is what an editor's abort is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from inference_pio.lsp_server.bench.client import ServerError

CONNECT_SECONDS, READ_SECONDS = 5.0, 300.0


class HttpError(ServerError):
    """The server answered with an HTTP error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class HttpServer:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ServerError(f"--against {url}: give the address of a llama-server, like http://127.0.0.1:8080")
        self.url, self.host, self.port = url, parts.hostname, parts.port or 80
        self.root = parts.path.rstrip("/").removesuffix("/infill")

    async def get(self, path: str) -> Any:
        return json.loads("".join([line async for line in self.lines("GET", path, None)]))

    async def lines(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[str]:
        """The answer's lines as they come. Abandoning the iterator closes the connection."""
        where = f"{method} {self.url}{path}"
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(self.host, self.port), CONNECT_SECONDS)
        except (OSError, TimeoutError) as e:
            raise ServerError(f"{where}: no llama-server answers there ({e or 'timed out'})") from e
        try:
            data = b"" if body is None else json.dumps(body).encode()
            writer.write(f"{method} {self.root}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
                         f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), READ_SECONDS)).decode("latin-1")
            status = int(head.split(" ", 2)[1])
            pieces = _chunks(reader) if "transfer-encoding: chunked" in head.lower() else _rest(reader)
            if status != 200:
                text = b"".join([piece async for piece in pieces]).decode("utf-8", "replace")
                raise HttpError(f"{where}: HTTP {status}: {text[:300]}", status)
            rest = b""
            async for piece in pieces:
                *complete, rest = (rest + piece).split(b"\n")
                for line in complete:
                    yield line.decode("utf-8", "replace")
            if rest:
                yield rest.decode("utf-8", "replace")
        except (asyncio.IncompleteReadError, ConnectionError, IndexError, ValueError) as e:
            raise ServerError(f"{where}: the answer broke off or is not HTTP: {e}") from e
        finally:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await asyncio.wait_for(reader.readline(), READ_SECONDS)).split(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await asyncio.wait_for(reader.read(1 << 16), READ_SECONDS):
        yield piece
