"""How fast a checkpoint of Qwen3-Coder-Next's true shapes is loaded: python benchmark_loading.py --device cuda --layers 4 --folder /dev/shm.

Writes a GGUF file of random weights below --folder (0.95 GB a layer in Q4_0; /dev/shm is memory), so that it is in the page cache, opens
it with the engine, and takes the file away again. `stages` are the seconds until the first tensor is on the device (its driver starts), until
the last is, and until the engine is ready (its cache is allocated). Then 64 tokens are read and 32 written, with experts in memory or in the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from gguf import GGMLQuantizationType as Type, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from inference_pio.engine import Engine, LoadProgress, SamplingParams, TokenPrompt

D, V, H, G, P, HK, HV, PK, TAPS, E, K, I = 2048, 151936, 16, 2, 256, 16, 32, 128, 4, 512, 10, 512   # noqa: E741
SCALES = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}   # f16 in a block; else (0,)
KEYS = {"context_length": 262144, "embedding_length": D, "attention.head_count": H, "attention.head_count_kv": G, "attention.key_length": P,
        "attention.value_length": P, "rope.dimension_count": 64, "rope.freq_base": 5e6, "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": E, "expert_used_count": K, "expert_feed_forward_length": I, "expert_shared_feed_forward_length": I,
        "ssm.conv_kernel": TAPS, "ssm.state_size": PK, "ssm.group_count": HK, "ssm.time_step_rank": HV, "ssm.inner_size": HV * PK, "vocab_size": V}


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes as converters write them; vectors and small matrices have at most two dimensions and stay f32."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output.weight": (V, D), "output_norm.weight": (D,)}
    for layer in range(layers):
        own = {"attn_norm.weight": (D,), "post_attention_norm.weight": (D,), "ffn_gate_inp.weight": (E, D), "ffn_gate_inp_shexp.weight": (D,),
               "ffn_gate_exps.weight": (E, I, D), "ffn_up_exps.weight": (E, I, D), "ffn_down_exps.weight": (E, D, I),
               "ffn_gate_shexp.weight": (I, D), "ffn_up_shexp.weight": (I, D), "ffn_down_shexp.weight": (D, I)}
        if (layer + 1) % 4:
            own |= {"attn_qkv.weight": (2 * HK * PK + HV * PK, D), "attn_gate.weight": (HV * PK, D), "ssm_ba.weight": (2 * HV, D),
                    "ssm_conv1d.weight": (2 * HK * PK + HV * PK, TAPS), "ssm_a": (HV,), "ssm_dt.bias": (HV,), "ssm_norm.weight": (PK,),
                    "ssm_out.weight": (D, HV * PK)}
        else:
            own |= {"attn_q.weight": (2 * H * P, D), "attn_k.weight": (G * P, D), "attn_v.weight": (G * P, D), "attn_output.weight": (D, H * P),
                    "attn_q_norm.weight": (P,), "attn_k_norm.weight": (P,)}
        found |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    return found


def rows(rng: np.random.Generator, kind: Type, shape: tuple[int, ...]) -> np.ndarray:
    """Random blocks as bytes; a stack of experts is one matrix of small values, again and again."""
    values, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[-2:-1], shape[-1] // values, size), np.uint8)
    for at in SCALES.get(kind, (0,)):
        blocks[..., at:at + 2] = rng.uniform(0.0005, 0.002, blocks.shape[:-1]).astype(np.float16)[..., None].view(np.uint8)
    matrix = blocks.reshape(*shape[-2:-1], -1)
    return np.broadcast_to(matrix, (*shape[:-2], *matrix.shape)).copy() if len(shape) == 3 else matrix


def write(path: Path, kind: Type, layers: int) -> None:
    writer, rng = GGUFWriter(path, "qwen3next"), np.random.default_rng(1)
    writer.add_block_count(layers)
    for key, value in KEYS.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"qwen3next.{key}", value)
    shapes = tensors(layers)
    kinds = {name: kind if len(shape) > 1 and not any(part in name for part in ("ffn_gate_inp", "ssm_ba", "conv1d")) else Type.F32
             for name, shape in shapes.items()}
    for name, shape in shapes.items():
        values, size = GGML_QUANT_SIZES[kinds[name]]
        stored = shape if kinds[name] == Type.F32 else (*shape[:-1], shape[-1] // values * size)
        writer.add_tensor_info(name, stored, np.dtype(np.float32 if kinds[name] == Type.F32 else np.uint8),
                               int(np.prod(stored)) * (4 if kinds[name] == Type.F32 else 1), raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        writer.write_tensor_data(rng.normal(0, 0.02, shape).astype(np.float32) if kinds[name] == Type.F32 else rows(rng, kinds[name], shape))
    writer.close()


def decoded(engine: Engine) -> float:
    """Tokens a second, the second time."""
    for _ in range(2):
        begin = perf_counter()
        engine.generate(TokenPrompt(tuple(range(64))), SamplingParams(max_tokens=32, ignore_eos=True))
    return 32 / (perf_counter() - begin)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--weights", default="Q4_0", choices=["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
    parser.add_argument("--experts", default="auto", choices=["auto", "memory", "file"], help="where a CPU has them")
    parser.add_argument("--folder", type=Path, default=None, help="where the file is written (default: the system's folder for temporary files)")
    options = parser.parse_args(argv)
    reports: list[tuple[float, LoadProgress]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "random.gguf"
        write(path, Type[options.weights], options.layers)
        begin = perf_counter()
        with Engine.open(path, device=options.device, experts=options.experts, progress=lambda report: reports.append((perf_counter() - begin, report))) as engine:
            seconds, nbytes = perf_counter() - begin, path.stat().st_size
            loaded = [at for at, report in reports if report.stage == "load"]
            found = {"device": engine.info.device_name, "layers": options.layers, "weights": options.weights, "bytes": nbytes, "seconds": seconds,
                     "gigabytes_per_second": nbytes / seconds / 1e9, "tokens_per_second": decoded(engine), "stages": [loaded[0], loaded[-1], seconds], "reports": len(reports),
                     "plan": reports[-1][1].detail}
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
