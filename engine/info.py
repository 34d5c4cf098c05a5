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
    host_state_count: int    # slots for checkpoints in the host's memory


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
    host_states_free: int
    host_states_cached: int  # checkpoints in the host's memory
    checkpoints_taken: int   # since the model was loaded, as all that follow
    checkpoints_skipped: int # for want of a slot
    checkpoints_saved: int   # moved to the host's memory
    checkpoints_restored: int # brought back from there
    checkpoints_dropped: int # for others that are worth more
    steps: int
    reused_tokens: int
    computed_tokens: int
    recomputed_tokens: int   # of those, known before, but behind the last checkpoint
    generated_tokens: int
    chunk: int               # prompt tokens in a step, now
    last_error: str | None
