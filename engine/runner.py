"""One step on the device: rows in, tokens out. Everything here happens on the step thread."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence as Items
from types import MappingProxyType
from typing import Any, NamedTuple

from inference_pio.engine.sequence import HISTORY, Sequence
from inference_pio.engine.tensor_file import MappedFile
from inference_pio.models.contract import ModelPlugin
from inference_pio.native import ops
from inference_pio.native.backend import Backend, Graph, OutOfMemory, Tensor
from inference_pio.native.dtype import DType, cached_row_bytes
from inference_pio.native.tensor import Mirror

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


class Draw(NamedTuple):
    """How a step draws tokens; it is recorded for each way."""

    restricted: bool   # some logits are changed before
    masked: bool       # because not every token is allowed


class Runner:
    """The model with its workspace, cache and batch."""

    def __init__(self, backend: Backend, plugin: ModelPlugin, config: Any, weights: Any, *, storage: DType, cache_dtype: DType,
                 pages: int, slots: int, context: int, vocabulary: int, files: Items[MappedFile] = ()):
        """files: in which weights are read while steps run."""
        self.backend, self._plugin, self._config, self._weights, self._files = backend, plugin, config, weights, files
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
        self._page_bytes = layout.g * PAGE_SIZE * cached_row_bytes(cache_dtype, layout.p)
        self._planes, self._pages = 2 * layout.layers, pages
        self._batch = backend.batch(self._most_tokens, MOST_ROWS, self._max_pages, SCORED_ROWS)
        self._workspace = plugin.workspace(config, backend, self._most_tokens, SCORED_ROWS, storage)
        self._graphs: dict[tuple[int, Draw | None], tuple[Graph, Tensor]] = {}
        self._staging = Mirror(backend, self._batch.block)
        base = int(backend.ffi.cast("uintptr_t", self._batch.block.pointer))
        self._fields = [(int(backend.ffi.cast("uintptr_t", getattr(self._batch, name).pointer)) - base) // 4
                        for name in ("ids", "positions", "slots", "sequences", "states_out", "logit_rows", "next_positions", "query_starts",
                                     "states_in", "page_table")]
        ids, positions, slots, _, _, _, next_positions, *_ = self._fields
        self._moving = ids, positions, slots, next_positions   # what differs between two steps of the same sequences
        v = self._workspace.logits.shape[1]
        self._v, self._vocabulary = v, min(vocabulary or v, v)
        self._words = -(-v // 32)
        self._drawn = Mirror(backend, backend.tensor((MOST_ROWS,), DType.I32))
        self._sampling = backend.tensor((MOST_ROWS, 32), DType.U8)
        self._sampled = b""   # what it holds
        self._allowed = backend.tensor((MOST_ROWS, self._words), DType.U32)
        self._history = backend.tensor((MOST_ROWS, HISTORY), DType.I32)
        self._lengths = backend.tensor((MOST_ROWS,), DType.I32)
        self._penalised = self._masked = False   # whether one of the lengths is not 0, and whether the step before had masks
        self._repeated: Graph | None = None   # what the step before launched, if it was recorded

    @staticmethod
    def most_tokens(backend: Backend) -> int:
        """Of a step."""
        return 512 if backend.kind == "cpu" else 2048

    @staticmethod
    def page_bytes(plugin: ModelPlugin, config: Any, cache_dtype: DType) -> int:
        """Bytes of a page in all layers."""
        layout = plugin.cache_layout(config)
        return 2 * layout.layers * layout.g * PAGE_SIZE * cached_row_bytes(cache_dtype, layout.p)

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

    def forward(self, rows: list[Row], sequences: Items[Sequence] = (), masks: Items[bytes | None] = ()) -> Tensor:
        """Logits f32 [sum of row.logits, v] of the rows, in order. From the first of them the next token of each of the sequences is
        drawn, where it has a mask among the tokens whose bits are set; `tokens` waits for them."""
        for file in self._files:
            file.require_whole()
        n, b, r = sum(row.count for row in rows), len(rows), sum(row.logits for row in rows)
        draw = self._prepare(sequences, masks) if sequences else None
        self._repeated = None
        if not n == b == r <= BUCKETS[-1]:
            self._fill(rows, b)
            self._batch.resize(n, b, r)
            return self._run(draw, len(sequences))
        bucket = next(size for size in BUCKETS if size >= n)
        self._fill(rows, bucket)
        self._batch.resize(bucket, bucket, bucket)
        if recorded := self._graphs.get((bucket, draw)):
            self._repeated, logits = recorded
            self._repeated.launch()
            return logits
        # Whatever a library sets up when an op first runs cannot be recorded. This run is the step: a state kept in place may
        # not be advanced twice.
        computed = self._run(draw, bucket)
        with self.backend.capture() as graph:
            logits = self._run(draw, bucket)
        self._graphs[bucket, draw] = graph, logits
        self._repeated = graph
        return computed

    @property
    def repeatable(self) -> bool:
        """Whether the step before was a recorded one of one token a sequence, whose drawing does not depend on the tokens drawn so far."""
        return self._repeated is not None and not (self._penalised or self._masked)

    def repeat(self, sequences: Items[Sequence]) -> None:
        """The step before, which was `repeatable`, once more for the same sequences: each is one token longer and has a page for it."""
        for file in self._files:
            file.require_whole()
        values = self._staging.values
        ids, positions, slots, next_positions = self._moving
        for index, sequence in enumerate(sequences):
            position = sequence.computed
            values[ids + index] = sequence.ids[position]
            values[positions + index] = position
            values[slots + index] = sequence.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
            values[next_positions + index] = position + 1
        self._staging.upload(self._used)
        self._repeated.launch()

    def tokens(self, count: int) -> list[int]:
        """Wait for the step; the tokens that it drew."""
        return self._drawn.fetch(count)

    def _run(self, draw: Draw | None, count: int) -> Tensor:
        logits = self._plugin.forward(self._config, self._weights, self._workspace, self._batch, self._cache)
        if draw and draw.restricted:
            ops.restrict_logits(logits, self._allowed if draw.masked else None, self._sampling, self._history, self._lengths, count, self._vocabulary)
        if draw:
            ops.sample(self._drawn.tensor, None, logits, self._sampling, self._batch.next_positions, count)
        return logits

    def _fill(self, rows: list[Row], b: int) -> None:
        """Write the batch; rows beyond those given pad the step, at position 0 of page 0."""
        values, at, logit = self._staging.values, 0, 0
        ids, positions, slots, sequences, states_out, logit_rows, next_positions, query_starts, states_in, page_table = self._fields
        for index, (tokens, first, count, pages, logits, start, keep) in enumerate(rows):
            values[query_starts + index] = at
            values[states_in + index] = start
            place = page_table + index * self._max_pages
            values[place:place + len(pages)] = pages
            if count == 1:
                values[ids + at], values[positions + at], values[sequences + at], values[states_out + at] = tokens[first], first, index, -1
                values[slots + at] = pages[first // PAGE_SIZE] * PAGE_SIZE + first % PAGE_SIZE
            else:
                where = range(first, first + count)
                values[ids + at:ids + at + count] = array("i", tokens[first:first + count])
                values[positions + at:positions + at + count] = array("i", where)
                values[slots + at:slots + at + count] = array("i", [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in where])
                values[sequences + at:sequences + at + count] = array("i", [index]) * count
                values[states_out + at:states_out + at + count] = array("i", [-1]) * count
            for row, slot in keep.items():
                values[states_out + at + row] = slot
            for row in range(count - logits, count):
                values[logit_rows + logit], values[next_positions + logit] = at + row, first + row + 1
                logit += 1
            at += count
        for index in range(len(rows), b):
            values[query_starts + index] = values[logit_rows + index] = at
            values[page_table + index * self._max_pages] = 0
            values[ids + at] = values[positions + at] = values[slots + at] = values[next_positions + index] = 0
            values[sequences + at] = index
            values[states_in + index] = values[states_out + at] = -1
            at += 1
        values[query_starts + b] = at
        self._used = page_table + b * self._max_pages   # the last field, as far as it is used
        self._staging.upload(self._used)

    def _prepare(self, sequences: Items[Sequence], masks: Items[bytes | None]) -> Draw:
        """Upload what drawing takes, where it has changed. Before the step, so that nothing stands between it and its tokens."""
        backend = self.backend
        sampling, penalised = b"", False
        for sequence in sequences:
            sampling += sequence.sampling
            penalised = penalised or sequence.penalised
        if sampling != self._sampled:
            backend.copy_in(self._sampling, sampling)
            self._sampled = sampling
        self._masked = masked = any(masks)
        if masked:
            backend.copy_in(self._allowed, b"".join(mask or b"\xff" * (4 * self._words) for mask in masks))
        if penalised or self._penalised:
            histories = [s.ids[-HISTORY:] if s.penalised else [] for s in sequences]
            backend.copy_in(self._lengths, array("i", [*map(len, histories), *[0] * (MOST_ROWS - len(sequences))]))
            for index, history in enumerate(histories):
                if history:
                    backend.copy_in(self._history, array("i", history), offset=4 * HISTORY * index)
            self._penalised = penalised
        return Draw(masked or penalised or self._vocabulary < self._v, masked)

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
