"""The gated delta rule against its formula in float64: convolution, recurrence, gated norm, and where states are kept."""

from dataclasses import dataclass

import numpy as np
import pytest
from inference_pio.native import ops
from inference_pio.native.dtype import DType

from arrays import Guarded, put, round_to

EPS = 1e-6


@dataclass
class Shape:
    hk: int
    hv: int
    pk: int
    pv: int
    taps: int

    @property
    def c(self):
        return 2 * self.hk * self.pk + self.hv * self.pv

    @property
    def width(self):
        return self.c + self.hv * self.pv + 2 * self.hv


SHAPES = [Shape(2, 4, 16, 16, 4), Shape(1, 1, 8, 24, 2), Shape(1, 3, 5, 7, 3), Shape(2, 2, 128, 128, 4)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(shape, x, w, inputs, memory):
    """Rows x of one sequence, from (inputs, memory): out [n, hv pv] and the state after every row."""
    conv, decay, dt_bias, norm = w
    hk, hv, pk, pv, c = shape.hk, shape.hv, shape.pk, shape.pv, shape.c
    history = np.concatenate([inputs, x[:, :c]])
    memory, out, states = memory.copy(), [], []
    for t, row in enumerate(x):
        u = (history[t:t + shape.taps] * conv.T).sum(0)
        u = u * sigmoid(u)
        q, k, v = u[:hk * pk].reshape(hk, pk), u[hk * pk:2 * hk * pk].reshape(hk, pk), u[2 * hk * pk:].reshape(hv, pv)
        q = q / np.sqrt((q * q).sum(1, keepdims=True) + 1e-6) / np.sqrt(pk)
        k = k / np.sqrt((k * k).sum(1, keepdims=True) + 1e-6)
        z, b, a = np.split(row[c:], [hv * pv, hv * pv + hv])
        g, beta = np.exp(decay * np.log1p(np.exp(a + dt_bias))), sigmoid(b)
        y = np.empty((hv, pv))
        for h in range(hv):
            j = h // (hv // hk)
            s = g[h] * memory[h]
            s = s + np.outer(k[j], beta[h] * (v[h] - s.T @ k[j]))
            y[h], memory[h] = s.T @ q[j], s
        y = y / np.sqrt((y * y).mean(1, keepdims=True) + EPS) * norm
        out.append(y.ravel() * z * sigmoid(z))
        states.append((history[t + 1:t + shape.taps].copy(), memory.copy()))
    return np.array(out).reshape(len(x), hv * pv), states


class Layer:
    """A layer's weights and states on a device and in float64."""

    def __init__(self, backend, shape, slots, random):
        self.backend, self.shape, self.random = backend, shape, random
        values = (random.normal(0, 0.5, (shape.c, shape.taps)), -np.exp(random.normal(0, 0.7, shape.hv)),
                  random.normal(0, 0.5, shape.hv), random.normal(1, 0.2, shape.pv))
        self.w = tuple(value.astype("f4").astype("f8") for value in values)
        self.w_device = tuple(self.put(value.ravel()) for value in values)
        self.whole, layers = backend.states(3, slots, shape.hk, shape.hv, shape.pk, shape.pv, shape.taps)
        self.states = layers[1]
        start = random.normal(0, 1, self.whole.shape).astype("f4")
        backend.copy_in(self.whole, start.tobytes())
        self.before = start

    def put(self, array, dtype=DType.F32):
        array = np.ascontiguousarray(array, "i4" if dtype == DType.I32 else "f4")
        tensor = self.backend.tensor(array.shape, dtype)
        self.backend.copy_in(tensor, array.tobytes())
        return tensor

    def split(self, whole, slot):
        """(inputs, memory) of the middle layer in a host copy of the states."""
        size = whole.shape[1] // 3
        inputs, memory = np.split(whole[slot, size:2 * size].astype("f8"), [(self.shape.taps - 1) * self.shape.c])
        return (inputs.reshape(self.shape.taps - 1, self.shape.c), memory.reshape(self.shape.hv, self.shape.pk, self.shape.pv))

    def states_now(self):
        return np.frombuffer(self.backend.copy_out(self.whole), "f4").reshape(self.whole.shape)

    def run(self, x, starts, states_in, states_out, dtype=DType.F32):
        """out of one step whose sequence s has rows starts[s] .. starts[s + 1] of x; checks the guard row behind it."""
        backend, n, d = self.backend, len(x), self.shape.hv * self.shape.pv
        batch = backend.batch(max(n, 1), len(starts) - 1, 1, 1)
        batch.resize(n, len(starts) - 1, 0)
        for name, values in (("query_starts", starts), ("states_in", states_in), ("states_out", states_out)):
            backend.copy_in(getattr(batch, name), np.array(values, "i4").tobytes())
        backend.copy_in(batch.sequences, np.repeat(np.arange(len(starts) - 1), np.diff(starts)).astype("i4").tobytes())
        out = Guarded(backend, n, d, dtype)
        ops.gated_delta_rule(out.tensor.rows(0, n), put(backend, x, dtype), *self.w_device, self.states, batch, EPS)
        return out.read()


def close(a, b, tolerance=2e-4):
    scale = max(1.0, np.abs(b).max(initial=0))
    assert a.shape == b.shape and np.abs(a - b).max(initial=0) <= tolerance * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 5, 16, 17, 64, 65, 150])
