"""From raw text to what may be shown: a pipeline of small rules.

Each rule takes the text and the place it would stand in, and gives what is left of it; nothing left means nothing is shown, and the
rule's name is the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

_CLOSERS, _QUOTES = ")]}>,;", "\"'`"
_LONG = 24   # characters of a line that nobody writes twice in a row
_STRING = re.compile(r"""(["'`])(?:\\.|(?!\1)[^\\\n])*\1""")
_CONTINUES = re.compile(r"[)\]}]|(?:else|elif|except|finally|catch|case|default|end)\b")


@dataclass(frozen=True)
class Place:
    """Where a suggestion would stand."""

    before: str          # the cursor's line up to the cursor
    after: str           # the cursor's line from the cursor on
    below: str           # the lines below
    cut: bool = False    # the text was cut off by a limit, it did not end by itself

    @property
    def indent(self) -> int:
        return _indent(self.before)

    @property
    def inside_a_line(self) -> bool:
        """Whether something else than closing brackets and quotes stands behind the cursor."""
        return bool(self.after.strip(_CLOSERS + _QUOTES + " \t"))

    @property
    def inside_a_word(self) -> bool:
        return bool(re.search(r"\w\Z", self.before) and re.match(r"\w", self.after))


@dataclass(frozen=True)
class Trimmed:
    text: str
    dropped_by: str | None = None   # the rule that left nothing


def trim(text: str, place: Place) -> Trimmed:
    """What may be shown of text at place."""
    for rule in RULES:
        text = rule(text, place)
        if not text:
            return Trimmed("", rule.__name__)
    return Trimmed(text)


def block_ended(text: str, place: Place) -> bool:
    """Whether the text goes on beyond its block already, so that nothing further can be shown."""
    if "```" in text:
        return True
    whole, _, last = text.rpartition("\n")   # the last line may still grow, but its indentation is known
    if place.inside_a_line:
        return bool(whole.strip())
    if _closed_at(text, place) is not None:
        return True
    return end_of_block(whole, place).rstrip() != whole.rstrip() or bool(last.strip()) and _indent(last) < place.indent


def plain_lines(text: str, place: Place) -> str:
    """One kind of line end, no NUL."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def no_fences(text: str, place: Place) -> str:
    """Chat models close a code block with Markdown: what follows is talk."""
    return text.split("```", 1)[0] if "```" not in place.before + place.below else text


def no_blank_lines_first(text: str, place: Place) -> str:
    """On an empty line the suggestion begins there, unless it leaves the block."""
    body = re.sub(r"\A(?:[ \t]*\n)+", "", text)
    return body if not place.before.strip() and _indent(body) >= place.indent else text


def indentation_kept(text: str, place: Place) -> str:
    """Where the cursor stands behind typed indentation, the text does not indent once more."""
    return text.lstrip(" \t") if place.before and not place.before.strip() else text


def one_line_inside_a_line(text: str, place: Place) -> str:
    """With text behind the cursor, only the rest of this line is suggested."""
    return text.split("\n", 1)[0] if place.inside_a_line else text


def end_of_block(text: str, place: Place) -> str:
    """Stop where the block ends: at a line that is indented less than the cursor's, or as little, where that one is not empty."""
    base, begun, kept = place.indent, bool(place.before.strip()), []
    for number, line in enumerate(text.split("\n")):
        if number and line.strip():
            closes = bool(_CONTINUES.match(line.lstrip()))
            if _indent(line) < base or _indent(line) == base and begun and not closes:
                break
            if closes and _indent(line) == base and not line.strip(_CLOSERS + " "):
                kept.append(line)
                break
        elif number and base == 0 and not begun and any(map(str.strip, kept)):
            break   # at the top level a blank line is the end
        kept.append(line)
    return "\n".join(kept)


def no_loops(text: str, place: Place) -> str:
    """A small model that repeats itself is cut: where a line comes a third time, a short or a long one as soon as that is no accident."""
    seen: dict[str, int] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines):
        key = line.strip()
        seen[key] = seen.get(key, 0) + 1
        in_a_row = sum(1 for _ in takewhile(lambda other: other.strip() == key, reversed(lines[:number])))
        if len(key) >= 4 and seen[key] > 2 or len(key) >= _LONG and in_a_row or key.strip(_CLOSERS) and in_a_row > 1:
            return "\n".join(lines[:number])
    return text


