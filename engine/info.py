"""What an engine tells about itself: while it loads, about the loaded model, and how busy it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoadProgress:
    stage: str      # download, quantize, load, ready
    done: int       # bytes
    total: int      # bytes, 0 if not known
    detail: str


@dataclass(frozen=True)
class EngineInfo:
    name: str
    architecture: str
    path: Path
    device: str              # cpu, cuda:0
    device_name: str
    build: str               # of the kernel library
    activations: str
    context: int             # tokens
    fim: bool                # trained to fill in the middle
    has_tokenizer: bool
    weight_bytes: int
    page_bytes: int          # of PAGE_SIZE tokens in all layers
    page_count: int
    page_size: int
    state_bytes: int         # of a recurrent state in all layers; 0: the model has none
    state_count: int         # slots for them: one for each running request, the rest for checkpoints


@dataclass(frozen=True)
class EngineStatus:
    waiting: int             # requests whose prompt is not computed
    running: int             # requests that decode
    pages_free: int
    pages_cached: int        # held by the cache alone
    pages_in_use: int        # held by requests
    states_free: int
    states_cached: int       # checkpoints, held by the cache alone
    states_in_use: int
    checkpoints_taken: int   # since the model was loaded
    checkpoints_skipped: int # for want of a slot
    steps: int
    chunk: int               # prompt tokens in a step
    reused_tokens: int       # totals since the model was loaded
    computed_tokens: int
    generated_tokens: int
    last_error: str | None
