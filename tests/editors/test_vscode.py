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
def vscode(playwright, tmp_path):
    running = []

    def start(files: dict[str, str], **options) -> VSCode:
        running.append(VSCode(playwright, tmp_path, files, **options))
        return running[0]

    yield start
    for editor in running:
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
    editor.ready()


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
