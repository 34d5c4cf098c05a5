"""Recorded editing sessions: data files, one JSON object each.

    {"name": "...", "files": {"a.py": {"language": "python", "text": "..."}},
     "events": [{"do": "type", "file": "a.py", "at": "text before the cursor", "text": "def f(", "kind": "same line", "pause_ms": 60}, ...]}

An event's place is where `at` ends (its first occurrence; without it the cursor stays). `do` is one of
    type     type `text` key by key, asking for a completion after each
    insert   insert `text` at once (a paste), then ask
    delete   delete the `text` that follows the place, then ask
    accept   insert what was suggested last, then ask
    ask      ask without a change (after a jump, in another file)
    cancel   ask, cancel 30 ms later and measure how long the engine takes to be idle
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

KINDS = ("cold", "same line", "new line", "edit in the middle", "file switch", "type-through", "after accept")
_DOES = ("type", "insert", "delete", "accept", "ask", "cancel")


class BadTrace(Exception):
    """The file is no trace; the message names the file and the event."""


@dataclass(frozen=True)
class Event:
    do: str
    file: str
    kind: str
    at: str | None = None
    text: str = ""
    pause_ms: float = 60.0


@dataclass(frozen=True)
class Trace:
    name: str
    files: dict[str, tuple[str, str]]   # name -> (language, text)
    events: tuple[Event, ...]


def load_traces(paths: Sequence[str] | None) -> list[Trace]:
    if paths:
        return [parse(Path(path).name, _read(Path(path))) for path in paths]
    folder = files("inference_pio.lsp_server.bench") / "traces"
    return [parse(entry.name, entry.read_text(encoding="utf-8")) for entry in sorted(folder.iterdir(), key=lambda e: e.name)
            if entry.name.endswith(".json")]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadTrace(f"{path} cannot be read: {error}") from None


def parse(where: str, text: str) -> Trace:
    try:
        value: Any = json.loads(text)
        documents = {name: (entry["language"], entry["text"]) for name, entry in value["files"].items()}
        trace = Trace(value["name"], documents, tuple(Event(**entry) for entry in value["events"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadTrace(f"{where} is not a trace: {error!r}") from None
    for number, event in enumerate(trace.events):
        for name, valid in (("do", event.do in _DOES), ("file", event.file in documents), ("kind", event.kind in KINDS)):
            if not valid:
                raise BadTrace(f"{where}: event {number}: {name} is {getattr(event, name)!r}")
    return trace
