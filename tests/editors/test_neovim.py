"""The Neovim plugin in a real Neovim: keys in, ghost text out, the file on disk at the end."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from neovim import VERSIONS, Neovim

HERE = Path(__file__).parent
SCRIPTED = HERE / "scripted_server.py"
ENGINE = HERE.parent / "lsp" / "scripted_engine.py"


@pytest.fixture(params=VERSIONS)
def start(request, tmp_path):
    """Starts a Neovim of each version there is, with a file of some text."""
    editors = []

    def start(cmd: list[str] | None, text: str = "", name: str = "sample.py", **options) -> Neovim:
        file = tmp_path / name
        file.write_text(text)
        editors.append(Neovim(tmp_path, file, cmd, nvim=VERSIONS[request.param], **options))
        editors[-1].file = file
        return editors[-1]

    yield start
    for editor in editors:
        editor.close()


@pytest.fixture
def scripted(start, tmp_path):
    """With a server that suggests what it is told to (scripted_server.py)."""
    log = tmp_path / "methods.log"

    def scripted(suggestion: str, delay: float = 0.0, text: str = "", flags: tuple[str, ...] = (), **options) -> Neovim:
        editor = start([sys.executable, str(SCRIPTED), suggestion.encode("unicode_escape").decode(), str(delay), str(log), *flags], text, **options)
        editor.methods = lambda: log.read_text().split() if log.exists() else []
        editor.kill_server = lambda: os.kill(int(Path(f"{log}.pid").read_text()), signal.SIGKILL)
        attached(editor)
        return editor

    return scripted


@pytest.fixture
def served(start):
    """With pio-lsp over an engine that writes an answer (scripted_engine.py)."""
    def served(answer: str, text: str, *flags: str, **options) -> Neovim:
        editor = start([sys.executable, str(ENGINE), "--answer", answer, *flags], text, **options)
        attached(editor)
        editor.wait(lambda: editor.lua("return require('pio.server').status ~= nil"), "the model is loaded")
        return editor

    return served


def attached(editor: Neovim) -> None:
    editor.wait(lambda: editor.lua("local c = require('pio').client(); return c and c.initialized"), "the server is attached")


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


def test_text_typed_before_the_server_is_up_is_completed_too(scripted, start, tmp_path):
    editor = start([sys.executable, str(SCRIPTED), "late", "0", str(tmp_path / "log"), "slow"])
    editor.type("iearly")
    assert editor.wait(editor.ghost, "ghost text") == "late"


def test_several_items_are_cycled_through(scripted):
    editor = scripted("one\x1etwo\x1ethree")
    editor.type("ix = ")
    editor.wait(lambda: editor.ghost() == "one", "the first")
    for key, item in (("<M-]>", "two"), ("<M-]>", "three"), ("<M-]>", "one"), ("<M-[>", "three")):
        editor.type(key)
        editor.wait(lambda: editor.ghost() == item, item)
    editor.type("<Tab>")
    editor.wait(lambda: editor.lines() == ["x = three"], "what was shown was accepted")


BUILTIN = "if vim.lsp.inline_completion then vim.lsp.inline_completion.enable() end"
DRAWN = ("local n = vim.api.nvim_create_namespace('nvim.lsp.inline_completion'); local m = vim.api.nvim_buf_get_extmarks(0, n, 0, -1, {details = true})[1]; "
         "return m and m[4].virt_text[1][1]")


@pytest.fixture
def builtin(scripted):
    """With Neovim's own inline completion switched on."""
    def builtin(*arguments, **options) -> Neovim:
        editor = scripted(*arguments, lua=BUILTIN, **options)
        if not editor.lua("return vim.lsp.inline_completion ~= nil"):
            pytest.skip("this Neovim has no inline completion of its own")
        return editor

    return builtin


