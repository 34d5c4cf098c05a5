"""Open documents, kept in step with the editor to the character.

Lines end at \\n, \\r\\n and \\r only, as LSP says (str.splitlines knows eight more). Positions count in the unit agreed with the client:
utf-8 bytes, utf-16 code units or utf-32 code points.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

Encoding = Literal["utf-8", "utf-16", "utf-32"]
_LINE_END = re.compile(r"\r\n|\n|\r")


def units(text: str, encoding: Encoding) -> int:
    """Length of text in the units of the encoding."""
    if encoding == "utf-32":
        return len(text)
    if encoding == "utf-16":
        return len(text) + sum(c > "\uffff" for c in text)
    return len(text.encode("utf-8", "surrogatepass"))


def advance(text: str, count: int, encoding: Encoding) -> int:
    """Characters of text that `count` units cover. A count inside a character goes to its beginning, one past the end to the end."""
    if text.isascii() or encoding == "utf-32":
        return min(count, len(text))
    for index, character in enumerate(text):
        width = units(character, encoding)
        if count < width:
            return index
        count -= width
    return len(text)


@dataclass(frozen=True)
class Document:
    """A document at one version; edits give a new one, so whoever holds it keeps what they saw."""

    uri: str
    language: str
    version: int
    text: str
    starts: tuple[int, ...] = field(repr=False)   # offset of each line

    @classmethod
    def of(cls, uri: str, language: str, version: int, text: str) -> Document:
        if "\r" in text:
            return cls(uri, language, version, text, (0, *(match.end() for match in _LINE_END.finditer(text))))
        return cls(uri, language, version, text, (0, *accumulate(len(line) + 1 for line in text.split("\n")[:-1])))   # five times faster

    def line(self, number: int) -> str:
        """Text of a line without its end."""
        end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.text)
        return self.text[self.starts[number]:end].rstrip("\r\n")

    def offset(self, line: int, character: int, encoding: Encoding) -> int:
        """Index into text. Positions outside are moved to the nearest place inside, as LSP asks."""
        if line < 0:
            return 0
        if line >= len(self.starts):
            return len(self.text)
        return self.starts[line] + advance(self.line(line), max(character, 0), encoding)

    def position(self, offset: int, encoding: Encoding) -> tuple[int, int]:
        """(line, character) of an index into text."""
        line = bisect_right(self.starts, offset) - 1
        return line, units(self.text[self.starts[line]:offset], encoding)

    def edited(self, start: int, end: int, text: str, version: int) -> Document:
        """text[start:end] replaced."""
        if end < start:
            start, end = end, start
        whole = self.text[:start] + text + self.text[end:]
        # Only lines near the edit change; one more on each side, because \r and \n may meet there.
        first = max(bisect_right(self.starts, start) - 2, 0)
        after = bisect_right(self.starts, min(end + 1, len(self.text)))
        shift = len(text) - (end - start)
        stop = self.starts[after] + shift if after < len(self.starts) else len(whole)
        begin = self.starts[first]
        middle = [match.end() for match in _LINE_END.finditer(whole, begin, min(stop + 1, len(whole))) if match.end() <= stop]
        kept = self.starts[after:]
        if kept and middle and middle[-1] == kept[0] + shift:
            middle.pop()
        return Document(self.uri, self.language, version, whole, (*self.starts[:first + 1], *middle, *(s + shift for s in kept)))


class Documents:
    """By URI. Changes of documents that were never opened are ignored, and so are versions that go back."""

    def __init__(self) -> None:
        self.encoding: Encoding = "utf-16"
        self._open: dict[str, Document] = {}
        self._recent: list[str] = []   # most recently edited last

    def get(self, uri: str) -> Document | None:
        return self._open.get(uri)

    def recent(self) -> Iterable[Document]:
        """Open documents, most recently touched first."""
        return [self._open[uri] for uri in reversed(self._recent)]

    def open(self, uri: str, language: str, version: int, text: str) -> Document:
        self._touch(uri)
        self._open[uri] = Document.of(uri, language, version, text)
        return self._open[uri]

    def close(self, uri: str) -> None:
        if self._open.pop(uri, None) is not None:
            self._recent.remove(uri)

    def change(self, uri: str, version: int, changes: Iterable[tuple[tuple[int, int, int, int] | None, str]]) -> tuple[Document, int] | None:
        """Changes are (range or None for everything, text). Gives the document and the offset behind the last change."""
        document = self._open.get(uri)
        if document is None or version < document.version:
            return None
        offset = len(document.text)
        for span, text in changes:
            if span is None:
                document, offset = Document.of(uri, document.language, version, text), len(text)
                continue
            start = document.offset(span[0], span[1], self.encoding)
            end = document.offset(span[2], span[3], self.encoding)
            document, offset = document.edited(start, end, text, version), min(start, end) + len(text)
        self._open[uri] = document
        self._touch(uri)
        return document, offset

    def _touch(self, uri: str) -> None:
        if uri in self._recent:
            self._recent.remove(uri)
        self._recent.append(uri)
