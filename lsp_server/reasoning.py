"""What a model thinks before it answers, told apart from the answer while both are being written."""

from __future__ import annotations

_OPEN, _CLOSE = "<think>", "</think>"


class Reasoning:
    """Feed it the pieces of a stream. Thoughts stand at the beginning between <think> and </think>; a text that looks so later is answer."""

    def __init__(self) -> None:
        self.thoughts = self.answer = ""
        self._state, self._held = "begin", ""

    def feed(self, piece: str) -> tuple[str, str]:
        """(new thoughts, new answer). What may still turn out to be a part of a mark is held back."""
        self._held += piece
        thoughts = ""
        if self._state == "begin":
            text = self._held.lstrip()
            if text.startswith(_OPEN):
                self._state, self._held = "thinking", text[len(_OPEN):]
            elif not _OPEN.startswith(text):
                self._state = "answer"
        if self._state == "thinking":
            thoughts, found, rest = self._held.partition(_CLOSE)
            if found:
                self._state, self._held = "answer", rest.lstrip()
            else:
                kept = _overlap(thoughts, _CLOSE)
                thoughts, self._held = thoughts[:len(thoughts) - kept], thoughts[len(thoughts) - kept:]
            thoughts = thoughts if self.thoughts else thoughts.lstrip()
            self.thoughts += thoughts
        answer = ""
        if self._state == "answer":
            answer, self._held = self._held if self.answer or not self.thoughts else self._held.lstrip(), ""
            self.answer += answer
        return thoughts, answer

    def end(self) -> tuple[str, str]:
        """What was held back when the stream ended."""
        held, self._held = self._held, ""
        if self._state == "thinking":
            self.thoughts += held
            return held, ""
        self.answer += held
        return "", held


def _overlap(text: str, mark: str) -> int:
    """The length of the longest beginning of `mark` that ends `text`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def answer_of(text: str) -> str:
    """A whole text without its thoughts."""
    reasoning = Reasoning()
    reasoning.feed(text)
    reasoning.end()
    return reasoning.answer
