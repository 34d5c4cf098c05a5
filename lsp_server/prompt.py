"""From a document and a cursor to the prompt.

The text before the cursor is prefix + middle. The prefix ends at an anchor on a line boundary that stays where it is while somebody
types behind it, so that typing only appends to the end of the prompt and everything before stays in the model's cache. The windows
of text move in big steps and begin at line boundaries, for the same reason.
"""

from __future__ import annotations

from inference_pio.engine import ContextChunk, FimPrompt
from inference_pio.lsp_server.documents import Document

_CHARACTERS = 3          # of code in a token, at the least: budgets are kept without asking the tokenizer
_MIDDLE = 1200           # characters behind the anchor before it moves
_SUFFIX_SHARE = 0.25     # of the budget


class PromptBuilder:
    """Remembers one anchor for each document."""

    def __init__(self) -> None:
        self._anchors: dict[str, tuple[str, int]] = {}   # uri -> (text before the anchor, its offset)

    def build(self, document: Document, offset: int, budget: int, fim: bool, context: tuple[ContextChunk, ...] = ()) -> FimPrompt:
        """A prompt of about `budget` tokens at most. Without fim only what stands before the cursor is used."""
        characters = max(budget * _CHARACTERS, 64)
        after = int(characters * _SUFFIX_SHARE) if fim else 0
        text = document.text
        start = _window_start(text, offset, characters - after)
        anchor = self._anchor(document, offset, start) if fim else start
        return FimPrompt(prefix=text[start:anchor], middle=text[anchor:offset], suffix=_head(text, offset, after), context=context,
                         path=document.uri.rsplit("/", 1)[-1])

    def forget(self, uri: str) -> None:
        self._anchors.pop(uri, None)

    def _anchor(self, document: Document, offset: int, start: int) -> int:
        text = document.text
        known, anchor = self._anchors.get(document.uri, ("", -1))
        if not (start <= anchor <= offset <= anchor + _MIDDLE and text.startswith(known)):
            anchor = max(document.starts[document.position(offset, "utf-32")[0]], start)
            self._anchors[document.uri] = text[:anchor], anchor
        return anchor


def _window_start(text: str, offset: int, size: int) -> int:
    """Where the prefix begins: at a line boundary that only moves when the cursor has gone half a window."""
    step = max(size // 2, 1)
    start = (offset // step - 1) * step
    if start <= 0:
        return 0
    newline = text.find("\n", start, offset)
    return newline + 1 if newline >= 0 else start


def _head(text: str, offset: int, size: int) -> str:
    """Up to `size` characters behind the cursor, ending at a line boundary where there is one."""
    if offset + size >= len(text):
        return text[offset:]
    newline = text.rfind("\n", offset, offset + size)
    return text[offset:newline + 1] if newline > offset else text[offset:offset + size]
