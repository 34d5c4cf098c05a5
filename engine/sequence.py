"""The engine's state for one request."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from inference_pio.engine.request import Priority, SamplingParams
from inference_pio.engine.stopping import StopTexts
from inference_pio.engine.stream import TokenStream
from inference_pio.engine.tokenizer import StreamDecoder, Tokenizer

HISTORY = 1024   # last tokens that the penalties see


class Keep(NamedTuple):
    """Recurrent states of one step: the slot to start from (-1: zeros), and slots by the row after which they are kept."""

    start: int
    slots: Mapping[int, int]


NOTHING = Keep(-1, {})


@dataclass(eq=False)
class HeldState:
    """The recurrent state behind `position` tokens, in a slot. wanted: it is to become a checkpoint."""

    position: int
    slot: int
    wanted: bool


@dataclass(eq=False)
class Sequence:
    """ids: prompt and answer; `computed` of them have keys and values in `pages`. required: bytes the answer must still begin with."""

    ids: list[int]
    params: SamplingParams
    priority: Priority
    stream: TokenStream
    stop_ids: frozenset[int]
    tokenizer: Tokenizer | None
    required: bytes = b""
    prompt_length: int = 0
    computed: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))   # as the batch wants them
    started: bool = False
    states: list[HeldState] = field(default_factory=list)   # of a model with recurrent layers; the last is the current one
    marks: list[int] = field(default_factory=list)          # positions at which the state should be kept
    keep: Keep = NOTHING                                    # of the step that is about to run

    def __post_init__(self) -> None:
        p = self.params
        self.prompt_length = len(self.ids)
        self.stream.stats.prompt_tokens = len(self.ids)
        self.sampling = struct.pack("5fiQ", p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.top_k, p.seed)
        self.deadline = self.stream.submitted + (inf if p.deadline_ms is None else p.deadline_ms / 1000)   # as perf_counter tells time
        self.penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0
        self._decoder, self._stops = StreamDecoder(), StopTexts(p.stop)
        self._drawn: tuple[int, str] | None = None   # not in the stream yet

    @property
    def waiting_tokens(self) -> int:
        """Tokens without keys and values; the last of them gives the next logits."""
        return len(self.ids) - self.computed

    def accept(self, token: int) -> str | None:
        """The next token was drawn. Gives the reason if it ended the answer. The stream has it when `deliver` was called."""
        if token in self.stop_ids and not self.params.ignore_eos:
            return "stop"
        self.ids.append(token)
        data = self.tokenizer.token_bytes(token) if self.tokenizer else b""
        if self.required:
            self.marks.append(len(self.ids))   # what the document has already is part of the next prompt
            typed = min(len(self.required), len(data))
            self.required, data = self.required[typed:], data[typed:]
        text, stopped = self._stops.feed(self._decoder.feed(data))
        self._drawn = token, text
        if stopped:
            return "stop"
        return "length" if len(self.ids) - self.prompt_length >= self.params.max_tokens else None

    def deliver(self) -> None:
        """Give the stream what was drawn."""
        if self._drawn is not None:
            self.stream.put(*self._drawn)
            self._drawn = None

    def finish(self, reason: str) -> None:
        """End the stream, with the text that was held back in case it became a stop text."""
        self.stream.end(reason, self._stops.feed(self._decoder.finish())[0] + self._stops.finish())
