"""GGUF files: metadata, tensor table, data. Versions 2 and 3, little endian.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. Headers are not trusted: every count is checked against the bytes left.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.tensor_file import MappedFile, TensorInfo, require_disjoint, tensor_bytes
from inference_pio.native.dtype import DType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Real headers have at most some 10 MB and vocabularies of some 300k tokens; more would only cost memory before it fails.
_HEADER_LIMIT, _ARRAY_LIMIT = 128 << 20, 4 << 20
_DTYPES = {int(dtype): dtype for dtype in DType if dtype < DType.FP8_E4M3}
# Formats that have no kernel; named so that the error can name them.
_OTHERS = {10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
           22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 39: "MXFP4"}


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """(metadata, tensors) of a GGUF file, or of all parts of a split one. Shapes are outermost first, as in torch."""
    metadata, tensors = _open_part(path)
    for part in _other_parts(path, metadata.get("split.count")):
        for name, tensor in _open_part(part)[1].items():
            if name in tensors:
                raise BadCheckpoint(f"{part}: tensor {name!r} is in another part too")
            tensors[name] = tensor
    return metadata, tensors


def _other_parts(path: Path, count: Any) -> list[Path]:
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        return []
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[2]) != count:
        raise BadCheckpoint(f"{path}: one of {count} parts; open the first, named ...-00001-of-{count:05}.gguf")
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[2]}.gguf") for number in range(2, count + 1)]
    for part in parts:
        if not part.exists():
            raise BadCheckpoint(f"{part} is missing: fetch all {count} parts")
    return parts


class _Cursor:
    def __init__(self, file: MappedFile):
        self.file, self.data, self.at = file, file.data, 0
        self.end = min(file.size, _HEADER_LIMIT)

    def bad(self, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.file.path}: {what} (byte {self.at})")

    def unpack(self, layout: str) -> tuple:
        size = struct.calcsize("<" + layout)
        if size > self.end - self.at:
            raise self.bad("the header is cut off, or larger than any real one")
        self.at += size
        return struct.unpack_from("<" + layout, self.data, self.at - size)

    def string(self) -> str:
        (length,) = self.unpack("Q")
        if length > self.end - self.at:
            raise self.bad(f"a string claims {length} bytes, the header can have {self.end - self.at} more")
        self.at += length
        try:
            return str(self.data[self.at - length:self.at], "utf-8")
        except UnicodeDecodeError:
            raise self.bad("a string is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 2:
            raise self.bad(f"unknown value type {kind}" if kind != _ARRAY else "arrays nested too deeply")
        element, count = self.unpack("IQ")
        least = struct.calcsize(_SCALARS[element]) if element in _SCALARS else 8
        if count * least > self.end - self.at or count > _ARRAY_LIMIT:
            raise self.bad(f"an array claims {count} elements, the header can have {self.end - self.at} more bytes")
        if element in _SCALARS:
            return list(self.unpack(f"{count}{_SCALARS[element]}"))
        return [self.value(element, depth + 1) for _ in range(count)]


def _open_part(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    cursor = _Cursor(MappedFile(path))
    if cursor.unpack("4s") != (b"GGUF",):
        raise BadCheckpoint(f"{path} is not a GGUF file (it does not begin with GGUF)")
    version, tensor_count, value_count = cursor.unpack("IQQ")
    if version not in (2, 3):
        raise BadCheckpoint(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key, (kind,) = cursor.string(), cursor.unpack("I")
        if key in metadata:
            raise cursor.bad(f"key {key!r} occurs twice")
        metadata[key] = cursor.value(kind)
    entries = []
    for _ in range(tensor_count):
        name, (dims,) = cursor.string(), cursor.unpack("I")
        if dims > 4:
            raise cursor.bad(f"tensor {name!r} claims {dims} dimensions, at most 4 are allowed")
        entries.append((name, cursor.unpack(f"{dims}Q")[::-1], *cursor.unpack("IQ")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20 or alignment & (alignment - 1):
        raise cursor.bad(f"general.alignment must be a power of two, not {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise cursor.bad(f"tensor {name!r} occurs twice")
        tensors[name] = _tensor(cursor, name, shape, kind, start, offset, alignment)
    require_disjoint(path, tensors.values())
    return metadata, tensors


def _tensor(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, start: int, offset: int, alignment: int) -> TensorInfo:
    path = cursor.file.path
    dtype = _DTYPES.get(kind)
    if dtype is None and kind not in _OTHERS:
        raise BadCheckpoint(f"{path}: tensor {name!r} has the unknown type {kind}")
    if offset % alignment:
        raise BadCheckpoint(f"{path}: tensor {name!r} stands at {offset}, which is not a multiple of {alignment}")
    try:
        nbytes = tensor_bytes(dtype, shape) if dtype is not None else 0
    except ValueError as error:
        raise BadCheckpoint(f"{path}: tensor {name!r} ({DType(kind).name} {list(shape)}): {error}") from None
    if start + offset + nbytes > cursor.file.size:
        raise BadCheckpoint(f"{path}: tensor {name!r} ends at byte {start + offset + nbytes} of a file of {cursor.file.size}: it is cut off")
    return TensorInfo(name, cursor.file, dtype, dtype.name if dtype is not None else _OTHERS[kind], shape, start + offset, nbytes)
