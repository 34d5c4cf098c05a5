"""Routing, expert products and the index ops against their formulas in float64."""

import numpy as np
import pytest
from arrays import Guarded, round_to
from arrays import put as store
from inference_pio.native import ops
from inference_pio.native.backend import TensorOpsError
from inference_pio.native.dtype import DType
from weights import FLOATS, QUANTISED, random_weight

EPS = 1e-6


def put(backend, array, dtype=DType.F32):
    array = np.ascontiguousarray(array, "i4" if dtype == DType.I32 else "f4")
    tensor = backend.tensor(array.shape, dtype)
    backend.copy_in(tensor, array.tobytes())
    return tensor


def get(backend, tensor):
    kind = "i4" if tensor.dtype == DType.I32 else "f4"
    return np.frombuffer(backend.copy_out(tensor), kind).reshape(tensor.shape)


def encode(matrix, dtype):
    """(file bytes, the values they stand for) of a matrix."""
    matrix = matrix.astype("f4")
    if dtype == DType.F32:
        return matrix.tobytes(), matrix.astype("f8")
    if dtype == DType.BF16:
        bits = (matrix.view("u4") >> 16).astype("u2")
        return bits.tobytes(), (bits.astype("u4") << 16).view("f4").astype("f8")
    blocks = matrix.reshape(*matrix.shape[:-1], -1, 32)
    largest = {DType.Q8_0: 127, DType.Q4_0: 7}[dtype]
    scale = (np.abs(blocks).max(-1, keepdims=True) / largest).astype("f2")
    codes = np.clip(np.rint(blocks / np.maximum(scale.astype("f4"), 1e-8)), -largest, largest).astype("i1")
    values = (codes * scale.astype("f8")).reshape(matrix.shape)
    if dtype == DType.Q4_0:
        nibbles = (codes + 8).astype("u1")
        codes = (nibbles[..., :16] | nibbles[..., 16:] << 4)
    return np.concatenate([scale.view("u1"), codes.view("u1")], -1).tobytes(), values


def stack(backend, matrices, dtype, activations=DType.F32):
    """Weight of parts [e, rows, cols], and the float64 values."""
    parts, values = [], []
    for part in matrices:
        encoded = [encode(matrix, dtype) for matrix in part]
        parts.append([(data, dtype, *matrix.shape, None) for (data, _), matrix in zip(encoded, part, strict=True)])
        values.append(np.stack([value for _, value in encoded]))
    return backend.pack_experts(parts, activations), values


def silu(x):
    return x / (1 + np.exp(-x))


def close(a, b, tolerance=1e-4):
    scale = max(1.0, np.abs(b).max(initial=0))
    assert a.shape == b.shape and np.abs(a - b).max(initial=0) <= tolerance * scale


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("n, d, e, k", [(0, 32, 4, 2), (1, 64, 8, 3), (3, 48, 5, 5), (17, 64, 512, 10), (70, 32, 33, 1)])
def test_route(backend, n, d, e, k, gate, renormalize, rng):
    x, norm = rng.normal(0, 2, (n, d)).astype("f4"), rng.normal(1, 0.2, d).astype("f4")
    router, shared = rng.normal(0, 0.3, (e, d)).astype("f4"), rng.normal(0, 0.3, (1, d)).astype("f4")
    parts = [(matrix.tobytes(), DType.F32, *matrix.shape, None) for matrix in ([router, shared] if gate else [router])]
    w = backend.pack(parts, DType.F32)
    normed, experts = put(backend, np.full((n + 1, d), 7.0)), put(backend, np.full((n + 1, k), 7), DType.I32)
    shares, logits_out = put(backend, np.full((n + 1, k + 1), 7.0)), put(backend, np.zeros((n, w.rows)))
    ops.rms_norm_route(normed, logits_out, experts, shares, put(backend, x), put(backend, norm), w, n, renormalize, EPS)
    normed, experts, shares = get(backend, normed), get(backend, experts), get(backend, shares)
    assert (normed[n] == 7).all() and (experts[n] == 7).all() and (shares[n] == 7).all()
    x = x.astype("f8")
    y = x / np.sqrt((x * x).mean(1, keepdims=True) + EPS) * norm
    logits = y @ router.T.astype("f8")
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = np.take_along_axis(p / p.sum(1, keepdims=True), chosen, 1)
    close(normed[:n], y)
    assert (experts[:n] == chosen).all()
    close(shares[:n, :k], p / p.sum(1, keepdims=True) if renormalize else p)
    close(shares[:n, k], 1 / (1 + np.exp(-(y @ shared[0].astype("f8")))) if gate else np.ones(n))


