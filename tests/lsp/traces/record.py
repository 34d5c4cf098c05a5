"""Writes the traces that come with --bench from the sources beside this file: python tests/lsp/traces/record.py

A session below reads like what the person did; positions and the kind of each edit follow from it.
`test_bench_traces.py` fails when the committed traces are not what this script writes.
"""

from __future__ import annotations

import json
from pathlib import Path

from inference_pio.lsp_server.bench.buffer import Buffer, end_of
from inference_pio.lsp_server.bench.trace import (
    ACCEPT, COLD, MIDDLE, NEW_LINE, SAME_LINE, SCHEMA, SWITCH, THROUGH, Change, Position,
)

SOURCES = Path(__file__).with_name("sources")
TRACES = Path(__file__).parents[3] / "lsp_server" / "bench" / "traces"
LANGUAGES = {".py": "python", ".ts": "typescript", ".rs": "rust", ".go": "go", ".c": "c", ".h": "c"}
KEY_MS, BURST_MS, THINK_MS = 70, 30, 150   # a key looked at, a key of a burst, a decision
ASK_MS = 40                                # VS Code asks that long after a key, other editors later; keys of a burst are asked for at once


class Recorder:
    """A person with one cursor in each document."""

    def __init__(self, name: str, about: str, *files: str) -> None:
        self.name, self.about = name, about
        self.texts = {file: (SOURCES / file).read_text("utf-8") for file in files}
        self.buffers = {file: Buffer(text) for file, text in self.texts.items()}
        self.events: list[dict] = []
        self.document = files[0]
        self.cursor: Position = (0, 0)
        self.next_kind: str | None = None
        self.seen: set[str] = set()
        self.revert = Change((0, 0), (0, 0), "")

    def go(self, document: str, after: str) -> None:
        """Puts the cursor behind the only occurrence of `after`, without asking for anything yet."""
        text = self.buffers[document].text
        if text.count(after) != 1:
            raise SystemExit(f"{self.name}: {after!r} occurs {text.count(after)} times in {document}, not once")
        before = text[:text.index(after) + len(after)]
        self.cursor = end_of((0, 0), before)
        self.next_kind = COLD if document not in self.seen else MIDDLE if document == self.document else SWITCH
        self.seen.add(document)
        self.document = document

    def look(self, pause_ms: int = THINK_MS) -> None:
        """Asks for a suggestion where the cursor stands."""
        self._event(pause_ms, None, None, request=list(self.cursor))

    def type(self, text: str, wait: str = "all") -> None:
        """Key by key. wait="last": the keys before the last are struck without looking at suggestions."""
        start, keys = self.cursor, _keys(text)
        for i, key in enumerate(keys):
            kind = NEW_LINE if key.startswith("\n") else SAME_LINE
            looked = wait == "all" or i == len(keys) - 1
            self._change(KEY_MS if looked else BURST_MS, kind, self.cursor, key, looked)
        self.revert = Change(start, self.cursor, "")

    def backspace(self, count: int) -> None:
        for _ in range(count):
            line, character = self.cursor
            self.cursor = (line, character - 1)
            self._change(KEY_MS, SAME_LINE, (line, character), "", True)

    def replace(self, old: str, new: str) -> None:
        """Selects `old`, which occurs once, and pastes `new` over it."""
        self.go(self.document, old)
        end = self.cursor
        buffer = self.buffers[self.document]
        self.cursor = end_of((0, 0), buffer.text[:buffer.text.index(old)])
        start = self.cursor
        self._change(THINK_MS, MIDDLE, end, new, True)
        self.revert = Change(start, self.cursor, old)

    def undo(self) -> None:
        """Takes back the last `type` or `replace`, in one change as editors do."""
        self.cursor = self.revert.start
        self._change(THINK_MS, MIDDLE, self.revert.end, self.revert.text, True)

    def type_through(self, *counts: int) -> None:
        for count in counts:
            self._event(KEY_MS, THROUGH, None, take=count, request=True)

    def accept(self) -> None:
        self._event(THINK_MS, ACCEPT, None, accept=True, request=True)

    def interrupt(self, key: str, after_ms: int) -> None:
        """Types a key whose suggestion nobody waits for: it is cancelled, and the engine has to come to rest."""
        self._change(KEY_MS, SAME_LINE, self.cursor, key, False, cancel_after_ms=after_ms)

    def _change(self, pause_ms: int, kind: str, end: Position, text: str, wait: bool, **more: object) -> None:
        change = Change(self.cursor, end, text)
        self.buffers[self.document].apply(change)
        self.cursor = end_of(self.cursor, text)
        fields = {"change": {"from": list(change.start), "to": list(end), "text": text}, "request": list(self.cursor)}
        self._event(pause_ms, kind, None if wait else False, **fields, **more)

    def _event(self, pause_ms: int, kind: str | None, wait: bool | None, **more: object) -> None:
        if kind not in (THROUGH, ACCEPT):
            kind = self.next_kind or kind
            if wait is not False:    # what is typed without looking leaves the kind to the first answer that is awaited
                self.next_kind = None
        event: dict[str, object] = {"document": self.document, "kind": kind, "pause_ms": pause_ms, **more}
        if wait is False:
            event["wait"] = False
        else:
            event["ask_after_ms"] = ASK_MS
        self.events.append(event)

    def json(self) -> str:
        documents = {file: {"language": LANGUAGES[Path(file).suffix], "text": text} for file, text in self.texts.items()}
        lines = ",\n".join("  " + json.dumps(event, ensure_ascii=False) for event in self.events)
        head = json.dumps({"schema": SCHEMA, "name": self.name, "about": self.about, "documents": documents},
                          indent=1, ensure_ascii=False)
        return f'{head[:-2]},\n "events": [\n{lines}\n ]\n}}\n'


