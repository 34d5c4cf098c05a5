"""The real server as a process, with hardly any memory for pages and checkpoints, and what must hold of it at any time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from wire import PATIENCE, Client, Process


def start(model: Path, *options: str, encodings: list[str] | None = None) -> Process:
    """With hardly any memory for pages and checkpoints."""
    process = Process(sys.executable, "-m", "inference_pio.lsp_server", "--model", str(model), "--device", "cpu", "--threads", "1", "--context", "1024",
                      "--memory", "2300000", "--prompt-tokens", "128", "--max-tokens", "24", *options)
    process.client.initialize(encodings)
    process.client.wait_ready()
    return process


def check_at_rest(client: Client) -> None:
    """The engine comes to rest, and nothing is lost then: free + cached = all."""
    deadline = time.monotonic() + PATIENCE
    while True:   # the counts are taken while the engine works, one after another
        status = client.request("pio/status", {})
        engine, info = status["engine"], status["info"]
        if not (engine["running"] or engine["waiting"] or engine["pages_in_use"] or engine["states_in_use"]):
            break
        assert time.monotonic() < deadline, engine
        time.sleep(0.01)
    assert engine["pages_free"] + engine["pages_cached"] == info["page_count"] - 1
    assert engine["states_free"] + engine["states_cached"] == info["state_count"]
    assert engine["last_error"] is None and not status.get("last", {"reason": ""})["reason"].startswith("error"), status


def resident(server: Process) -> int:
    """Bytes of the server's memory; 0 where the system does not tell."""
    statm = Path(f"/proc/{server.process.pid}/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0
