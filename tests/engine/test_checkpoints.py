"""A hybrid model's reuse is exact: whatever was asked before, a prompt gets the logits and the greedy answer of a fresh start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from inference_pio.engine import Engine
from inference_pio.engine.checkpoints import APART, SPACING, marks
from inference_pio.engine.page_pool import PagePool
from inference_pio.engine.radix_cache import DEVICE, RadixCache
from inference_pio.engine.request import SamplingParams, TokenPrompt
from inference_pio.native.backend import Backend, OutOfMemory

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = GOLDEN / "qwen3_next"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def wanted():
    return json.loads((GOLDEN / "golden.json").read_text())["qwen3_next"]


@pytest.fixture(scope="module")
def engine(request):
    with Engine.open(MODEL, device=request.config.getoption("--device"), activations="f32", context=320) as engine:
        yield engine


@pytest.fixture(scope="module")
def cold(request):
    with Engine.open(MODEL, device=request.config.getoption("--device"), activations="f32", context=320, reuse=False) as engine:
        yield engine


def prompt(n):
    return [(t * 37 + 11) % 512 for t in range(n)]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_golden_logits_in_any_chunks(engine, wanted, chunk):
    logits = engine.score(prompt(150), chunk=chunk)
    for place, row in (("pos0", 0), ("mid", 75), ("last", 149)):
        assert logits.row(row)[:8] == pytest.approx(wanted[place]["first8"], abs=1e-3)


def test_golden_greedy_tokens_cold_and_warm(engine, wanted):
    engine.clear_cache()
    first = engine.generate(TokenPrompt(tuple(prompt(150))), GREEDY)
    again = engine.generate(TokenPrompt(tuple(prompt(150))), GREEDY)
    assert list(first.token_ids) == list(again.token_ids) == wanted["greedy8"]
    assert (first.stats.reused_tokens, again.stats.reused_tokens, again.stats.computed_tokens) == (0, 149, 1)


def test_typing_computes_what_was_typed(engine):
    engine.clear_cache()
    ids = prompt(200)
    engine.generate(TokenPrompt(tuple(ids[:180])), GREEDY)
    for n in range(181, 200, 3):
        answer = engine.generate(TokenPrompt(tuple(ids[:n])), GREEDY)
        assert answer.stats.computed_tokens == (1 if n == 181 else 3)


def test_an_accepted_answer_is_reused_even_if_its_last_token_is_cut(engine):
    engine.clear_cache()
    ids = prompt(100)
    answer = list(engine.generate(TokenPrompt(tuple(ids)), GREEDY).token_ids)
    for cut in (0, 1):
        follow = ids + answer[:len(answer) - cut] + [3]
        assert engine.generate(TokenPrompt(tuple(follow)), GREEDY).stats.computed_tokens <= 2


def test_an_edit_in_the_middle_goes_back_to_a_mark(engine, cold):
    engine.clear_cache()
    ids = prompt(300)
    for n in (120, 300):
        engine.generate(TokenPrompt(tuple(ids[:n])), GREEDY)
    ids[200] = 5
    warm, fresh = (e.generate(TokenPrompt(tuple(ids)), GREEDY) for e in (engine, cold))
    assert warm.stats.reused_tokens == 120 and warm.token_ids == fresh.token_ids


def test_what_the_device_has_no_room_for_goes_to_the_host_and_comes_back(cold, request):
    with Engine.open(MODEL, device=request.config.getoption("--device"), activations="f32", context=320, checkpoints=0,
                     host_checkpoints=8 * cold.info.state_bytes) as engine:
        assert (engine.info.state_count, engine.info.host_state_count) == (4, 8)
        files = [TokenPrompt(tuple(prompt(100 + n)[n:])) for n in range(5)]
        for file in files:
            engine.generate(file, GREEDY)
        status = engine.status()
        assert status.checkpoints_saved > 0 and status.host_states_cached > 0 and status.states_free + status.states_cached == 4
        back = engine.generate(files[0], GREEDY)
        assert back.stats.computed_tokens == 1 and engine.status().checkpoints_restored == 1
        assert back.token_ids == cold.generate(files[0], GREEDY).token_ids
        for n in range(20):
            engine.generate(TokenPrompt(tuple(prompt(150 + n)[n:])), GREEDY)
        status = engine.status()
        assert status.checkpoints_dropped > 0 and status.host_states_free + status.host_states_cached == 8
        engine.clear_cache()
        assert (engine.status().states_free, engine.status().host_states_free) == (4, 8)


def test_where_the_host_has_no_memory_left_checkpoints_are_dropped(cold, request, monkeypatch):
    def nothing_left(backend, nbytes):
        raise OutOfMemory("the system has no memory left")

    with Engine.open(MODEL, device=request.config.getoption("--device"), activations="f32", context=320, checkpoints=0,
                     host_checkpoints=8 * cold.info.state_bytes) as engine:
        monkeypatch.setattr(Backend, "host_buffer", nothing_left)
        for n in range(5):
            file = TokenPrompt(tuple(prompt(100 + n)[n:]))
            assert engine.generate(file, GREEDY).token_ids == cold.generate(file, GREEDY).token_ids
        status = engine.status()
        assert (status.checkpoints_saved, status.host_states_free) == (0, 8) and status.checkpoints_dropped > 0


def test_several_requests_at_once_are_exact(engine, cold):
    engine.clear_cache()
    prompts = [TokenPrompt(tuple(prompt(50 + 17 * i)[i:])) for i in range(9)]
    streams = [engine.submit(p, GREEDY) for p in prompts]
    for stream, p in zip(streams, prompts, strict=True):
        for _ in stream:
            pass
        assert stream.token_ids == cold.generate(p, GREEDY).token_ids
    assert engine.status().states_in_use == 0


def test_marks_are_dense_at_the_end_and_sparse_before():
    chosen = marks(40_000, [100, 20_000, 39_990])
    assert chosen[-2:] == [39_999, 40_000] and 100 in chosen and 39_990 not in chosen
    assert all(b - a <= SPACING for a, b in zip(chosen, chosen[1:]) if a >= 40_000 - 4096)
    assert len(chosen) < 40 and marks(1, []) == [1] and marks(0, []) == []
    assert all(b - a >= APART or b >= 39_999 for a, b in zip(chosen, chosen[1:]))
    later = marks(40_100, [100, 20_000])
    assert len(set(chosen) & set(later)) > 15, "marks must not wander with the prompt's length"


def test_the_checkpoint_that_is_cheapest_to_compute_again_goes_first():
    pages, slots = PagePool(20), PagePool(4, first=0)
    cache = RadixCache(pages, 4, slots)
    held = [pages.take() for _ in range(5)]
    states = [(position, slots.take()) for position in (4, 12, 13, 20)]
    cache.insert(range(20), held, states)
    for _, slot in states:
        slots.release(slot)
    gone = []
    for _ in range(4):
        before = {p for p, s in states if slots.references(s)}
        worst = cache.worst_checkpoint(DEVICE)
        cache.drop(worst.node, worst.offset)
        gone += before - {p for p, s in states if slots.references(s)}
    assert gone[0] == 13 and cache.worst_checkpoint(DEVICE) is None and slots.free == 4
