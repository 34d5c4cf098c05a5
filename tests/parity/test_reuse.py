"""Exactness is a promise: whatever was edited before, a warm request gives the tokens and logits of a cold one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import GOLDEN
from inference_pio.engine import Engine, Priority, SamplingParams, TokenPrompt, checkpoints

CONTEXT, LONGEST = 160, 120   # tokens of an engine and of a document
PAGES = CONTEXT // 16 + 2     # the least that an engine loads with: two documents do not fit beside each other


class Small(NamedTuple):
    """An engine with hardly any room. slots: of recurrent states on the device; host: in the host's memory; cache: how keys and values are kept."""

    model: str
    slots: int = 0
    host: int = 0
    cache: str = "auto"

    def open(self, device: str) -> Engine:
        with Engine.open(GOLDEN / self.model, device=device, activations="f32", cache=self.cache, context=CONTEXT) as probe:
            page, state = probe.info.page_bytes, probe.info.state_bytes
        weights = sum(f.stat().st_size for f in (GOLDEN / self.model).glob("*.safetensors"))
        memory = weights + PAGES * page + state + 2 * max(self.slots - 1, 0) * state   # states beyond the first take half of what is left
        engine = Engine.open(GOLDEN / self.model, device=device, activations="f32", cache=self.cache, context=CONTEXT, memory=memory,
                             checkpoints=self.slots * state, host_checkpoints=self.host * state)
        assert engine.info.state_count == self.slots and engine.info.page_count < 3 * PAGES
        return engine


SMALL = [Small("llama"), Small("qwen3"), Small("qwen3_next", 1), Small("qwen3_next", 2, 2), Small("qwen3_next", 4), Small("qwen3_next", 5, 4)]
EIGHT_BITS = [Small("qwen3", cache="q8"), Small("qwen3_next", 1, cache="q8")]


def both(request):
    """(one with reuse and hardly any room, one without reuse). Checkpoints are as dense in short documents as else in long ones."""
    device = request.config.getoption("--device")
    if request.param.cache == "q8" and device != "cpu":
        pytest.skip("a GPU keeps keys and values in 16 bits")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SPACING", 24), ("NEAR", 72), ("APART", 4)):
            patch.setattr(checkpoints, name, value)
        cold = Engine.open(GOLDEN / request.param.model, device=device, activations="f32", cache=request.param.cache, context=CONTEXT,
                           reuse=False)
        with request.param.open(device) as warm, cold:
            yield warm, cold


@pytest.fixture(scope="module", params=SMALL, ids=lambda s: "-".join(map(str, s)))
def engines(request):
    yield from both(request)


@pytest.fixture(scope="module", params=EIGHT_BITS, ids=lambda s: s.model)
def engines_in_8_bits(request):
    yield from both(request)


class Edit(NamedTuple):
    """What somebody does before a suggestion is asked for, and how much of it is accepted afterwards."""

    document: int
    where: int        # per cent of the document
    gone: int         # tokens deleted
    come: list[int]   # tokens inserted
    tokens: int       # of the suggestion
    accepted: int
    priority: Priority
    cancelled: bool   # a request before it, as by a key that was typed over
    beside: bool      # another document asks at the same time

    def apply(self, text: list[int]) -> list[int]:
        at = len(text) * self.where // 100
        return (text[:at] + self.come + text[at + self.gone:])[:LONGEST] or [5]


# Few different tokens, so that different texts share beginnings; places often at the end, where people type.
SESSION = st.lists(st.builds(
    Edit, st.integers(0, 2), st.one_of(st.just(100), st.integers(0, 100)), st.integers(0, 12), st.lists(st.integers(5, 9), max_size=24),
    st.integers(0, 6), st.integers(0, 6), st.sampled_from(list(Priority)), st.booleans(), st.booleans()), min_size=1, max_size=10)


def ask(engine: Engine, text: list[int], tokens: int, priority: Priority):
    return engine.submit(TokenPrompt(tuple(text)), SamplingParams(max_tokens=tokens, ignore_eos=True, keep_logits=True), priority)


def finish(stream):
    for _ in stream:
        pass
    return stream


def check_equal(warm, cold) -> None:
    assert warm.token_ids == cold.token_ids
    if cold.first_logits is not None:
        np.testing.assert_allclose(np.asarray(warm.first_logits), np.asarray(cold.first_logits), atol=1e-4, rtol=0)


def check_nothing_lost(engine: Engine) -> None:
    """free + cached + in use = all, and nothing is in use."""
    status, info = engine.status(), engine.info
    assert status.pages_in_use == status.states_in_use == 0
    assert status.pages_free + status.pages_cached == info.page_count - 1
    assert status.states_free + status.states_cached == info.state_count
    assert status.host_states_free + status.host_states_cached == info.host_state_count