def test_one_sequence(backend, shape, n, rng):
    layer = Layer(backend, shape, 2, rng)
    x = layer.random.normal(0, 1, (n, shape.width)).astype("f4")
    out = layer.run(x, [0, n], [1], [-1] * (n - 1) + [0] if n else [])
    expected, states = oracle(shape, x.astype("f8"), layer.w, *layer.split(layer.before, 1))
    close(out, expected)
    after = layer.states_now()
    assert (after[1] == layer.before[1]).all()
    size = after.shape[1] // 3
    assert (after[0, :size] == layer.before[0, :size]).all() and (after[0, 2 * size:] == layer.before[0, 2 * size:]).all()
    for kept, wanted in zip(layer.split(after, 0), states[-1] if n else layer.split(layer.before, 0), strict=True):
        close(kept, wanted)


@pytest.mark.parametrize("n", [1, 4, 16, 40, 130])
def test_any_row_keeps_its_state(backend, n, rng):
    shape = SHAPES[0]
    layer = Layer(backend, shape, n + 1, rng)
    x = layer.random.normal(0, 1, (n, shape.width)).astype("f4")
    kept = [t for t in range(n) if n <= 16 or t % 9 == 0 or t == n - 1]
    layer.run(x, [0, n], [-1], [t if t in kept else -1 for t in range(n)])
    zeros = tuple(np.zeros_like(part) for part in layer.split(layer.before, 0))
    states = oracle(shape, x.astype("f8"), layer.w, *zeros)[1]
    after = layer.states_now()
    for t in range(n + 1):
        if t not in kept:
            assert (after[t] == layer.before[t]).all()
            continue
        for got, wanted in zip(layer.split(after, t), states[t], strict=True):
            close(got, wanted)


