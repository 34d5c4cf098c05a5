"""Exactness is a promise: whatever was edited before, a warm request gives the tokens and logits of a cold one."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import GOLDEN
from inference_pio.engine import Engine, Priority, SamplingParams, TokenPrompt

# An edit: (where, how many tokens go, which come). Few different tokens, so that pages of different texts share beginnings.
EDIT = st.tuples(st.integers(0, 90), st.integers(0, 12), st.lists(st.integers(5, 9), max_size=24))
SESSION = st.lists(st.tuples(EDIT, st.integers(0, 6), st.sampled_from(list(Priority)), st.booleans()), min_size=1, max_size=12)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def engines(request):
    device = request.config.getoption("--device")
    small = Engine.open(GOLDEN / request.param, device=device, activations="f32", context=160,
                        memory={"llama": 520_000, "qwen3": 720_000}[request.param])   # about 14 pages: everything is evicted all the time
    cold = Engine.open(GOLDEN / request.param, device=device, activations="f32", context=160, reuse=False)
    with small, cold:
        yield small, cold


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(session=SESSION)
def test_warm_equals_cold(engines, session):
    warm, cold = engines
    text = [5, 6, 7]
    for (where, gone, come), tokens, priority, cancel in session:
        where = min(where, len(text))
        text = (text[:where] + come + text[where + gone:])[:120] or [5]
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        if cancel:
            stream = warm.submit(TokenPrompt(tuple(text)), params, priority)
            stream.close()
            for _ in stream:
                pass
        found = warm.generate(TokenPrompt(tuple(text)), params, priority)
        assert found.token_ids == cold.generate(TokenPrompt(tuple(text)), params).token_ids
        stats = found.stats
        assert stats.reused_tokens + stats.computed_tokens == stats.prompt_tokens == len(text)
        text += found.token_ids
    status = warm.status()
    assert status.pages_in_use == 0
    assert status.pages_free + status.pages_cached == warm.info.page_count - 1


def test_typing_computes_only_what_was_typed(engines):
    warm, _ = engines
    text = [int(x) for x in range(5, 105)]
    warm.generate(TokenPrompt(tuple(text)), SamplingParams(max_tokens=1, ignore_eos=True))
    for _ in range(10):
        text.append(7)
        stats = warm.generate(TokenPrompt(tuple(text)), SamplingParams(max_tokens=1, ignore_eos=True)).stats
        assert stats.computed_tokens == 1, stats
    edited = text[:50] + [9] + text[50:]
    stats = warm.generate(TokenPrompt(tuple(edited)), SamplingParams(max_tokens=1, ignore_eos=True)).stats
    assert stats.reused_tokens == 50, "reuse is exact to the token, not to the page"


def test_many_at_once_give_what_each_gives_alone(engines):
    warm, cold = engines
    prompts = [TokenPrompt(tuple((5 + i + t) % 512 for t in range(3 + 5 * i))) for i in range(9)]
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    streams = [warm.submit(p, params, Priority(i % 3)) for i, p in enumerate(prompts)]
    for prompt, stream in zip(prompts, streams):
        for _ in stream:
            pass
        assert stream.token_ids == cold.generate(prompt, params).token_ids
