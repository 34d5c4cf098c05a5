"""What a server takes from the machine's memory, and what its model takes from the disk."""

from __future__ import annotations

from pathlib import Path


def held(pid: int) -> int | None:
    """Bytes of memory of a process, of what it shares with others its share (PSS). None where the system does not tell (Linux does)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def on_disk(model: str) -> int:
    """Bytes of a model's weights: a file, or a folder of safetensors."""
    path = Path(model)
    files = path.glob("*.safetensors") if path.is_dir() else [path] if path.is_file() else []
    return sum(file.stat().st_size for file in files)
