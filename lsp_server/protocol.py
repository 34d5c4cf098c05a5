"""pygls, hardened. What it does otherwise is described where it is mended."""

from __future__ import annotations

import os
import sys
from typing import Any, BinaryIO

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.protocol import LanguageServerProtocol
from pygls.protocol.json_rpc import JsonRPCNotification
from pygls.protocol.language_server import lsp_method


class Protocol(LanguageServerProtocol):
    """Documents are ours (see documents.py): pygls splits lines where LSP does not and keeps a second copy of every text."""

    def __init__(self, *arguments: Any, **options: Any):
        self._inner: dict[Any, set] = {}   # request -> the coroutines that its generator handler has handed its work to
        super().__init__(*arguments, **options)

    def _execute_handler(self, msg_id, handler, callback, args=None, kwargs=None):
        super()._execute_handler(msg_id, handler, callback, args, kwargs)
        outer = self.msg_id
        if outer is not None and outer != msg_id and msg_id in self._request_futures:
            self._inner.setdefault(outer, set()).add(msg_id)

    def _handle_cancel_notification(self, msg_id):
        """pygls tells the client that a request of a generator handler is cancelled, and lets its coroutine run to the end."""
        inner = self._inner.pop(msg_id, ())
        super()._handle_cancel_notification(msg_id)
        for number in inner:
            if (future := self._request_futures.pop(number, None)) is not None:
                future.cancel()

    def _send_handler_result(self, future, *, msg_id):
        self._inner.pop(msg_id, None)
        super()._send_handler_result(future, msg_id=msg_id)

    @lsp_method(types.TEXT_DOCUMENT_DID_OPEN)
    def lsp_text_document__did_open(self, params: types.DidOpenTextDocumentParams):
        yield from self._hand_on(types.TEXT_DOCUMENT_DID_OPEN, params)

    @lsp_method(types.TEXT_DOCUMENT_DID_CHANGE)
    def lsp_text_document__did_change(self, params: types.DidChangeTextDocumentParams):
        yield from self._hand_on(types.TEXT_DOCUMENT_DID_CHANGE, params)

    @lsp_method(types.TEXT_DOCUMENT_DID_CLOSE)
    def lsp_text_document__did_close(self, params: types.DidCloseTextDocumentParams):
        yield from self._hand_on(types.TEXT_DOCUMENT_DID_CLOSE, params)

    def _hand_on(self, method: str, params: Any):
        yield self.fm.features[method], (params,), None

    def structure_message(self, data: dict[str, Any]) -> Any:
        """A request whose parameters cannot be read is answered; pygls would let the client wait for ever."""
        try:
            return super().structure_message(data)
        except JsonRpcException as error:
            if "id" not in data or "method" not in data:
                raise
            self._send_response(data["id"], error=error.to_response_error())
            return JsonRPCNotification(method="$/unreadable", jsonrpc="2.0", params=None)


def claim_stdout() -> BinaryIO:
    """The wire: a copy of fd 1. What else writes to fd 1 from now on, in Python or C, goes to stderr and cannot break the session."""
    wire = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return os.fdopen(wire, "wb")