def test_route_breaks_ties_by_the_lower_number(backend):
    router = np.zeros((6, 32), "f4")
    router[[1, 4]] = 1.0
    w = backend.pack([(router.tobytes(), DType.F32, 6, 32, None)], DType.F32)
    experts = put(backend, np.zeros((1, 4)), DType.I32)
    ops.rms_norm_route(put(backend, np.zeros((1, 32))), put(backend, np.zeros((1, 6))), experts, put(backend, np.zeros((1, 5))), put(backend, np.ones((1, 32))),
                       put(backend, np.ones(32)), w, 1, True, EPS)
    assert get(backend, experts).tolist() == [[1, 4, 0, 2]]


@pytest.mark.parametrize("e, k", [(40, 10), (512, 10), (512, 32), (1000, 17)])
@pytest.mark.parametrize("period", [1, 4, 48])
def test_route_among_logits_that_repeat(backend, period, e, k, rng):
    router = np.resize(rng.normal(0, 0.3, (period, 32)).astype("f4"), (e, 32))
    w = backend.pack([(router.tobytes(), DType.F32, e, 32, None)], DType.F32)
    experts, logits = put(backend, np.zeros((1, k)), DType.I32), put(backend, np.zeros((1, e)))
    ops.rms_norm_route(put(backend, np.zeros((1, 32))), logits, experts, put(backend, np.zeros((1, k + 1))), put(backend, rng.normal(0, 1, (1, 32))),
                       put(backend, np.ones(32)), w, 1, True, EPS)
    assert (get(backend, experts)[0] == np.argsort(-get(backend, logits)[0], kind="stable")[:k]).all()


CASES = [(0, 64, 32, 4, 2), (1, 64, 32, 8, 3), (2, 32, 64, 4, 4), (16, 64, 96, 8, 3), (17, 64, 32, 8, 3), (90, 96, 64, 16, 5)]


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.Q8_0, DType.Q4_0])
@pytest.mark.parametrize("n, d, i, e, k", CASES)
def test_experts(backend, n, d, i, e, k, dtype, rng):
    x = rng.normal(0, 1, (n, d)).astype("f4")
    gate_up, (gates, ups) = stack(backend, rng.normal(0, 0.2, (2, e, i, d)), dtype)
    shared_gate_up, shared_in = stack(backend, rng.normal(0, 0.2, (2, 1, i, d)), DType.F32)
    down, (downs,) = stack(backend, rng.normal(0, 0.2, (1, e, d, i)), dtype)
    shared_down, (shared_out,) = stack(backend, rng.normal(0, 0.2, (1, 1, d, i)), DType.BF16)
    chosen = np.array([rng.permutation(e)[:k] for _ in range(n)], "i4").reshape(n, k)
    shares = rng.uniform(0, 1, (n, k + 1)).astype("f4")
    experts = put(backend, chosen, DType.I32)

    act = put(backend, np.full((n + 1, (k + 1) * i), 7.0))
    ops.experts_gate_up_silu(act, put(backend, x), experts, gate_up, shared_gate_up, n)
    got = get(backend, act)
    assert (got[n] == 7).all()
    expected = np.zeros((n, k + 1, i))
    for t in range(n):
        for j in range(k):
            expected[t, j] = silu(gates[chosen[t, j]] @ x[t]) * (ups[chosen[t, j]] @ x[t])
        expected[t, k] = silu(shared_in[0][0] @ x[t]) * (shared_in[1][0] @ x[t])
    close(got[:n].reshape(n, k + 1, i), expected)

    residual = rng.normal(0, 1, (n + 1, d)).astype("f4")
    out = put(backend, residual)
    ops.experts_down_add(out, act, experts, put(backend, shares), down, shared_down, n)
    out = get(backend, out)
    assert (out[n] == residual[n]).all()
    act = got[:n].reshape(n, k + 1, i).astype("f8")
    expected = residual[:n].astype("f8")
    for t in range(n):
        for j in range(k):
            expected[t] += shares[t, j] * (downs[chosen[t, j]] @ act[t, j])
        expected[t] += shares[t, k] * (shared_out[0] @ act[t, k])
    close(out[:n], expected)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP8_E4M3, *QUANTISED], ids=lambda d: d.name)