def _keys(text: str) -> list[str]:
    """One key a character; Enter brings the indentation of the next line with it, as in any editor."""
    keys: list[str] = []
    for character in text:
        if keys and keys[-1].startswith("\n") and character in " \t":
            keys[-1] += character
        else:
            keys.append(character)
    return keys


def python() -> Recorder:
    r = Recorder("python", "A method is added to a scheduler, a backoff changed, a call looked up in the file next to it.",
                 "scheduler.py", "store.py")
    r.go("scheduler.py", "if job.state is State.WAITING]\n")
    r.look()
    r.type("\n    def ")
    r.type("failed(self) -> ", wait="last")
    r.type("list")
    r.type("[Job]:", wait="last")
    r.type("\n        ")
    r.type_through(1, 1, 3)
    r.accept()
    r.interrupt("r", 25)
    r.type("eturn [j", wait="last")
    r.go("scheduler.py", "base = self.backoff * 2 ** ")
    r.type("max(0, ", wait="last")
    r.undo()
    r.replace("        return count\n", "        log.debug('%d jobs were due', count)\n        return count\n")
    r.undo()
    r.go("scheduler.py", "job.state = State.CANCELLED\n")
    r.type("        ")
    r.type("log", wait="all")
    r.accept()
    r.go("store.py", "os.replace(temporary, self.path)\n")
    r.type("\n    def ", wait="last")
    r.interrupt("c", 60)
    r.type("ount", wait="last")
    r.go("scheduler.py", "failed(self) -> list[Job]:\n        return [j")
    r.type("ob")
    r.type_through(1, 1)
    r.go("store.py", "    def count")
    r.type("(self)", wait="last")
    r.type("\n        ")
    return r


def typescript() -> Recorder:
    r = Recorder("typescript", "A total is added to a shopping cart; a rule is pasted, and undone.", "cart.ts", "money.ts")
    r.go("cart.ts", "return rate.price;\n  }\n")
    r.look()
    r.type("\n  total(", wait="last")
    r.type("rates: readonly ShippingRate[]", wait="last")
    r.type("): Money {", wait="last")
    r.type("\n    ")
    r.type_through(1, 2, 1)
    r.accept()
    r.interrupt("r", 25)
    r.go("cart.ts", "export interface Product {\n  id: string;\n")
    r.type("  sku")
    r.go("cart.ts", "const total = quantity + ")
    r.type("Math", wait="last")
    r.backspace(2)
    r.replace("    return reduction.atMost(this.subtotal);\n",
              "    if (reduction === Money.zero) {\n      return reduction;\n    }\n"
              "    return reduction.atMost(this.subtotal);\n")
    r.undo()
    r.go("cart.ts", "case \"free-shipping\":\n")
    r.type("          // no", wait="last")
    r.accept()
    r.go("money.ts", "return this.times(percent / 100);\n  }\n")
    r.type("\n  minus(", wait="last")
    r.type_through(1)
    r.go("cart.ts", "ShippingRate[]): Money {\n    r")
    r.type("etu")
    r.type("rn ", wait="last")
    r.interrupt("t", 60)
    r.type_through(1)
    return r


