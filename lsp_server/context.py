"""What the model is shown of other open files: the beginnings of those edited last, and the definitions of what is named at the cursor.

It stands before everything else in the prompt, so a change of it costs the whole prompt. Therefore it is chosen anew only when another
file was edited meanwhile, or the cursor has gone far; and it has an order of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from inference_pio.engine import ContextChunk
from inference_pio.lsp_server.documents import Document
from inference_pio.lsp_server.privacy import Privacy

SIZE = 6000              # characters of all chunks, a quarter of them for definitions
_FILES = 3               # whose beginnings are shown
_FAR = 4000              # characters the cursor goes before definitions are looked for again
_NEAR = 600              # characters before the cursor that names are taken from
_LINES = 6               # of a definition
_NAME = re.compile(r"[A-Za-z_]\w{2,}")
_DEFINITION = re.compile(   # a keyword and a name, as many languages have it; or a C function at the beginning of a line
    r"^[ \t]*(?:[\w()]+[ \t]+)*?(?:def|class|function|fn|func|struct|enum|trait|type|interface|const|let|val|#define)[ \t]+(?:\([^)\n]*\)[ \t]*)?"
    r"(\w{3,})|^\w[\w \t*]*?[ \t*](\w{3,})\([^;\n]*\)[ \t]*\{", re.MULTILINE)


@dataclass(frozen=True)
class _Choice:
    others: frozenset[tuple[str, int]]   # (uri, version) of the other files
    offset: int
    size: int
    chunks: tuple[ContextChunk, ...]


class Context:
    """Remembers for each document what was chosen."""

    def __init__(self, privacy: Privacy) -> None:
        self._privacy = privacy
        self._choices: dict[str, _Choice] = {}

    def chunks(self, document: Document, offset: int, recent: Iterable[Document], secrets_allowed: bool, size: int = SIZE) -> tuple[ContextChunk, ...]:
        """Of the documents `recent`, the one edited last first; never of a file that must not be shown. May run git."""
        others = [d for d in recent if d.uri != document.uri and d.text.strip() and (secrets_allowed or self._privacy.reason(d.uri) is None)]
        key, known = frozenset((d.uri, d.version) for d in others), self._choices.get(document.uri)
        if known is None or known.others != key or known.size != size or abs(known.offset - offset) > _FAR:
            known = self._choices[document.uri] = _Choice(key, offset, size, _choose(document.text[max(0, offset - _NEAR):offset], others, size))
        return known.chunks

    def forget(self, uri: str) -> None:
        self._choices.pop(uri, None)


def _choose(before: str, others: list[Document], size: int) -> tuple[ContextChunk, ...]:
    heads = {d.uri: _whole_lines(d.text, size // 4) for d in others[:_FILES]}
    chunks = [ContextChunk(_name(uri), text) for uri, text in sorted(heads.items())]
    names, left = set(_NAME.findall(before)), size // 4
    for document in sorted(others, key=lambda d: d.uri):
        text = "".join(_definitions(document.text, names, len(heads.get(document.uri, "")), left))
        left -= len(text)
        chunks += [ContextChunk(_name(document.uri), text)] if text else []
    return tuple(chunks)


def _definitions(text: str, names: set[str], first: int, most: int) -> Iterable[str]:
    """The first lines of what `text` defines of `names` from character `first` on."""
    for match in _DEFINITION.finditer(text, first):
        if (match[1] or match[2]) in names:
            start = text.rfind("\n", 0, match.start()) + 1
            piece = "".join(text[start:start + 2000].splitlines(keepends=True)[:_LINES])
            most -= len(piece)
            if most < 0:
                return
            yield piece


def _name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]


def _whole_lines(text: str, size: int) -> str:
    return text if len(text) <= size else text[:text.rfind("\n", 0, size) + 1 or size]
