"""When an answer ends: texts that stop it, found in the stream before any part of them is shown."""

from __future__ import annotations


class StopTexts:
    """Text in, text out; what may be the beginning of a stop text is held back until it is clear."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""
        self._found = False

    def feed(self, text: str) -> tuple[str, bool]:
        """(what may be shown, whether a stop text was found). Nothing is shown after it."""
        if self._found:
            return "", True
        if not self._stops:
            return text, False
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held, self._found = "", True
            return held[:min(found)], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep:]
        return held[:len(held) - keep], False

    def finish(self) -> str:
        """What was held back and turned out to be text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