def test_several_sequences_in_one_step_and_in_place(backend, rng):
    shape, starts = SHAPES[0], [0, 1, 1, 70, 72, 75]
    layer = Layer(backend, shape, 6, rng)
    x = layer.random.normal(0, 1, (75, shape.width)).astype("f4")
    states_in, states_out = [2, 0, 4, -1, -1], [-1] * 75
    states_out[0], states_out[69], states_out[71] = 2, 4, 1      # two in place; the last sequence is padding and keeps nothing
    out = layer.run(x, starts, states_in, states_out)
    after = layer.states_now()
    for s, slot in enumerate(states_in):
        state = layer.split(layer.before, max(slot, 0))
        state = tuple(part * (slot >= 0) for part in state)
        rows = slice(starts[s], starts[s + 1])
        expected, states = oracle(shape, x[rows].astype("f8"), layer.w, *state)
        close(out[rows], expected)
        if len(states) and states_out[rows.stop - 1] >= 0:
            for got, wanted in zip(layer.split(after, states_out[rows.stop - 1]), states[-1], strict=True):
                close(got, wanted)
    for slot in (0, 3, 5):
        assert (after[slot] == layer.before[slot]).all()


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunks_agree_with_the_whole(backend, chunk, rng):
    shape, n = SHAPES[0], 100
    layer = Layer(backend, shape, 2, rng)
    x = layer.random.normal(0, 1, (n, shape.width)).astype("f4")
    whole = layer.run(x, [0, n], [-1], [-1] * (n - 1) + [0])
    parts = [layer.run(x[t:t + chunk], [0, len(x[t:t + chunk])], [1 if t else -1], [-1] * (len(x[t:t + chunk]) - 1) + [1])
             for t in range(0, n, chunk)]
    close(np.concatenate(parts), whole, 1e-5)
    after = layer.states_now()
    for a, b in zip(layer.split(after, 1), layer.split(after, 0), strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("n", [1, 2, 16, 17, 63, 64, 65, 128, 300])
def test_bf16_keeps_states_in_f32(backend, n, rng):
    """Storage in bf16; a GPU takes heads of 128 in chunks here, and rows are kept at, before and behind the chunks' ends."""
    shape = Shape(2, 4, 128, 128, 4)
    layer = Layer(backend, shape, 8, rng)
    x = round_to(rng.normal(0, 1, (n, shape.width)), DType.BF16)
    cut = n // 3
    kept = dict(zip(sorted({0, 1, cut, cut + 62, cut + 63, n - 1} & set(range(n)) - {cut - 1}), (4, 5, 6, 7, 3), strict=False))
    kept.setdefault(n - 1, 0)
    if cut:
        kept[cut - 1] = 1
    starts = [0, cut, n]
    out = layer.run(x.astype("f4"), starts, [1, 0], [kept.get(t, -1) for t in range(n)], DType.BF16)
    after = layer.states_now()
    for s, slot in enumerate((1, 0)):
        rows = range(starts[s], starts[s + 1])
        expected, states = oracle(shape, x[rows.start:rows.stop], layer.w, *layer.split(layer.before, slot))
        close(out[rows.start:rows.stop], expected, 2e-2)
        for t in rows:
            if t in kept:
                for got, wanted in zip(layer.split(after, kept[t]), states[t - rows.start], strict=True):
                    close(got, wanted, 2e-2)


def test_strong_decay_stays_finite(backend, rng):
    """exp of the summed log decays underflows in a chunk; nothing may divide by it."""
    shape = SHAPES[0]
    layer = Layer(backend, shape, 1, rng)
    x = layer.random.normal(0, 1, (130, shape.width)).astype("f4")
    x[:, -shape.hv:] = 40.0
    out = layer.run(x, [0, 130], [0], [-1] * 129 + [0])
    close(out, oracle(shape, x.astype("f8"), layer.w, *layer.split(layer.before, 0))[0])


def test_wrong_shapes_are_refused_by_name(backend, rng):
    shape = SHAPES[0]
    layer = Layer(backend, shape, 1, rng)
    batch = backend.batch(4, 1, 1, 1)
    batch.resize(4, 1, 0)
    out, x = layer.put(np.zeros((4, shape.hv * shape.pv))), layer.put(np.zeros((4, shape.width)))
    with pytest.raises(ValueError, match="conv"):
        ops.gated_delta_rule(out, x, layer.w_device[3], *layer.w_device[1:], layer.states, batch, EPS)
    with pytest.raises(ValueError, match="x must be"):
        ops.gated_delta_rule(out, out, *layer.w_device, layer.states, batch, EPS)
