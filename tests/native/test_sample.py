"""From logits to tokens: restriction, penalties, and draws whose frequencies are the distribution's."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from arrays import Guarded, get, put
from inference_pio.native import ops
from inference_pio.native.dtype import DType


def params(backend, rows):
    fields = dict(temperature=0.0, top_p=1.0, min_p=0.0, repetition=1.0, presence=0.0, top_k=0, seed=0)
    data = b"".join(struct.pack("5fiQ", *(fields | row).values()) for row in rows)
    tensor = backend.tensor((len(rows), 32), DType.U8)
    backend.copy_in(tensor, data)
    return tensor


def draw(backend, logits, rows, positions=None):
    n = len(logits)
    ids, logprobs = Guarded(backend, n, 1), Guarded(backend, n, 1)
    ids_tensor = put(backend, np.full(n + 1, -7), DType.I32)
    positions = np.arange(n) if positions is None else positions
    flat = type(logprobs.tensor)(backend, logprobs.tensor.pointer, (n + 1,), DType.F32)
    ops.sample(ids_tensor, flat, put(backend, logits), params(backend, rows), put(backend, positions, DType.I32), n)
    drawn = get(backend, ids_tensor)
    assert drawn[n] == -7
    return drawn[:n], logprobs.read()[:, 0]


@pytest.mark.parametrize("v", [1, 31, 1000, 49152])
def test_greedy_takes_the_first_of_the_largest(backend, rng, v):
    logits = rng.standard_normal((3, v)).astype(np.float32)
    logits[1, [v // 2, v - 1]] = 9
    ids, logprobs = draw(backend, logits, [{}] * 3)
    assert list(ids) == list(logits.argmax(1))
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True)) + exact.max(1, keepdims=True)
    assert np.allclose(logprobs, exact[np.arange(3), ids], atol=1e-5)


@pytest.mark.parametrize("settings,kept", [
    ({}, [0, 1, 2, 3, 4]), ({"top_k": 2}, [0, 1]), ({"top_p": 0.7}, [0, 1]), ({"min_p": 0.25}, [0, 1, 2]), ({"top_k": 1}, [0]),
    ({"top_k": 3, "top_p": 0.8}, [0, 1])])
def test_frequencies_follow_the_distribution(backend, settings, kept):
    probability, n = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), 4000
    if "min_p" in settings:
        kept = [i for i in range(5) if probability[i] >= settings["min_p"] * 0.4]
    row = dict(temperature=1.0, seed=int(np.random.SeedSequence().generate_state(1)[0]), **settings)
    ids, _ = draw(backend, np.tile(np.log(probability), (n, 1)), [row] * n)
    expected = np.where(np.isin(np.arange(5), kept), probability, 0)
    expected /= expected.sum()
    counts = np.bincount(ids, minlength=5) / n
    assert (counts[expected == 0] == 0).all()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9).all(), (counts, expected)


@pytest.mark.parametrize("spread", [0.5, 3, 30])
@pytest.mark.parametrize("settings", [{"top_p": 0.3}, {"top_p": 0.999}, {"top_k": 40}, {"top_k": 3000, "top_p": 0.9}, {"min_p": 0.1},
                                      {"min_p": 1e-6, "top_p": 0.9999}, {"min_p": 0.3, "top_k": 2500}])
def test_only_what_the_settings_keep_of_a_vocabulary_is_drawn(backend, rng, spread, settings):
    v, n = 4000, 300
    logits = (rng.standard_normal(v) * spread).astype(np.float32)
    ids, _ = draw(backend, np.tile(logits, (n, 1)), [dict(temperature=1.0, seed=int(rng.integers(1 << 30)), **settings)] * n)
    order = np.argsort(-logits, kind="stable")[: settings.get("top_k") or v]
    weight = np.exp(logits[order].astype(np.float64) - logits.max())
    before = np.concatenate([[0], np.cumsum(weight)[:-1]]) / weight.sum()
    kept = order[(before < settings.get("top_p", 1) + 1e-6) & (weight >= settings.get("min_p", 0) * (1 - 1e-6))]
    assert np.isin(ids, kept).all()
    share = np.cumsum(weight[np.isin(order, kept)])
    share /= share[-1]
    half = int((share < 0.5).sum()) + 1
    assert abs(np.isin(ids, kept[:half]).mean() - share[half - 1]) < 5 * np.sqrt(0.25 / n)


def test_temperature_sharpens_and_the_seed_repeats(backend, rng):
    logits = np.tile(np.log([0.5, 0.3, 0.2]), (2000, 1))
    ids, _ = draw(backend, logits, [dict(temperature=0.5, seed=5)] * 2000)
    sharp = np.array([0.25, 0.09, 0.04]) / 0.38
    assert np.abs(np.bincount(ids, minlength=3) / 2000 - sharp).max() < 0.06
    again, _ = draw(backend, logits, [dict(temperature=0.5, seed=5)] * 2000)
    other, _ = draw(backend, logits, [dict(temperature=0.5, seed=6)] * 2000)
    assert np.array_equal(ids, again) and not np.array_equal(ids, other)
    alone, _ = draw(backend, logits[:1], [dict(temperature=0.5, seed=5)], np.array([1234]))
    assert alone[0] == ids[1234], "a draw depends on seed and position alone"


def test_restrict_logits(backend, rng):
    n, v, vocabulary = 3, 70, 65
    logits = rng.standard_normal((n, v)).astype(np.float32)
    allowed = rng.random((n, 96)) < 0.5
    bits = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)
    history, lengths = rng.integers(0, vocabulary, (n, 9)).astype(np.int32), np.array([0, 4, 9], np.int32)
    history[2, :3] = history[2, 3]
    rows = [dict(repetition=1.5, presence=0.25)] * n
    for mask in (None, put(backend, bits.view(np.int32), DType.I32)):
        out = Guarded(backend, n, v, DType.F32, logits)
        if mask is not None:
            mask = type(mask)(backend, mask.pointer, mask.shape, DType.U32)
        ops.restrict_logits(out.tensor, mask, params(backend, rows), put(backend, history, DType.I32), put(backend, lengths, DType.I32), n,
                            vocabulary)
        expected = logits.astype(np.float64)
        expected[:, vocabulary:] = -np.inf
        if mask is not None:
            expected[~allowed[:, :v]] = -np.inf
        for t in range(n):
            for token in set(history[t, : lengths[t]].tolist()):
                expected[t, token] = (expected[t, token] / 1.5 if expected[t, token] > 0 else expected[t, token] * 1.5) - 0.25
        assert np.allclose(out.read(), expected, atol=1e-6)
