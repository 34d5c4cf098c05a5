"""The VS Code extension in a real VS Code. Needs install_vscode.sh; run with -m vscode."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.vscode
pytest.importorskip("playwright")
from playwright.sync_api import sync_playwright  # noqa: E402

from vscode import INSTALLED, VSCode, wait  # noqa: E402

if not (INSTALLED / "pio.vsix").exists():
    pytest.skip("VS Code is not installed: run tests/editors/install_vscode.sh", allow_module_level=True)


@pytest.fixture(scope="module")
def playwright():
    with sync_playwright() as started:
        yield started


@pytest.fixture
def vscode(playwright, tmp_path, request):
    running = []

    def start(files: dict[str, str], **options) -> VSCode:
        running.append(VSCode(playwright, tmp_path, files, **options))
        return running[0]

    yield start
    for editor in running:
        editor.shot("end-" + request.node.name)
        editor.close()


SCRIPTED = [sys.executable, str(Path(__file__).parent / "scripted_server.py")]
FIBONACCI = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'


def test_the_real_model_writes_into_a_file(vscode):
    """Ghost text is shown, Tab accepts it, the file is on the disk; how long it takes is printed."""
    editor = vscode({"fibonacci.py": FIBONACCI})
    editor.open("fibonacci.py")
    print("status bar:", editor.ready())
    editor.press("Control+End")
    editor.type("    if n ", delay=80)
    editor.type("<")
    begin = time.monotonic()
    ghost = editor.ghost_text()
    print(f"ghost text {1000 * (time.monotonic() - begin):.0f} ms after the last key: {ghost}")
    editor.shot("ghost-text")
    editor.press("Tab")
    text = editor.saved("fibonacci.py")
    typed = FIBONACCI + "    if n <"
    assert text.startswith(typed) and len(text) > len(typed)
    assert all(piece.strip() in text[len(typed):] for piece in ghost)
    assert not editor.foreign, "nothing is asked of another machine"


def test_a_server_that_dies_is_started_again_and_one_that_keeps_dying_is_not(vscode, tmp_path):
    editor = vscode({"a.py": "x = 1\n"}, command=[*SCRIPTED, "(a, b)", "0", str(tmp_path / "log")])
    editor.open("a.py")
    starts = lambda: (tmp_path / "log").read_text().count("initialize\n")   # noqa: E731
    wait(lambda: (tmp_path / "log").exists() and starts() == 1, "the server runs", 30, editor)
    editor.press("Control+End")
    editor.type("def add")
    assert "".join(editor.ghost_text()) == "(a, b)"
    os.kill(int((tmp_path / "log.pid").read_text()), signal.SIGKILL)
    wait(lambda: starts() == 2, "it is started again", 30, editor)
    editor.type("_")
    assert "".join(editor.ghost_text()) == "(a, b)", "it goes on as if nothing had happened"
    for count in (2, 3):
        os.kill(int((tmp_path / "log.pid").read_text()), signal.SIGKILL)
        if count < 3:
            wait(lambda: starts() == 3, "it is started again", 30, editor)
    assert "3 times in a row" in wait(editor.problem, "the status bar tells why there is no server", 30, editor)
    editor.command("pio: Restart Server")
    wait(lambda: starts() == 4, "a person can start it again", 30, editor)


def test_no_server_is_said_with_ways_out(vscode):
    editor = vscode({"a.py": ""}, command=["/nowhere/pio-lsp"])
    assert "/nowhere/pio-lsp" in wait(editor.problem, "the status bar tells what is wrong", 30, editor)
    assert editor.page.locator('.notification-list-item:has-text("/nowhere/pio-lsp") .monaco-button').count() >= 2


def test_settings_reach_the_running_server(vscode):
    editor = vscode({"fibonacci.py": FIBONACCI})
    editor.open("fibonacci.py")
    editor.ready()
    editor.press("Control+End")
    editor.command("pio: Switch Completions On or Off")
    editor.page.wait_for_timeout(1000)
    editor.type("    if n <", delay=60)
    editor.page.wait_for_timeout(1500)
    assert editor.ghost.count() == 0, "completions are switched off"
    editor.command("pio: Switch Completions On or Off")
    editor.page.wait_for_timeout(1000)
    editor.type(" ")
    editor.ghost_text()
    editor.press("Escape")
    editor.command("pio: Select Model")
    editor.choose("Another")
    editor.answer("no-such-model")
    assert "no-such-model" in wait(editor.problem, "the status bar shows what the server says", 30, editor)
    editor.command("pio: Select Model")
    editor.choose("smollm2-135m")
    wait(lambda: "smollm2-135m ·" in editor.status_bar(), "the other model is loaded", 60, editor)


def test_why_nothing_was_shown_is_told(vscode):
    editor = vscode({".env": "PASSWORD=1\n"})
    editor.open(".env")
    editor.ready()
    editor.press("Control+End")
    editor.type("TOKEN", delay=60)
    editor.page.wait_for_timeout(500)
    editor.command("pio: Why Was This")
    wait(lambda: "secret file" in (editor.page.locator(".editor-instance .view-lines").last.text_content() or "").replace("\u00a0", " "),
         "the reason is shown", 10, editor)


def test_the_chat_streams_and_code_goes_into_the_file(vscode):
    """The real model is asked about a selection; what it says is shown, stopped, copied; nothing it writes is executed."""
    editor = vscode({"add.py": "def add(a, b):\n    return a - b\n"})
    editor.open("add.py")
    editor.ready()
    editor.press("Control+a")
    editor.command("pio: Focus on Chat View")
    view = editor.frame("#question")
    view.fill("#question", "/explain")
    view.press("#question", "Enter")
    begin = time.monotonic()
    view.wait_for_selector(".answer:not(:empty)")
    print(f"first words {1000 * (time.monotonic() - begin):.0f} ms after Enter")
    view.wait_for_selector('article.assistant[data-done="true"]', timeout=60_000)
    assert "add.py (" in view.text_content(".note"), "it says what the model sees"
    assert len(view.text_content(".answer")) > 20
    editor.shot("chat")
    view.fill("#question", "Write a very long story.")
    view.press("#question", "Enter")
    view.wait_for_selector("article:nth-child(4) .answer:not(:empty)")
    view.click("#stop")
    wait(lambda: view.locator("article:last-child .error").count(), "it stops", 5, editor)
    assert view.text_content("article:last-child .error") == "Stopped."
    assert view.text_content("article:last-child .answer").strip(), "what had come stays"


HOSTILE = ("<img src=x onerror=\"document.body.dataset.owned=1\"><script>document.body.dataset.owned=1</script>\x1b[31mred\n\n"
           "**bold** and `code`\n\n```python\nprint('open fence')\n")


def test_what_a_model_writes_is_text_and_code_is_applied_as_a_diff(vscode, tmp_path):
    editor = vscode({"a.py": "x = 1\ny = 2\n"}, command=[*SCRIPTED, HOSTILE.encode("unicode_escape").decode(), "0", str(tmp_path / "log")])
    editor.open("a.py")
    editor.press("Control+Home", "Shift+ArrowDown")
    editor.command("pio: Focus on Chat View")
    view = editor.frame("#question")
    wait(lambda: "initialized" in (tmp_path / "log").read_text(), "the server runs", 30, editor)
    view.fill("#question", "go")
    view.press("#question", "Enter")
    view.wait_for_selector('article.assistant[data-done="true"] pre')
    answer = view.locator(".answer")
    assert answer.locator("img, script").count() == 0 and "<script>" in answer.text_content() and "\x1b" not in answer.text_content()
    assert view.evaluate("document.body.dataset.owned") is None
    assert answer.locator("strong").text_content() == "bold" and answer.locator("pre .string").text_content() == "'open fence'"
    editor.shot("hostile")
    view.click("text=Apply")
    editor.page.wait_for_selector('.tab.active:has-text("proposal")')
    editor.page.wait_for_selector(".monaco-diff-editor .line-insert")
    editor.shot("diff")
    assert (editor.workspace / "a.py").read_text() == "x = 1\ny = 2\n", "a proposal changes nothing"
    editor.command("pio: Accept Proposal")
    editor.page.wait_for_selector('.tab.active:has-text("a.py"):not(:has-text("proposal"))')
    assert editor.saved("a.py") == "print('open fence')\ny = 2\n"
    editor.press("Control+z")
    assert editor.saved("a.py") == "x = 1\ny = 2\n", "one undo takes all of it back"


def test_a_server_that_dies_in_an_answer_loses_nothing(vscode, tmp_path):
    editor = vscode({"a.py": "x = 1\n"}, command=[*SCRIPTED, "part of an answer", "0", str(tmp_path / "log"), "hang"])
    editor.open("a.py")
    editor.command("pio: Focus on Chat View")
    view = editor.frame("#question")
    wait(lambda: "initialized" in (tmp_path / "log").read_text(), "the server runs", 30, editor)
    view.fill("#question", "why")
    view.press("#question", "Enter")
    view.wait_for_selector("text=part of an answer")
    os.kill(int((tmp_path / "log.pid").read_text()), signal.SIGKILL)
    view.wait_for_selector("article:last-child .error")
    assert "part of an answer" in view.text_content(".answer") and "ended" in view.text_content(".error")
    wait(lambda: (tmp_path / "log").read_text().count("initialized\n") == 2, "it is started again", 30, editor)
    view.click("text=Retry")
    view.wait_for_selector('article.assistant[data-done="false"] >> text=part of an answer')
    assert view.locator("article").count() == 2


def test_an_edit_is_a_diff_that_can_be_rejected(vscode, tmp_path):
    editor = vscode({"a.py": "x = 1\ny = 2\n"}, command=[*SCRIPTED, "x = 3\n", "0", str(tmp_path / "log")])
    editor.open("a.py")
    wait(lambda: (tmp_path / "log").exists() and "initialized" in (tmp_path / "log").read_text(), "the server runs", 30, editor)
    for accepted in (False, True):
        editor.press("Control+Home", "Shift+ArrowDown")
        editor.command("pio: Edit Selection")
        editor.answer("make it three")
        editor.page.wait_for_selector('.tab.active:has-text("proposal")')
        editor.page.wait_for_selector(".monaco-diff-editor .line-insert")
        editor.press("Control+Enter" if accepted else "Escape")
        editor.page.wait_for_selector('.tab.active:has-text("a.py"):not(:has-text("proposal"))')
        editor.page.wait_for_selector(".monaco-diff-editor", state="detached")
    assert editor.saved("a.py") == "x = 3\ny = 2\n"
    editor.press("Control+z")
    assert editor.saved("a.py") == "x = 1\ny = 2\n"
