"""What the engine and a model agree on.

The engine fills a `Batch`, calls `plugin.forward`, and reads logits; a model knows nothing of requests, pages' owners or text.
Both import this file, and a model imports only this and `native`.

Letters: n tokens in the step, d width, i feed-forward width, h query heads, g key-value heads, p head width, v vocabulary,
b sequences, r rows of logits asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from inference_pio.native.backend import Backend, Batch, KV, Tensor, Weight


@dataclass(frozen=True)
class CacheLayout:
    """What one token leaves behind in the cache: `layers` pairs of K and V, [g, p] each."""

    layers: int
    g: int
    p: int


class TensorSource(Protocol):
    """An open checkpoint, as `load` sees it. Names are the file's own."""

    format: str                      # "safetensors" or "gguf"

    def has(self, name: str) -> bool: ...

    def weight(self, *names: str, rows: int | None = None, cols: int) -> Weight:
        """The matrices of `names`, stacked by rows and packed for the device; rows is the sum that is expected."""

    def vector(self, name: str, d: int) -> Tensor:
        """A 1-D tensor [d] as f32 on the device."""

    def ignore(self, *names: str) -> None:
        """Names that the file may hold and the model does not want. Any other leftover is an error."""


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
class ModelPlugin:
    """A model as a record of functions.

    parse_config(fields, format) -> Config: `fields` is config.json, or a GGUF's metadata. A missing field is a ValueError by name.
    cache_layout(config) -> CacheLayout
    load(config, source, backend) -> Weights
    workspace(config, backend, n, r) -> Workspace: activations for steps of at most n tokens and r rows of logits
    forward(config, weights, workspace, batch, cache) -> Tensor: logits f32 [r, v] in the workspace. It allocates nothing, reads
        no tensor on the host, branches on the config only, and writes only into the workspace and the cache.
    """

    name: str                        # what --model takes
    architectures: tuple[str, ...]   # config.json's `architectures` entry and the GGUF `general.architecture`
    checkpoint: str | None           # where the weights are published: a Hugging Face id, or None for third-party folders
    prompts: Prompts
    parse_config: Callable[[Mapping[str, Any], str], Any]
    cache_layout: Callable[[Any], CacheLayout]
    load: Callable[[Any, TensorSource, Backend], Any]
    workspace: Callable[[Any, Backend, int, int], Any]
    forward: Callable[[Any, Any, Any, Batch, tuple[KV, ...]], Tensor]
