"""Type into a real Neovim in a real terminal with the real default model, and write what stands on the screen as an SVG.

    python tests/editors/screenshot.py editors/neovim/screenshot.svg
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from neovim import NVIM, PLUGIN
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

BEGIN = '''import json
from pathlib import Path


def load_settings(path: Path) -> dict:
    """Read the settings file; an empty dict if it does not exist."""
'''


def main(target: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
    file = folder / "settings.py"
    file.write_text(BEGIN)
    init = folder / "init.lua"
    options = {"cmd": [sys.executable, "-m", "inference_pio.lsp_server"]}
    init.write_text("vim.o.swapfile = false\nvim.o.shadafile = 'NONE'\nvim.o.termguicolors = true\nvim.o.number = true\nvim.o.laststatus = 2\n"
                    "vim.o.statusline = \" %t %=%{v:lua.require'pio'.statusline()} \"\n"
                    f"vim.opt.runtimepath:prepend({json.dumps(str(PLUGIN))})\n"
                    f"require('pio').setup(vim.json.decode({json.dumps(json.dumps(options))}))\n")
    subprocess.run([*tmux, "new-session", "-d", "-x", "96", "-y", "18", f"{NVIM} --clean -u {init} {file}"], check=True)
    try:
        def screen(*flags: str) -> str:
            return subprocess.run([*tmux, "capture-pane", "-p", *flags], capture_output=True, text=True, check=True).stdout

        def wait(text: str) -> None:
            end = time.monotonic() + 120
            while text not in screen():
                if time.monotonic() > end:
                    raise SystemExit(f"{text!r} did not appear:\n{screen()}")
                time.sleep(0.05)

        wait("pio smollm2-135m")
        subprocess.run([*tmux, "send-keys", "Go"], check=True)
        subprocess.run([*tmux, "send-keys", "-l", "if not path"], check=True)
        time.sleep(3)
        picture = screen("-e")
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    console = Console(record=True, width=96, file=open("/dev/null", "w"), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(picture.rstrip("\n")))
    grey = [(96, 96, 96)] * 8
    svg = console.export_svg(title="Neovim with pio", theme=TerminalTheme((20, 22, 27), (224, 226, 234), grey, grey))
    svg = re.sub(r"<!-- .*? -->\s*", "", svg)
    target.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S), encoding="utf-8")   # no fonts from the network
    print(re.sub(r"\x1b\[[0-9;]*m", "", picture))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
