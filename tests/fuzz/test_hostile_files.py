"""Whatever bytes a checkpoint holds: it opens, or one BadCheckpoint names the file. No other exception, no crash, no huge allocation."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import GOLDEN, write_gguf
from inference_pio.engine import Engine, EngineError, SamplingParams, TokenPrompt
from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.gguf import open_gguf
from inference_pio.engine.safetensors import open_file, open_folder
from inference_pio.engine.tokenizer import Tokenizer

FUZZ = settings(max_examples=400)
ODD_NUMBERS = st.sampled_from([0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
# JSON of every kind, with the sizes that overflow something somewhere.
JSON = st.recursive(st.none() | st.booleans() | ODD_NUMBERS | st.integers(-3, 10) | st.floats() | st.text(max_size=8)
                    | st.sampled_from(["F32", "BF16", "m.safetensors", "..", "\ud800", "\0"]),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8)


@contextmanager
def bounded(name):
    """Nothing but BadCheckpoint, which names the file, and no more than 512 MB on top of what the process has had so far."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except BadCheckpoint as error:
        assert name in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


@st.composite
def damaged(draw, content: bytes, reach: int) -> bytes:
    """Some numbers or bytes of the first `reach` bytes replaced, perhaps something put in or left out, perhaps cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(reach, len(data)) - 1)) if data else 0
        kind = draw(st.sampled_from("QIBxid"))
        if kind in "QIB":
            packed = struct.pack("<" + kind, draw(ODD_NUMBERS) & (1 << 8 * struct.calcsize(kind)) - 1)
            data[at:at + len(packed)] = packed
        elif kind == "x":
            data[at:at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "i":
            data[at:at] = draw(st.binary(max_size=9))
        else:
            del data[at:at + draw(st.integers(1, 9))]
    return bytes(data[:draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    return write_gguf("llama", tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


SAFETENSORS = (GOLDEN / "llama" / "model.safetensors").read_bytes()


@FUZZ
@given(damaged(SAFETENSORS, 600) | st.binary(max_size=200))
def test_safetensors_bytes(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with bounded("m.safetensors"):
        for tensor in open_file(path).values():
            assert len(tensor.data) == tensor.nbytes


@FUZZ
@given(st.dictionaries(st.text(max_size=6), JSON | st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "U8", "F8_E4M3"]), "shape": JSON,
                                                                         "data_offsets": st.tuples(ODD_NUMBERS, ODD_NUMBERS) | JSON}), max_size=4))
def test_safetensors_headers(tmp_path, header):
    path, text = tmp_path / "m.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with bounded("m.safetensors"):
        open_file(path)


@FUZZ
@given(JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.text(max_size=6), st.sampled_from(["m.safetensors", "..", "", "\0", "x" * 300]))}))
def test_safetensors_indexes(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "m.safetensors").write_bytes(SAFETENSORS)
    with bounded(str(tmp_path)):
        open_folder(tmp_path)


@FUZZ
@given(st.data())
def test_gguf_bytes(tmp_path, small_gguf, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data.draw(damaged(small_gguf, 2400) | st.binary(max_size=100).map(lambda tail: b"GGUF\3\0\0\0" + tail)))
    with bounded("m.gguf"):
        for tensor in open_gguf(path)[1].values():
            assert len(tensor.data) == tensor.nbytes


@FUZZ
@given(st.dictionaries(st.sampled_from(["tokens", "merges", "pre", "model", "token_type"]), JSON))
def test_gguf_vocabularies(changes):
    fields = {"tokens": ["a", "b", "ab"], "merges": ["a b"], "pre": "gpt-2", "model": "gpt2", "token_type": [1, 1, 1]} | changes
    with bounded("the.gguf"):
        Tokenizer.from_gguf({f"tokenizer.ggml.{name}": value for name, value in fields.items()}, "the.gguf")


TOKENIZER = json.loads((GOLDEN / "qwen3_tokenizer.json").read_text(encoding="utf-8"))


@settings(FUZZ, max_examples=150)
@given(st.dictionaries(st.sampled_from([*TOKENIZER]), JSON, max_size=2), st.dictionaries(st.sampled_from([*TOKENIZER["model"]]), JSON, max_size=2))
def test_tokenizer_json(tmp_path, changes, model):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "model": {**TOKENIZER["model"], **model}, **changes}))
    with bounded("tokenizer.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json").encode("Hello world\n")


# ---- a whole model whose config lies -----------------------------------------------------------------------------------------


def starts(folder) -> None:
    """It opens and answers, or says in one EngineError why not."""
    try:
        with Engine.open(folder, device="cpu", context=32, threads=1) as engine:
            engine.generate(TokenPrompt((1, 2, 3)), SamplingParams(max_tokens=2))
    except EngineError as error:
        assert str(error)


@pytest.mark.parametrize("model", ["llama", "qwen3", "qwen3_next"])
def test_config_json(tmp_path, model):
    source = GOLDEN / model
    shutil.copy(source / "model.safetensors", tmp_path)
    config = json.loads((source / "config.json").read_text())

    @settings(FUZZ, max_examples=150)
    @given(st.dictionaries(st.sampled_from([*config]), JSON, min_size=1, max_size=2), st.booleans())
    def run(changes, left_out):
        fields = {k: v for k, v in config.items() if k not in changes} if left_out else {**config, **changes}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        starts(tmp_path)

    run()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_gguf_that_starts(tmp_path, architecture):
    content = write_gguf(architecture, tmp_path / "m.gguf").read_bytes()

    @settings(FUZZ, max_examples=200)
    @given(damaged(content, 1000))
    def run(data):
        (tmp_path / "m.gguf").write_bytes(data)
        starts(tmp_path / "m.gguf")

    run()
