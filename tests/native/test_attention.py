"""Rotation, the store into pages, and attention over them, against formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest

from arrays import Guarded, error, get_cached, put, put_cached, round_to
from inference_pio.native import ops
from inference_pio.native.backend import TensorOpsError
from inference_pio.native.dtype import DType

PAGE = 16


class Scene:
    """b sequences with a cached past of random length, and a step of some new rows for each, over shuffled pages."""

    def __init__(self, backend, rng, pasts, news, h, g, p, storage=DType.F32, cache=DType.F32, gated=False):
        self.h, self.g, self.p, self.n = h, g, p, sum(news)
        self.rng, self.storage, self.cache_dtype = rng, storage, cache
        b, max_pages = len(pasts), -(-max(map(sum, zip(pasts, news))) // PAGE) + 1
        pages = b * max_pages + 1
        order = rng.permutation(np.arange(1, pages))
        table = order[: b * max_pages].reshape(b, max_pages).astype(np.int32)
        self.table = table
        whole, (self.kv,) = backend.kv_cache(1, pages, g, PAGE, p, cache)
        self.whole = whole
        self.k = np.zeros((pages, g, PAGE, p))
        self.v = np.zeros((pages, g, PAGE, p))
        for s, past in enumerate(pasts):
            for position in range(past):
                self.k[table[s, position // PAGE], :, position % PAGE] = round_to(rng.standard_normal((g, p)), cache)
                self.v[table[s, position // PAGE], :, position % PAGE] = round_to(rng.standard_normal((g, p)), cache)
        put_cached(backend, whole, np.stack([self.k, self.v]), cache)
        self.batch = backend.batch(max(self.n, 1), b, max_pages, 1)
        self.batch.resize(self.n, b, 0)
        self.positions = np.concatenate([np.arange(a, a + m) for a, m in zip(pasts, news)]).astype(np.int32)
        self.sequences = np.repeat(np.arange(b), news).astype(np.int32)
        slots = table[self.sequences, self.positions // PAGE] * PAGE + self.positions % PAGE
        starts = np.concatenate([[0], np.cumsum(news)]).astype(np.int32)
        for tensor, value in ((self.batch.positions, self.positions), (self.batch.sequences, self.sequences), (self.batch.slots, slots),
                              (self.batch.query_starts, starts), (self.batch.page_table, table)):
            backend.copy_in(tensor, np.ascontiguousarray(value, np.int32).tobytes())
        self.qkv = round_to(rng.standard_normal((self.n, ((2 if gated else 1) * h + 2 * g) * p)), storage)

    def attention(self, q, scale):
        out = np.zeros((self.n, self.h, self.p))
        for t in range(self.n):
            at = np.arange(self.positions[t] + 1)
            pages, rows = self.table[self.sequences[t]][at // PAGE], at % PAGE
            for j in range(self.h):
                kv = j // (self.h // self.g)
                score = self.k[pages, kv, rows] @ q[t, j] * scale
                weight = np.exp(score - score.max())
                out[t, j] = weight / weight.sum() @ self.v[pages, kv, rows]
        return out.reshape(self.n, self.h * self.p)


class Rope:
    """A step's rotation of the first r dimensions of heads, after their norm where there is one."""

    def __init__(self, backend, rng, scene, r, normed):
        self.scene, self.eps = scene, 1e-6
        self.inv_freq = (10000.0 ** (-np.arange(r // 2) / (r // 2))).astype(np.float32)
        # The table's angles are products in f32.
        self.angle = (scene.positions[:, None].astype(np.float32) * self.inv_freq).astype(np.float64)
        self.weights = [rng.uniform(0.5, 1.5, scene.p).astype(np.float32) for _ in range(2)] if normed else None
        self.norms = [put(backend, w) for w in self.weights] if normed else [None, None]

    @property
    def table(self):
        """[n, r / 2, 2]"""
        return np.stack([np.cos(self.angle), np.sin(self.angle)], 2)

    def heads(self, pairs):
        """What becomes of the step's queries and keys, its values and its gates: [n, heads, p] each."""
        scene = self.scene
        h, g, p = scene.h, scene.g, scene.p
        q, k, v, gate = np.split(scene.qkv.reshape(scene.n, scene.qkv.shape[1] // p, p), [h, h + g, h + 2 * g], 1)
        if self.weights:
            q, k = (x / np.sqrt((x * x).mean(2, keepdims=True) + self.eps) * w for x, w in zip((q, k), self.weights))
        return self._rotated(q, pairs), self._rotated(k, pairs), v, gate

    def _rotated(self, x, pairs):
        c, s = np.cos(self.angle)[:, None], np.sin(self.angle)[:, None]
        out, half = x.copy(), len(self.inv_freq)
        first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if pairs else (slice(0, half), slice(half, 2 * half))
        out[..., first] = x[..., first] * c - x[..., second] * s
        out[..., second] = x[..., second] * c + x[..., first] * s
        return out


def require(backend, cache):
    if cache == DType.Q8_0 and backend.kind != "cpu":
        pytest.skip("a GPU keeps keys and values in 16 bits")


@pytest.mark.parametrize("storage,cache", [(DType.F32, DType.F32), (DType.BF16, DType.BF16), (DType.F32, DType.Q8_0)], ids=str)
@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("news,r,gated", [((), 16, False), ((1,), 64, False), ((1, 3, 0, 5), 16, False), ((7,), 32, True)])
def test_qk_norm_rope_store(backend, rng, storage, cache, pairs, normed, news, r, gated):
    h, g, p = 4, 2, 64
    require(backend, cache)
    scene = Scene(backend, rng, [int(rng.integers(0, 40)) for _ in news] or [0], list(news) or [0], h, g, p, storage, cache, gated)
    n, rope = scene.n, Rope(backend, rng, scene, r, normed)
    table = Guarded(backend, n, r)
    shaped = type(table.tensor)(backend, table.tensor.pointer, (n + 1, r // 2, 2), DType.F32)
    ops.rope_table(shaped, scene.batch.positions, put(backend, rope.inv_freq), n)
    assert np.allclose(table.read(), rope.table.reshape(n, r), atol=2e-6)

    qkv = Guarded(backend, n, scene.qkv.shape[1], storage, scene.qkv)
    before = get_cached(backend, scene.whole, cache).reshape(2, -1, g, PAGE, p)
    ops.qk_norm_rope_store(qkv.tensor, scene.kv, scene.batch, shaped, *rope.norms, h, pairs, rope.eps, **({"gated": True} if gated else {}))

    q, k, v, gate = rope.heads(pairs)
    limit = 2e-6 if storage == DType.F32 else 8e-3
    actual = qkv.read().reshape(n, scene.qkv.shape[1] // p, p)
    assert error(actual[:, :h], q) < limit
    assert np.array_equal(actual[:, h + 2 * g:], gate)
    after, expected = get_cached(backend, scene.whole, cache).reshape(2, -1, g, PAGE, p), before.astype(np.float64)
    for t in range(n):
        page = scene.table[scene.sequences[t], scene.positions[t] // PAGE]
        expected[0, page, :, scene.positions[t] % PAGE], expected[1, page, :, scene.positions[t] % PAGE] = k[t], v[t]
    assert error(after, expected) < (limit if cache != DType.Q8_0 else 0.5 / 127 + limit)   # half a code of the row's largest value


@pytest.mark.parametrize("storage,cache", [(DType.F32, DType.F32), (DType.F32, DType.F16), (DType.BF16, DType.BF16), (DType.F32, DType.Q8_0)], ids=str)
@pytest.mark.parametrize("h,g,p", [(3, 3, 32), (6, 2, 5), (4, 2, 48), (4, 2, 128), (9, 3, 64), (40, 2, 80), (4, 1, 128), (16, 2, 256)])
@pytest.mark.parametrize("pasts,news", [((0,), (0,)), ((0,), (1,)), ((15,), (1,)), ((700,), (1,)), ((0,), (37,)), ((33, 0, 129), (2, 17, 1)),
                                        ((5, 260, 16, 90), (1, 1, 1, 1))])
def test_paged_attention(backend, rng, storage, cache, h, g, p, pasts, news):
    require(backend, cache)
    scene = Scene(backend, rng, pasts, news, h, g, p, storage, cache)
    # The rows of this step are in the cache already: qk_norm_rope_store ran before.
    for t in range(scene.n):
        page, row = scene.table[scene.sequences[t], scene.positions[t] // PAGE], scene.positions[t] % PAGE
        scene.k[page, :, row], scene.v[page, :, row] = (round_to(rng.standard_normal((g, p)), cache) for _ in range(2))
    # What lies beyond a sequence's end must not be read: garbage would show.
    seen = np.zeros(scene.k.shape[:1] + (PAGE,), bool)
    for s, length in enumerate(map(sum, zip(pasts, news))):
        seen[scene.table[s][np.arange(length) // PAGE], np.arange(length) % PAGE] = True
    stored = np.stack([scene.k, scene.v])
    stored[:, ~seen[:, None, :, None].repeat(g, 1).repeat(p, 3)] = 1e4
    put_cached(backend, scene.whole, stored, cache)
    out = Guarded(backend, scene.n, h * p, storage)
    ops.paged_attention(out.tensor, put(backend, scene.qkv, storage), scene.kv, scene.batch, h, p**-0.5)
    expected = scene.attention(scene.qkv[:, : h * p].reshape(scene.n, h, p), p**-0.5)
    assert error(out.read(), expected) < (3e-6 if storage == DType.F32 else 6e-3)


def test_large_scores_do_not_overflow(backend, rng):
    scene = Scene(backend, rng, (40,), (1,), 2, 2, 32)
    scene.qkv *= 1000
    expected = scene.attention(scene.qkv.reshape(1, -1, 32)[:, :2], 1.0)
    # The new row is not stored here, so its slot holds zeros in both.
    out = Guarded(backend, 1, 64)
    ops.paged_attention(out.tensor, put(backend, scene.qkv), scene.kv, scene.batch, 2, 1.0)
    assert error(out.read(), expected) < 1e-4


def test_a_cache_in_a_format_without_kernels_is_refused(backend, rng):
    scene = Scene(backend, rng, (3,), (1,), 2, 2, 32)
    scene.kv.struct.dtype = DType.Q4_0 if backend.kind == "cpu" else DType.Q8_0
    with pytest.raises(TensorOpsError, match="kv: must be f32"):
        ops.paged_attention(put(backend, np.zeros((1, 64))), put(backend, scene.qkv), scene.kv, scene.batch, 2, 1.0)


@pytest.mark.parametrize("storage", [DType.F32, DType.BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("h,g,p,r,normed,gated", [(4, 2, 64, 64, False, False), (8, 4, 128, 128, True, False), (3, 1, 64, 32, True, False),
                                                  (6, 1, 64, 64, True, False), (16, 2, 256, 64, True, True)])
@pytest.mark.parametrize("pasts,news", [((0,), (0,)), ((0,), (1,)), ((127,), (1,)), ((128,), (1,)), ((700,), (1,)), ((4500,), (1,)), ((40, 7), (2, 0)),
                                        ((5, 260, 16, 90), (1, 1, 1, 1)), ((126, 1), (0, 5)), ((33, 0, 129), (2, 17, 1))])
def test_rope_attention(backend, rng, storage, h, g, p, r, normed, gated, pasts, news):
    scene = Scene(backend, rng, pasts, news, h, g, p, storage, storage, gated)
    n, rope = scene.n, Rope(backend, rng, scene, r, normed)
    out, table = Guarded(backend, n, h * p, storage), put(backend, rope.table)
    ops.rope_attention(out.tensor, put(backend, scene.qkv, storage), scene.kv, scene.batch, table, *rope.norms, h, 0, p**-0.5, rope.eps, gated)
    q, k, v, gate = rope.heads(0)
    for t in range(n):
        page, row = scene.table[scene.sequences[t], scene.positions[t] // PAGE], scene.positions[t] % PAGE
        scene.k[page, :, row], scene.v[page, :, row] = round_to(k[t], storage), v[t]
    expected = scene.attention(round_to(q, storage), p**-0.5)
    if gated:
        expected = expected / (1 + np.exp(-gate.reshape(n, h * p)))
    assert error(out.read(), expected) < (3e-6 if storage == DType.F32 else 1e-2)
    stored = get_cached(backend, scene.whole, storage).reshape(2, -1, g, PAGE, p)
    assert error(stored, np.stack([scene.k, scene.v])) < (2e-6 if storage == DType.F32 else 8e-3)
