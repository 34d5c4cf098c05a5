"""Recorded ops: nothing runs while they are recorded, and every launch does what the calls would have done, on the data of then."""

from __future__ import annotations

import numpy as np
import pytest

from arrays import get, put
from inference_pio.native import ops
from inference_pio.native.backend import Backend, TensorOpsError
from inference_pio.native.dtype import DType
from weights import random_weight

N, V, D, H, G, P, PAGES, EPS = 2, 96, 128, 4, 2, 32, 4, 1e-6


class Step:
    """A decode step of two sequences: every op that a layer of a dense model takes, from ids to tokens."""

    def __init__(self, backend: Backend, rng: np.random.Generator):
        def weight(*rows: int, cols: int = D):
            return backend.pack([(random_weight(rng, DType.Q4_1, count, cols)[0], DType.Q4_1, count, cols, None) for count in rows], DType.Q8_0)

        def zeros(*shape: int, dtype: DType = DType.F32):
            return backend.tensor(shape, dtype)

        self.backend = backend
        self.embedding, self.qkv_weight, self.output = weight(V), weight(H * P, G * P, G * P), weight(V)
        self.o, self.gate_up, self.down = weight(D, cols=H * P), weight(64, 64), weight(D, cols=64)
        self.norm, self.inv_freq = put(backend, rng.uniform(0.5, 2, D)), put(backend, rng.uniform(0, 1, P // 2))
        self.x, self.qkv, self.attention, self.mlp = zeros(N, D), zeros(N, (H + 2 * G) * P), zeros(N, H * P), zeros(N, 64)
        self.rope, self.logits, self.ids = zeros(N, P // 2, 2), zeros(N, V), zeros(N, dtype=DType.I32)
        self.sampling = zeros(N, 32, dtype=DType.U8)
        self.batch = backend.batch(N, N, PAGES, N)
        self.cache, (self.kv,) = backend.kv_cache(1, 2 * PAGES, G, 16, P, DType.F32)
        self.put("page_table", list(range(2 * PAGES)))
        self.put("sequences", [0, 1])
        self.put("query_starts", [0, 1, 2])
        self.batch.resize(N, N, N)

    def put(self, name: str, values: list[int]) -> None:
        self.backend.copy_in(getattr(self.batch, name), np.array(values, np.int32))

    def place(self, ids: list[int], positions: list[int]) -> None:
        self.put("ids", ids)
        self.put("positions", positions)
        self.put("slots", [16 * PAGES * row + position for row, position in enumerate(positions)])

    def run(self) -> None:
        ops.embed(self.x, self.embedding, self.batch.ids, N)
        ops.rope_table(self.rope, self.batch.positions, self.inv_freq, N)
        ops.rms_norm_linear(self.qkv, self.x, self.norm, self.qkv_weight, N, EPS)
        ops.rope_attention(self.attention, self.qkv, self.kv, self.batch, self.rope, None, None, H, 0, P**-0.5, EPS)
        ops.linear_add(self.x, self.attention, self.o, N)
        ops.rms_norm_gate_up_silu(self.mlp, self.x, self.norm, self.gate_up, N, EPS)
        ops.linear_add(self.x, self.mlp, self.down, N)
        ops.rms_norm_linear_f32(self.logits, self.x, self.norm, self.output, N, EPS)
        ops.sample(self.ids, None, self.logits, self.sampling, self.batch.positions, N)

    def results(self) -> list[np.ndarray]:
        return [get(self.backend, tensor) for tensor in (self.logits, self.ids, self.cache)]


@pytest.fixture
def step(backend, rng):
    return Step(backend, rng)


def test_launches_follow_the_data_as_calls_do(step):
    placed = [([3, 90], [0, 0]), ([17, 4], [1, 1]), ([64, 64], [2, 2]), ([5, 6], [33, 3])]
    called, launched = [], []
    for where in placed:
        step.place(*where)
        step.run()
        called.append(step.results())
    for tensor in (step.cache, step.logits, step.ids, step.x):
        step.backend.zero(tensor)
    with step.backend.capture() as graph:
        step.run()
    assert not any(result.any() for result in step.results()), "recording runs nothing"
    for where in placed:
        step.place(*where)
        graph.launch()
        launched.append(step.results())
    for one, other in zip(called, launched, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not np.array_equal(called[0][0], called[1][0])


def test_a_recording_keeps_the_sizes_it_was_made_with(step):
    with step.backend.capture() as graph:
        step.run()
    step.place([3, 90], [0, 0])
    step.run()
    expected = step.results()
    step.batch.resize(0, 0, 0)   # a prompt of another size was computed in between
    step.backend.zero(step.attention)
    graph.launch()
    assert all(np.array_equal(a, b) for a, b in zip(expected, step.results(), strict=True))


def test_recordings_do_not_mix(backend):
    out, one, two = (backend.tensor((1, 8), DType.F32) for _ in range(3))
    rows, graphs = put(backend, np.zeros(1), DType.I32), []
    for source, value in ((one, 1.0), (two, 2.0)):
        backend.copy_in(source, np.full((1, 8), value, np.float32))
        with backend.capture() as graph:
            ops.gather_rows(out, source, rows, 1)
        graphs.append(graph)
    for graph, value in (graphs[0], 1.0), (graphs[1], 2.0), (graphs[0], 1.0):
        graph.launch()
        assert (get(backend, out) == value).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_that_come_late_change_nothing(backend, rng, threads):
    """Calls and launches in turn, by more threads than there are processors, which therefore often miss whole stages and programs."""
    if backend.kind != "cpu":
        return   # threads are the CPU library's
    with Backend.open("cpu", threads) as team:
        team.reserve(n=16, widest=1024, h=H, p=P)
        step = Step(team, rng)
        step.place([3, 90], [40, 7])
        step.run()
        expected = step.results()
        with team.capture() as graph:
            step.run()
        for turn in range(2000):
            for tensor in (step.logits, step.ids, step.x, step.attention):
                team.zero(tensor)
            step.run() if turn % 3 == 0 else graph.launch()
            assert all(np.array_equal(a, b) for a, b in zip(expected, step.results(), strict=True)), turn


def test_a_graph_is_of_no_use_after_its_scratch_is_gone(rng, backend):
    if backend.kind != "cpu":
        return   # a GPU's scratch stays where it is
    with Backend.open("cpu", 2) as small:
        small.reserve(n=16, widest=256, h=H, p=P)
        step = Step(small, rng)
        with small.capture() as graph:
            step.run()
        graph.launch()
        small.reserve(n=512, widest=8192, h=32, p=256)
        with pytest.raises(TensorOpsError, match="recorded before"):
            graph.launch()


def test_an_argument_is_refused_while_it_is_recorded(step):
    with step.backend.capture():
        with pytest.raises(TensorOpsError, match="n: must be at least 0"):
            step.backend.check(step.backend.lib.tops_linear_add(step.backend.stream, step.x.pointer, step.attention.pointer, step.o.struct, -1, 0))


def test_a_launch_says_what_is_wrong_with_the_data(step):
    if step.backend.kind != "cpu":
        return   # a GPU does not look at them
    with step.backend.capture() as graph:
        step.run()
    step.place([1, 2], [0, 16 * PAGES])
    step.put("slots", [0, 16 * PAGES])
    with pytest.raises(TensorOpsError, match=r"positions\[1\]: outside the page table"):
        graph.launch()
    step.place([1, 2], [0, 0])
    graph.launch()


def test_a_stream_records_one_graph_at_a_time(backend):
    if backend.kind != "cpu":
        return   # a GPU's driver says it in other words, and may be lost then
    with backend.capture() as graph:
        for call, arguments in (backend.lib.tops_graph_begin, ()), (backend.lib.tops_graph_launch, (graph.native,)):
            with pytest.raises(TensorOpsError, match="the stream records one"):
                backend.check(call(backend.stream, *arguments))
    with pytest.raises(TensorOpsError, match="the stream records none"):
        backend.check(backend.lib.tops_graph_end(backend.stream, backend.ffi.new("tops_graph **")))
