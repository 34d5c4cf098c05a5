"""safetensors files, single or in shards: u64 length, JSON header {name: dtype, shape, data_offsets}, data.

Format: github.com/huggingface/safetensors. Headers are not trusted.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.tensor_file import MappedFile, TensorInfo, require_disjoint
from inference_pio.native.dtype import DType

_HEADER_LIMIT = 100 << 20   # the reference implementation's own limit
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16, "F8_E4M3": DType.FP8_E4M3}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


def files_of(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors, whether they are there or not: the index's shards, or model.safetensors."""
    return [folder / name for name in sorted(set(_weight_map(folder).values()))] or [folder / "model.safetensors"]


def open_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder: those of its index's shards, or of the one .safetensors file."""
    weight_map = _weight_map(folder)
    tensors: dict[str, TensorInfo] = {}
    for path in files_of(folder):
        if not path.exists():
            listed = f"{_INDEX} lists it" if weight_map else f"the folder has no {_INDEX} either"
            raise BadCheckpoint(f"{path} is missing ({listed}): fetch the checkpoint again")
        for name, tensor in open_file(path).items():
            if name in tensors:
                raise BadCheckpoint(f"{folder}: tensor {name!r} is in {tensors[name].file.path.name} and in {path.name}")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.path.name != shard:
            raise BadCheckpoint(f"{folder}: the index says that {name!r} is in {shard}, which does not hold it")
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name from the index; empty if there is none."""
    index = folder / _INDEX
    if not index.exists():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadCheckpoint(f"{index}: weight_map must map tensor names to file names")
    for shard in set(weight_map.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadCheckpoint(f"{index}: {shard!r} is not the name of a .safetensors file in the folder")
    return weight_map


def open_file(path: Path) -> dict[str, TensorInfo]:
    file = MappedFile(path)
    length = int.from_bytes(file.data[:8], "little")
    if file.size < 8 or length > min(file.size - 8, _HEADER_LIMIT):
        raise BadCheckpoint(f"{path}: the header claims {length} bytes, the file has {file.size}: it is cut off or not safetensors")
    header = _parse(path, bytes(file.data[8:8 + length]))
    tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    require_disjoint(path, tensors.values())
    # Without overlaps, the sizes add up to the file's only if there is no hole and nothing behind the last tensor.
    if (held := sum(tensor.nbytes for tensor in tensors.values())) != file.size - 8 - length:
        raise BadCheckpoint(f"{path}: {file.size - 8 - length} bytes of data, {held} of them in tensors: it is damaged")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. BadCheckpoint if it is something else."""
    try:
        if (size := path.stat().st_size) > _HEADER_LIMIT:
            raise BadCheckpoint(f"{path} has {size} bytes, more than any JSON file of a checkpoint")
        return _parse(path, path.read_bytes())
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}") from None


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise BadCheckpoint(f"{path}: {name!r} occurs twice")
            table[name] = value
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
    if not isinstance(type_name, str) or type_name not in _SIZES:
        raise bad(f"unknown dtype {type_name!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_size, shape)):
        raise bad(f"shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {offsets!r} are not [begin, end]")
    begin, end = offsets
    if start + end > file.size:
        raise bad(f"its data ends at byte {start + end} of a file of {file.size}: the file is cut off")
    if (nbytes := prod(shape) * _SIZES[type_name]) != end - begin:
        raise bad(f"{type_name} {shape} needs {nbytes} bytes, the header gives it {end - begin}")
    return TensorInfo(name, file, _DTYPES.get(type_name), type_name, tuple(shape), start + begin, end - begin)
