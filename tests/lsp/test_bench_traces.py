"""Traces: what is wrong with a file is named, and those that come along are what their recorder writes."""

import json
import runpy
from pathlib import Path

import pytest

from inference_pio.lsp_server.bench.buffer import Buffer, end_of
from inference_pio.lsp_server.bench.trace import Change, TraceError, bundled, load, parse

RECORD = Path(__file__).with_name("traces") / "record.py"
EVENT = {"document": "a.c", "kind": "cold", "pause_ms": 5, "change": {"from": [0, 0], "to": [0, 0], "text": "x"}, "request": [0, 1]}


def text_of(*events: object, **more: object) -> str:
    documents = {"a.c": {"language": "c", "text": "int x;\n"}}
    return json.dumps({"schema": 1, "name": "t", "documents": documents, "events": events or [EVENT], **more})


def test_a_trace_is_read():
    trace = parse(text_of(EVENT, {"document": "a.c", "kind": "type-through", "take": 2, "request": True, "wait": False}), "t")
    first, second = trace.events
    assert first.change == Change((0, 0), (0, 0), "x") and first.request == (0, 1) and first.wait and first.pause_ms == 5
    assert second.take == 2 and second.request is True and not second.wait and second.change is None


@pytest.mark.parametrize("text, message", [
    ("{", "trace t: not JSON"),
    ("[" * 100_000, "trace t: not JSON"),
    ("[]", "trace t: must be an object, not list"),
    (text_of(schema=2), "trace t: schema is 2, this version reads 1"),
    (text_of(extra=1), "trace t: unknown field 'extra'"),
    (text_of(documents={"a.c": {"language": "c"}}), "document 'a.c': text is missing"),
    (text_of(documents={"a.c": {"language": 3, "text": ""}}), "document 'a.c': language must be str, not 3"),
    (text_of(events={}), "trace t: events must be list, not {}"),
    (text_of(EVENT, 7), "event 1: must be an object, not int"),
    (text_of(EVENT | {"kind": "warm"}), "event 0: kind is 'warm'; known are cold, same line"),
    (text_of(EVENT | {"document": "b.c"}), "event 0: document is 'b.c', which is none of the trace's documents"),
    (text_of(EVENT | {"pause_ms": -1}), "event 0: pause_ms must be milliseconds from 0 to an hour, not -1"),
    (text_of(EVENT | {"pause_ms": True}), "event 0: pause_ms must be"),
    (text_of(EVENT | {"take": True}), "event 0: take must be int, not True"),
    (text_of(EVENT | {"take": 1}), "event 0: change, take, accept are alternatives"),
    (text_of(EVENT | {"request": [0]}), "event 0: request must be [line, character], two numbers from 0, not [0]"),
    (text_of(EVENT | {"request": [0, -1]}), "event 0: request must be [line, character]"),
    (text_of(EVENT | {"colour": 1}), "event 0: unknown field 'colour'"),
    (text_of(EVENT | {"change": {"from": [1, 0], "to": [0, 0], "text": ""}}), "event 0, change: to is [0, 0], before from, [1, 0]"),
    (text_of(EVENT | {"request": False}), "no event asks for a suggestion"),
])
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(TraceError) as error:
        parse(text, "t")
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TraceError, match="nothing.json"):
        load(tmp_path / "nothing.json")


def test_the_traces_that_come_along_are_what_the_recorder_writes():
    recorder = runpy.run_path(str(RECORD))
    folder = recorder["TRACES"]
    written = {f"{r.name}.json": r.json() for r in (session() for session in recorder["SESSIONS"])}
    assert written == {path.name: path.read_text("utf-8") for path in folder.glob("*.json")}


@pytest.mark.parametrize("trace", bundled(), ids=lambda t: t.name)
def test_every_recorded_change_fits_its_document(trace):
    buffers = {name: Buffer(document.text) for name, document in trace.documents.items()}
    seen = set()
    for event in trace.events:
        if event.change:
            buffers[event.document].apply(event.change)
        if isinstance(event.request, tuple):
            buffers[event.document].offset(event.request)
        if event.request and event.wait and event.cancel_after_ms is None:
            assert (event.kind == "cold") == (event.document not in seen)
            seen.add(event.document)


def test_buffer_counts_utf16_units_and_reverts():
    buffer = Buffer("a😀b\nzwei\n")
    assert buffer.offset((0, 3)) == 2 and buffer.offset((0, 4)) == 3 and buffer.offset((1, 0)) == 4
    revert = buffer.apply(Change((0, 3), (1, 1), "x\n😀"))
    assert buffer.text == "a😀x\n😀wei\n" and revert == Change((0, 3), (1, 2), "b\nz")
    buffer.apply(revert)
    assert buffer.text == "a😀b\nzwei\n" and buffer.version == 3
    assert end_of((2, 5), "x😀") == (2, 8) and end_of((2, 5), "x\ny") == (3, 1)
    for outside in ((0, 5), (3, 0)):
        with pytest.raises(ValueError, match="outside"):
            buffer.offset(outside)
