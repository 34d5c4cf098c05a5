"""Conversations that fit, edits that touch only what changes: against an engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from pygls.exceptions import JsonRpcInvalidParams

from inference_pio.engine import EngineError, Message, StreamStats
from inference_pio.lsp_server.conversation import code_blocks, compose, expanded, fenced, repeats
from inference_pio.lsp_server.documents import Document
from inference_pio.lsp_server.features.chat import chat
from inference_pio.lsp_server.features.edit import changed_lines, edit, fitted
from inference_pio.lsp_server.reasoning import Reasoning, answer_of
from inference_pio.lsp_server.session import Session
from inference_pio.lsp_server.settings import Settings

URI = "file:///nowhere/a.py"


class Stream:
    def __init__(self, pieces, reason):
        self.pieces, self.closed, self.text, self.stats = list(pieces), False, "", StreamStats(finish_reason=reason)

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if not self.pieces:
            raise StopAsyncIteration
        self.text += self.pieces[0]
        return self.pieces.pop(0)

    def close(self):
        self.closed = True


class Engine:
    """A word is a token."""

    def __init__(self, pieces=("fine",), reason="stop", context=4096):
        self.info, self.pieces, self.reason, self.streams, self.prompts = SimpleNamespace(context=context), pieces, reason, [], []

    def count_tokens(self, text):
        return len(text.split())

    def submit(self, prompt, params, priority):
        self.prompts.append(prompt)
        self.streams.append(Stream(self.pieces, self.reason))
        return self.streams[-1]


def session(engine: Engine, text: str = "", uri: str = URI) -> Session:
    made = Session(Settings())
    made.engine = engine
    made.loaded.set()
    if text:
        made.documents.open(uri, "python", 1, text)
    return made


def span(start: int, end: int) -> dict:
    """Whole lines."""
    return {"start": {"line": start, "character": 0}, "end": {"line": end, "character": 0}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


async def test_an_answer_comes_in_pieces_after_what_the_model_is_shown():
    engine, reports = Engine(("It ", "adds.\n```python\nx\n```")), []
    result = await chat(session(engine, "one\ntwo\nthree\n"), {"messages": [user("/explain please")], "textDocument": {"uri": URI},
                                                              "range": span(1, 2)}, reports.append)
    assert reports[0]["context"]["shown"] == [{"name": "a.py", "tokens": 1, "cut": False}]
    assert [report["delta"] for report in reports[1:]] == ["It ", "adds.\n```python\nx\n```"]
    assert result["text"] == "It adds.\n```python\nx\n```" and result["codeBlocks"] == [{"language": "python", "text": "x\n"}]
    system, question = engine.prompts[0].messages
    assert "two" in system.content and "three" not in system.content
    assert question.content == "Explain what this code does, and how. please"
    assert engine.streams[0].closed


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thoughts_and_answer_are_told_apart_however_they_are_cut(size):
    text = "\n<think>\nIs a < b? </thin no.\n</think>\n\nYes: <think> is a tag.</think>"
    reasoning, pieces = Reasoning(), []
    for at in range(0, len(text), size):
        pieces.append(reasoning.feed(text[at:at + size]))
    pieces.append(reasoning.end())
    assert reasoning.thoughts == "".join(piece[0] for piece in pieces) == "Is a < b? </thin no.\n"
    assert reasoning.answer == "".join(piece[1] for piece in pieces) == "Yes: <think> is a tag.</think>"


@pytest.mark.parametrize(("text", "thoughts", "answer"), [
    ("fine", "", "fine"), ("  <thin", "", "  <thin"), ("<think>only thoughts </thi", "only thoughts </thi", ""), ("<think></think>yes", "", "yes"), ("", "", "")])
def test_texts_without_thoughts_or_without_an_answer(text, thoughts, answer):
    reasoning = Reasoning()
    reasoning.feed(text)
    reasoning.end()
    assert (reasoning.thoughts, reasoning.answer) == (thoughts, answer) and answer_of(text) == answer


async def test_thoughts_are_reported_apart_and_asked_for_by_the_setting():
    engine, reports = Engine(("<think>hm", "m</think>", "It adds.")), []
    asked = session(engine)
    asked.settings = Settings(thinking=True)
    result = await chat(asked, {"messages": [user("go")]}, reports.append)
    assert reports[1:] == [{"reasoning": "hm"}, {"reasoning": "m"}, {"delta": "It adds."}]
    assert (result["text"], result["reasoning"]) == ("It adds.", "hmm")
    assert engine.prompts[0].template_variables == {"enable_thinking": True}
    await chat(session(engine), {"messages": [user("go")]}, reports.append)
    assert engine.prompts[1].template_variables == {"enable_thinking": False}


async def test_a_cancelled_chat_closes_its_stream():
    engine = Engine(["x"] * 100_000)
    began = asyncio.Event()
    task = asyncio.create_task(chat(session(engine), {"messages": [user("go")]}, lambda report: "delta" in report and began.set()))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.streams[0].closed and engine.streams[0].pieces


async def test_secret_files_are_not_shown_and_that_is_said():
    engine, reports, uri = Engine(), [], "file:///nowhere/.env"
    await chat(session(engine, "PASSWORD=1", uri), {"messages": [user("what is it")], "textDocument": {"uri": uri}}, reports.append)
    assert reports[0] == {"hidden": "secret file"}
    assert not any("PASSWORD" in message.content for message in engine.prompts[0].messages)
    with pytest.raises(EngineError, match="secret file"):
        await edit(session(engine, "PASSWORD=1", uri), {"textDocument": {"uri": uri}, "range": {"start": {"line": 0, "character": 0},
                   "end": {"line": 0, "character": 9}}, "instruction": "x"}, reports.append)


@pytest.mark.parametrize("params", [{}, {"messages": []}, {"messages": 3}, {"messages": [{"role": "user"}]}, {"messages": [user(3)]},
                                    {"messages": [{"role": "system", "content": "x"}]}, {"messages": [user("x")], "textDocument": {"uri": "file:///b"}},
                                    {"messages": [user("x")], "textDocument": {"uri": URI}, "range": {"start": 3}}])
async def test_bad_parameters_are_answered(params):
    with pytest.raises(JsonRpcInvalidParams):
        await chat(session(Engine(), "x"), params, print)


def test_the_oldest_messages_are_dropped_in_pairs_and_counted():
    turns = [message for i in range(10) for message in (Message("user", f"question{i} " * 20), Message("assistant", f"answer{i} " * 20))]
    conversation = compose(Engine(context=300), [*turns, Message("user", "now")], 50)
    messages = conversation.prompt.messages
    assert messages[0].role == "system" and messages[1].role == "user" and messages[-1].content == "now"
    assert conversation.dropped == 20 - (len(messages) - 2) and 0 < conversation.dropped < 20
    assert conversation.tokens <= 300 - 50 - 64
    with pytest.raises(EngineError, match="1000 tokens|10[0-9][0-9] tokens"):
        compose(Engine(context=300), [Message("user", "word " * 1000)], 50)


def test_long_code_is_cut_at_a_line_and_marked():
    document = Document.of(URI, "python", 1, "".join(f"line {i} of many\n" for i in range(500)))
    conversation = compose(Engine(context=600), [Message("user", "what")], 100, document)
    (shown,) = conversation.shown
    assert shown.cut and 0 < shown.tokens <= 300
    assert conversation.prompt.messages[0].content.rstrip("`").endswith("of many\n")


async def test_an_answer_that_repeats_itself_is_ended():
    engine, reports = Engine(["It adds. "] + ["end for; "] * 1000), []
    result = await chat(session(engine), {"messages": [user("go")]}, reports.append)
    assert reports[-1] == {"repeats": True} and len(result["text"]) < 200 and engine.streams[0].closed
    assert not repeats("=" * 500) and not repeats("".join(f"{i}," for i in range(500)))


def test_blocks_and_fences():
    assert code_blocks("a\n```py\nx = '```'\n```\nb\n~~~\ny\n~~~\n```c\nopen") == [("py", "x = '```'\n"), ("", "y\n"), ("c", "open")]
    assert code_blocks(fenced("a\n```\nb\n```\n", "md")) == [("md", "a\n```\nb\n```\n")]
    assert expanded("/unknown x") == "/unknown x" and expanded("a /fix") == "a /fix"


CODE = "import os\n\n    def add(a, b):\n        return a - b\n\nprint(1)\n"


async def test_an_edit_holds_the_changed_lines_alone():
    engine = Engine(["Here:\n```python\ndef add(a, b):\n", "    return a + b\n```\nDone."])
    result = await edit(session(engine, CODE), {"textDocument": {"uri": URI}, "range": span(2, 4), "instruction": "mend it"}, lambda report: None)
    (change,) = result.document_changes
    (only,) = change.edits
    assert change.text_document.version == 1 and only.new_text == "        return a + b\n"
    assert (only.range.start.line, only.range.start.character, only.range.end.line, only.range.end.character) == (3, 0, 4, 0)


async def test_an_edit_is_refused_when_the_document_changed_meanwhile():
    engine = Engine(["```\nx\n```"] * 3)
    made = session(engine, CODE)

    def meddle(report):
        made.documents.change(URI, 2, [((0, 0, 0, 0), "#")])

    with pytest.raises(EngineError, match="changed"):
        await edit(made, {"textDocument": {"uri": URI}, "range": span(2, 4), "instruction": "x"}, meddle)


@pytest.mark.parametrize("pieces,reason,match", [(["no code"], "stop", "without code"), (["```\nx"], "length", "did not come to an end")])
async def test_an_answer_that_is_no_edit_changes_nothing(pieces, reason, match):
    with pytest.raises(EngineError, match=match):
        await edit(session(Engine(pieces, reason), CODE), {"textDocument": {"uri": URI}, "range": span(2, 4), "instruction": "x"}, print)


async def test_a_selection_too_long_for_the_model_is_said_with_its_size():
    text = "word word\n" * 10_000
    with pytest.raises(EngineError, match="20001 tokens"):
        await edit(session(Engine(), text), {"textDocument": {"uri": URI}, "range": span(0, 10_000), "instruction": "x"}, print)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
@pytest.mark.parametrize("new", ["", "a\n", "🙂\nb\n", "a\nZ\n🙂c\nd\n", "x\u2028y\nb\n"])
def test_applying_the_changed_lines_gives_the_new_text(encoding, new):
    document = Document.of(URI, "python", 1, "🙂head a\nb\n🙂c\nd\ntail\n")
    start, end = 6, 13
    edits = changed_lines(document, start, end, new, encoding)
    text = document.text
    for one in reversed(edits):
        first, last = (document.offset(p.line, p.character, encoding) for p in (one.range.start, one.range.end))
        assert start <= first <= last <= end, "outside the selection nothing is touched"
        text = text[:first] + one.new_text + text[last:]
    assert text == document.text[:start] + new + document.text[end:]


def test_indentation_and_line_ends_are_the_selections():
    assert fitted("if a:\n    b\n\nc\n", "    x\n") == "    if a:\n        b\n\n    c\n"
    assert fitted("a\nb\n", "x\r\ny") == "a\r\nb"
    assert fitted("\ta\n", "\tx") == "\ta"
