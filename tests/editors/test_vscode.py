"""The VS Code extension in a real VS Code. Needs install_vscode.sh; run with -m vscode."""

from __future__ import annotations

import os
import re
import signal
import sys
import zipfile
from pathlib import Path
from statistics import median

import pytest

pytestmark = pytest.mark.vscode
pytest.importorskip("playwright")
from playwright.sync_api import TimeoutError, sync_playwright  # noqa: E402

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


ENGINE = [sys.executable, str(Path(__file__).parents[1] / "lsp" / "scripted_engine.py")]   # pio-lsp, over an engine that says what it is told to
FIBONACCI = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'


class Scripted:
    """A server that says what the test tells it to (scripted_server.py), and the methods it has seen."""

    def __init__(self, folder: Path, suggestion: str, *flags: str):
        self._log = folder / "log"
        script = str(Path(__file__).parent / "scripted_server.py")
        self.command = [sys.executable, script, suggestion.encode("unicode_escape").decode(), "0", str(self._log), *flags]

    def seen(self, method: str) -> int:
        return self._log.read_text().splitlines().count(method) if self._log.exists() else 0

    def kill(self) -> None:
        os.kill(int(Path(f"{self._log}.pid").read_text()), signal.SIGKILL)


# Notes when a key is pressed, and when a picture of the screen has ghost text at another place of the cursor.
WATCH_GHOST = """() => {
  const place = () => document.querySelector(".editor-instance .cursor")?.style.cssText.replace(/visibility[^;]*;?/, "");
  window.pio = { key: 0, place: "", drawn: -1 };
  addEventListener("keydown", () => { window.pio = { key: performance.now(), place: place(), drawn: 0 }; }, true);
  new MutationObserver(() => {
    if (pio.drawn !== 0 || place() === pio.place || !document.querySelector(".ghost-text, .ghost-text-decoration")) return;
    pio.drawn = -1;
    const { key } = pio;
    requestAnimationFrame(() => setTimeout(() => { if (pio.key === key) pio.drawn = performance.now(); }));
  }).observe(document.querySelector(".part.editor"), { subtree: true, childList: true, characterData: true, attributes: true });
}"""
DEBOUNCE = 50    # ms after a key at which VS Code asks: what is drawn earlier stood there before
LONGEST = 2000   # ms that a key's ghost text is waited for: at some places the model suggests nothing


def test_the_real_model_writes_into_a_file(vscode):
    """Ghost text is shown, Tab accepts it, the file is on the disk; how long it takes is printed."""
    editor = vscode({"fibonacci.py": FIBONACCI})
    editor.open("fibonacci.py")
    print("status bar:", editor.ready())
    editor.press("Control+End")
    editor.page.evaluate(WATCH_GHOST)
    times, typed = [], FIBONACCI
    for key in "    if n <= 1:\n        return n\n    a, b = 0, 1\n    for i in ra":
        typed += key
        editor.type(key)
        try:
            editor.page.wait_for_function("() => pio.drawn > 0", timeout=LONGEST)
        except TimeoutError:
            continue
        times.append(editor.page.evaluate("() => pio.drawn - pio.key"))
    asked = [took for took in times if took > DEBOUNCE]
    print(f"key to ghost text: p50 {median(asked):.0f} ms, most {max(asked):.0f} ms, of {len(asked)} keys; {len(times) - len(asked)} more went along with it")
    print("status bar:", editor.status_bar())
    ghost = editor.ghost_text()
    editor.shot("ghost-text")
    editor.press("Tab")
    text = editor.saved("fibonacci.py")
    assert text.startswith(typed) and len(text) > len(typed)
    assert all(piece.strip() in text[len(typed):] for piece in ghost)
    assert not editor.foreign, "nothing is asked of another machine"
    assert not internet_sockets(editor.process.pid, "lsp_server"), "nor by the server"


