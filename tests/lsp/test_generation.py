"""What is being written is taken over by whoever types what it says, and stops for everybody else."""

import asyncio
from types import SimpleNamespace

import pytest

from inference_pio.engine import EngineError, Priority, StreamStats
from inference_pio.lsp_server.features.inline_completion import begin_ahead, complete, prefetch
from inference_pio.lsp_server.generation import Cursor
from inference_pio.lsp_server.session import Session
from inference_pio.lsp_server.settings import Settings

URI = "untitled:a.py"


class Stream:
    """A TokenStream whose text the test feeds."""

    def __init__(self, prompt, priority):
        self.prompt, self.priority, self.closed = prompt, priority, False
        self.stats = StreamStats()
        self._queue = asyncio.Queue()

    def feed(self, *pieces):
        for piece in pieces:
            self.stats.generated_tokens += 1
            self._queue.put_nowait(piece)

    def end(self, reason="stop"):
        self.stats.finish_reason = reason
        self._queue.put_nowait(None)

    def fail(self, message):
        self._queue.put_nowait(EngineError(message))

    def close(self):
        if not self.closed:
            self.closed = True
            if self.stats.finish_reason is None:
                self.end("closed")

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = await self._queue.get()
        if isinstance(piece, Exception):
            raise piece
        if piece is None:
            raise StopAsyncIteration
        return piece


class Engine:
    def __init__(self):
        self.info = SimpleNamespace(fim=False, context=4096)
        self.streams = []
        self.others = 0

    def submit(self, prompt, params, priority):
        self.streams.append(Stream(prompt, priority))
        return self.streams[-1]

    def status(self):
        return SimpleNamespace(running=self.others, waiting=sum(not s.closed for s in self.streams))

    def close(self):
        pass


class Editor:
    """A session with one document that is typed into."""

    def __init__(self):
        self.engine = Engine()
        self.session = Session(Settings(), open_engine=lambda *a, **k: self.engine)

    async def open(self, text):
        await self.session.load(lambda progress: None)
        self.session.documents.open(URI, "python", 1, text)
        return self

    @property
    def cursor(self):
        document = self.session.documents.get(URI)
        return Cursor(document, len(document.text))

    def type(self, text):
        document, at = self.cursor.document, self.cursor.document.position(self.cursor.offset, "utf-16")
        self.session.documents.change(URI, document.version + 1, [((*at, *at), text)])
        if (generation := self.session.keep(self.cursor)) is not None:
            generation.owner = None

    def ask(self):
        return asyncio.create_task(complete(self.session, self.cursor))

    async def streams(self, count):
        """Waits until that many prompts were submitted, and whoever asked has seen them."""
        for _ in range(500):
            if len(self.engine.streams) == count:
                break
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)
        assert len(self.engine.streams) == count
        return self.engine.streams


@pytest.fixture
async def editor():
    editor = await Editor().open("x = ")
    yield editor
    editor.session.close()


async def test_typing_what_is_being_written_takes_it_over(editor):
    first = editor.ask()
    [stream] = await editor.streams(1)
    stream.feed("fo", "ur")
    await asyncio.sleep(0.02)
    editor.type("f")
    second = editor.ask()
    await asyncio.sleep(0.02)
    assert not stream.closed and len(editor.engine.streams) == 1
    stream.feed("teen")
    stream.end()
    assert (await first, await second) == ("", "ourteen")
    assert editor.session.last.source == "adopted" and editor.session.last.first_token_ms < editor.session.last.total_ms


async def test_typing_ahead_of_what_is_written_waits_for_it(editor):
    editor.ask()
    [stream] = await editor.streams(1)
    editor.type("fou")
    second = editor.ask()
    await asyncio.sleep(0.02)
    stream.feed("four", " + 1")
    stream.end()
    assert await second == "r + 1"


async def test_what_turns_out_to_be_different_is_stopped_and_begun_anew(editor):
    editor.ask()
    [stream] = await editor.streams(1)
    editor.type("fou")
    second = editor.ask()
    await asyncio.sleep(0.02)
    stream.feed("five")
    stream, anew = await editor.streams(2)
    assert stream.closed and anew.prompt.prefix + anew.prompt.middle == "x = fou"
    anew.feed("r")
    anew.end()
    assert await second == "r" and editor.session.last.source == "model"


@pytest.mark.parametrize("change", [((0, 0, 0, 1), "y"), ((0, 4, 0, 4), "7"), ((0, 2, 0, 3), "")])
async def test_any_other_change_stops_it_at_once(editor, change):
    first = editor.ask()
    [stream] = await editor.streams(1)
    stream.feed("fo")
    await asyncio.sleep(0.02)
    editor.session.documents.change(URI, 2, [change])
    assert editor.session.keep(editor.cursor) is None
    assert stream.closed
    second = editor.ask()
    assert (await first) == ""
    (await editor.streams(2))[1].end()
    await second


async def test_a_cancelled_request_stops_its_generation(editor):
    request = editor.ask()
    [stream] = await editor.streams(1)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert stream.closed


