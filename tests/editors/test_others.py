"""Editors that know nothing of pio, with the configuration that editors/OTHERS.md tells people to use."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELIX = ROOT / "build" / "editors" / "bin" / "hx"   # by install_editors.sh
SERVER = [sys.executable, str(ROOT / "tests" / "lsp" / "scripted_engine.py"), "--answer", "(a, b):\n    return a + b"]
EXPECTED = "x = 1\ndef add(a, b):\n    return a + b\n"


def configuration(editor: str) -> str:
    """The block of the page below the mark of that editor."""
    page = (ROOT / "editors" / "OTHERS.md").read_text()
    return re.search(rf"<!-- {editor} -->\n```\w+\n(.*?)```", page, re.DOTALL)[1]


@pytest.mark.skipif(not HELIX.exists(), reason="Helix is not installed: run tests/editors/install_editors.sh")
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_helix_shows_the_suggestion_in_its_menu(tmp_path):
    file, settings = tmp_path / "a.py", tmp_path / "config" / "helix" / "languages.toml"
    file.write_text("x = 1\n")
    settings.parent.mkdir(parents=True)
    settings.write_text(configuration("helix").replace('command = "pio-lsp"\nargs = []', f"command = {json.dumps(SERVER[0])}\nargs = {json.dumps(SERVER[1:])}"))
    tmux = ["tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null"]
    subprocess.run([*tmux, "new-session", "-d", "-x", "90", "-y", "16", f"env XDG_CONFIG_HOME={tmp_path}/config {HELIX} {file}"], check=True)
    try:
        def screen() -> str:
            return subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout

        def wait(condition, keys: str = "") -> None:
            """`keys` are pressed again every few seconds, should they have come before the server was there."""
            end = time.monotonic() + 120
            for tries in count():
                if condition():
                    return
                assert time.monotonic() < end, screen()
                if keys and tries % 25 == 24:
                    subprocess.run([*tmux, "send-keys", keys], check=True)
                time.sleep(0.2)

        wait(lambda: "x = 1" in screen())
        subprocess.run([*tmux, "send-keys", "G", "o"], check=True)
        subprocess.run([*tmux, "send-keys", "-l", "def add"], check=True)
        wait(lambda: "add(a, b):" in screen(), "C-x")
        subprocess.run([*tmux, "send-keys", "C-n", "Enter"], check=True)
        wait(lambda: "return a + b" in screen())
        subprocess.run([*tmux, "send-keys", "Escape"], check=True)
        subprocess.run([*tmux, "send-keys", "-l", ":w"], check=True)
        subprocess.run([*tmux, "send-keys", "Enter"], check=True)
        wait(lambda: stored(file) == EXPECTED)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def stored(file: Path) -> str:
    """Helix moves a file aside while it writes the new one."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


DRIVE = """
(setq eglot-sync-connect 120 make-backup-files nil create-lockfiles nil)
(find-file "a.py")
(run-hooks 'post-command-hook)   ; eglot-ensure waits for the first command
(with-timeout (120) (while (not (eglot-current-server)) (accept-process-output nil 0.1)))
(goto-char (point-max))
(insert "def add")
(let* ((found (eglot-completion-at-point))
       (items (all-completions (buffer-substring (nth 0 found) (nth 1 found)) (nth 2 found))))
  (delete-region (nth 0 found) (nth 1 found))
  (insert (car items))
  (funcall (plist-get (nthcdr 3 found) :exit-function) (car items) 'finished))
(insert "\\n")
(save-buffer)
(eglot-shutdown (eglot-current-server))
"""


@pytest.mark.skipif(shutil.which("emacs") is None, reason="Emacs is not installed")
def test_emacs_completes_with_eglot(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    lines = configuration("emacs")
    assert '("pio-lsp" "--max-tokens" "48")' in lines
    (tmp_path / "init.el").write_text("(require 'package)\n(package-initialize)\n" + lines.replace(
        '("pio-lsp" "--max-tokens" "48")', "(" + " ".join(json.dumps(part) for part in SERVER) + ")") + DRIVE)
    done = subprocess.run(["emacs", "--batch", "-l", "init.el"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (tmp_path / "a.py").read_text() == EXPECTED, done.stderr