def internet_sockets(parent: int, program: str) -> list[str]:
    """The TCP and UDP sockets of the processes below `parent` whose command line holds `program`."""
    inodes = {line.split()[9]: line for name in ("tcp", "tcp6", "udp", "udp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]}
    found, processes = [], [p for p in Path("/proc").glob("[0-9]*") if program in _read(p / "cmdline") and os.getsid(int(p.name)) == os.getsid(parent)]
    assert processes, f"{program} runs"
    for process in processes:
        links = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        found += [inodes[link[8:-1]] for link in links if link.startswith("socket:[") and link[8:-1] in inodes]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:   # it is gone
        return ""


def test_the_package_is_small_starts_fast_and_knows_no_network(vscode):
    """How long its activation takes is printed, as VS Code itself tells it."""
    with zipfile.ZipFile(INSTALLED / "pio.vsix") as package:
        program = package.read("extension/dist/extension.js").decode()
    size = (INSTALLED / "pio.vsix").stat().st_size
    assert size < 1_000_000
    assert not re.search(r"""require\("(node:)?(https?|http2|tls|dgram|dns)(/promises)?"\)|\b(fetch|XMLHttpRequest|WebSocket)\(""", program)
    editor = vscode({"a.py": ""})
    editor.ready()
    editor.command("Developer: Show Running Extensions")
    row = editor.page.locator('.runtime-extensions-editor .monaco-list-row:has-text("inference-pio.pio"), .runtime-extensions-editor .monaco-list-row:has-text("pio: code completion")')
    took = wait(lambda: row.count() and re.search(r"(\d+)\s?ms", row.first.text_content() or ""), "the activation time is shown", editor)
    print(f"the package has {size} bytes and is activated in {took[1]} ms")


def test_a_server_that_dies_is_started_again_and_one_that_keeps_dying_is_not(vscode, tmp_path):
    server = Scripted(tmp_path, "(a, b)", "slow")
    editor = vscode({"a.py": "x = 1\n"}, command=server.command)
    editor.open("a.py")
    editor.press("Control+End")
    editor.type("def add")
    assert "".join(editor.ghost_text()) == "(a, b)", "also what was typed while the server started is completed"
    server.kill()
    wait(lambda: server.seen("initialize") == 2, "it is started again", editor)
    editor.type("_")   # while there is nobody to ask
    wait(lambda: "def add_" in editor.lines(), "the key is drawn", editor)
    assert "".join(editor.ghost_text()) == "(a, b)", "it goes on as if nothing had happened"
    server.kill()
    wait(lambda: server.seen("initialize") == 3, "it is started again", editor)
    server.kill()      # in the middle of its start
    assert "3 times in a row" in wait(editor.problem, "the status bar tells why there is no server", editor)
    assert server.seen("initialize") == 3
    editor.command("pio: Restart Server")
    wait(lambda: server.seen("initialized") and server.seen("initialize") == 4, "a person can start it again", editor)
    wait(lambda: not editor.problem(), "the status bar has no error any more", editor)


def test_a_server_that_crashes_at_start_is_told_with_its_last_words(vscode, tmp_path):
    script = f"import sys; open({str(tmp_path / 'starts')!r}, 'a').write('x'); sys.exit('no such option: --frobnicate')"
    editor = vscode({"a.py": ""}, command=[sys.executable, "-c", script])
    problem = wait(editor.problem, "the status bar tells why there is no server", editor)
    assert "3 times in a row" in problem and "no such option: --frobnicate" in problem
    assert (tmp_path / "starts").read_text() == "xxx"


def test_no_server_is_said_with_ways_out(vscode):
    editor = vscode({"a.py": ""}, command=["/nowhere/pio-lsp"])
    assert "/nowhere/pio-lsp" in wait(editor.problem, "the status bar tells what is wrong", editor)
    buttons = editor.page.locator('.notification-list-item:has-text("/nowhere/pio-lsp") .monaco-button')
    wait(lambda: buttons.count() >= 2, "a notification offers ways out", editor)


def test_a_wrong_version_is_said(vscode, tmp_path):
    editor = vscode({"a.py": ""}, command=Scripted(tmp_path, "x", "--version", "7.0.0").command)
    editor.notified("the server's version is 7.0.0")


def test_ten_thousand_lines_a_read_only_and_a_deleted_file(vscode):
    """Each ends in one sentence, and the next edit works."""
    files = {"long.py": "x = 1\n" * 10_000, "fixed.py": "x = 1\n", "gone.py": "x = 1\n", "a.py": "x = 1\n"}
    editor = vscode(files, command=[*ENGINE, "--answer", "```python\nx = 3\n```"], settings={"files.readonlyInclude": {"**/fixed.py": True}})

    def edit() -> None:
        editor.press("Control+a")
        editor.command("pio: Edit Selection")
        editor.answer("What should be changed?", "make it three")

    def accept() -> None:
        editor.page.wait_for_selector(".monaco-diff-editor .line-insert")
        editor.press("Control+Enter")

    editor.open("long.py")
    edit()
    editor.notified("select less")
    editor.open("fixed.py")
    edit()
    accept()
    editor.notified("fixed.py cannot be changed")
    editor.focus("fixed.py")   # where it is drawn as on the disk
    editor.open("gone.py")
    edit()
    editor.page.wait_for_selector(".monaco-diff-editor .line-insert")
    (editor.workspace / "gone.py").unlink()
    accept()
    editor.notified("gone.py cannot be changed")
    editor.open("a.py")
    edit()
    accept()
    assert editor.saved("a.py") == "x = 3\n"


def test_two_windows_on_one_folder(vscode):
    first = vscode({"a.py": "x = 1\n"}, command=[*ENGINE, "--answer", "(a, b)"])
    second = first.another_window()
    for editor, name in ((first, "one"), (second, "two")):
        editor.open("a.py")
        editor.ready()
        editor.press("Control+End")
        editor.type(f"def {name}")
        assert "".join(editor.ghost_text(asking=True)) == "(a, b)"
        editor.press("Tab")
        assert editor.saved("a.py").endswith(f"def {name}(a, b)")
    wait(lambda: "def two(a, b)" in first.lines(), "the other window sees what was saved", first)


def test_settings_reach_the_running_server(vscode):
    editor = vscode({"fibonacci.py": FIBONACCI})
    editor.open("fibonacci.py")
    editor.ready()
    editor.press("Control+End")
    editor.command("pio: Switch Completions On or Off")
    wait(lambda: "Completions are switched off" in editor.told(), "the server knows that completions are switched off", editor)
    editor.type("    if n <")
    wait(lambda: "switched off by the setting" in editor.told(), "the server has answered", editor)
    assert editor.ghost.count() == 0
    editor.command("pio: Switch Completions On or Off")
    wait(lambda: "Completions are switched off" not in editor.told(), "the server knows that they are on", editor)
    editor.type(" ")
    editor.ghost_text()
    editor.press("Escape")
    editor.command("pio: Select Model")
    editor.choose("Model", "Another")
    editor.answer("A Hugging Face id", "no-such-model")
    assert "no-such-model" in wait(editor.problem, "the status bar shows what the server says", editor)
    editor.command("pio: Select Model")
    editor.choose("Model", "smollm2-135m")
    wait(lambda: "smollm2-135m ·" in editor.status_bar(), "the other model is loaded", editor)


def test_why_nothing_was_shown_is_told(vscode):
    editor = vscode({".env": "PASSWORD=1\n"})
    editor.open(".env")
    editor.ready()
    editor.press("Control+End")
    editor.type("TOKEN")
    wait(lambda: "secret file" in editor.told(), "the request is answered", editor)
    editor.command("pio: Why Was This")
    wait(lambda: "reason: secret file" in editor.lines(), "the reason is shown", editor)


def test_the_chat_streams_and_says_what_it_sees(vscode):
    """The real model is asked about a selection."""
    editor = vscode({"add.py": "def add(a, b):\n    return a - b\n"})
    editor.open("add.py")
    editor.ready()
    editor.press("Control+a")
    editor.command("pio: Focus on Chat View")
    view = editor.frame("#question")
    view.fill("#question", "/explain")
    view.press("#question", "Enter")
    view.wait_for_selector('article.assistant[data-done="true"]')
    assert "add.py (" in view.text_content(".note"), "it says what the model sees"
    assert len(view.text_content(".answer")) > 20
    editor.shot("chat")


# When the answer, which is the time at which the engine wrote it, stands in the next picture of the screen.
WATCH_ANSWER = """() => {
  window.delays = [];
  const seen = new Set();
  new MutationObserver(() => {
    for (const { textContent } of document.querySelectorAll(".answer")) {
      if (!textContent.trim() || seen.has(textContent)) continue;
      seen.add(textContent);
      requestAnimationFrame(() => setTimeout(() => delays.push(Date.now() - 1000 * Number(textContent))));
    }
  }).observe(document.getElementById("log"), { subtree: true, childList: true, characterData: true });
}"""


def test_what_the_engine_writes_is_shown_soon(vscode):
    """From the engine to the screen, of the first word of an answer; printed."""
    editor = vscode({"a.py": ""}, command=[*ENGINE, "--stamp"])
    editor.open("a.py")
    editor.command("pio: Focus on Chat View")
    view = editor.frame("#question")
    view.wait_for_selector("#question:enabled")
    view.evaluate(WATCH_ANSWER)
    for asked in range(1, 11):
        view.fill("#question", "when")
        view.press("#question", "Enter")
        view.wait_for_function(f"() => delays.length === {asked}")
        view.wait_for_selector('article:last-child[data-done="true"]')
    delays = view.evaluate("() => delays")
    print(f"engine to screen: p50 {median(delays):.0f} ms, most {max(delays):.0f} ms, of {len(delays)} first words")


HOSTILE = ("<img src=x onerror=\"document.body.dataset.owned=1\"><script>document.body.dataset.owned=1</script>\x1b[31mred\n\n"
           "**bold** and `code`\n\n```python\nprint('open fence')\n")


def test_what_a_model_writes_is_text_and_code_is_applied_as_a_diff(vscode, tmp_path):
    editor = vscode({"a.py": "x = 1\ny = 2\n"}, command=Scripted(tmp_path, HOSTILE, "thinks").command)
    editor.open("a.py")
    editor.press("Control+Home", "Shift+ArrowDown")
    editor.command("pio: Focus on Chat View")
    view = editor.frame("#question")
    view.fill("#question", "go")
    view.press("#question", "Enter")
    view.wait_for_selector('article.assistant[data-done="true"] pre')
    answer = view.locator(".answer")
    assert answer.locator("img, script").count() == 0 and "<script>" in answer.text_content() and "\x1b" not in answer.text_content()
    assert view.evaluate("document.body.dataset.owned") is None
    assert answer.locator("strong").text_content() == "bold" and answer.locator("pre .string").text_content() == "'open fence'"
    thoughts = view.locator("details.reasoning")
    assert "<b>because</b>" in thoughts.text_content() and thoughts.get_attribute("open") is None, "reasoning is folded"
    editor.shot("hostile")
    view.click("text=Apply")
    editor.page.wait_for_selector('.tab.active:has-text("proposal")')
    editor.page.wait_for_selector(".monaco-diff-editor .line-insert")
    editor.shot("diff")
    assert (editor.workspace / "a.py").read_text() == "x = 1\ny = 2\n", "a proposal changes nothing"
    editor.command("pio: Accept Proposal")
    assert editor.saved("a.py") == "print('open fence')\ny = 2\n"
    editor.focus("a.py")
    editor.press("Control+z")
    assert editor.saved("a.py") == "x = 1\ny = 2\n", "one undo takes all of it back"


def test_an_answer_can_be_stopped_and_a_server_that_dies_in_one_loses_nothing(vscode, tmp_path):
    server = Scripted(tmp_path, "part of an answer", "hang")
    editor = vscode({"a.py": "x = 1\n"}, command=server.command)
    editor.open("a.py")
    editor.command("pio: Focus on Chat View")
    view = editor.frame("#question")
    view.fill("#question", "tell me")
    view.press("#question", "Enter")
    view.wait_for_selector("text=part of an answer")
    view.click("#stop")
    view.wait_for_selector("article:last-child .error >> text=Stopped.")
    assert "part of an answer" in view.text_content(".answer"), "what had come stays"
    wait(lambda: server.seen("$/cancelRequest"), "the server is told", editor)
    view.fill("#question", "why")
    view.press("#question", "Enter")
    view.wait_for_selector("article:nth-child(4) >> text=part of an answer")
    server.kill()
    view.wait_for_selector("article:last-child .error >> text=The server ended")
    assert "part of an answer" in view.text_content("article:nth-child(4) .answer")
    view.click("text=Retry")   # perhaps before the server is there again
    view.wait_for_selector('article.assistant[data-done="false"] >> text=part of an answer')
    assert view.locator("article").count() == 4 and server.seen("initialize") == 2


def test_an_edit_is_a_diff_that_can_be_rejected(vscode, tmp_path):
    editor = vscode({"a.py": "x = 1\ny = 2\n"}, command=Scripted(tmp_path, "x = 3\n").command)
    editor.open("a.py")
    for accepted in (False, True):
        editor.focus("a.py")
        editor.press("Control+Home", "Shift+ArrowDown")
        editor.command("pio: Edit Selection")
        editor.answer("What should be changed?", "make it three")
        editor.page.wait_for_selector('.tab.active:has-text("proposal")')
        editor.page.wait_for_selector(".monaco-diff-editor .line-insert")
        editor.press("Control+Enter" if accepted else "Escape")
    assert editor.saved("a.py") == "x = 3\ny = 2\n"
    editor.focus("a.py")
    editor.press("Control+z")
    assert editor.saved("a.py") == "x = 1\ny = 2\n"