@pytest.mark.parametrize("n", [1, 5, 16, 17, 100])
def test_experts_in_every_format_with_bf16_storage(backend, n, dtype, rng):
    """What a GPU computes with tensor cores: one token, a few, and enough for several to share an expert."""
    d, i, e, k = 256, 512, 6, 3

    def experts(count, rows, cols, parts):
        made = [[random_weight(rng, dtype, rows, cols) for _ in range(count)] for _ in range(parts)]
        stacks = [[(data, dtype, rows, cols, None if scales is None else scales.tobytes()) for data, _, scales in part] for part in made]
        return backend.pack_experts(stacks, DType.BF16), [np.stack([values for _, values, _ in part]) for part in made]

    (gate_up, (gates, ups)), (shared, (shared_gate, shared_up)) = experts(e, i, d, 2), experts(1, i, d, 2)
    (down, (downs,)), (shared_down, (shared_out,)) = experts(e, d, i, 1), experts(1, d, i, 1)
    x = round_to(rng.normal(0, 1, (n, d)), DType.BF16)
    chosen = np.array([rng.permutation(e)[:k] for _ in range(n)], "i4")
    shares = rng.uniform(0, 1, (n, k + 1)).astype("f4")
    act, ids = Guarded(backend, n, (k + 1) * i, DType.BF16), put(backend, chosen, DType.I32)
    ops.experts_gate_up_silu(act.tensor, store(backend, x, DType.BF16), ids, gate_up, shared, n)
    got = act.read().reshape(n, k + 1, i)
    expected = np.stack([np.stack([silu(gates[c] @ x[t]) * (ups[c] @ x[t]) for c in chosen[t]]
                                  + [silu(shared_gate[0] @ x[t]) * (shared_up[0] @ x[t])]) for t in range(n)])
    close(got, expected, 2e-2)
    residual = round_to(rng.normal(0, 1, (n, d)), DType.BF16)
    out = Guarded(backend, n, d, DType.BF16, residual)
    ops.experts_down_add(out.tensor, act.tensor, ids, put(backend, shares), down, shared_down, n)
    expected = residual + np.stack([sum(shares[t, j] * (downs[c] @ got[t, j]) for j, c in enumerate(chosen[t]))
                                    + shares[t, k] * (shared_out[0] @ got[t, k]) for t in range(n)])
    close(out.read(), expected, 1e-2)


@pytest.mark.parametrize("n", [1, 16, 40])
def test_route_with_bf16_storage(backend, n, rng):
    d, e, k = 256, 512, 10
    x, norm = round_to(rng.normal(0, 2, (n, d)), DType.BF16), rng.normal(1, 0.2, d).astype("f4")
    (router, values, _), (gate, gate_values, _) = (random_weight(rng, DType.BF16, rows, d) for rows in (e, 1))
    w = backend.pack([(router, DType.BF16, e, d, None), (gate, DType.BF16, 1, d, None)], DType.BF16)
    normed, logits = Guarded(backend, n, d, DType.BF16), put(backend, np.zeros((n, e + 1)))
    experts, shares = put(backend, np.zeros((n, k)), DType.I32), put(backend, np.zeros((n, k + 1)))
    ops.rms_norm_route(normed.tensor, logits, experts, shares, store(backend, x, DType.BF16), put(backend, norm), w, n, True, EPS)
    y = x / np.sqrt((x * x).mean(1, keepdims=True) + EPS) * norm
    close(normed.read(), y, 1e-2)
    l, chosen, shares = get(backend, logits), get(backend, experts), get(backend, shares)
    close(l[:, :e], y @ values.T, 2e-2)
    for t in range(n):       # the choice is exact for the logits that the op itself computed
        assert chosen[t].tolist() == np.argsort(-l[t, :e], kind="stable")[:k].tolist()
        p = np.exp(l[t, chosen[t]] - l[t, chosen[t]].max())
        close(shares[t, :k], p / p.sum(), 1e-4)
    close(shares[:, k], 1 / (1 + np.exp(-l[:, e])), 1e-4)
    close(l[:, e:], y @ gate_values.T, 2e-2)


def test_experts_with_8_bit_activations(backend, rng):
    """Rounding x to 8 bits stays within the error of that rounding, for few tokens and for many."""
    d, i, e, k = 256, 128, 8, 3
    gate_up, (gates, ups) = stack(backend, rng.normal(0, 0.1, (2, e, i, d)), DType.Q4_0, DType.Q8_0)
    shared, shared_in = stack(backend, rng.normal(0, 0.1, (2, 1, i, d)), DType.Q8_0, DType.Q8_0)
    for n in (1, 40):
        x = rng.normal(0, 1, (n, d)).astype("f4")
        chosen = np.array([rng.permutation(e)[:k] for _ in range(n)], "i4")
        act = put(backend, np.zeros((n, (k + 1) * i)))
        ops.experts_gate_up_silu(act, put(backend, x), put(backend, chosen, DType.I32), gate_up, shared, n)
        expected = np.stack([np.stack([silu(gates[c] @ x[t]) * (ups[c] @ x[t]) for c in chosen[t]]
                                      + [silu(shared_in[0][0] @ x[t]) * (shared_in[1][0] @ x[t])]) for t in range(n)])
        close(get(backend, act).reshape(n, k + 1, i), expected, 2e-2)


