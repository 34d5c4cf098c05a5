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