def rust() -> Recorder:
    r = Recorder("rust", "A consumer learns to say that it is empty; a message is reworded and an attribute removed.", "ring.rs")
    r.go("ring.rs", "Some(value)\n    }\n")
    r.look()
    r.type("\n    pub fn ", wait="last")
    r.type("is_empty(&self) -> ", wait="last")
    r.type("bool {", wait="last")
    r.type("\n        ")
    r.type_through(1, 1, 2)
    r.accept()
    r.interrupt("s", 25)
    r.go("ring.rs", "pub fn len(&self) -> usize {\n")
    r.type("        // ", wait="last")
    r.type("wr")
    r.accept()
    r.go("ring.rs", "PushError::Disconnected(_) => write!(f, \"the consumer ")
    r.type("was", wait="last")
    r.replace("    #[inline]\n    fn mask", "    fn mask")
    r.undo()
    r.replace("        let tail = self.ring.tail.0.load(Ordering::Relaxed);\n        tail.wrapping_sub",
              "        let tail = self.ring.tail.0.load(Ordering::Acquire);\n        tail.wrapping_sub")
    r.go("ring.rs", "bool {\n        s")
    r.type("elf")
    r.interrupt("r", 60)
    r.type_through(1, 1)
    return r


def go() -> Recorder:
    r = Recorder("go", "A limiter gets a Close method; a configuration check is added in the middle.", "limiter.go")
    r.go("limiter.go", "next.ServeHTTP(w, r)\n\t})\n}\n")
    r.look()
    r.type("\n// Close ", wait="last")
    r.type("sto")
    r.type("ps the janitor.", wait="last")
    r.type("\n")
    r.type("func (l *Limiter) Close() ", wait="last")
    r.type("error {", wait="last")
    r.type("\n\t")
    r.type_through(1, 1, 2)
    r.accept()
    r.interrupt("i", 25)
    r.go("limiter.go", "Burst must be at least 1, not %d\", c.Burst)\n")
    r.type("\tcase ", wait="last")
    r.type("c.I")
    r.backspace(1)
    r.go("limiter.go", "b.seen = now\n}\n\n// Allow takes ")
    r.type("at most ", wait="last")
    r.undo()
    r.replace("\tdefer ticker.Stop()\n", "\tdefer ticker.Stop()\n\tdefer l.forgetIdle()\n")
    r.accept()
    r.go("limiter.go", "Close() error {\n\ti")
    r.type("f l")
    r.interrupt("x", 60)
    r.backspace(1)
    return r


def c() -> Recorder:
    r = Recorder("c", "A hash map learns to be walked: declared in its header, written in its source.",
                 "hashmap.c", "hashmap.h")
    r.go("hashmap.c", "return map->count;\n}\n")
    r.look()
    r.type("\nvoid hashmap_each(", wait="last")
    r.type("con")
    r.type("st hashmap *map) {", wait="last")
    r.type("\n    ")
    r.type_through(1, 1, 2)
    r.accept()
    r.interrupt("f", 25)
    r.go("hashmap.c", "h ^= h >> 33;\n    h *= ")
    r.type("0x", wait="last")
    r.undo()
    r.replace("    if (!map)\n        return;\n    for", "    for")
    r.undo()
    r.go("hashmap.c", "        map->count++;\n")
    r.type("        ass", wait="last")
    r.accept()
    r.go("hashmap.h", "size_t hashmap_count(const hashmap *map);\n")
    r.type("\nvoid hashmap_", wait="last")
    r.go("hashmap.c", "hashmap_each(const hashmap *map) {\n    f")
    r.type("or (")
    r.interrupt("x", 60)
    r.go("hashmap.h", "map);\n\nvoid hashmap_")
    r.type("each(", wait="last")
    return r


SESSIONS = (c, go, python, rust, typescript)

if __name__ == "__main__":
    for session in SESSIONS:
        recorder = session()
        (TRACES / f"{recorder.name}.json").write_text(recorder.json(), "utf-8")
        print(f"{recorder.name}: {len(recorder.events)} events")
