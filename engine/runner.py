"""One step on the device: rows in, tokens out. Everything here happens on the step thread."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping, Sequence as Items
from types import MappingProxyType
from typing import Any, NamedTuple

from inference_pio.engine.sequence import HISTORY, Sequence
from inference_pio.models.contract import ModelPlugin
from inference_pio.native import ops
from inference_pio.native.backend import Backend, Graph, OutOfMemory, Tensor
from inference_pio.native.dtype import DType

PAGE_SIZE = 16
BUCKETS = (1, 2, 4, 8, 16)   # decode steps are recorded for these numbers of rows
MOST_ROWS = 16               # sequences in a step
SCORED_ROWS = 64             # rows of logits a step of `score` can give


class Row(NamedTuple):
    """Tokens ids[first:first + count] of a sequence whose pages are `pages`; logits of the last of them, or of all, are wanted or not.

    Models with recurrent layers take up the state in slot `start` and keep it after rows of the step in other slots.
    """

    ids: Items[int]
    first: int
    count: int
    pages: array[int]
    logits: int   # how many of the last tokens give logits
    start: int = -1   # slot of the state before them, -1: zeros
    keep: Mapping[int, int] = MappingProxyType({})   # row (0: the first of these tokens) -> slot


class Runner:
    """The model with its workspace, cache and batch."""

    def __init__(self, backend: Backend, plugin: ModelPlugin, config: Any, weights: Any, *, storage: DType, cache_dtype: DType,
                 pages: int, slots: int, context: int, vocabulary: int):
        self.backend, self._plugin, self._config, self._weights = backend, plugin, config, weights
        layout = plugin.cache_layout(config)
        self._most_tokens = self.most_tokens(backend)
        self._max_pages = -(-context // PAGE_SIZE)
        self._pool, kv = backend.kv_cache(layout.layers, pages, layout.g, PAGE_SIZE, layout.p, cache_dtype)
        s, states = layout.states, ()
        if s is not None:
            self._states, states = backend.states(s.layers, slots, s.hk, s.hv, s.pk, s.pv, s.taps)
            self._state_bytes = s.nbytes
            self._host_states: dict[int, memoryview] = {}   # by slot, each from when it is first needed: pinning takes its time
        self._cache = layout.in_order(kv, states)
        self._page_bytes = layout.g * PAGE_SIZE * layout.p * (4 if cache_dtype == DType.F32 else 2)
        self._planes, self._pages = 2 * layout.layers, pages
        self._batch = backend.batch(self._most_tokens, MOST_ROWS, self._max_pages, SCORED_ROWS)
        self._workspace = plugin.workspace(config, backend, self._most_tokens, SCORED_ROWS, storage)
        self._graphs: dict[int, tuple[Graph, Tensor]] = {}
        self._staging = backend.host_buffer(self._batch.block.nbytes).cast("i")
        self._staging[:] = array("i", [0]) * len(self._staging)   # a page table's unused places are copied, too
        base = int(backend.ffi.cast("uintptr_t", self._batch.block.pointer))
        self._fields = {name: (int(backend.ffi.cast("uintptr_t", getattr(self._batch, name).pointer)) - base) // 4
                        for name in ("ids", "positions", "slots", "sequences", "states_out", "logit_rows", "query_starts", "states_in", "page_table")}
        v = self._workspace.logits.shape[1]
        self._v, self._vocabulary = v, min(vocabulary or v, v)
        self._words = -(-v // 32)
        self._ids = backend.tensor((MOST_ROWS,), DType.I32)
        self._positions = backend.tensor((MOST_ROWS,), DType.I32)
        self._sampling = backend.tensor((MOST_ROWS, 32), DType.U8)
        self._sampled = b""   # what it holds
        self._allowed = backend.tensor((MOST_ROWS, self._words), DType.U32)
        self._history = backend.tensor((MOST_ROWS, HISTORY), DType.I32)
        self._lengths = backend.tensor((MOST_ROWS,), DType.I32)

    @staticmethod
    def most_tokens(backend: Backend) -> int:
        """Of a step."""
        return 512 if backend.kind == "cpu" else 2048

    @staticmethod
    def page_bytes(plugin: ModelPlugin, config: Any, cache_dtype: DType) -> int:
        """Bytes of a page in all layers."""
        layout = plugin.cache_layout(config)
        return 2 * layout.layers * layout.g * PAGE_SIZE * layout.p * (4 if cache_dtype == DType.F32 else 2)

    def copy_page(self, out: int, source: int) -> None:
        """Copy a page of all layers."""
        pitch = self._pages * self._page_bytes
        self.backend.copy_2d(self._pool, out * self._page_bytes, pitch, self._pool, source * self._page_bytes, pitch,
                             self._page_bytes, self._planes)

    def save_state(self, slot: int, host_slot: int) -> bool:
        """Copy a recurrent state of all layers to the host's memory, behind the steps before. False if the host has no room for it."""
        if host_slot not in self._host_states:
            try:
                self._host_states[host_slot] = self.backend.host_buffer(self._state_bytes)
            except OutOfMemory:
                return False
        host = self._host_states[host_slot]
        self.backend.copy_out_async(host, self._states, slot * len(host))
        return True

    def restore_state(self, slot: int, host_slot: int) -> None:
        host = self._host_states[host_slot]
        self.backend.copy_in_async(self._states, host, slot * len(host))

    # ---- the forward pass ------------------------------------------------------------------------------------------------

    def forward(self, rows: list[Row]) -> Tensor:
        """Logits f32 [sum of row.logits, v] of the rows, in order."""
        n, b, r = sum(row.count for row in rows), len(rows), sum(row.logits for row in rows)
        decode = n == b == r and n <= BUCKETS[-1]
        bucket = next(size for size in BUCKETS if size >= n) if decode else n
        self._fill(rows, bucket if decode else b)
        if not decode:
            self._batch.resize(n, b, r)
            return self._run()
        self._batch.resize(bucket, bucket, bucket)
        if bucket not in self._graphs:
            # Whatever a library sets up when an op first runs cannot be recorded. This run is the step: a state kept in place may
            # not be advanced twice.
            computed = self._run()
            with self.backend.capture() as graph:
                logits = self._run()
            self._graphs[bucket] = graph, logits
            return computed
        graph, logits = self._graphs[bucket]
        graph.launch()
        return logits

    def _run(self) -> Tensor:
        return self._plugin.forward(self._config, self._weights, self._workspace, self._batch, self._cache)

    def _fill(self, rows: list[Row], b: int) -> None:
        """Write the batch; rows beyond those given pad the step, at position 0 of page 0."""
        staging, fields, at, logit = self._staging, self._fields, 0, 0
        ids, positions, slots, sequences = fields["ids"], fields["positions"], fields["slots"], fields["sequences"]
        for index, (tokens, first, count, pages, logits, start, keep) in enumerate(rows):
            staging[fields["query_starts"] + index] = at
            staging[fields["states_in"] + index] = start
            staging[fields["states_out"] + at:fields["states_out"] + at + count] = array("i", [-1]) * count
            for row, slot in keep.items():
                staging[fields["states_out"] + at + row] = slot
            place = fields["page_table"] + index * self._max_pages
            staging[place:place + len(pages)] = pages
            if count == 1:
                staging[ids + at], staging[positions + at], staging[sequences + at] = tokens[first], first, index
                staging[slots + at] = pages[first // PAGE_SIZE] * PAGE_SIZE + first % PAGE_SIZE
            else:
                where = range(first, first + count)
                staging[ids + at:ids + at + count] = array("i", tokens[first:first + count])
                staging[positions + at:positions + at + count] = array("i", where)
                staging[slots + at:slots + at + count] = array("i", [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in where])
                staging[sequences + at:sequences + at + count] = array("i", [index]) * count
            at += count
            for row in range(at - logits, at):
                staging[fields["logit_rows"] + logit] = row
                logit += 1
        for index in range(len(rows), b):
            staging[fields["query_starts"] + index] = staging[fields["logit_rows"] + index] = at
            staging[fields["page_table"] + index * self._max_pages] = 0
            staging[ids + at] = staging[positions + at] = staging[slots + at] = 0
            staging[sequences + at] = index
            staging[fields["states_in"] + index] = staging[fields["states_out"] + at] = -1
            at += 1
        staging[fields["query_starts"] + b] = at
        self.backend.copy_in_async(self._batch.block, staging[:fields["page_table"] + b * self._max_pages])   # the last field, as far as it is used

    # ---- from logits to tokens -------------------------------------------------------------------------------------------

    def prepare(self, sequences: list[Sequence]) -> None:
        """Upload what `sample` will need of these sequences, before the forward, so that nothing stands between the two."""
        self.backend.copy_in(self._positions, array("i", [len(s.ids) for s in sequences]))
        sampling = b"".join(s.sampling for s in sequences)
        if sampling != self._sampled:
            self.backend.copy_in(self._sampling, sampling)
            self._sampled = sampling

    def sample(self, logits: Tensor, sequences: list[Sequence], allowed: Callable[[Sequence], bytes | None]) -> list[int]:
        """The next token of each sequence, whose logits are the first rows and for which `prepare` was called. Waits for the step."""
        n, backend = len(sequences), self.backend
        masks = [allowed(s) for s in sequences]
        masked = any(mask is not None for mask in masks)
        if masked or self._vocabulary < self._v or any(s.penalised for s in sequences):
            if masked:
                backend.copy_in(self._allowed, b"".join(mask or b"\xff" * (4 * self._words) for mask in masks))
            histories = [s.ids[-HISTORY:] if s.penalised else [] for s in sequences]
            backend.copy_in(self._lengths, array("i", map(len, histories)))
            for index, history in enumerate(histories):
                if history:
                    backend.copy_in(self._history, array("i", history), offset=4 * HISTORY * index)
            ops.restrict_logits(logits, self._allowed if masked else None, self._sampling, self._history, self._lengths, n, self._vocabulary)
        ops.sample(self._ids, None, logits, self._sampling, self._positions, n)
        return list(struct.unpack(f"{n}i", backend.copy_out(self._ids, 4 * n)))

    def row_of(self, logits: Tensor, row: int) -> memoryview:
        """f32 [v]"""
        return memoryview(self.backend.copy_out(logits.rows(row, 1))).cast("f")

    @property
    def mask_words(self) -> int:
        """u32 words of a row of allowed tokens."""
        return self._words

    @property
    def width(self) -> int:
        """Columns of the logits: the vocabulary with its padding."""
        return self._v
