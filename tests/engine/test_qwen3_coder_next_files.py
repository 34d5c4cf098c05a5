"""Every layout a Qwen3-Coder-Next checkpoint comes in gives the logits of the plain one with the same values."""

from __future__ import annotations

import os

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from checkpoint_files import Tensors, plain, write_gguf, write_safetensors
from inference_pio.engine import BadCheckpoint, Engine, EngineError, SamplingParams, TokenPrompt
from inference_pio.native.dtype import DType
from weights import random_weight

D, V, LAYERS, H, G, P, HK, HV, PK, PV, TAPS, E, K, I = 256, 320, 4, 4, 2, 128, 1, 2, 128, 128, 4, 4, 2, 256   # noqa: E741
CONFIG = {
    "architectures": ["Qwen3NextForCausalLM"], "vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": H,
    "num_key_value_heads": G, "head_dim": P, "rms_norm_eps": 1e-6, "linear_num_key_heads": HK, "linear_num_value_heads": HV,
    "linear_key_head_dim": PK, "linear_value_head_dim": PV, "linear_conv_kernel_dim": TAPS, "num_experts": E, "num_experts_per_tok": K,
    "moe_intermediate_size": I, "shared_expert_intermediate_size": I, "max_position_embeddings": 256, "full_attention_interval": 4,
    "rope_theta": 5e6, "partial_rotary_factor": 0.25, "rope_scaling": None, "tie_word_embeddings": False,
}
METADATA = {
    "general.architecture": "qwen3next", "qwen3next.block_count": LAYERS, "qwen3next.context_length": 256,
    "qwen3next.embedding_length": D, "qwen3next.attention.head_count": H, "qwen3next.attention.head_count_kv": G,
    "qwen3next.attention.key_length": P, "qwen3next.attention.value_length": P, "qwen3next.rope.dimension_count": 32,
    "qwen3next.rope.freq_base": 5e6, "qwen3next.attention.layer_norm_rms_epsilon": 1e-6, "qwen3next.expert_count": E,
    "qwen3next.expert_used_count": K, "qwen3next.expert_feed_forward_length": I, "qwen3next.expert_shared_feed_forward_length": I,
    "qwen3next.ssm.conv_kernel": TAPS, "qwen3next.ssm.state_size": PK, "qwen3next.ssm.group_count": HK,
    "qwen3next.ssm.time_step_rank": HV, "qwen3next.ssm.inner_size": HV * PV, "qwen3next.vocab_size": V,
}
IDS = [(t * 37 + 11) % V for t in range(40)]
QKVZ, BA = 2 * HK * PK + 2 * HV * PV, 2 * HV


