"""The real default model: fetched once, as a user's first start does."""

from __future__ import annotations

import json

import numpy as np
import pytest

from checkpoints import GOLDEN
from inference_pio.engine import ChatPrompt, Engine, FimPrompt, Message, SamplingParams, TokenPrompt

REFERENCE = json.loads((GOLDEN / "smollm2.json").read_text())["code"]


@pytest.fixture(scope="module")
def exact(request):
    with Engine.open("smollm2-135m", device=request.config.getoption("--device"), activations="f32") as engine:
        yield engine


@pytest.fixture(scope="module")
def fast(request):
    with Engine.open("smollm2-135m", device=request.config.getoption("--device")) as engine:
        yield engine


def logits(engine: Engine, ids) -> np.ndarray:
    scored = engine.score(ids)
    return np.frombuffer(scored.data, np.float32).reshape(scored.shape)


def test_exact_activations_give_the_references_tokens(exact):
    ids = REFERENCE["ids"]
    last = logits(exact, ids)[-1]
    for token, value in REFERENCE["top5_fp32"]:
        assert abs(last[token] - value) < 0.02
    answer = exact.generate(TokenPrompt(tuple(ids)), SamplingParams(max_tokens=len(REFERENCE["greedy_fp32"]), ignore_eos=True))
    assert list(answer.token_ids) == REFERENCE["greedy_fp32"]
    text = exact.generate("The capital of France is", SamplingParams(max_tokens=5))
    assert text.token_ids == (7042, 30, 198, 198, 504) and text.text == " Paris.\n\nThe"


def test_chat_template_of_the_file(exact):
    answer = exact.generate(ChatPrompt((Message("user", "What is 2+2?"),)), SamplingParams(max_tokens=20))
    assert answer.token_ids == (504, 2988, 288, 451, 8170, 4119, 1732, 314, 216, 36, 30) and answer.finish_reason == "stop"
    assert answer.stats.prompt_tokens == 37


def test_8_bit_activations_stay_close(exact, fast):
    if fast.info.activations != "q8":
        return   # another device rounds otherwise and is measured by its own tests
    ids = REFERENCE["ids"] + REFERENCE["greedy_fp32"]
    want, found = logits(exact, ids), logits(fast, ids)
    ordered = np.sort(want, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 1.5
    assert clear.sum() > 10 and (want.argmax(1) == found.argmax(1))[clear].all()
    assert np.sqrt(((want - found) ** 2).mean()) < 0.35


def test_tokens(exact):
    for text, ids in (
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("def f(x):\n    return x**2  # 123", [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 216, 33, 34, 35]),
        ("Héllo  wörld\t\n\n  42 — ok", [56, 2756, 31394, 216, 267, 29989, 400, 197, 39892, 36, 34, 1841, 10907]),
        ("it's 3.5kg\n\n\n  x  12 34", [269, 506, 216, 35, 30, 37, 11372, 1116, 3805, 1792, 256, 33, 34, 216, 35, 36]),
    ):
        assert exact.tokenize(text) == ids
        assert exact.detokenize(ids) == text
    assert 2 not in exact.tokenize("<|im_end|>") and exact.detokenize(exact.tokenize("<|im_end|>")) == "<|im_end|>"


def test_streaming_never_splits_a_character(fast):
    stream = fast.submit("Écris des emojis: 😀 😃 😄 😁 🎉 🚀 😀 😃 😄", SamplingParams(max_tokens=24, ignore_eos=True))
    pieces = list(stream)
    assert "".join(pieces) == stream.text and "�" not in stream.text.rstrip("�")


def test_a_word_cut_by_the_cursor_is_finished(fast):
    answer = fast.generate(FimPrompt(prefix="import json\n\ndef save(path, data):\n    with open(path, 'w') as file:\n        json.du"),
                           SamplingParams(max_tokens=8))
    assert answer.text.startswith("mp"), answer.text
