"""A checkpoint whose parts do not belong together: one error that names the part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import GOLDEN
from inference_pio.engine import BadCheckpoint, Engine, EngineError, ModelNotFound, loading
from inference_pio.engine.runner import PAGE_SIZE
from inference_pio.models.qwen3_coder_next.plugin import PLUGIN as CODER_NEXT
from inference_pio.native.dtype import DType

SOURCE = GOLDEN / "llama"


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny checkpoint that a test may damage."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SOURCE / name, tmp_path)
    return tmp_path


def change(folder, **fields):
    config = {**json.loads((SOURCE / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refuse(folder, error, says):
    with pytest.raises(error, match=says):
        Engine.open(folder, device="cpu", context=32)


@pytest.mark.parametrize("fields,error,says", [
    (dict(architectures=["MambaForCausalLM"]), ModelNotFound, "no plugin runs the architecture 'MambaForCausalLM'"), (dict(architectures=...), BadCheckpoint, "architecture"),
    (dict(architectures=[]), BadCheckpoint, "architecture"), (dict(architectures=[3]), BadCheckpoint, "architecture"), (dict(hidden_size=...), BadCheckpoint, "hidden_size"),
    (dict(hidden_size="72"), BadCheckpoint, "hidden_size"), (dict(hidden_size=64), BadCheckpoint, "must .* 64"), (dict(num_attention_heads=0), BadCheckpoint, "."),
    (dict(num_hidden_layers=3), BadCheckpoint, "lacks the tensor 'model.layers.2"), (dict(num_hidden_layers=1), BadCheckpoint, "does not have: 'model.layers.1"),
    (dict(num_hidden_layers=-1), BadCheckpoint, "num_hidden_layers must be a positive"), (dict(rms_norm_eps=float("nan")), BadCheckpoint, "rms_norm_eps"),
    (dict(vocab_size=600), BadCheckpoint, "embed_tokens.*600"), (dict(max_position_embeddings=2.5), BadCheckpoint, "max_position_embeddings"),
    (dict(head_dim=[8]), BadCheckpoint, "head_dim must be a positive integer"), (dict(rope_parameters={"rope_theta": 0, "rope_type": "yarn"}), BadCheckpoint, "yarn"),
])
def test_a_config_that_does_not_fit_is_refused_by_name(folder, fields, error, says):
    change(folder, **fields)
    refuse(folder, error, says)


def test_a_tokenizer_of_another_model(folder):
    shutil.copy(GOLDEN / "qwen3_tokenizer.json", folder / "tokenizer.json")
    refuse(folder, BadCheckpoint, "tokenizer has 151669 ids, the model 512")


@pytest.mark.parametrize("damage,says", [
    (lambda t: t.pop("model.norm.weight"), "lacks the tensor 'model.norm.weight'"), (lambda t: t.update(extra=np.ones(3, np.float32)), "does not have: 'extra'"),
    (lambda t: t.update({"model.norm.weight": np.ones(71, np.float32)}), "'model.norm.weight' must have 72"),
    (lambda t: t.update({"model.norm.weight": np.ones(72, np.int64)}), "'model.norm.weight' is stored as I64"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((96, 71), np.float32)}), "up_proj"),
])
def test_tensors_that_do_not_fit_are_refused_by_name(folder, damage, says):
    tensors = load_file(SOURCE / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    refuse(folder, BadCheckpoint, says)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_that_is_none(folder, name):
    (folder / name).write_text('{"a": ')
    refuse(folder, BadCheckpoint, f"{name}: not valid JSON")


def test_without_a_tokenizer_ids_are_scored_and_text_is_refused(folder):
    with Engine.open(folder, device="cpu", context=32) as engine:
        assert not engine.info.has_tokenizer and engine.score([1, 2, 3]).shape == (3, 512)
        with pytest.raises(EngineError, match="no tokenizer"):
            engine.tokenize("text")


def test_the_flagship_fits_on_a_card_of_78_gib_with_128k_tokens_and_64_checkpoints():
    config = CODER_NEXT.parse_config({
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "rms_norm_eps": 1e-6, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512, "max_position_embeddings": 262144,
        "shared_expert_intermediate_size": 512, "partial_rotary_factor": 0.25, "rope_theta": 5e6}, "safetensors")
    weights = SimpleNamespace(dtype=DType.Q4_0, nbytes=44_800_000_000)
    checkpoint = SimpleNamespace(path=Path("flagship"), plugin=CODER_NEXT, config=config, tensors={"all": weights}, context=262144)
    backend = SimpleNamespace(kind="cuda", device="cuda:0", memory_info=lambda: (78 << 30, 80 << 30), lib=SimpleNamespace(tops_scratch_bytes=lambda *_: 2 << 30))
    plan = loading.plan(checkpoint, backend, "auto", "auto", "auto", None, 131072, None)
    assert plan.pages * PAGE_SIZE >= 131072 and plan.states >= 64 + 1
    assert plan.workspace_bytes > 2 << 30, "scratch and activations are counted"
    taken = weights.nbytes + plan.pages * plan.page_bytes + plan.states * plan.state_bytes + plan.workspace_bytes
    assert taken < 78 << 30
    with pytest.raises(EngineError, match="needs 44.80 GB for weights, .* for a recurrent state and .*the budget is 48.00 GB"):
        loading.plan(checkpoint, backend, "auto", "auto", "auto", 48_000_000_000, 131072, None)
    with pytest.raises(EngineError, match="cache 'q8' cannot be used on cuda:0.*use cache 'auto' or --device cpu"):
        loading.plan(checkpoint, backend, "auto", "q8", "auto", None, 131072, None)