def shapes() -> dict[str, tuple[int, ...]]:
    """Published names, per expert."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        found |= {p + "input_layernorm.weight": (D,), p + "post_attention_layernorm.weight": (D,)}
        if (layer + 1) % 4:
            a = p + "linear_attn."
            found |= {a + "in_proj_qkvz.weight": (QKVZ, D), a + "in_proj_ba.weight": (BA, D), a + "A_log": (HV,), a + "dt_bias": (HV,),
                      a + "conv1d.weight": (2 * HK * PK + HV * PV, 1, TAPS), a + "norm.weight": (PV,), a + "out_proj.weight": (D, HV * PV)}
        else:
            a = p + "self_attn."
            found |= {a + "q_proj.weight": (2 * H * P, D), a + "k_proj.weight": (G * P, D), a + "v_proj.weight": (G * P, D),
                      a + "o_proj.weight": (D, H * P), a + "q_norm.weight": (P,), a + "k_norm.weight": (P,)}
        m = p + "mlp."
        found |= {m + "gate.weight": (E, D), m + "shared_expert_gate.weight": (1, D)}
        for where in [m + "shared_expert."] + [f"{m}experts.{e}." for e in range(E)]:
            found |= {where + "gate_proj.weight": (I, D), where + "up_proj.weight": (I, D), where + "down_proj.weight": (D, I)}
    return found


@pytest.fixture
def arrays(rng):
    return {name: (rng.normal(0, 0.3 if len(shape) == 1 else 0.08, shape) + (1.0 if name.endswith("linear_attn.norm.weight") else 0)).astype("f4")
            for name, shape in shapes().items()}


DEVICE = ["cpu"]


@pytest.fixture(autouse=True)
def device(request):
    DEVICE[0] = request.config.getoption("--device")


def logits(path, **options):
    with Engine.open(path, device=DEVICE[0], activations="f32", **options) as engine:
        result = engine.score(IDS)
        return np.array(result.data).reshape(result.shape)


def close(a, b, k_experts=False):
    errors = np.abs(a - b).max(1) / max(1, np.abs(b).max())
    assert np.abs(b).max() > 0.1
    if k_experts and DEVICE[0] != "cpu":
        # A GPU rounds the scales of these experts to f16 (2^-11); a router that stands near a tie may then choose otherwise.
        assert np.median(errors) < 2e-3 and errors.max() < 0.1
    else:
        assert errors.max() < 1e-3


def fused(arrays):
    """The experts of a layer in two tensors."""
    found = {name: a for name, a in arrays.items() if ".experts." not in name}
    for layer in range(LAYERS):
        m = f"model.layers.{layer}.mlp.experts."
        part = {kind: np.stack([arrays[f"{m}{e}.{kind}_proj.weight"] for e in range(E)]) for kind in ("gate", "up", "down")}
        found |= {m + "gate_up_proj": np.concatenate([part["gate"], part["up"]], 1), m + "down_proj": part["down"]}
    return found


def test_fused_and_per_expert_names_agree(tmp_path, arrays):
    expected = logits(write_safetensors(tmp_path / "experts", CONFIG, plain(arrays)))
    tensors = fused(arrays) | {"mtp.fc.weight": np.zeros((4, 4), "f4")}     # a draft head is tolerated
    assert (logits(write_safetensors(tmp_path / "fused", CONFIG, plain(tensors))) == expected).all()


def test_new_spelling_and_split_projections_agree(tmp_path, arrays):
    expected = logits(write_safetensors(tmp_path / "old", CONFIG, plain(arrays)))
    config = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "partial_rotary_factor", "rope_scaling", "full_attention_interval")}
    config |= {"layer_types": ["linear_attention"] * 3 + ["full_attention"],
               "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25}}
    split = dict(arrays)
    for layer in range(3):
        a = f"model.layers.{layer}.linear_attn."
        qkvz, ba = split.pop(a + "in_proj_qkvz.weight"), split.pop(a + "in_proj_ba.weight")
        split |= dict(zip((a + f"in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")), deinterleave(qkvz, ba), strict=True))
    assert (logits(write_safetensors(tmp_path / "new", config, plain(split))) == expected).all()


def deinterleave(qkvz, ba):
    """(qkv, z, b, a), each of all heads in order."""
    values = HV // HK * PV
    q, k, v, z = np.split(qkvz.reshape(HK, -1, D), np.cumsum([PK, PK, values]), 1)
    b, a = np.split(ba.reshape(HK, -1, D), 2, 1)
    return np.concatenate([x.reshape(-1, D) for x in (q, k, v)]), z.reshape(-1, D), b.reshape(-1, D), a.reshape(-1, D)


def test_block_fp8_agrees_with_its_values(tmp_path, arrays, rng):
    stored, values = {}, dict(arrays)
    for name, array in arrays.items():
        kept = array.ndim != 2 or any(part in name for part in ("embed", "lm_head", "in_proj_ba", "mlp.gate.", "shared_expert_gate"))
        if kept:
            stored |= plain({name: array})
            continue
        data, values[name], scales = random_weight(rng, DType.FP8_E4M3, *array.shape)
        bits = (scales.view("u4") >> 16).astype("u2")      # scales are bf16 in Qwen's releases
        spread = np.repeat(np.repeat((bits.astype("u4") << 16).view("f4") / scales, 128, 0), 128, 1)[:array.shape[0], :array.shape[1]]
        values[name] = values[name] * spread
        stored |= {name: (DType.FP8_E4M3, array.shape, data), name + "_scale_inv": (DType.BF16, scales.shape, bits.tobytes())}
    expected = logits(write_safetensors(tmp_path / "plain", CONFIG, plain(values)))
    close(logits(write_safetensors(tmp_path / "fp8", CONFIG, stored)), expected)


def gguf(arrays, rng, interleaved: bool, mixture: dict[str, DType]) -> tuple[Tensors, dict[str, np.ndarray]]:
    """(the file's tensors, the same model by its published names), matrices in the formats of `mixture` by a part of their name."""
    tensors, values = {}, dict(arrays)

    def put(name, array, *sources):
        """A matrix, or a stack; sources are the published names its rows go back to."""
        dtype = next((d for part, d in mixture.items() if part in name), DType.F32) if array.ndim > 1 else DType.F32
        if dtype == DType.F32:
            tensors[name] = (dtype, array.shape, np.ascontiguousarray(array, "<f4").tobytes())
            return
        data, decoded, _ = random_weight(rng, dtype, int(np.prod(array.shape[:-1])), array.shape[-1])
        tensors[name] = (dtype, array.shape, data)
        decoded = decoded.reshape(array.shape)
        for index, source in enumerate(sources):
            values[source] = decoded[index] if len(sources) > 1 else decoded
    put("token_embd.weight", arrays["model.embed_tokens.weight"], "model.embed_tokens.weight")
    put("output.weight", arrays["lm_head.weight"], "lm_head.weight")
    put("output_norm.weight", 1 + arrays["model.norm.weight"])
    for layer in range(LAYERS):
        p, b, m = f"model.layers.{layer}.", f"blk.{layer}.", f"model.layers.{layer}.mlp."
        put(b + "attn_norm.weight", 1 + arrays[p + "input_layernorm.weight"])
        put(b + "post_attention_norm.weight", 1 + arrays[p + "post_attention_layernorm.weight"])
        if (layer + 1) % 4:
            a = p + "linear_attn."
            if interleaved:
                put(b + "ssm_in.weight", arrays[a + "in_proj_qkvz.weight"], a + "in_proj_qkvz.weight")
            else:   # one key head: interleaved is [q | k | v | z] already
                qkv, z, _, _ = deinterleave(arrays[a + "in_proj_qkvz.weight"], arrays[a + "in_proj_ba.weight"])
                put(b + "attn_qkv.weight", qkv, "qkv")
                put(b + "attn_gate.weight", z, "z")
                values[a + "in_proj_qkvz.weight"] = np.concatenate([values.pop("qkv", qkv), values.pop("z", z)])
            put(b + "ssm_ba.weight", arrays[a + "in_proj_ba.weight"], a + "in_proj_ba.weight")
            put(b + "ssm_conv1d.weight", arrays[a + "conv1d.weight"][:, 0])
            put(b + "ssm_a", -np.exp(arrays[a + "A_log"].astype("f8")))
            put(b + "ssm_dt.bias", arrays[a + "dt_bias"])
            put(b + "ssm_norm.weight", arrays[a + "norm.weight"])
            put(b + "ssm_out.weight", arrays[a + "out_proj.weight"], a + "out_proj.weight")
        else:
            for name, source in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
                put(b + f"attn_{name}.weight", arrays[p + f"self_attn.{source}.weight"], p + f"self_attn.{source}.weight")
            for name in ("q_norm", "k_norm"):
                put(b + f"attn_{name}.weight", 1 + arrays[p + f"self_attn.{name}.weight"])
        put(b + "ffn_gate_inp.weight", arrays[m + "gate.weight"])
        put(b + "ffn_gate_inp_shexp.weight", arrays[m + "shared_expert_gate.weight"][0])
        for kind in ("gate", "up", "down"):
            names = [f"{m}experts.{e}.{kind}_proj.weight" for e in range(E)]
            put(b + f"ffn_{kind}_exps.weight", np.stack([arrays[name] for name in names]), *names)
            put(b + f"ffn_{kind}_shexp.weight", arrays[m + f"shared_expert.{kind}_proj.weight"], m + f"shared_expert.{kind}_proj.weight")
    return tensors, values


MIXTURES = {
    "f32": {},
    "q8_0": {"token_embd": DType.BF16, "ssm_conv1d": DType.F32, "ssm_ba": DType.F32, "gate_inp": DType.F32, ".": DType.Q8_0},
    "q4_k_m": {"ssm_conv1d": DType.F32, "gate_inp": DType.F32, "ssm_ba": DType.Q5_0, "output": DType.Q6_K, "down": DType.Q6_K,
               "attn_v": DType.Q6_K, "ssm_out": DType.Q5_K, ".": DType.Q4_K},
}


@pytest.mark.parametrize("interleaved", [True, False], ids=["ssm_in", "attn_qkv"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_gguf_of_both_generations_agrees_with_its_values(tmp_path, arrays, rng, interleaved, mixture):
    tensors, values = gguf(arrays, rng, interleaved, MIXTURES[mixture])
    expected = logits(write_safetensors(tmp_path / "plain", CONFIG, plain(values)))
    close(logits(write_gguf(tmp_path / "model.gguf", METADATA, tensors)), expected, k_experts=mixture == "q4_k_m")


@pytest.mark.parametrize("weights", ["q8", "q4"])
@pytest.mark.parametrize("source", [DType.F32, DType.FP8_E4M3])
def test_rounding_at_load_keeps_routers_and_gates(tmp_path, arrays, rng, monkeypatch, weights, source):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored, values = {}, dict(arrays)
    for name, array in arrays.items():
        vocabulary = "embed" in name or "lm_head" in name
        if array.ndim != 2 or any(part in name for part in ("in_proj_ba", "mlp.gate.", "shared_expert_gate")):
            stored |= plain({name: array})
            continue
        if source == DType.FP8_E4M3 and not vocabulary:
            data, array, scales = random_weight(rng, source, *array.shape)
            stored |= {name: (source, array.shape, data), name + "_scale_inv": (DType.F32, scales.shape, scales.astype("<f4").tobytes())}
            values[name] = array
            if weights == "q8":
                continue        # it has 8 bits already
        else:
            stored |= plain({name: array})
        kind = GGMLQuantizationType.Q4_0 if weights == "q4" and not vocabulary else GGMLQuantizationType.Q8_0
        values[name] = quants.dequantize(quants.quantize(array.astype("f4"), kind), kind)
    expected = logits(write_safetensors(tmp_path / "plain", CONFIG, plain(values)))
    close(logits(write_safetensors(tmp_path / "stored", CONFIG, stored), weights=weights), expected)


@pytest.mark.parametrize("layout", ["per expert", "fused", "gguf"])
def test_experts_read_in_the_file_give_the_same_bits(tmp_path, arrays, rng, layout):
    if DEVICE[0] != "cpu":
        pytest.skip("a GPU cannot read a file")
    path = (write_gguf(tmp_path / "model.gguf", METADATA, gguf(arrays, rng, False, MIXTURES["q4_k_m"])[0]) if layout == "gguf" else
            write_safetensors(tmp_path / "m", CONFIG, plain(fused(arrays) if layout == "fused" else arrays)))
    for activations in ("f32", "auto"):
        found = []
        for experts in ("memory", "file"):
            reports = []
            with Engine.open(path, device="cpu", activations=activations, experts=experts, progress=reports.append) as engine:
                found.append(bytes(engine.score(IDS).data))
            assert ("experts read in the file" in reports[-1].detail) == (experts == "file")
        assert found[0] == found[1] and any(found[0])


def test_experts_stay_in_the_file_where_memory_is_too_small_for_them(tmp_path, arrays):
    path, held = write_safetensors(tmp_path / "m", CONFIG, plain(arrays)), sum(a.nbytes for n, a in arrays.items() if ".experts." not in n)
    room = dict(device="cpu", activations="f32", context=64, checkpoints=0, memory=held + (4 << 20))
    with pytest.raises(EngineError, match="a larger --memory, --experts file or a smaller model"):
        Engine.open(path, experts="memory", **room)
    with Engine.open(path, **room) as engine:
        assert engine.info.weight_bytes > room["memory"] and len(engine.score(IDS).data) == len(IDS) * V
    with pytest.raises(EngineError, match="experts must be auto, memory or file, not 'disk'"):
        Engine.open(path, device="cpu", experts="disk")


def test_a_file_that_is_cut_while_its_experts_are_read_ends_requests_and_not_the_process(tmp_path, arrays):
    path = write_safetensors(tmp_path / "m", CONFIG, plain(arrays))
    with Engine.open(path, device="cpu", activations="f32", experts="file") as engine:
        assert len(engine.generate(TokenPrompt((1, 2, 3)), SamplingParams(max_tokens=2, ignore_eos=True)).token_ids) == 2
        whole = (path / "model.safetensors").stat().st_size
        os.truncate(path / "model.safetensors", whole // 2)
        with pytest.raises(EngineError, match=f"model.safetensors was cut from {whole} to {whole // 2} bytes"):
            engine.generate(TokenPrompt((1, 2, 4)), SamplingParams(max_tokens=2))
        with pytest.raises(BadCheckpoint, match="load the model again"):
            engine.score(IDS)


def refused(path, *words):
    with pytest.raises(EngineError) as error:
        logits(path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_checkpoints_are_refused_by_name(tmp_path, arrays, rng):
    expert = "model.layers.1.mlp.experts.2.up_proj.weight"
    write = iter(range(100))

    def folder(tensors, **changes):
        return write_safetensors(tmp_path / str(next(write)), CONFIG | changes, tensors)

    refused(folder({k: v for k, v in plain(arrays).items() if k != expert}), "lacks", expert)
    refused(folder(plain(arrays), num_experts=E - 1), "mlp.gate.weight", f"{E} rows")
    refused(folder(plain(arrays), num_experts=E + 1), "mlp.gate.weight", f"{E + 2} rows")
    refused(folder(plain(arrays | {expert: arrays[expert][:, :128]})), expert, f"[{I}, {D}]")
    refused(folder(plain(arrays | {"model.layers.0.linear_attn.A_log": np.zeros(3)})), "A_log", str(HV))
    out = "model.layers.0.linear_attn.out_proj.weight"
    data, _, scales = random_weight(rng, DType.FP8_E4M3, *arrays[out].shape)
    fp8 = plain(arrays) | {out: (DType.FP8_E4M3, arrays[out].shape, data)}
    refused(folder(fp8), out, "lacks its scales", "_scale_inv")
    refused(folder(fp8 | {out + "_scale_inv": (DType.F32, (1, 1), b"\0" * 4)}), "_scale_inv", "[2, 2]")
    refused(folder(plain(arrays), num_experts_per_tok=E + 1), "num_experts_per_tok")
    refused(folder(plain(arrays), decoder_sparse_step=2), "decoder_sparse_step")
    refused(folder(plain(arrays), rope_scaling={"type": "yarn"}), "rope_scaling")
    for missing in ("ssm_a", "ssm_conv1d.weight", "ssm_ba.weight"):
        tensors = gguf(arrays, rng, False, {})[0]
        del tensors["blk.0." + missing]
        refused(write_gguf(tmp_path / f"{missing}.gguf", METADATA, tensors), "lacks", "blk.0." + missing)
    refused(write_gguf(tmp_path / "keys.gguf", {k: v for k, v in METADATA.items() if "group_count" not in k}, gguf(arrays, rng, False, {})[0]),
            "ssm.group_count")


def test_a_context_longer_than_the_pages_allow_is_refused(tmp_path, arrays):
    path = write_safetensors(tmp_path / "m", CONFIG, plain(arrays))
    weights = sum(a.nbytes for a in arrays.values())
    with pytest.raises(EngineError, match="recurrent state.*smaller --context"):
        Engine.open(path, device="cpu", activations="f32", memory=weights + (1 << 18), experts="memory")
    with Engine.open(path, device="cpu", activations="f32", checkpoints=0) as engine:
        assert engine.info.state_count == 4 and engine.status().states_free == 4


def test_recurrent_layers_alone_need_no_pages(tmp_path, arrays):
    few = {name: a for name, a in arrays.items() if not any(f"layers.{layer}." in name for layer in range(2, LAYERS))}
    path = write_safetensors(tmp_path / "m", CONFIG | {"num_hidden_layers": 2}, plain(few))
    result = logits(path)
    assert np.isfinite(result).all() and result.std() > 0
    with Engine.open(path, device=DEVICE[0], activations="f32") as engine:
        first, again = (engine.generate(TokenPrompt(tuple(IDS)), SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)) for _ in range(2))
        assert first.token_ids == again.token_ids and again.stats.computed_tokens == 1
