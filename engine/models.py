"""What can be selected: the installed plugins, what of them is on disk, what they need in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inference_pio.engine.hub import on_disk
from inference_pio.engine.registry import plugins
from inference_pio.models.contract import WheelFile


@dataclass(frozen=True)
class ModelListing:
    name: str
    description: str
    checkpoint: str          # where it is published
    on_disk: Path | None
    disk_bytes: int | None   # of what is on disk; for what is not, of the download where it is known


def list_models() -> list[ModelListing]:
    """Looks at the disk only, never at the network."""
    listings = []
    for plugin in plugins().values():
        path = on_disk(plugin.name)
        source = plugin.checkpoint
        size = _bytes(path) if path else source.nbytes if isinstance(source, WheelFile) else None
        named = f"{source.project} {source.version} (Python package index)" if isinstance(source, WheelFile) else source or "your own files"
        listings.append(ModelListing(plugin.name, plugin.description, named, path, size))
    return listings


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))
