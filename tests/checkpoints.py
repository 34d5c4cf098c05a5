"""Checkpoints that the tests write: the golden weights again, as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
_LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
          "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_GLOBAL = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as GGUF converters store them for llama: by head (0, p/2, 1, p/2 + 1, ...)."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write_gguf(architecture: str, path: Path, dtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """The golden checkpoint `architecture` (llama or qwen3) as GGUF; matrices in dtype where their width allows it."""
    folder = GOLDEN / architecture
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in tensors.items():
        if name in _GLOBAL:
            target = _GLOBAL[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            target = f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"
        if architecture == "llama" and ".q_proj" in name or architecture == "llama" and ".k_proj" in name:
            tensor = permuted(tensor, config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"])
        tensor = np.ascontiguousarray(tensor, np.float32)
        block = gguf.GGML_QUANT_SIZES[dtype][0]
        if tensor.ndim == 2 and dtype != gguf.GGMLQuantizationType.F32 and tensor.shape[1] % block == 0:
            writer.add_tensor(target, quantize(tensor, dtype), raw_dtype=dtype)
        else:
            writer.add_tensor(target, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
