"""The stream between the step thread and whoever reads: every piece comes, in order, and nobody sleeps on."""

from __future__ import annotations

import asyncio
import sys
import threading
from random import Random

import pytest

from inference_pio.engine.errors import EngineError
from inference_pio.engine.stream import TokenStream

PIECES = [f"{i} " for i in range(3000)]


@pytest.fixture(autouse=True)
def switching():
    """Threads take turns after every few bytecodes, so that they meet in every order."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def write(stream: TokenStream, error: EngineError | None = None, taken: threading.Semaphore | None = None) -> None:
    """taken: wait for the reader after every piece, so that nothing that comes later could wake it."""
    pause, draw = threading.Event(), Random(1)
    for token, piece in enumerate(PIECES):
        if draw.random() < 0.1:
            pause.wait(1e-5)
        stream.put(token, piece)
        if taken and not taken.acquire(timeout=60):
            break
    stream.end("error" if error else "length", "end", error)


def in_thread(function, *arguments) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def test_a_thread_gets_every_piece_and_the_end():
    stream, read, taken = TokenStream(lambda: None), [], threading.Semaphore(0)

    def reads():
        for piece in stream:
            read.append(piece)
            taken.release()
    reader = in_thread(reads)
    in_thread(write, stream, None, taken).join()
    reader.join()
    assert read == [*PIECES, "end"], "the reader was not woken"
    assert stream.text == "".join(read) and stream.token_ids == tuple(range(len(PIECES)))


def test_an_event_loop_gets_every_piece_and_the_end():
    async def reads():
        stream, read, taken = TokenStream(lambda: None), [], threading.Semaphore(0)
        writer = in_thread(write, stream, None, taken)
        async for piece in stream:
            read.append(piece)
            taken.release()
        writer.join()
        return read
    assert asyncio.run(reads()) == [*PIECES, "end"], "the loop was not woken"


def test_whoever_wants_the_whole_waits_for_the_end_only():
    stream = TokenStream(lambda: None)
    reader = in_thread(stream.wait)
    in_thread(write, stream).join()
    reader.join(60)
    assert not reader.is_alive() and stream.text == "".join(PIECES) + "end"
    stream.wait()   # it has ended already


def test_an_error_is_raised_behind_the_pieces_and_once():
    stream = TokenStream(lambda: None)
    write(stream, EngineError("lost"))
    read = []
    with pytest.raises(EngineError, match="lost"):
        for piece in stream:
            read.append(piece)
    assert read == [*PIECES, "end"] and list(stream) == []
    stream = TokenStream(lambda: None)
    write(stream, EngineError("lost"))
    with pytest.raises(EngineError, match="lost"):
        stream.wait()


def test_a_loop_that_is_gone_does_not_stop_the_engine():
    stream = TokenStream(lambda: None)

    async def give_up():
        await asyncio.wait_for(anext(stream), 0.01)
    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    stream.put(1, "late")
    stream.end("length")
    assert stream.text == "late"
