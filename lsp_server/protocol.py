"""pygls, hardened. What it does otherwise is described where it is mended."""

from __future__ import annotations

import os
import sys
from typing import Any, BinaryIO

from lsprotocol import types
from pygls.exceptions import JsonRpcException, JsonRpcInvalidRequest
from pygls.protocol import LanguageServerProtocol
from pygls.protocol.json_rpc import JsonRPCNotification
from pygls.protocol.language_server import lsp_method


class Protocol(LanguageServerProtocol):
    """Documents are ours (see documents.py): pygls splits lines where LSP does not and keeps a second copy of every text."""

    alone = True   # whether the process ends with this client

    def _execute_handler(self, msg_id, handler, callback, args=None, kwargs=None):
        """A generator handler hands its work on under a second id, which pygls neither forgets nor cancels with the first."""
        super()._execute_handler(msg_id, handler, callback, args, kwargs)
        future, request = self._request_futures.get(msg_id), self._request_futures.get(self.msg_id)
        if future is None:
            return
        future.add_done_callback(lambda _: self._request_futures.pop(msg_id, None))
        if request is not None and request is not future:
            request.add_done_callback(lambda done: done.cancelled() and future.cancel())

    def _run_generator(self, future, *, gen, result_future):
        """Work that is cancelled by itself, as by the end of the loop, cancels its request; pygls would raise into the loop."""
        if future is not None and future.cancelled():
            gen.close()
            result_future.cancel()
        else:
            super()._run_generator(future, gen=gen, result_future=result_future)

    @lsp_method(types.EXIT)
    def lsp_exit(self, *params: Any):
        """pygls ends the process, which may serve others."""
        if self.alone:
            yield from super().lsp_exit(*params)
        else:
            self.writer.close()

    @lsp_method(types.SHUTDOWN)
    def lsp_shutdown(self, *params: Any):
        """pygls stumbles over requests that end while it cancels them."""
        yield from self._hand_on(types.SHUTDOWN, *params)
        for number, future in list(self._request_futures.items()):
            if number != self.msg_id:
                future.cancel()
        self._shutdown = True

    @lsp_method(types.TEXT_DOCUMENT_DID_OPEN)
    def lsp_text_document__did_open(self, params: types.DidOpenTextDocumentParams):
        yield from self._hand_on(types.TEXT_DOCUMENT_DID_OPEN, params)

    @lsp_method(types.TEXT_DOCUMENT_DID_CHANGE)
    def lsp_text_document__did_change(self, params: types.DidChangeTextDocumentParams):
        yield from self._hand_on(types.TEXT_DOCUMENT_DID_CHANGE, params)

    @lsp_method(types.TEXT_DOCUMENT_DID_CLOSE)
    def lsp_text_document__did_close(self, params: types.DidCloseTextDocumentParams):
        yield from self._hand_on(types.TEXT_DOCUMENT_DID_CLOSE, params)

    def _hand_on(self, method: str, *params: Any):
        yield self.fm.features[method], params, None

    def structure_message(self, data: dict[str, Any]) -> Any:
        """A request whose parameters cannot be read is answered; pygls would let the client wait for ever."""
        number, method = data.get("id"), data.get("method")
        if isinstance(method, str) and self.get_message_type(method) is None:
            data.setdefault("params", None)   # JSON-RPC lets them be left out
        try:
            if not isinstance(number, int | str | None):
                raise JsonRpcInvalidRequest(f"the id of a request must be a number or a text, not {type(number).__name__}")
            return super().structure_message(data)
        except JsonRpcException as error:
            if method is None or number is None:
                raise
            self._send_response(number if isinstance(number, int | str) else None, error=error.to_response_error())
            return JsonRPCNotification(method="$/unreadable", jsonrpc="2.0", params=None)


class Wire:
    """What pygls writes to. When the client has hung up, the rest is said to nobody: an error for each message would fill stderr, and
    block where nobody reads that any more."""

    def __init__(self, out: BinaryIO):
        self._out: BinaryIO | None = out

    def write(self, data: bytes) -> None:
        try:
            if self._out is not None:
                self._out.write(data)
                self._out.flush()
        except BrokenPipeError:
            self._out = None

    def flush(self) -> None:
        """Every message is complete when it is written."""

    def close(self) -> None:
        """The process ends with it."""


def claim_stdout() -> Wire:
    """The wire: a copy of fd 1. What else writes to fd 1 from now on, in Python or C, goes to stderr and cannot break the session."""
    wire = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return Wire(os.fdopen(wire, "wb"))
