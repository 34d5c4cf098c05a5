"""The editor's copy of a document: what the client believes the text to be."""

from __future__ import annotations

from inference_pio.lsp_server.bench.trace import Change, Position


class Buffer:
    """Text edited by ranges. Lines end at \\n (traces hold no other line ending); characters are UTF-16 code units."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.version = 1
        self._lines: list[str] = text.split("\n")

    def offset(self, position: Position) -> int:
        """Index into `text`. A position outside the text is a ValueError: the trace does not belong to this document."""
        line, character = position
        if line >= len(self._lines):
            raise ValueError(f"line {line} is outside the document of {len(self._lines)} lines")
        units = self._lines[line].encode("utf-16-le", "surrogatepass")
        if 2 * character > len(units):
            raise ValueError(f"character {character} is outside line {line}, which has {len(units) // 2}")
        before = sum(len(text) + 1 for text in self._lines[:line])
        return before + len(units[:2 * character].decode("utf-16-le", "surrogatepass"))

    def apply(self, change: Change) -> Change:
        """Applies `change` and returns the change that reverts it."""
        start, end = self.offset(change.start), self.offset(change.end)
        replaced = self.text[start:end]
        self.text = self.text[:start] + change.text + self.text[end:]
        self._lines = self.text.split("\n")
        self.version += 1
        return Change(change.start, end_of(change.start, change.text), replaced)


def end_of(start: Position, text: str) -> Position:
    """Where the cursor stands after `text` is inserted at `start`."""
    line, character = start
    head, newline, tail = text.rpartition("\n")
    units = len(tail.encode("utf-16-le", "surrogatepass")) // 2
    return (line + head.count("\n") + 1, units) if newline else (line, character + units)
