"""Tiny checkpoints of each dense architecture against the logits that transformers gave for them (tests/golden/golden.json)."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest

from checkpoints import GOLDEN, write_gguf
from inference_pio.engine import Engine, EngineError, SamplingParams, TokenPrompt, runner

EXPECTED = json.loads((GOLDEN / "golden.json").read_text())
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "qwen3"])


def prompt(n: int) -> list[int]:
    return [(t * 37 + 11) % 512 for t in range(n)]


@pytest.fixture(scope="module", params=["safetensors", "gguf"])
def open_golden(request, tmp_path_factory):
    device = request.config.getoption("--device")

    def open_(architecture: str, activations: str = "f32", **options) -> Engine:
        path = GOLDEN / architecture
        if request.param == "gguf":
            path = write_gguf(architecture, tmp_path_factory.mktemp("gguf") / f"{architecture}.gguf")
        return Engine.open(path, device=device, activations=activations, **options)
    return open_


def logits(engine: Engine, ids, **options) -> np.ndarray:
    scored = engine.score(ids, **options)
    return np.frombuffer(scored.data, np.float32).reshape(scored.shape)


@ARCHITECTURES
@pytest.mark.parametrize("activations,limit", [("f32", 1e-3), ("bf16", 0.2)])
def test_logits_and_greedy_tokens(open_golden, architecture, activations, limit):
    expected = EXPECTED[architecture]
    n = expected["prompt_len"]
    with open_golden(architecture, activations) as engine:
        assert not engine.info.has_tokenizer
        found = logits(engine, prompt(n))
        for row, name in ((0, "pos0"), (n // 2, "mid"), (n - 1, "last")):
            want = expected[name]
            assert np.abs(found[row, :8] - want["first8"]).max() < limit, name
            assert abs(np.linalg.norm(found[row]) - want["l2"]) < limit * 10, name
            for token, value in want["top3"]:
                assert abs(found[row, token] - value) < limit, (name, token)
        if activations == "f32":
            answer = engine.generate(TokenPrompt(tuple(prompt(n))), SamplingParams(max_tokens=8, ignore_eos=True))
            assert list(answer.token_ids) == expected["greedy8"]


@ARCHITECTURES
def test_keys_and_values_in_8_bits(open_golden, architecture, request):
    """Half a code of 127 in each key and value: logits (which reach 11 here) stay close, and less memory holds as many tokens."""
    if request.config.getoption("--device") != "cpu":
        with pytest.raises(EngineError, match="cache 'q8' cannot be used on cuda"):
            open_golden(architecture, cache="q8")
        return
    with open_golden(architecture, activations="bf16") as exact, open_golden(architecture, activations="bf16", cache="q8") as engine:
        assert engine.info.page_bytes < 0.8 * exact.info.page_bytes   # heads of 8 values, with a scale of 4 bytes
        ids = prompt(EXPECTED[architecture]["prompt_len"])
        difference = np.abs(logits(engine, ids) - logits(exact, ids))
        assert 0 < difference.max() < 0.5 and np.sqrt((difference ** 2).mean()) < 0.06
    with pytest.raises(EngineError, match="cache must be auto or q8, not 'q3'"):
        open_golden(architecture, cache="q3")


@ARCHITECTURES
def test_prefill_in_chunks_at_once_and_token_by_token_agree(open_golden, architecture):
    with open_golden(architecture) as engine:
        whole = logits(engine, prompt(40), chunk=40)
        for chunk in (1, 7, 16, 33):
            assert np.abs(logits(engine, prompt(40), chunk=chunk) - whole).max() < 1e-4, chunk


@ARCHITECTURES
@pytest.mark.parametrize("dtype", ["Q8_0", "BF16"])
def test_rounded_weights_stay_close(architecture, dtype, tmp_path, request):
    """Rounding the weights of a model this small moves its logits, but not far."""
    kind = gguf.GGMLQuantizationType[dtype]
    small = write_gguf(architecture, tmp_path / "small.gguf", kind)
    with Engine.open(small, device=request.config.getoption("--device"), activations="f32") as engine:
        found = logits(engine, prompt(24))
    assert np.isfinite(found).all()
    with Engine.open(GOLDEN / architecture, device=request.config.getoption("--device"), activations="f32") as engine:
        exact = logits(engine, prompt(24))
    correlation = np.corrcoef(found.ravel(), exact.ravel())[0, 1]
    assert correlation > 0.999, correlation


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_next"])
@pytest.mark.parametrize("activations", ["f32", "bf16"])
def test_recorded_steps_give_the_tokens_of_eager_ones(architecture, activations, request, monkeypatch):
    """Decoding replays a recorded step (a graph on a GPU); one, two and more sequences at once take different recordings."""
    prompts = [TokenPrompt(tuple((t * 41 + 7 * k) % 512 for t in range(20 + k))) for k in range(5)]
    greedy = SamplingParams(max_tokens=12, ignore_eos=True)

    def answers():
        with Engine.open(GOLDEN / architecture, device=request.config.getoption("--device"), activations=activations, reuse=False) as engine:
            alone = [engine.generate(prompt, greedy).token_ids for prompt in prompts[:2]]
            if activations == "bf16":   # which rows share a step is chance, and a GPU rounds a row by itself in another order
                return alone
            streams = [engine.submit(prompt, greedy) for prompt in prompts]
            for stream in streams:
                for _ in stream:
                    pass
            return alone, [stream.token_ids for stream in streams]
    recorded = answers()
    monkeypatch.setattr(runner, "BUCKETS", (0,))
    assert recorded == answers()