async def test_a_request_cancelled_before_its_stream_is_there_leaves_none_behind(editor):
    request = editor.ask()
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await asyncio.sleep(0.05)
    assert all(stream.closed for stream in editor.engine.streams)


async def test_a_key_that_agrees_saves_it_from_the_cancel_that_follows(editor):
    first = editor.ask()
    [stream] = await editor.streams(1)
    stream.feed("fo")
    await asyncio.sleep(0.02)
    editor.type("f")
    first.cancel()
    await asyncio.sleep(0.02)
    assert not stream.closed
    second = editor.ask()
    stream.feed("ur")
    stream.end()
    assert await second == "our"


async def test_begun_ahead_it_is_there_when_somebody_asks(editor):
    editor.type("f")
    await begin_ahead(editor.session, editor.cursor)
    [stream] = await editor.streams(1)
    assert stream.priority == Priority.PREFETCH
    stream.feed("our")
    stream.end()
    assert await editor.ask() == "our" and len(editor.engine.streams) == 1


async def test_nothing_begins_ahead_while_the_suggestion_on_the_screen_is_typed(editor):
    request = editor.ask()
    [stream] = await editor.streams(1)
    stream.feed("four")
    stream.end()
    assert await request == "four"
    editor.type("fo")
    await begin_ahead(editor.session, editor.cursor)
    assert await editor.ask() == "ur" and len(editor.engine.streams) == 1


async def test_nothing_begins_ahead_of_a_request_that_came(editor):
    request = editor.ask()
    await begin_ahead(editor.session, editor.cursor)
    [stream] = await editor.streams(1)
    assert stream.priority == Priority.COMPLETION
    stream.end()
    await request


async def test_begun_ahead_and_behind_others_it_becomes_urgent_when_somebody_asks(editor):
    await begin_ahead(editor.session, editor.cursor)
    [ahead] = await editor.streams(1)
    editor.engine.others = 1
    request = editor.ask()
    ahead, urgent = await editor.streams(2)
    assert ahead.closed and urgent.priority == Priority.COMPLETION
    urgent.feed("1")
    urgent.end()
    assert await request == "1"


async def test_all_of_it_typed_begins_anew(editor):
    editor.ask()
    [stream] = await editor.streams(1)
    editor.type("14")
    request = editor.ask()
    await asyncio.sleep(0.02)
    stream.feed("14")
    stream.end()
    (await editor.streams(2))[1].end()
    assert await request == ""


async def test_an_error_is_told_once(editor):
    request = editor.ask()
    [stream] = await editor.streams(1)
    stream.fail("the device is gone")
    assert await request == "" and editor.session.last.reason == "error: the device is gone"
    again = editor.ask()
    stream = (await editor.streams(2))[1]
    stream.feed("1")
    stream.end()
    assert await again == "1"


async def shown(editor, text):
    """A suggestion stands on the screen, and what follows it is being written: that stream."""
    request, cursor = editor.ask(), editor.cursor
    stream = (await editor.streams(len(editor.engine.streams) + 1))[-1]
    stream.feed(text)
    stream.end()
    assert await request == text
    await prefetch(editor.session, cursor, text)
    return editor.engine.streams[-1]


async def test_what_follows_a_suggestion_is_there_when_it_is_accepted(editor):
    ahead = await shown(editor, "four")
    assert ahead.priority == Priority.PREFETCH and ahead.prompt.prefix + ahead.prompt.middle == "x = four"
    ahead.feed(" + 5")
    ahead.end()
    editor.type("four")
    assert await editor.ask() == " + 5" and len(editor.engine.streams) == 2
    assert editor.session.last.source == "prefetch" and (editor.session.prefetches, editor.session.prefetch_hits) == (1, 1)
    await editor.ask()
    assert editor.session.prefetch_hits == 1


async def test_typing_the_suggestion_keeps_what_follows_it_and_anything_else_stops_it(editor):
    ahead = await shown(editor, "four")
    editor.type("fo")
    assert await editor.ask() == "ur"
    await prefetch(editor.session, editor.cursor, "ur")
    assert not ahead.closed and len(editor.engine.streams) == 2, "the same thing is not begun twice"
    editor.type("x")
    assert ahead.closed and not editor.session.prefetched and editor.session.prefetch_hits == 0


async def test_nothing_is_written_behind_a_suggestion_that_is_gone_or_where_nobody_wants_it(editor):
    request, cursor = editor.ask(), editor.cursor
    [stream] = await editor.streams(1)
    stream.feed("four")
    stream.end()
    await request
    editor.type("5")
    await prefetch(editor.session, cursor, "four")
    assert len(editor.engine.streams) == 1
    editor.session.settings = Settings(prefetch=False)
    await prefetch(editor.session, editor.cursor, "6")
    assert len(editor.engine.streams) == 1


async def test_asking_in_another_document_stops_what_would_follow_here(editor):
    ahead = await shown(editor, "four")
    other = editor.session.documents.open("untitled:b.py", "python", 1, "y = ")
    request = asyncio.create_task(complete(editor.session, Cursor(other, 4)))
    (await editor.streams(3))[-1].end()
    await request
    assert ahead.closed and not editor.session.prefetched
