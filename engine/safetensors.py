"""safetensors files, single or in shards: u64 length, JSON header {name: dtype, shape, data_offsets}, data.

Format: github.com/huggingface/safetensors. Headers are not trusted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.tensor_file import MappedFile, TensorInfo, require_disjoint, tensor_bytes
from inference_pio.native.dtype import DType

_HEADER_LIMIT = 100 << 20   # the reference implementation's own limit
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16, "F8_E4M3": DType.FP8_E4M3}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


def open_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder: those of its index's shards, or of the one .safetensors file."""
    index = folder / _INDEX
    if not index.exists():
        return open_file(folder / "model.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadCheckpoint(f"{index}: weight_map must map tensor names to file names")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise BadCheckpoint(f"{index}: {shard!r} is not the name of a file in the folder")
        if not (folder / shard).exists():
            raise BadCheckpoint(f"{folder / shard} is missing: the index lists it; fetch the checkpoint again")
        for name, tensor in open_file(folder / shard).items():
            if name in tensors:
                raise BadCheckpoint(f"{folder}: tensor {name!r} is in {tensors[name].file.path.name} and in {shard}")
            tensors[name] = tensor
    if missing := sorted(set(weight_map) - set(tensors)):
        raise BadCheckpoint(f"{folder}: the index lists {missing[0]!r}, which is in no shard")
    return tensors


def open_file(path: Path) -> dict[str, TensorInfo]:
    file = MappedFile(path)
    length = int.from_bytes(file.data[:8], "little")
    if file.size < 8 or length > min(file.size - 8, _HEADER_LIMIT):
        raise BadCheckpoint(f"{path}: the header claims {length} bytes, the file has {file.size}: it is cut off or not safetensors")
    header = _parse(path, bytes(file.data[8:8 + length]))
    tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    require_disjoint(path, tensors.values())
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. BadCheckpoint if it is something else."""
    try:
        return _parse(path, path.read_bytes())
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}") from None


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            raise BadCheckpoint(f"{path}: {next(n for n in names if names.count(n) > 1)!r} occurs twice")
        return table

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path}: not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise BadCheckpoint(f"{path}: must hold a JSON object, not {type(parsed).__name__}")
    return parsed


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor(file: MappedFile, name: str, entry: Any, start: int) -> TensorInfo:
    def bad(what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{file.path}: tensor {name!r}: {what}")

    if not isinstance(entry, dict):
        raise bad("its entry is not an object")
    type_name, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type_name not in _SIZES:
        raise bad(f"unknown dtype {type_name!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_size, shape)):
        raise bad(f"shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {offsets!r} are not [begin, end]")
    begin, end = offsets
    if start + end > file.size:
        raise bad(f"its data ends at byte {start + end} of a file of {file.size}: the file is cut off")
    count = 1
    for size in shape:
        count *= size
    if count * _SIZES[type_name] != end - begin:
        raise bad(f"{type_name} {shape} needs {count * _SIZES[type_name]} bytes, the header gives it {end - begin}")
    dtype = _DTYPES.get(type_name)
    assert dtype is None or tensor_bytes(dtype, tuple(shape)) == end - begin
    return TensorInfo(name, file, dtype, type_name, tuple(shape), start + begin, end - begin)
