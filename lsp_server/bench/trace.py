"""A trace: documents and the keystrokes somebody typed into them. The schema is in traces/README.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

SCHEMA = 1

COLD, SAME_LINE, NEW_LINE, MIDDLE, SWITCH, THROUGH, ACCEPT = KINDS = (
    "cold", "same line", "new line", "edit in the middle", "file switch", "type-through", "after accept",
)
"""What an edit asks of the cache, in the order of reports. A request's kind is that of the event that caused it."""

Position = tuple[int, int]   # line, UTF-16 code unit, both from 0, as in LSP


class TraceError(Exception):
    """A trace that cannot be replayed; the message names the file, the event and the field."""


@dataclass(frozen=True)
class Change:
    start: Position
    end: Position
    text: str


@dataclass(frozen=True)
class Event:
    """One keystroke (or paste, undo, click): what changes, and whether a suggestion is asked for after it.

    Exactly one of `change`, `take`, `accept` may be set. `take` types that many characters of the suggestion that is shown,
    `accept` takes all of it: what a model suggests is not recorded, so replay reverts both before the next recorded change.
    """

    document: str
    kind: str
    pause_ms: float = 0.0              # since the event before
    change: Change | None = None
    take: int = 0
    accept: bool = False
    request: Position | bool = False   # where the cursor stands; True: where the change left it
    ask_after_ms: float = 0.0          # the request comes that long after the change: editors wait a little
    wait: bool = True                  # False: the next key comes at its time, answered or not
    cancel_after_ms: float | None = None


@dataclass(frozen=True)
class Document:
    language: str
    text: str


@dataclass(frozen=True)
class Trace:
    name: str
    about: str
    documents: dict[str, Document]
    events: tuple[Event, ...]


def bundled() -> list[Trace]:
    """The traces that come with the package, by name."""
    folder = resources.files("inference_pio.lsp_server.bench") / "traces"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return [parse(f.read_text("utf-8"), f.name) for f in files]


def load(path: Path) -> Trace:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TraceError(f"trace {path}: cannot be read: {e}") from e
    return parse(text, str(path))


def parse(text: str, where: str) -> Trace:
    """The trace in `text`; `where` names it in errors."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise TraceError(f"trace {where}: not JSON: {e}") from e
    top = _Fields(f"trace {where}", fields)
    if (schema := top.get("schema", int)) != SCHEMA:
        raise TraceError(f"trace {where}: schema is {schema}, this version reads {SCHEMA}")
    documents = {}
    for path, entry in top.get("documents", dict).items():
        document = _Fields(f"trace {where}, document {path!r}", entry)
        documents[path] = Document(document.get("language", str), document.get("text", str))
        document.done()
    events = tuple(_event(_Fields(f"trace {where}, event {i}", entry), documents)
                   for i, entry in enumerate(top.get("events", list)))
    trace = Trace(top.get("name", str), top.get("about", str, ""), documents, events)
    top.done()
    if not any(event.request for event in events):
        raise TraceError(f"trace {where}: no event asks for a suggestion, so there is nothing to measure")
    return trace


def _event(fields: _Fields, documents: dict[str, Document]) -> Event:
    document, kind = fields.get("document", str), fields.get("kind", str)
    if document not in documents:
        raise fields.error("document", f"is {document!r}, which is none of the trace's documents")
    if kind not in KINDS:
        raise fields.error("kind", f"is {kind!r}; known are {', '.join(KINDS)}")
    change = fields.get("change", dict, None)
    request = fields.get("request", (list, bool), False)
    event = Event(
        document, kind, fields.number("pause_ms", 0.0), None if change is None else _change(fields.where, change),
        fields.get("take", int, 0), fields.get("accept", bool, False),
        _position(fields, "request", request) if isinstance(request, list) else request, fields.number("ask_after_ms", 0.0),
        fields.get("wait", bool, True), fields.number("cancel_after_ms", None),
    )
    fields.done()
    if (event.change is not None) + (event.take > 0) + event.accept > 1:
        raise fields.error("change, take, accept", "are alternatives: give one of them")
    return event


def _change(where: str, entry: dict[str, Any]) -> Change:
    fields = _Fields(f"{where}, change", entry)
    start, end = (_position(fields, key, fields.get(key, list)) for key in ("from", "to"))
    change = Change(start, end, fields.get("text", str))
    fields.done()
    if end < start:
        raise fields.error("to", f"is {list(end)}, before from, {list(start)}")
    return change


def _position(fields: _Fields, key: str, value: list[Any]) -> Position:
    if len(value) != 2 or not all(type(x) is int and x >= 0 for x in value):
        raise fields.error(key, f"must be [line, character], two numbers from 0, not {value!r}")
    return value[0], value[1]


class _Fields:
    """A JSON object whose keys are taken one by one; what is left over is an error."""

    def __init__(self, where: str, entry: Any) -> None:
        if not isinstance(entry, dict):
            raise TraceError(f"{where}: must be an object, not {type(entry).__name__}")
        self.where, self._left = where, dict(entry)

    def get(self, key: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        value = self._left.pop(key, *default or (_MISSING,))
        if value is _MISSING:
            raise self.error(key, "is missing")
        wrong_bool = isinstance(value, bool) and kind is int
        if not default or value is not default[0]:
            if wrong_bool or not isinstance(value, kind):
                names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                raise self.error(key, f"must be {names}, not {value!r}")
        return value

    def number(self, key: str, default: float | None) -> float | None:
        value = self.get(key, (int, float), default)
        if value is not default and (isinstance(value, bool) or not 0 <= value < 3.6e6):
            raise self.error(key, f"must be milliseconds from 0 to an hour, not {value!r}")
        return value

    def done(self) -> None:
        if self._left:
            raise TraceError(f"{self.where}: unknown field {sorted(self._left)[0]!r}")

    def error(self, key: str, message: str) -> TraceError:
        return TraceError(f"{self.where}: {key} {message}")


_MISSING = object()
