"""Writes a GGUF file of Qwen3-0.6B's true shapes with random weights, for comparisons of speed in formats that nobody publishes.

    python models/qwen3_0_6b/benchmarks/random_gguf.py OUT.gguf --weights Q4_K

It has no tokenizer: what reads it must be given token ids.
"""

from __future__ import annotations

import argparse

import numpy as np
from gguf import GGMLQuantizationType as Type, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

D, I, H, G, P, V, LAYERS = 1024, 3072, 16, 8, 128, 151936, 28
SCALES = {Type.Q4_1: (0, 2), Type.Q5_1: (0, 2), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}   # f16 in a block; else (0,)


def matrix(rng: np.random.Generator, kind: Type, rows: int, cols: int) -> np.ndarray:
    """Rows as bytes."""
    values, size = GGML_QUANT_SIZES[kind]
    if values == 1:
        data = (rng.standard_normal(rows * cols, np.float32) * 0.02)
        return (data.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(rows, cols * 2)
    blocks = rng.integers(0, 256, (rows, cols // values, size), np.uint8)
    for at in SCALES.get(kind, (0,)):
        blocks[:, :, at:at + 2] = rng.uniform(0.0005, 0.002, (rows, cols // values)).astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--weights", default="Q8_0", choices=["BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
    options = parser.parse_args()
    kind, rng = Type[options.weights], np.random.default_rng(1)
    writer = GGUFWriter(options.out, "qwen3")
    for add, value in ((writer.add_context_length, 40960), (writer.add_embedding_length, D), (writer.add_block_count, LAYERS),
                       (writer.add_feed_forward_length, I), (writer.add_head_count, H), (writer.add_head_count_kv, G),
                       (writer.add_key_length, P), (writer.add_value_length, P), (writer.add_rope_freq_base, 1e6),
                       (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_vocab_size, V), (writer.add_tokenizer_model, "no_vocab")):
        add(value)
    matrices = {"attn_q": (H * P, D), "attn_k": (G * P, D), "attn_v": (G * P, D), "attn_output": (D, H * P),
                "ffn_gate": (I, D), "ffn_up": (I, D), "ffn_down": (D, I)}
    norms = {"attn_norm": D, "attn_q_norm": P, "attn_k_norm": P, "ffn_norm": D}
    writer.add_tensor("token_embd.weight", matrix(rng, kind, V, D), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for layer in range(LAYERS):
        for name, shape in matrices.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix(rng, kind, *shape), raw_dtype=kind)
        for name, d in norms.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(d, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
