"""What was shown, so that typing along with it, or accepting a part of it, needs no model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suggestion:
    """`text` was shown at `offset` of a document that read `before` up to there and `after` behind."""

    uri: str
    offset: int
    before: str
    after: str
    text: str


class Suggestions:
    """The last few of each document."""

    def __init__(self, keep: int = 8):
        self._keep = keep
        self._shown: dict[str, list[Suggestion]] = {}

    def show(self, suggestion: Suggestion) -> None:
        shown = self._shown.setdefault(suggestion.uri, [])
        shown.insert(0, suggestion)
        del shown[self._keep:]

    def typed_along(self, uri: str, text: str, offset: int) -> str | None:
        """What is left of a suggestion whose beginning has been typed since; None if what was typed differs."""
        for shown in self._shown.get(uri, ()):
            typed = offset - shown.offset
            if not 0 <= typed < len(shown.text) or len(text) - offset != len(shown.after):
                continue
            if shown.text.startswith(text[shown.offset:offset]) and text.endswith(shown.after) and text.startswith(shown.before):
                return shown.text[typed:]
        return None

    def forget(self, uri: str) -> None:
        self._shown.pop(uri, None)
