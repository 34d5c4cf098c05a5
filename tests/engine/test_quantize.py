"""Weights rounded when a checkpoint is loaded: the same as a file that was rounded beforehand, made once, and never in part."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple

import gguf
import numpy as np
import pytest

from checkpoints import GOLDEN, write_gguf
from inference_pio.engine import Engine, EngineError

IDS = [(t * 37 + 11) % 512 for t in range(24)]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder in which rounded weights are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pio-lsp" / "quantized"


def logits(path, **options):
    stages = []
    with Engine.open(path, device="cpu", activations="f32", progress=lambda p: stages.append(p.stage), **options) as engine:
        scored = engine.score(IDS)
        return np.array(scored.data).reshape(scored.shape), stages


@pytest.mark.parametrize("source", ["safetensors", "gguf"])
def test_rounded_at_load_is_rounded_beforehand(kept, tmp_path, source):
    exact = GOLDEN / "qwen3" if source == "safetensors" else write_gguf("qwen3", tmp_path / "exact.gguf")
    beforehand = write_gguf("qwen3", tmp_path / "rounded.gguf", gguf.GGMLQuantizationType.Q8_0)
    found, stages = logits(exact, weights="q8")
    assert "quantize" in stages
    np.testing.assert_allclose(found, logits(beforehand)[0], atol=1e-5)
    assert np.abs(found - logits(exact)[0]).max() > 1e-4, "something was rounded"


def test_a_second_start_maps_what_the_first_one_made(kept, tmp_path):
    folder = shutil.copytree(GOLDEN / "qwen3", tmp_path / "model")
    first, _ = logits(folder, weights="q4")
    (file,) = kept.iterdir()
    assert file.stat().st_size < 0.4 * (folder / "model.safetensors").stat().st_size
    made = file.stat().st_mtime_ns
    again, stages = logits(folder, weights="q4")
    assert (again == first).all() and file.stat().st_mtime_ns == made and "quantize" not in stages
    logits(folder, weights="q8")
    assert len(list(kept.iterdir())) == 2, "other bits are another file"
    os.utime(folder / "model.safetensors", ns=(1, 1))
    logits(folder, weights="q4")
    assert len(list(kept.iterdir())) == 3, "another checkpoint in the same place is another file"


def test_a_damaged_file_is_made_again(kept):
    first, _ = logits(GOLDEN / "qwen3", weights="q4")
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    again, stages = logits(GOLDEN / "qwen3", weights="q4")
    assert (again == first).all() and "quantize" in stages and [file] == list(kept.iterdir())


def test_a_full_disk_is_said_and_nothing_is_left(kept, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 0))
    with pytest.raises(EngineError, match="GB in .*quantized.*Make room"):
        logits(GOLDEN / "qwen3", weights="q4")
    assert not list(kept.iterdir())


def test_other_words_are_refused():
    with pytest.raises(EngineError, match="weights must be auto, q8 or q4, not 'q2'"):
        Engine.open(GOLDEN / "qwen3", device="cpu", weights="q2")
