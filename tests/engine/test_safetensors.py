"""safetensors headers: what the reference implementation writes is read; what lies is refused by name."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save_file

from checkpoints import GOLDEN
from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.safetensors import open_file, open_folder, read_json
from inference_pio.native.dtype import DType

INDEX = "model.safetensors.index.json"


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("model", ["llama", "qwen3", "qwen3_next"])
def test_golden_files_are_read_as_the_reference_reads_them(model):
    path = GOLDEN / model / "model.safetensors"
    found, wanted = open_file(path), dict(deserialize(path.read_bytes()))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (list(tensor.shape), tensor.type_name) == (wanted[name]["shape"], wanted[name]["dtype"])
        assert tensor.data == wanted[name]["data"] and tensor.data.readonly


def test_types_shapes_and_padding(tmp_path, rng):
    arrays = {"a": rng.normal(size=(3, 5)).astype(np.float16), "scalar": np.array(rng.normal(), np.float32), "empty": np.zeros((0, 7), np.float32),
              "ints": rng.integers(0, 9, 4, np.int64)}
    save_file(arrays, tmp_path / "m.safetensors", {"format": "pt"})
    found = open_file(tmp_path / "m.safetensors")
    assert {n: t.shape for n, t in found.items()} == {n: a.shape for n, a in arrays.items()}
    assert found["a"].dtype == DType.F16 and found["ints"].dtype is None and found["ints"].type_name == "I64"
    assert all(bytes(found[n].data) == a.tobytes() for n, a in arrays.items())


def test_shards_are_joined_by_the_index(tmp_path):
    write(tmp_path / "model-1.safetensors", {"a": entry(0, 8)}, b"aaaaAAAA")
    write(tmp_path / "model-2.safetensors", {"b": entry(0, 4)}, b"bbbb")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert {n: bytes(t.data) for n, t in open_folder(tmp_path).items()} == {"a": b"aaaaAAAA", "b": b"bbbb"}


OVERLONG = {"a": {"dtype": "F32", "shape": [2**61, 8], "data_offsets": [0, 8]}}


@pytest.mark.parametrize("header,data,names", [
    (b"", b"", "JSON"), (b"[1]", b"", "object"), (b"{", b"", "JSON"), (b"\xff\xfe{}", b"", "JSON"), (b"[" * 100_000, b"", "JSON"),
    (b'{"a": 1, "a": 2}', b"", "'a' occurs twice"), ({"a": 7}, b"", "'a'.*object"), ({"a": {}}, b"", "'a'.*dtype"),
    ({"a": entry(0, 4, dtype="F7")}, b"1234", "'a'.*'F7'"), ({"a": entry(0, 4, dtype=["F32"])}, b"1234", "'a'.*dtype"),
    ({"a": entry(0, 4, shape=[-1])}, b"1234", "'a'.*shape"), ({"a": entry(0, 4, shape=[1.0])}, b"1234", "'a'.*shape"),
    ({"a": entry(0, 4, shape=[True])}, b"1234", "'a'.*shape"), ({"a": entry(0, 4, shape="1")}, b"1234", "'a'.*shape"),
    ({"a": entry(0, 4, shape=[1] * 9)}, b"1234", "'a'.*shape"), (OVERLONG, b"12345678", "'a'.*needs"),
    ({"a": entry(0, 4, shape=[2])}, b"1234", "'a'.*needs 8"), ({"a": entry(4, 0, shape=[0])}, b"1234", "'a'.*offsets"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"1234", "'a'.*offsets"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234", "'a'.*offsets"),
    ({"a": entry(0, 8)}, b"1234", "'a'.*cut off"), ({"a": entry(0, 8), "b": entry(4, 12)}, b"123456789012", "'a' and 'b' overlap"),
    ({"a": entry(0, 4)}, b"12345", "5 bytes of data, 4"), ({"a": entry(0, 4), "b": entry(8, 12)}, b"123456789012", "12 bytes of data, 8"),
])
def test_a_header_that_lies_is_refused_by_name(tmp_path, header, data, names):
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(BadCheckpoint, match=f"bad.safetensors.*{names}"):
        open_file(path)


@pytest.mark.parametrize("content", [b"", b"\x02\0\0", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2**64 - 1)])
def test_a_file_that_is_cut_off(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpoint, match="bad.safetensors"):
        open_file(tmp_path / "bad.safetensors")


def test_the_same_name_many_times_is_found_at_once(tmp_path):
    names = b",".join(b'"%d":0' % n for n in range(200_000))
    with pytest.raises(BadCheckpoint, match="'199999' occurs twice"):
        open_file(write(tmp_path / "bad.safetensors", b"{" + names + b',"199999":0}'))


@pytest.mark.parametrize("weight_map,names", [
    (None, "weight_map"), ({}, "weight_map"), ({"a": 3}, "weight_map"), ({"a": "../m.safetensors"}, "not the name"), ({"a": ".."}, "not the name"),
    ({"a": "/etc/passwd"}, "not the name"), ({"a": "config.json"}, "not the name"), ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
    ({"b": "m.safetensors"}, "'b' is in m.safetensors"), ({"a": "m.safetensors", "b": "n.safetensors"}, "'a' is in m.safetensors and in n"),
])
def test_an_index_that_lies_is_refused_by_name(tmp_path, weight_map, names):
    write(tmp_path / "m.safetensors", {"a": entry(0, 4)}, b"1234")
    write(tmp_path / "n.safetensors", {"a": entry(0, 4)}, b"1234")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadCheckpoint, match=names):
        open_folder(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(BadCheckpoint, match="model.safetensors is missing"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(BadCheckpoint, match="model.safetensors cannot be read"):
        open_folder(tmp_path)


def test_json_files(tmp_path):
    with pytest.raises(BadCheckpoint, match="gone.json cannot be read"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_bytes(b'{"a": ' + b"9" * 5000 + b"}")
    with pytest.raises(BadCheckpoint, match="bad.json: not valid JSON"):
        read_json(tmp_path / "bad.json")