def test_neovims_own_inline_completion_is_used_where_it_is_on_and_accepts_after_typing_along(builtin):
    editor = builtin("(a, b):\n    return a + b")
    editor.type("idef add")
    editor.wait(lambda: editor.lua(DRAWN) == "(a, b):", "Neovim draws it")
    assert editor.ghost() is None, "and we do not"
    editor.type("(a")
    editor.wait(lambda: editor.lua(DRAWN) == ", b):", "the rest of it")
    editor.type("<Tab>")
    editor.wait(lambda: len(editor.lines()) == 2, "it was accepted")
    assert editor.lines() == ["def add(a, b):", "    return a + b"], "nothing is there twice"


def test_words_and_lines_of_neovims_own(builtin):
    editor = builtin("one two\nthree")
    editor.type("ix = ")
    editor.wait(lambda: editor.lua(DRAWN) == "one two", "Neovim draws it")
    editor.type("<M-Right>")
    editor.wait(lambda: editor.lines() == ["x = one"], "a word was accepted")
    editor.wait(lambda: editor.lua(DRAWN), "the next suggestion")
    editor.type("<M-Down>")
    editor.wait(lambda: editor.lines() == ["x = oneone two"], "a line was accepted")
    editor.wait(lambda: editor.lua(DRAWN), "the next suggestion")
    editor.type("<C-]>")
    editor.wait(lambda: not editor.lua(DRAWN), "it was dismissed")
    assert editor.lines() == ["x = oneone two"]


def test_neovims_own_takes_requests_back_at_the_next_key(builtin):
    editor = builtin("x", delay=1.0)
    editor.type("ia")
    editor.wait(lambda: "textDocument/inlineCompletion" in editor.methods(), "it is asked for")
    editor.type("b")
    editor.wait(lambda: "$/cancelRequest" in editor.methods(), "it is taken back")


def test_a_server_that_dies_is_started_again_and_one_that_keeps_dying_is_not(scripted):
    editor = scripted("(a, b)")
    for starts in (2, 3):
        editor.kill_server()
        editor.wait(lambda: editor.methods().count("initialized") == starts, "it is started again")
    editor.type("idef add")
    assert editor.wait(editor.ghost, "ghost text") == "(a, b)"
    editor.type("<Esc>")
    editor.kill_server()
    assert "3 times in a row" in editor.wait(lambda: editor.lua("return require('pio.server').problem"), "it is given up")
    assert editor.lua("return require('pio').statusline()") == "pio: no server"
    editor.type(":PioRestart<CR>")
    editor.wait(lambda: editor.methods().count("initialized") == 4, "a person can start it again")