def whole_lines(text: str, place: Place) -> str:
    """A text that a limit has cut ends with its last whole line, or inside a line with its last whole word."""
    if not place.cut:
        return text
    head, newline, _ = text.rpartition("\n")
    if newline and head.strip():
        return head
    words = re.match(r"(?s).*[^\w](?=\w*$)", text)
    return words[0] if words and words[0].strip() else text


def rest_of_the_word(text: str, place: Place) -> str:
    """Inside a word, no more than that word is suggested."""
    return re.match(r"\w*", text)[0] if place.inside_a_word else text


def no_repeat_of_the_line(text: str, place: Place) -> str:
    """Drop what stands behind the cursor anyway: the brackets and quotes that close there, or what the text ran into."""
    rest, body = place.after.strip(), text.rstrip()
    if not rest:
        return text
    if (end := _closed_at(text, place)) is not None:
        return text[:end]
    least = 1 if place.inside_a_word else 3
    for length in range(min(len(rest), len(body)), 0, -1):
        if body.endswith(rest[:length]) and (length == len(rest) or length >= least or not rest[:length].strip(_CLOSERS)):
            return body[:-length]
    return text


def no_repeat_of_the_lines_below(text: str, place: Place) -> str:
    """Stop before the line that comes next in the document."""
    following = next((line for line in place.below.split("\n") if line.strip()), None)
    if place.after.strip() or following is None:
        return text
    lines = text.split("\n")
    for number, line in enumerate(lines):
        whole = line if number else place.before + line
        if whole.strip() == following.strip() and _indent(whole) == _indent(following):
            return "\n".join(lines[:number])
    return text


def no_lone_closers(text: str, place: Place) -> str:
    """Closing brackets alone are what the editor types by itself, and lines without a word say nothing."""
    alone = not text.strip(_CLOSERS + " \t\n") or "\n" in text.strip() and not re.search(r"\w", text)
    return "" if alone else text


def no_trailing_space(text: str, place: Place) -> str:
    """Nothing invisible at the end of the text or of its lines, but for the line break before a bracket that stands there already."""
    last = re.search(r"\n[ \t]*\Z", text) if place.after.strip() else None
    return re.sub(r"[ \t]+(?=\n|$)", "", text).rstrip("\n") + (last[0] if last else "") if text.strip() else ""


RULES: tuple[Callable[[str, Place], str], ...] = (
    plain_lines, no_fences, no_blank_lines_first, indentation_kept, one_line_inside_a_line, rest_of_the_word, whole_lines, end_of_block,
    no_loops, no_repeat_of_the_line, no_repeat_of_the_lines_below, no_lone_closers, no_trailing_space)


def _closed_at(text: str, place: Place) -> int | None:
    """Where text closes the bracket or quote that is closed right behind the cursor."""
    rest = place.after.strip()
    if not rest or rest[0] not in _CLOSERS + _QUOTES or rest[0] in ",;":
        return None
    if rest[0] in _QUOTES:
        if place.before.count(rest[0]) % 2 == 0:
            return None   # it opens
        found = re.search(rf"(?<!\\){rest[0]}", text)
        return found and found.start()
    pairs = {"(": ")", "[": "]", "{": "}"} | ({"<": ">"} if rest[0] == ">" else {})
    depth, at = 0, 0
    while at < len(text):
        character = text[at]
        if character in _QUOTES and (string := _STRING.match(text, at)):
            at = string.end()
            continue
        if character in pairs:
            depth += 1
        elif character in pairs.values() and text[at - 1:at + 1] not in ("->", "=>"):
            if depth == 0:
                return at if character == rest[0] else None
            depth -= 1
        at += 1
    return None


def _indent(line: str) -> int:
    """Columns of leading white space; a tab goes to the next multiple of 4."""
    width = 0
    for character in line:
        if character == "\t":
            width += 4 - width % 4
        elif character == " ":
            width += 1
        else:
            break
    return width
