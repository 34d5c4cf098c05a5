"""From a document and a cursor to the prompt.

The text before the cursor is prefix + middle. The prefix ends at an anchor on a line boundary that stays where it is while somebody
types behind it, so that typing only appends to the end of the prompt and everything before stays in the model's cache. For the same
reason a window of text begins at a line boundary, stays until the cursor leaves it, and is taken up again when the cursor comes back.
"""

from __future__ import annotations

from inference_pio.engine import ContextChunk, FimPrompt
from inference_pio.lsp_server.documents import Document

_CHARACTERS = 3          # of code in a token, at the least: budgets are kept without asking the tokenizer
_MIDDLE = 1200           # characters behind the anchor before it moves
_SUFFIX_SHARE = 0.25     # of the budget
_KEPT, _HEAD = 8, 80     # windows remembered, characters that identify one
_MOVED = 20_000          # characters that edits may have moved it by
_LEAST_SHOWN = 4         # a window is too small that shows less than this part of what could be shown


class PromptBuilder:
    """Remembers for each document one anchor, and where windows began."""

    def __init__(self) -> None:
        self._anchors: dict[str, tuple[str, int]] = {}   # uri -> (text before the anchor, its offset)
        self._windows: dict[str, Windows] = {}

    def build(self, document: Document, offset: int, budget: int, fim: bool, context: tuple[ContextChunk, ...] = (),
              remember: bool = True) -> FimPrompt:
        """A prompt of about `budget` tokens at most. Without fim only what stands before the cursor is used. remember: False for a
        document that may never be; later prompts will be what they would have been without it."""
        characters = max(budget * _CHARACTERS, 64)
        after = int(characters * _SUFFIX_SHARE) if fim else 0
        text = document.text
        start = self._windows.setdefault(document.uri, Windows()).start(text, offset, characters - after, remember)
        anchor = self._anchor(document, offset, start, remember) if fim else start
        return FimPrompt(prefix=text[start:anchor], middle=text[anchor:offset], suffix=_head(text, offset, after), context=context,
                         path=document.uri.rsplit("/", 1)[-1])

    def forget(self, uri: str) -> None:
        self._anchors.pop(uri, None)
        self._windows.pop(uri, None)

    def _anchor(self, document: Document, offset: int, start: int, remember: bool) -> int:
        text = document.text
        known, anchor = self._anchors.get(document.uri, ("", -1))
        if not (start <= anchor <= offset <= anchor + _MIDDLE and text.startswith(known)):
            anchor = max(document.starts[document.position(offset, "utf-32")[0]], start)
            if remember:
                self._anchors[document.uri] = text[:anchor], anchor
        return anchor


class Windows:
    """Where the windows of one document began: what is shown to the model begins there again while it holds the cursor.

    A window is known by its first characters, so that it is found again after an edit before it. Not finding it costs computing,
    never correctness.
    """

    def __init__(self) -> None:
        self._known: list[tuple[int, str]] = []   # (offset, text there), the one used last first

    def start(self, text: str, offset: int, size: int, remember: bool = True) -> int:
        """Where to begin for a cursor at `offset`, at most `size` characters before it."""
        known = [(at, head) for start, head in self._known if (at := _find(text, start, head)) is not None]
        fitting = (w for w in known if w[0] <= offset <= w[0] + size and (w[0] == 0 or offset - w[0] >= size // _LEAST_SHOWN))
        chosen = next(fitting, None)
        if chosen is None:
            start = _line_start(text, offset, size)
            chosen = start, text[start:start + _HEAD]
        if remember:
            self._known = [chosen, *(w for w in known if w[0] != chosen[0])][:_KEPT]
        return chosen[0]


def _find(text: str, start: int, head: str) -> int | None:
    """Where the window that began at `start` with `head` begins now; None if it is gone."""
    if start == 0 or text.startswith(head, start):
        return start
    at = text.find(head, max(0, start - _MOVED), start + _MOVED + len(head))
    return at if at > 0 and text[at - 1] == "\n" else None


def _line_start(text: str, offset: int, size: int) -> int:
    """A line boundary half a window to a whole one before the cursor."""
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
