"""What can be selected: the installed plugins, what of them is on disk, what they need in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inference_pio.engine.errors import EngineError
from inference_pio.engine.gguf import open_gguf
from inference_pio.engine.hub import Located, on_disk
from inference_pio.engine.loading import CONTEXT
from inference_pio.engine.registry import plugins
from inference_pio.engine.safetensors import read_json
from inference_pio.models.contract import ModelPlugin, WheelFile


@dataclass(frozen=True)
class ModelListing:
    name: str
    description: str
    checkpoint: str          # where it is published
    on_disk: Path | None
    disk_bytes: int | None   # of what is on disk; for what is not, of the download where it is known
    memory_bytes: int | None # weights and cache of one context on a CPU, at the least; known for what is on disk


def list_models() -> list[ModelListing]:
    """Looks at the disk only, never at the network."""
    listings = []
    for plugin in plugins().values():
        path = on_disk(plugin.name)
        source = plugin.checkpoint
        size = _bytes(path) if path else source.nbytes if isinstance(source, WheelFile) else None
        named = f"{source.project} {source.version} (Python package index)" if isinstance(source, WheelFile) else source or "your own files"
        listings.append(ModelListing(plugin.name, plugin.description, named, path, size, _memory(plugin, path, size) if path and size else None))
    return listings


def _memory(plugin: ModelPlugin, path: Path, weights: int) -> int | None:
    """What loading will ask for; None if the files are damaged, which loading will say better."""
    try:
        located = Located(path)
        metadata = open_gguf(path)[0] if located.format == "gguf" else read_json(path / "config.json")
        config = plugin.parse_config(metadata, located.format)
        layout = plugin.cache_layout(config)
        tokens = min(config.max_position_embeddings, CONTEXT)
        return weights + 2 * layout.layers * layout.g * layout.p * 2 * tokens + (layout.states.nbytes if layout.states else 0)
    except (EngineError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))
