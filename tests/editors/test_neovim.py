"""The Neovim plugin in a real Neovim: keys in, ghost text out, the file on disk at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from neovim import Neovim

SCRIPTED = Path(__file__).parent / "scripted_server.py"


@pytest.fixture
def scripted(tmp_path):
    editors = []

    def start(suggestion: str, delay: float = 0.0, text: str = "") -> Neovim:
        file = tmp_path / "sample.py"
        file.write_text(text)
        log = tmp_path / "methods.log"
        editor = Neovim(tmp_path, file, [sys.executable, str(SCRIPTED), suggestion.encode("unicode_escape").decode(), str(delay), str(log)])
        editors.append(editor)
        editor.methods = lambda: log.read_text().split() if log.exists() else []
        editor.file = file
        editor.wait(lambda: editor.lua("local c = require('pio').client(); return c and c.initialized"), "the server is attached")
        return editor

    yield start
    for editor in editors:
        editor.close()


def test_ghost_text_is_shown_and_accepted(scripted):
    editor = scripted("(a, b):\n    return a + b")
    editor.type("idef add")
    assert editor.wait(editor.ghost, "ghost text") == "(a, b):\n    return a + b"
    assert editor.lines() == ["def add"], "ghost text is not in the buffer"
    marks = editor.lua("return vim.api.nvim_buf_get_extmarks(0, vim.api.nvim_create_namespace('pio'), 0, -1, {details = true})[1][4]")
    assert marks["virt_text"] == [["(a, b):", "PioGhost"]] and marks["virt_lines"] == [[["    return a + b", "PioGhost"]]]
    editor.type("<Tab>")
    editor.wait(lambda: editor.lines() == ["def add(a, b):", "    return a + b"], "it was accepted")
    editor.type("<Esc>:w<CR>")
    editor.wait(lambda: editor.file.read_text() == "def add(a, b):\n    return a + b\n", "it is on the disk")


def test_words_lines_and_dismissal(scripted):
    editor = scripted("one two\nthree")
    editor.type("ix = ")
    editor.wait(lambda: editor.ghost() == "one two\nthree", "ghost text")
    editor.type("<M-Right>")
    editor.wait(lambda: editor.lines() == ["x = one"], "a word was accepted")
    editor.wait(editor.ghost, "ghost text again")
    editor.type("<M-Down>")
    editor.wait(lambda: editor.lines()[0].startswith("x = oneone two") or editor.lines()[0] == "x = one two", "the rest of the line was accepted")
    editor.wait(editor.ghost, "ghost text once more")
    before = editor.lines()
    editor.type("<C-]>")
    editor.wait(lambda: editor.ghost() is None, "it was dismissed")
    assert editor.lines() == before


def test_tab_is_a_tab_where_nothing_is_shown(scripted):
    editor = scripted("x", delay=5.0)
    editor.type("i<Tab>y")
    editor.wait(lambda: (line := editor.lines()[0]).strip() == "y" and line != "y", "a tab was typed")


def test_superseded_requests_are_cancelled(scripted):
    editor = scripted("x", delay=0.2)
    for key in "iabcdef":
        editor.type(key)
    editor.wait(lambda: editor.methods().count("$/cancelRequest") >= 3, "older requests are cancelled")


def test_text_typed_before_the_server_is_up_is_completed_too(tmp_path):
    file = tmp_path / "early.py"
    file.write_text("")
    editor = Neovim(tmp_path, file, [sys.executable, "-c", f"import time, runpy, sys; time.sleep(1); sys.argv = ['', 'late', '0', {str(tmp_path / 'log')!r}]; "
                                     f"runpy.run_path({str(SCRIPTED)!r})"])
    try:
        editor.type("iearly")
        assert editor.wait(editor.ghost, "ghost text") == "late"
    finally:
        editor.close()


def test_the_real_model_writes_into_a_file(tmp_path):
    """pio-lsp with the default model: text typed, ghost shown, accepted, saved."""
    file = tmp_path / "fibonacci.py"
    file.write_text('def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n')
    editor = Neovim(tmp_path, file)
    try:
        editor.wait(lambda: editor.lua("local s = require('pio').last_status; return s and s.state == 'ready'"), "the model is loaded", 300)
        editor.type("Go    if n ")
        begin = time.monotonic()
        ghost = editor.wait(editor.ghost, "ghost text")
        print(f"ghost text after {1000 * (time.monotonic() - begin):.0f} ms: {ghost!r}")
        shown = editor.wait(lambda: (g := editor.ghost()) and editor.lua("return vim.fn.mode()") == "i" and g, "it stays")
        before = "\n".join(editor.lines())
        editor.type("<Tab>")
        editor.wait(lambda: "\n".join(editor.lines()) == before + shown, "it was accepted")
        editor.type("<Esc>:w<CR>")
        editor.wait(lambda: file.read_text() == before + shown + "\n", "it is on the disk")
    finally:
        editor.close()