def test_a_server_that_crashes_at_start_is_not_started_for_ever(start, tmp_path):
    editor = start([sys.executable, "-c", f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); raise SystemExit(3)"])
    assert "(exit code 3)" in editor.wait(lambda: editor.lua("return require('pio.server').problem"), "it is given up")
    assert (tmp_path / "starts").read_text() == "xxx"


def test_a_wrong_version_is_said(scripted):
    editor = scripted("x", flags=("--version", "7.0.0"))
    assert "version is 7.0.0" in editor.wait(lambda: (m := editor.messages()) and "version" in m and m, "a message")
    editor.type(":checkhealth pio<CR>")
    assert "the server's version is 7.0.0" in "\n".join(editor.wait(lambda: (l := editor.lines()) and "pio" in "".join(l) and l, "the report"))


def test_a_missing_server_is_said(start):
    editor = start(["/nowhere/pio-lsp"])
    problem = editor.wait(lambda: editor.lua("return require('pio.server').problem"), "it is said")
    assert problem.startswith("/nowhere/pio-lsp is not found")
    editor.type(":checkhealth pio<CR>")
    assert "/nowhere/pio-lsp is not found" in "\n".join(editor.wait(lambda: (l := editor.lines()) and "pio" in "".join(l) and l, "the report"))


def chat(editor: Neovim) -> str:
    return "\n".join(editor.lines("pio://chat"))


def test_the_chat_tells_what_the_model_sees(served):
    editor = served("It adds two numbers.", "def add(a, b):\n    return a + b\n")
    editor.type(":%PioChat /explain<CR>")
    editor.wait(lambda: "It adds two numbers." in chat(editor), "the answer")
    assert chat(editor).startswith("# /explain\n\n> Sees sample.py (8 tokens). ") and " tokens in all." in chat(editor)
    editor.type("iand<C-j>why?<CR>")
    editor.wait(lambda: "# and\n# why?" in chat(editor), "a question typed into the box")
    editor.wait(lambda: chat(editor).count("It adds two numbers.") == 2, "its answer")
    editor.type("<Esc>:PioNew<CR>")
    editor.wait(lambda: chat(editor) == "", "a new conversation")
    assert editor.lua("return #vim.api.nvim_list_wins()") == 3


def test_reasoning_is_folded(served):
    editor = served("<think>because</think>It adds.", "def add(a, b):\n    return a + b\n")
    editor.type(":PioChat why<CR>")
    editor.wait(lambda: "It adds." in chat(editor), "the answer")
    assert "{{{ Reasoning\nbecause\n}}}\nIt adds." in chat(editor)
    line = editor.lines("pio://chat").index("because") + 1
    window = "vim.fn.bufwinid('pio://chat')"
    assert editor.lua(f"return vim.api.nvim_win_call({window}, function() return vim.fn.foldclosed({line}) end)") == line - 1


def test_an_answer_comes_in_pieces_and_can_be_stopped(scripted):
    editor = scripted("part of an answer", flags=("hang",))
    editor.type(":PioChat why<CR>")
    editor.wait(lambda: "part of an answer" in chat(editor), "the beginning of an answer that never ends")
    editor.type("<C-c>")
    editor.wait(lambda: "**Stopped.**" in chat(editor), "it stops")
    assert "part of an answer" in chat(editor), "what had come stays"
    editor.wait(lambda: "$/cancelRequest" in editor.methods(), "the server is told")
    editor.type(":PioRetry<CR>")
    editor.wait(lambda: editor.methods().count("pio/chat") == 2 and "part of an answer" in chat(editor), "it is asked again")
    assert chat(editor).count("# why") == 1 and "Stopped" not in chat(editor)


def test_nothing_is_lost_when_the_server_dies_in_an_answer(scripted):
    editor = scripted("\x1b[31mpart of an answer <script>\n```", flags=("hang",))
    editor.type(":PioChat why<CR>")
    editor.wait(lambda: "part of an answer" in chat(editor), "the beginning of the answer")
    assert "\x1b" not in chat(editor) and "[31m" not in chat(editor), "no control codes"
    editor.kill_server()
    editor.wait(lambda: "The server ended in the middle of the answer" in chat(editor), "it is said")
    assert "part of an answer" in chat(editor)
    editor.wait(lambda: editor.methods().count("initialized") == 2, "it is started again")
    editor.type(":PioRetry<CR>")
    editor.wait(lambda: editor.methods().count("pio/chat") == 2 and "part of an answer" in chat(editor), "it is asked again")
    assert "ended" not in chat(editor)


ANSWER = "```python\nx = 3\ny = 2\nz = 4\n```"


def test_an_edit_is_a_diff_that_can_be_rejected_or_accepted_and_undone_in_one_step(served):
    editor = served(ANSWER, "x = 1\ny = 2\nz = 1\nw = 0\n")
    before = editor.lines()
    proposal = "return vim.fn.tabpagenr('$') == 2 and vim.wo.diff and vim.api.nvim_buf_get_lines(0, 0, -1, false)"
    for key in ("q", "<CR>"):
        editor.type("gg:1,3PioEdit make them larger<CR>")
        assert editor.wait(lambda: editor.lua(proposal), "the proposal") == ["x = 3", "y = 2", "z = 4", "w = 0"]
        assert editor.lines("sample.py") == before, "a proposal changes nothing"
        editor.type(key)
        editor.wait(lambda: editor.lua("return vim.fn.tabpagenr('$')") == 1, "the proposal is closed")
        assert editor.lines() == (before if key == "q" else ["x = 3", "y = 2", "z = 4", "w = 0"])
    editor.type("u")
    editor.wait(lambda: editor.lines() == before, "one undo takes all of it back")


def test_a_proposal_for_text_that_changed_is_not_applied(served):
    editor = served(ANSWER, "x = 1\ny = 2\nz = 1\n")
    editor.type(":%PioEdit make them larger<CR>")
    editor.wait(lambda: editor.lua("return vim.fn.tabpagenr('$')") == 2, "the proposal")
    editor.type("<C-w>hggdd<C-w>l<CR>")
    editor.wait(lambda: "changed since" in editor.messages(), "it is said")
    assert editor.lines() == ["y = 2", "z = 1"]


def test_what_cannot_be_changed_is_said(served):
    editor = served(ANSWER, "x = 1\n", lua="vim.o.modifiable = false")
    editor.type(":PioEdit make it larger<CR>")
    editor.wait(lambda: "cannot be changed" in editor.messages(), "it is said")
    assert editor.lines() == ["x = 1"]


def test_a_deleted_file_and_a_selection_too_large_are_no_crash(served):
    editor = served(ANSWER, "x = 1\n" * 10_000)
    editor.file.unlink()
    editor.type(":%PioEdit make it larger<CR>")
    editor.wait(lambda: "select less" in editor.messages(), "it is said")
    editor.type(":1,3PioEdit make them larger<CR>")
    editor.wait(lambda: editor.lua("return vim.fn.tabpagenr('$')") == 2, "the proposal")
    editor.type("<CR>")
    editor.wait(lambda: editor.lines()[:4] == ["x = 3", "y = 2", "z = 4", "x = 1"], "it is applied")


@pytest.mark.parametrize(("command", "instruction"), [
    ("PioRefactor", "easier to read"), ("PioDocs", "documentation comments"), ("PioFix", "line 2: y is not used")])
def test_code_actions_that_rewrite(served, command, instruction):
    editor = served(ANSWER, "x = 1\ny = 2\nz = 1\n")
    editor.lua("vim.diagnostic.set(vim.api.nvim_create_namespace('test'), 0, {{lnum = 1, col = 0, message = 'y is not used'}}); return 1")
    editor.type(f":%{command}<CR>")
    editor.wait(lambda: editor.lua("return vim.fn.tabpagenr('$')") == 2, "the proposal")
    assert instruction in editor.messages().replace("\n", " ")


def test_code_actions_of_the_menu_are_carried_out_in_the_editor(served):
    editor = served("It says x.", "x = 1\ny = 2\n")
    editor.type("ggVj<Cmd>lua vim.lsp.buf.code_action({filter = function(a) return a.title == 'pio: Explain' end, apply = true})<CR>")
    editor.wait(lambda: "It says x." in chat(editor), "an answer in the chat")
    assert editor.lines("pio://chat")[0] == "# /explain"


def test_the_model_is_chosen_with_completion_and_the_status_line_follows(served):
    editor = served("x", "")
    editor.wait(lambda: editor.lua("return require('pio').statusline()") == "pio smollm2-135m · cpu", "the status line")
    names = editor.lua("return vim.fn.getcompletion('PioModel ', 'cmdline')")
    assert "smollm2-135m" in names and "qwen3-0.6b" in names
    editor.type(":PioModel qwen3-0.6b<CR>")
    editor.wait(lambda: editor.lua("return require('pio').statusline()") == "pio qwen3-0.6b · cpu", "the status line")
    editor.type(":PioToggle<CR>")
    editor.wait(lambda: editor.lua("return require('pio').statusline()") == "pio: off", "the status line")
    editor.type("ix = ")
    editor.wait(lambda: editor.lua("local r = require('pio').client():request_sync('pio/explain', vim.empty_dict(), 1000); return r.result.reason")
                == "switched off by the setting enable", "the server knows")
    assert editor.ghost() is None


def test_the_status_line_tells_how_far_loading_is(start):
    editor = start([sys.executable, str(ENGINE), "--answer", "x", "--load-seconds", "600"])
    editor.wait(lambda: editor.lua("return require('pio').statusline()") == "pio: loading 50 %", "the status line")


def test_every_command_is_in_the_help_file_and_the_health_check_is_content(served):
    editor = served("x", "")
    commands = [name for name in editor.lua("return vim.tbl_keys(vim.api.nvim_get_commands({}))") if name.startswith("Pio")]
    text = (HERE.parents[1] / "editors" / "neovim" / "doc" / "pio.txt").read_text()
    assert len(commands) >= 15 and all(f"*:{name}*" in text for name in commands)
    assert all(f"{action} =" in text for action in editor.lua("return vim.tbl_keys(require('pio').defaults.keys)"))
    editor.type(":checkhealth pio<CR>")
    report = "\n".join(editor.wait(lambda: (l := editor.lines()) and "is ready on" in "".join(l) and l, "the report"))
    assert "ERROR" not in report and "WARNING" not in report


# Notes when a key comes that the ghost text did not foresee, and when the ghost text after it is put on the screen.
WATCH_GHOST = """
vim.cmd('filetype indent off | set noautoindent')
pio_times, pio_along, pio_key = {}, 0, nil
vim.on_key(function(_, typed)
  local ghost = require('pio.ghost').text()
  local along = ghost and typed and typed ~= '' and vim.startswith(ghost, typed == '\\r' and '\\n' or typed)
  if along then pio_along = pio_along + 1 end
  pio_key = typed and typed ~= '' and not along and vim.uv.hrtime() or nil
end)
local set = vim.api.nvim_buf_set_extmark
vim.api.nvim_buf_set_extmark = function(buf, namespace, ...)
  if pio_key and namespace == vim.api.nvim_get_namespaces().pio then
    pio_times[#pio_times + 1] = (vim.uv.hrtime() - pio_key) / 1e6
    pio_key = nil
  end
  return set(buf, namespace, ...)
end
"""


def test_the_real_model_writes_into_a_file(start):
    """pio-lsp with the default model: text typed, ghost shown, accepted, saved; how long it takes is printed."""
    editor = start(None, 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n', "fibonacci.py", lua=WATCH_GHOST)
    editor.wait(lambda: editor.lua("local s = require('pio.server').status; return s and s.state == 'ready'"), "the model is loaded", 300)
    editor.type("Go")
    typed = "    if n <= 1:\n        return n\n    a, b = 0, 1\n    for i in ra"
    for key in typed:
        editor.type({"\n": "<CR>", "<": "<lt>"}.get(key, key))
        time.sleep(0.25)   # as a person does; nothing below needs it
    times, along = editor.lua("return {pio_times, pio_along}")
    print(f"key to ghost text: p50 {median(times):.0f} ms, most {max(times):.0f} ms, of {len(times)} keys; {along} more went along with it")
    editor.wait(lambda: "\n".join(editor.lines()).endswith(typed), "the keys are typed")
    ghost = editor.wait(editor.ghost, "ghost text")
    before = "\n".join(editor.lines())
    editor.type("<Tab>")
    editor.wait(lambda: "\n".join(editor.lines()) == before + ghost, "it was accepted")
    editor.type("<Esc>:w<CR>")
    editor.wait(lambda: editor.file.read_text() == before + ghost + "\n", "it is on the disk")


def test_what_the_engine_writes_is_shown_soon(served):
    """From the engine to the buffer of the chat, of the first word of an answer; printed."""
    editor = served("", "", "--stamp")
    editor.type(":PioChat<CR>")
    editor.wait(lambda: chat(editor) == "", "the chat is open")
    editor.lua("""
        pio_delays = {}
        local buf, seen = vim.fn.bufnr('pio://chat'), {}
        vim.api.nvim_buf_attach(buf, false, { on_lines = function(_, _, _, first, _, last)
          local seconds, micro = vim.uv.gettimeofday()
          for _, line in ipairs(vim.api.nvim_buf_get_lines(buf, first, last, false)) do
            local written = tonumber(line)
            if written and not seen[line] then seen[line] = true; pio_delays[#pio_delays + 1] = 1000 * (seconds + micro / 1e6 - written) end
          end
        end })
        return 1""")
    for asked in range(1, 11):
        editor.type("<Esc>:PioChat when<CR>")
        editor.wait(lambda: editor.lua("return #pio_delays") == asked, "an answer")
    delays = editor.lua("return pio_delays")
    print(f"engine to the chat: p50 {median(delays):.0f} ms, most {max(delays):.0f} ms, of {len(delays)} first words")
