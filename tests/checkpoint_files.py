"""Checkpoint files for tests: safetensors and GGUF, from numpy arrays or from bytes in a file's own format."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from inference_pio.native.dtype import DType

_NAMES = {DType.F32: "F32", DType.F16: "F16", DType.BF16: "BF16", DType.FP8_E4M3: "F8_E4M3"}
_KINDS = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}

# name -> (dtype, shape, bytes)
Tensors = dict[str, tuple[DType, tuple[int, ...], bytes]]


def plain(arrays: dict[str, np.ndarray]) -> Tensors:
    return {name: (DType.F32, a.shape, np.ascontiguousarray(a, "<f4").tobytes()) for name, a in arrays.items()}


def write_safetensors(folder: Path, config: dict, tensors: Tensors) -> Path:
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in tensors.values()))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(path: Path, metadata: dict, tensors: Tensors) -> Path:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, layout = _KINDS.get(type(value), (8, ""))
        head += string(key) + struct.pack("<I", kind) + (struct.pack("<" + layout, value) if layout else string(value))
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), dtype, len(data))
        data += content + b"\0" * (-len(content) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path
