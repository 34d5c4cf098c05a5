"""The window of text a model sees begins where it began, as long as that is possible: what was computed for it stays of use."""

import pytest

from inference_pio.lsp_server.documents import Document
from inference_pio.lsp_server.prompt import PromptBuilder, Windows

SIZE = 400
TEXT = "".join(f"line number {i:04}\n" for i in range(200))   # 17 characters each


def test_a_window_stays_while_somebody_types_until_it_is_full():
    windows, text, offset = Windows(), TEXT[:1700], 1700
    first = windows.start(text, offset, SIZE)
    assert text[first - 1] == "\n" and SIZE // 2 <= offset - first <= SIZE
    starts = []
    for _ in range(SIZE):
        text, offset = text + "x", offset + 1
        starts.append(windows.start(text, offset, SIZE))
        assert 0 <= offset - starts[-1] <= SIZE
    assert starts[:SIZE - (1700 - first)] == [first] * (SIZE - (1700 - first)), "it moved before it was full"
    moves = [i for i, (one, next_one) in enumerate(zip(starts, starts[1:])) if one != next_one]
    assert all(b - a >= SIZE // 2 - 17 for a, b in zip(moves, moves[1:])), "it moved by less than half a window"


def test_coming_back_finds_the_window_again():
    windows = Windows()
    here = windows.start(TEXT, 3000, SIZE)
    there = windows.start(TEXT, 900, SIZE)
    assert there < here and windows.start(TEXT, 3001, SIZE) == here and windows.start(TEXT, 901, SIZE) == there


@pytest.mark.parametrize("edit", ["a new line above\n", "", "line"])
def test_an_edit_above_moves_the_window_with_its_text(edit):
    windows = Windows()
    start = windows.start(TEXT, 3000, SIZE)
    edited = TEXT[:340] + edit + TEXT[357:]
    moved = len(edited) - len(TEXT)
    assert windows.start(edited, 3000 + moved, SIZE) == start + moved


def test_a_window_whose_beginning_was_deleted_is_forgotten():
    windows = Windows()
    start = windows.start(TEXT, 3000, SIZE)
    edited = TEXT[:start - 100] + TEXT[start + 100:]
    new = windows.start(edited, 2800, SIZE)
    assert 0 <= 2800 - new <= SIZE and edited[new - 1] == "\n"


def test_a_window_that_would_show_too_little_is_not_taken():
    windows = Windows()
    start = windows.start(TEXT, 3000, SIZE)
    assert windows.start(TEXT, start + SIZE // 4 - 1, SIZE) < start


@pytest.mark.parametrize("text, offset", [("", 0), ("x", 1), ("x" * 5000, 5000), ("\n" * 5000, 4000)])
def test_any_text_has_a_window(text, offset):
    windows = Windows()
    for at in (offset, offset // 2, offset):
        assert 0 <= at - windows.start(text, at, SIZE) <= SIZE


def test_a_document_that_may_never_be_leaves_later_prompts_as_they_were():
    prompts = []
    for tried in (False, True):
        builder, document = PromptBuilder(), Document.of("file:///a", "python", 1, TEXT)
        builder.build(document, 1900, 200, fim=True)
        if tried:
            longer = document.edited(2000, 2000, "accepted\n" * 300, 1)
            builder.build(longer, 2000 + 2700, 200, fim=True, remember=False)
        prompts.append(builder.build(document.edited(2000, 2000, "x", 2), 2001, 200, fim=True))
    assert prompts[0] == prompts[1]