def check_close(warm, cold) -> None:
    """Sums in another order may turn a code of 8 bits into its neighbour: 1/127 of one value of a key."""
    if cold.first_logits is not None:
        found, wanted = np.asarray(warm.first_logits), np.asarray(cold.first_logits)
        np.testing.assert_allclose(found, wanted, atol=0.02, rtol=0)
        second, first = np.sort(wanted)[-2:]
        assert warm.token_ids[:1] == cold.token_ids[:1] or first - second < 0.04


def play(warm: Engine, cold: Engine, session: list[Edit], check=check_equal) -> None:
    texts = [[5, 6, 7], [5, 6, 8], [9]]
    for edit in session:
        text = texts[edit.document] = edit.apply(texts[edit.document])
        if edit.cancelled:
            stream = ask(warm, text, edit.tokens, edit.priority)
            stream.close()
            finish(stream)
        beside = ask(warm, texts[edit.document - 1], 3, Priority.PREFETCH) if edit.beside else None
        found = finish(ask(warm, text, edit.tokens, edit.priority))
        if beside is not None:
            check(finish(beside), finish(ask(cold, texts[edit.document - 1], 3, Priority.CHAT)))
        check(found, finish(ask(cold, text, edit.tokens, Priority.CHAT)))
        stats = found.stats
        assert stats.reused_tokens + stats.computed_tokens == stats.prompt_tokens == len(text)
        assert stats.computed_tokens > stats.recomputed_tokens >= 0
        texts[edit.document] = text + list(found.token_ids[:edit.accepted])
    check_nothing_lost(warm)


@given(session=SESSION)
@settings(max_examples=500, suppress_health_check=list(HealthCheck))
def test_warm_equals_cold(engines, session):
    play(*engines, session)


@given(session=SESSION)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_warm_is_close_to_cold_with_8_bits(engines_in_8_bits, session):
    play(*engines_in_8_bits, session, check_close)


@pytest.mark.slow
@given(session=SESSION)
@settings(max_examples=20_000, suppress_health_check=list(HealthCheck))
def test_warm_equals_cold_for_long(engines, session):
    play(*engines, session)


def test_typing_computes_only_what_was_typed(engines):
    warm, _ = engines
    text = [int(x) for x in range(5, 105)]
    finish(ask(warm, text, 1, Priority.COMPLETION))
    for _ in range(10):
        text.append(7)
        stats = finish(ask(warm, text, 1, Priority.COMPLETION)).stats
        assert (stats.computed_tokens, stats.recomputed_tokens) == (1, 0)


def test_an_edit_in_the_middle_computes_what_follows_and_at_most_a_spacing_before(engines):
    warm, _ = engines
    warm.clear_cache()
    text = [int(x) for x in range(5, 105)]
    finish(ask(warm, text, 1, Priority.COMPLETION))
    stats = finish(ask(warm, text[:50] + [9] + text[50:], 1, Priority.COMPLETION)).stats
    if not warm.info.state_count:
        assert stats.reused_tokens == 50, "reuse is exact to the token, not to the page"
    elif warm.info.state_count >= 5:
        assert 50 - checkpoints.SPACING <= stats.reused_tokens == 50 - stats.recomputed_tokens


def test_many_at_once_give_what_each_gives_alone(engines):
    warm, cold = engines
    prompts = [[(5 + i + t) % 512 for t in range(3 + 5 * i)] for i in range(9)]
    streams = [ask(warm, p, 9, Priority(i % 3)) for i, p in enumerate(prompts)]
    for prompt, stream in zip(prompts, streams, strict=True):
        check_equal(finish(stream), finish(ask(cold, prompt, 9, Priority.CHAT)))
    check_nothing_lost(warm)


CROWD = st.lists(st.tuples(st.integers(0, 2), st.integers(1, LONGEST), st.integers(0, 9), st.sampled_from(list(Priority)), st.booleans()),
                 min_size=4, max_size=14)


@given(crowd=CROWD)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_a_crowd_that_takes_pages_from_each_other_loses_none(engines, crowd):
    """Of three documents beginnings of any length are asked for at the same time; some of the requests are closed at once."""
    warm, cold = engines
    documents = [[5 + (n * t + t // 7) % 97 for t in range(LONGEST)] for n in (1, 2, 3)]
    streams = [ask(warm, documents[d][:n], tokens, priority) for d, n, tokens, priority, _ in crowd]
    for stream, (*_, closed) in zip(streams, crowd, strict=True):
        if closed:
            stream.close()
    for stream, (d, n, tokens, _, closed) in zip(streams, crowd, strict=True):
        finish(stream)
        if not closed:
            check_equal(stream, finish(ask(cold, documents[d][:n], tokens, Priority.CHAT)))
    check_nothing_lost(warm)
