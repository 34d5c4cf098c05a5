"""A real VS Code (code-server) in a real browser, driven as a person would: keys, clicks, and the file on the disk.

Nothing here or in the scenarios waits for a length of time: each step waits until what it needs can be seen."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Frame, Locator, Page, Playwright, TimeoutError

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "build" / "vscode"          # by install_vscode.sh
SHOTS = INSTALLED / "screenshots"
SERVER = [sys.executable, "-m", "inference_pio.lsp_server"]
_ENTRY = INSTALLED / "node_modules" / "code-server" / "out" / "node" / "entry.js"
_PATIENCE = 120      # seconds: how long a machine may take that does much else; no test passes or fails by being fast
_QUIET = {
    "workbench.startupEditor": "none", "security.workspace.trust.enabled": False, "telemetry.telemetryLevel": "off", "update.mode": "none",
    "extensions.autoCheckUpdates": False, "extensions.autoUpdate": False, "workbench.enableExperiments": False, "workbench.tips.enabled": False,
    "workbench.secondarySideBar.defaultVisibility": "hidden", "editor.wordBasedSuggestions": "off", "editor.autoClosingBrackets": "never",
    "editor.quickSuggestions": {"other": "off", "comments": "off", "strings": "off"}, "editor.minimap.enabled": False, "files.autoSave": "off",
    "editor.autoIndent": "none", "editor.scrollBeyondLastLine": False, "workbench.colorTheme": "Default Dark Modern",
}


class VSCode:
    """Opens a workspace with `files` in it; `command` starts the server. The extension is the packaged one."""

    def __init__(self, playwright: Playwright, folder: Path, files: dict[str, str], command: list[str] | None = None,
                 settings: dict | None = None, viewport: tuple[int, int] = (1200, 750)):
        self.workspace, self._data, extensions = folder / "workspace", folder / "data", folder / "extensions"
        self.workspace.mkdir()
        for name, text in files.items():
            (self.workspace / name).write_text(text)
        self._stored = dict(files)
        user = self._data / "User" / "settings.json"
        user.parent.mkdir(parents=True)
        user.write_text(json.dumps({**_QUIET, **(settings or {})}))
        machine = self._data / "Machine" / "settings.json"   # paths of programs belong to the machine, not to the person
        machine.parent.mkdir()
        machine.write_text(json.dumps({"pio.command": command or SERVER}))
        node = INSTALLED / "node" / "bin" / "node"
        common = [node, _ENTRY, "--extensions-dir", extensions, "--user-data-dir", self._data, "--config", folder / "config.yaml"]
        subprocess.run([*common, "--install-extension", INSTALLED / "pio.vsix"], check=True, capture_output=True, timeout=2 * _PATIENCE)
        port = _free_port()
        self._log = (folder / "code-server.log").open("w")
        self.process = subprocess.Popen(
            [*common, "--auth", "none", "--bind-addr", f"127.0.0.1:{port}", "--disable-telemetry", "--disable-update-check",
             "--disable-workspace-trust", "--disable-getting-started-override", self.workspace],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True)
        address = f"http://127.0.0.1:{port}"
        wait(lambda: _healthy(address), "code-server answers")
        self._browser = playwright.chromium.launch(executable_path="/usr/bin/chromium",
                                                   args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        self._address, self._viewport = f"{address}/?folder={self.workspace}", dict(zip(("width", "height"), viewport, strict=True))
        self.foreign: list[str] = []   # what the pages asked of other machines
        self.page = self._window()

    def _window(self) -> Page:
        page = self._browser.new_page(viewport=self._viewport)
        page.set_default_timeout(1000 * _PATIENCE)
        page.on("console", lambda message: self._log.write(f"browser: {message.text}\n"))
        page.on("request", lambda request: self._seen(request.url))
        page.goto(self._address)
        page.wait_for_selector(".monaco-workbench")
        return page

    def another_window(self) -> VSCode:
        """On the same folder, of the same VS Code."""
        other = copy.copy(self)
        other.page = self._window()
        return other

    def _seen(self, url: str) -> None:
        if url.startswith("http") and "127.0.0.1" not in url and "open-vsx.org" not in url:   # VS Code's own gallery
            self.foreign.append(url)

    def open(self, name: str) -> None:
        self.page.dblclick(f'.explorer-folders-view .monaco-list-row:has-text("{name}")')
        self.focus(name)

    def focus(self, name: str) -> None:
        """Wait until the file stands in the editor, as on the disk, and the keys go there. (Playwright's click would scroll the editor.)"""
        self.page.wait_for_selector(f'.tab.active:has-text("{name}"):not(:has-text("proposal"))')
        self.page.wait_for_selector(".monaco-diff-editor", state="detached")
        begin = (self.workspace / name).read_text().partition("\n")[0].strip()
        wait(lambda: begin in self.lines(), f"{name} is drawn", editor=self)
        wait(lambda: self.page.locator(".editor-instance .monaco-editor.focused").count() or self.press("Control+1"), "the editor has the keys", editor=self)

    def lines(self) -> str:
        """What is drawn of the document, ghost text included."""
        found = self.page.locator(".editor-instance .view-lines")
        return (found.last.text_content() or "").replace("\u00a0", " ") if found.count() else ""

    def ready(self) -> str:
        """The status bar's text, once the model is loaded."""
        text = wait(lambda: (t := self.status_bar()) and ("·" in t or self.problem()) and t, "the model is loaded", editor=self)
        assert not self.problem(), self.problem()
        return text

    def status_bar(self) -> str:
        item = self.page.locator('.statusbar-item[id*="pio.status"]')
        return (item.first.text_content() or "").replace("\u00a0", " ") if item.count() else ""

    def told(self) -> str:
        """The status bar's tooltip."""
        item = self.page.locator('.statusbar-item[id*="pio.status"] a')
        return item.first.get_attribute("aria-label") or "" if item.count() else ""

    def problem(self) -> str:
        """The same, where it is an error."""
        return self.told() if self.page.locator('.statusbar-item.error-kind[id*="pio.status"]').count() else ""

    def type(self, text: str, delay: float = 0) -> None:
        self.page.keyboard.type(text, delay=delay)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    @property
    def ghost(self) -> Locator:
        return self.page.locator(".ghost-text, .ghost-text-decoration")

    def ghost_text(self, asking: bool = False) -> list[str]:
        """The pieces shown, once there are any: the rest of the cursor's line and those below, in the order of the page. asking: by the key
        for it, too: VS Code sees to ghost text only some time after a file was opened, and what was typed before is not asked for."""
        asked = time.monotonic()

        def pieces() -> list[str]:
            nonlocal asked
            if asking and time.monotonic() - asked > 3:
                asked = time.monotonic()
                self.press("Alt+Backslash")
            found = [text.replace("\u00a0", " ") for text in self.ghost.all_text_contents()]
            return found if any(found) else []

        return wait(pieces, "ghost text", editor=self)

    def command(self, title: str) -> None:
        """The palette's list is made when it opens: opened again until the extension has told VS Code of its commands."""
        def offered() -> bool:
            self.page.keyboard.press("F1")
            self.page.locator(".quick-input-widget:visible input:focus").fill(f">{title}")
            try:
                self.page.wait_for_selector(f'.quick-input-list .monaco-list-row.focused:has-text("{title}")', timeout=3000)
            except TimeoutError:
                self.page.keyboard.press("Escape")
                return False
            return True

        wait(offered, f"the command {title}", editor=self)
        self.page.keyboard.press("Enter")

    def choose(self, title: str, label: str) -> None:
        """An entry of the list of that title."""
        self.page.click(f'.quick-input-widget:has-text("{title}") .quick-input-list .monaco-list-row:has-text("{label}")')

    def answer(self, prompt: str, text: str) -> None:
        """Into the input box that asks so."""
        self.page.locator(f'.quick-input-widget:visible:has-text("{prompt}") input:focus').fill(text)
        self.page.keyboard.press("Enter")

    def saved(self, name: str) -> str:
        """What the file holds once it is another than before and has no unsaved changes; Ctrl+S is pressed while it has. The editor's own
        lines would also hold ghost text."""
        def stored() -> str | None:
            if self.page.locator(f'.tab.active.dirty:has-text("{name}")').count():
                self.press("Control+s")
                return None
            text = (self.workspace / name).read_text()
            return text if text != self._stored[name] else None

        self._stored[name] = wait(stored, f"{name} is saved", editor=self)
        return self._stored[name]

    def frame(self, selector: str) -> Frame:
        """The webview that holds an element: it stands two frames deep."""
        return wait(lambda: next((f for f in self.page.frames if _holds(f, selector)), None), f"a frame with {selector}", editor=self)

    def notified(self, text: str) -> None:
        """Wait for a notification that holds the text."""
        self.page.wait_for_selector(f'.notification-list-item:has-text("{text}")')

    def shot(self, name: str) -> Path:
        SHOTS.mkdir(exist_ok=True)
        path = SHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def close(self) -> None:
        self._browser.close()
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._log.close()


def wait(condition, what: str, editor: VSCode | None = None, seconds: float = _PATIENCE):
    """The first true value of condition(); a screenshot tells what was there instead."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        if editor:
            editor.page.wait_for_timeout(15)
        else:
            time.sleep(0.02)
    if editor:
        print("screenshot:", editor.shot("failed"))
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def _holds(frame: Frame, selector: str) -> bool:
    try:
        return frame.locator(selector).count() > 0
    except Exception:   # it is being replaced
        return False


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
