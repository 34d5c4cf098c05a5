"""GGUF headers: what gguf-py writes is read; what lies is refused by name."""

from __future__ import annotations

import struct

import gguf as reference
import numpy as np
import pytest

from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.gguf import open_gguf
from inference_pio.native.dtype import DType


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(key, kind, data):
    return string(key) + struct.pack("<I", kind) + data


def tensor(name="t", shape=(4,), kind=0, offset=0, dims=None):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape) if dims is None else dims, *shape, kind, offset)


def write(path, values=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, n_tensors=None, n_values=None):
    head = magic + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(values) if n_values is None else n_values)
    head += b"".join(values) + b"".join(tensors)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def test_what_the_reference_writes(tmp_path, rng):
    writer = reference.GGUFWriter(tmp_path / "m.gguf", "test")
    writer.add_uint32("a.u32", 7)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.strings", ["x", "", "日本"])
    matrix, vector = rng.normal(size=(3, 64)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    blocks = reference.quants.quantize(matrix, reference.GGMLQuantizationType.Q8_0)
    writer.add_tensor("matrix", blocks, raw_dtype=reference.GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", vector)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    metadata, tensors = open_gguf(tmp_path / "m.gguf")
    assert {k: v for k, v in metadata.items() if k.startswith("a.")} == {
        "a.u32": 7, "a.f32": 0.5, "a.bool": True, "a.string": "Grüße", "a.ints": [1, -2, 3], "a.strings": ["x", "", "日本"]}
    assert metadata["general.architecture"] == "test"
    assert (tensors["matrix"].shape, tensors["matrix"].dtype, bytes(tensors["matrix"].data)) == ((3, 64), DType.Q8_0, blocks.tobytes())
    assert (tensors["vector"].shape, tensors["vector"].dtype, bytes(tensors["vector"].data)) == ((5,), DType.F32, vector.tobytes())


def test_every_scalar_type_and_an_alignment(tmp_path):
    kinds = {0: ("B", 200), 1: ("b", -100), 2: ("H", 60000), 3: ("h", -30000), 4: ("I", 4_000_000_000), 5: ("i", -2_000_000_000), 6: ("f", 1.5),
             7: ("?", True), 10: ("Q", 2**63), 11: ("q", -2**62), 12: ("d", 0.1)}
    values = [value(str(kind), kind, struct.pack("<" + layout, content)) for kind, (layout, content) in kinds.items()]
    values += [value("general.alignment", 4, struct.pack("<I", 64)),
               value("nested", 9, struct.pack("<IQ", 9, 2) + 2 * (struct.pack("<IQ", 0, 3) + b"\1\2\3"))]
    head = write(tmp_path / "m.gguf", values, [tensor(offset=64)]).read_bytes()
    (tmp_path / "m.gguf").write_bytes(head + b"\0" * (-len(head) % 64) + b"x" * 64 + b"0123456789abcdef")
    metadata, tensors = open_gguf(tmp_path / "m.gguf")
    assert all(metadata[str(kind)] == content for kind, (_, content) in kinds.items()) and metadata["nested"] == [[1, 2, 3]] * 2
    assert bytes(tensors["t"].data) == b"0123456789abcdef"


def test_parts_are_joined(tmp_path):
    count = value("split.count", 2, struct.pack("<H", 2))
    write(tmp_path / "m-00001-of-00002.gguf", [count], [tensor("a")], b"a" * 16)
    second = write(tmp_path / "m-00002-of-00002.gguf", [count], [tensor("b")], b"b" * 16)
    _, tensors = open_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert {n: bytes(t.data) for n, t in tensors.items()} == {"a": b"a" * 16, "b": b"b" * 16}
    with pytest.raises(BadCheckpoint, match="open the first"):
        open_gguf(second)
    write(second, [count], [tensor("a")], b"a" * 16)
    with pytest.raises(BadCheckpoint, match="'a' is in another part"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")
    second.unlink()
    with pytest.raises(BadCheckpoint, match="00002-of-00002.gguf is missing"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


ARRAY, BYTES = 9, 0
BIG = 2**63


@pytest.mark.parametrize("arguments,names", [
    (dict(magic=b"GGML"), "not a GGUF"), (dict(version=1), "version 1"), (dict(version=3 << 24), "version"),
    (dict(n_tensors=BIG), "cut off"), (dict(n_values=BIG), "cut off"), (dict(n_values=1), "cut off|string claims"),
    (dict(values=[struct.pack("<Q", BIG)]), "string claims"), (dict(values=[value(b"\xff\xff", 0, b"\0")]), "not UTF-8"),
    (dict(values=[value("k", 13, b"")]), "type 13"), (dict(values=[value("k", 8, struct.pack("<Q", 1 << 40))]), "string claims"),
    (dict(values=[value("k", 0, b"\1")] * 2), "'k' occurs twice"),
    (dict(values=[value("k", ARRAY, struct.pack("<IQ", BYTES, BIG))]), "array claims"),
    (dict(values=[value("k", ARRAY, struct.pack("<IQ", 8, 1000))]), "array claims"),
    (dict(values=[value("k", ARRAY, struct.pack("<IQ", 99, 1) + b"\0" * 64)]), "type 99"),
    (dict(values=[value("k", ARRAY, struct.pack("<IQ", 9, 1) * 20 + b"\0" * 64)]), "nested"),
    (dict(values=[value("k", ARRAY, struct.pack("<IQ", BYTES, 5 << 20) + b"\0" * (5 << 20))]), "array claims 5242880"),
    (dict(tensors=[tensor(dims=5, shape=(1,) * 5)]), "'t' claims 5"), (dict(tensors=[tensor(dims=2**32 - 1)]), "'t' claims"),
    (dict(tensors=[tensor(kind=77)]), "'t'.*type 77"), (dict(tensors=[tensor(kind=100)]), "'t'.*type 100"), (dict(tensors=[tensor(kind=4)]), "'t'.*type 4"),
    (dict(tensors=[tensor(offset=8)], data=b"\0" * 64), "'t' stands at 8"), (dict(tensors=[tensor(offset=32)], data=b"\0" * 40), "'t' ends at"),
    (dict(tensors=[tensor(shape=(2**62, 2**62))], data=b"\0" * 64), "'t' ends at"), (dict(tensors=[tensor(offset=BIG)], data=b"\0" * 64), "'t' ends at"),
    (dict(tensors=[tensor(kind=8, shape=(33,))], data=b"\0" * 64), "'t'.*33"), (dict(tensors=[tensor(kind=8, shape=())], data=b"\0" * 64), "'t'.*Q8_0"),
    (dict(tensors=[tensor(), tensor()], data=b"\0" * 64), "'t' occurs twice"),
    (dict(tensors=[tensor("a", (16,)), tensor("b", offset=32)], data=b"\0" * 64), "'a' and 'b' overlap"),
    (dict(values=[value("general.alignment", 4, struct.pack("<I", 0))]), "alignment"),
    (dict(values=[value("general.alignment", 4, struct.pack("<I", 24))]), "alignment"),
    (dict(values=[value("general.alignment", 8, string("32"))]), "alignment"),
    (dict(values=[value("split.count", 2, struct.pack("<H", 3))]), "00001-of-00003"),
])
def test_a_header_that_lies_is_refused_by_name(tmp_path, arguments, names):
    path = write(tmp_path / "bad.gguf", **arguments)
    with pytest.raises(BadCheckpoint, match=f"bad.gguf.*({names})"):
        open_gguf(path)


def test_every_cut_of_a_file_is_refused(tmp_path):
    whole = write(tmp_path / "m.gguf", [value("k", 8, string("text")), value("l", ARRAY, struct.pack("<IQ", 4, 2) + b"\0" * 8)], [tensor()],
                  b"\0" * 16).read_bytes()
    open_gguf(tmp_path / "m.gguf")
    for length in range(len(whole)):
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint, match="m.gguf"):
            open_gguf(tmp_path / "m.gguf")