@pytest.mark.parametrize("n, e", [(0, 3), (1, 1), (5, 4), (640, 512), (1000, 7)])
def test_gather_by_value(backend, n, e, rng):
    values = rng.integers(0, e, n)
    order, starts = put(backend, np.full(n + 1, 7), DType.I32), put(backend, np.full(e + 1, 7), DType.I32)
    ops.gather_by_value(order, starts, put(backend, values, DType.I32), n)
    assert get(backend, order).tolist() == np.argsort(values, kind="stable").tolist() + [7]
    assert get(backend, starts).tolist() == np.concatenate([[0], np.cumsum(np.bincount(values, minlength=e))]).tolist()


def test_gather_by_value_leaves_out_what_is_no_value(backend):
    order, starts = put(backend, np.full(5, 7), DType.I32), put(backend, np.full(3, 7), DType.I32)
    ops.gather_by_value(order, starts, put(backend, [1, -1, 0, 9, 1], DType.I32), 5)
    assert get(backend, order).tolist()[:3] == [2, 0, 4] and get(backend, starts).tolist() == [0, 1, 3]


@pytest.mark.parametrize("n, rows, d", [(0, 2, 8), (1, 1, 1), (9, 3, 40), (200, 16, 65)])
@pytest.mark.parametrize("scaled", [True, False])
def test_scatter_add_by_index(backend, n, rows, d, scaled, rng):
    x, before, scale = (rng.normal(0, 1, shape).astype("f4") for shape in ((n, d), (rows, d), (n,)))
    index = rng.integers(-1, rows + 1, n)
    out = put(backend, before)
    ops.scatter_add_by_index(out, put(backend, x), put(backend, index, DType.I32), put(backend, scale) if scaled else None, n)
    expected = before.astype("f8")
    for t in range(n):
        if 0 <= index[t] < rows:
            expected[index[t]] += x[t] * (scale[t] if scaled else 1)
    close(get(backend, out), expected)


@pytest.mark.parametrize("activations", [DType.F32, DType.Q8_0], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [*FLOATS, DType.FP8_E4M3, *QUANTISED], ids=lambda d: d.name)
def test_experts_left_in_place_give_what_packed_ones_give(backend, rng, dtype, activations):
    """Bit for bit, for one token and for many, with rows that fill no group."""
    d, i, e, k = 256, 512, 5, 2
    if backend.kind != "cpu":
        with pytest.raises(TensorOpsError, match="cannot read"):
            backend.leave_experts([[(bytes(d * 4), DType.F32, 1, d, None)]], activations)
        return

    def stack_of(parts, count, rows, cols):
        made = [[random_weight(rng, dtype, rows, cols) for _ in range(count)] for _ in range(parts)]
        return [[(data, dtype, rows, cols, None if scales is None else scales.tobytes()) for data, _, scales in part] for part in made]

    for rows in (i, 256 + 40):
        gate_up, shared_gate_up, shared_down = stack_of(2, e, rows, d), stack_of(2, 1, rows, d), stack_of(1, 1, rows, i)
        down = stack_of(1, e, rows, i)
        for n in (1, 17):
            ids = put(backend, np.array([rng.permutation(e)[:k] for _ in range(n)]), DType.I32)
            x, act, shares = (put(backend, rng.normal(0, 1, shape)) for shape in ((n, d), (n, (k + 1) * i), (n, k + 1)))
            found = []
            for bring in (backend.pack_experts, backend.leave_experts):
                up, out = (put(backend, np.zeros((n, width))) for width in ((k + 1) * rows, rows))
                ops.experts_gate_up_silu(up, x, ids, bring(gate_up, activations), backend.pack_experts(shared_gate_up, activations), n)
                ops.experts_down_add(out, act, ids, shares, bring(down, activations), backend.pack_experts(shared_down, activations), n)
                found.append((bytes(backend.copy_out(up)), bytes(backend.copy_out(out))))
            assert found[0] == found[1] and any(found[0][0]) and any(found[0][1])


def test_rows_too_wide_to_be_left_in_place_are_refused(backend):
    with pytest.raises(TensorOpsError, match="cannot read F32 rows of 100000"):
        backend.leave_experts([[(bytes(400_000), DType.F32, 1, 100_000, None)]], DType.F32)
