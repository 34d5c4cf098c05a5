"""From a located checkpoint to a runner: config, tokenizer, template, weights, and how much memory each part gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from math import inf, prod
from pathlib import Path
from typing import Any

from inference_pio.engine import gguf, safetensors
from inference_pio.engine.chat_template import ChatTemplate, chat_template_of, chat_tokens_of_gguf
from inference_pio.engine.errors import BadCheckpoint, DeviceError, EngineError, OutOfMemory
from inference_pio.engine.hub import Located
from inference_pio.engine.prompts import PromptRenderer
from inference_pio.engine.quantize import FORMATS, quantized
from inference_pio.engine.registry import plugin_for
from inference_pio.engine.runner import PAGE_SIZE, SCORED_ROWS, Runner
from inference_pio.engine.tensor_file import TensorInfo
from inference_pio.engine.tokenizer import Tokenizer
from inference_pio.engine.weights import WeightStore
from inference_pio.models.contract import ModelPlugin
from inference_pio.native import backend as native
from inference_pio.native.backend import Backend
from inference_pio.native.dtype import BLOCKS, DType

CONTEXT = 8192               # tokens, if nobody says otherwise
_MARGIN = 256 << 20          # left to others when the budget is what is free
_CONTEXTS = 4                # full contexts that the cache holds, if memory allows
_RUNNING = 4                 # slots for the states of requests that run side by side
_CHECKPOINTS = 64            # slots for checkpoints, if memory allows
_HOST_CHECKPOINTS = 2 << 30  # bytes of the host's memory for more of them, beside a GPU
_ACTIVATIONS = {"f32": DType.F32, "bf16": DType.BF16, "q8": DType.Q8_0}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: nothing on the device yet."""

    path: Path
    plugin: ModelPlugin
    config: Any
    tensors: dict[str, TensorInfo]
    format: str
    tokenizer: Tokenizer | None
    renderer: PromptRenderer
    context: int             # tokens the model was made for


@dataclass(frozen=True)
class Plan:
    """How the model will be run."""

    storage: DType           # of activations between ops
    activations: DType       # how inputs of quantised layers are rounded
    cache_dtype: DType
    context: int
    pages: int
    page_bytes: int
    states: int              # slots for recurrent states; 0: the model has none
    state_bytes: int         # of a slot
    host_states: int         # slots in the host's memory
    workspace_bytes: int     # activations and scratch of the largest step
    mapped_bytes: int        # of experts that are read in the file


def open_checkpoint(located: Located) -> Checkpoint:
    path, where = located.path, str(located.path)
    if located.format == "gguf":
        metadata, tensors = gguf.open_gguf(path)
        architecture = metadata.get("general.architecture")
        tokenizer = Tokenizer.from_gguf(metadata, where) if "tokenizer.ggml.tokens" in metadata else None
        template, tokens = metadata.get("tokenizer.chat_template"), chat_tokens_of_gguf(metadata)
    else:
        metadata, tensors = safetensors.read_json(path / "config.json"), safetensors.open_folder(path)
        names = metadata.get("architectures")
        architecture = names[0] if isinstance(names, list) and names else None
        tokenizer = Tokenizer.from_file(path / "tokenizer.json") if (path / "tokenizer.json").exists() else None
        template, tokens = chat_template_of(path)
    if not isinstance(architecture, str):
        raise BadCheckpoint(f"{where} does not say which architecture it has")
    plugin = plugin_for(architecture, where, located.name)
    try:
        config = plugin.parse_config(metadata, located.format)
    except ValueError as error:
        raise BadCheckpoint(f"{where}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:   # a field of a type or size that nobody expects
        raise BadCheckpoint(f"{where}: its config cannot be understood: {error}") from None
    _require_numbers(config, where)
    if tokenizer and tokenizer.vocabulary > config.vocab_size:
        raise BadCheckpoint(f"{where}: its tokenizer has {tokenizer.vocabulary} ids, the model {config.vocab_size}: they do not belong together")
    template = template or plugin.prompts.chat_template
    compiled = ChatTemplate(template, where, tokens) if isinstance(template, str) else None
    return Checkpoint(path, plugin, config, tensors, located.format, tokenizer, PromptRenderer(plugin.prompts, tokenizer, compiled, where),
                      config.max_position_embeddings)


def _require_numbers(config: Any, where: str) -> None:
    """Fields of a config are what they are declared to be: sizes are positive integers, other numbers positive and finite."""
    for field in fields(config):
        value, number = getattr(config, field.name), type(getattr(config, field.name)) in (int, float)
        if field.type == "int" and not (type(value) is int and 0 < value < 1 << 31):
            raise BadCheckpoint(f"{where}: {field.name} must be a positive integer, not {value!r}")
        if field.type == "float" and not (number and 0 < value < inf):
            raise BadCheckpoint(f"{where}: {field.name} must be a positive number, not {value!r}")


def open_backend(device: str, threads: int) -> Backend:
    """`auto` is the first GPU if its library and driver are here, else the CPU. DeviceError if what was asked for cannot be had."""
    if device == "auto":
        try:
            return Backend.open("cuda")
        except native.NoDevice:
            return Backend.open("cpu", threads)
    try:
        return Backend.open(device, threads)
    except native.NoDevice as error:
        raise DeviceError(f"device {device!r} cannot be used: {error}. Use --device cpu or auto") from None
    except ValueError as error:
        raise DeviceError(str(error)) from None


def open_both(located: Located, device: str, threads: int) -> tuple[Checkpoint, Backend]:
    """Side by side: a GPU's driver takes its time to start, a tokenizer to be built."""
    with ThreadPoolExecutor(1) as beside:
        opening = beside.submit(open_backend, device, threads)
        try:
            return open_checkpoint(located), opening.result()
        except BaseException:
            if opening.exception() is None:
                opening.result().close()
            raise


def quantize(checkpoint: Checkpoint, weights: str, backend: Backend, progress: Callable[[int, int], None]) -> Checkpoint:
    """The same checkpoint with its matrices in fewer bits, if `weights` says so (auto, q8 or q4)."""
    if weights == "auto":
        return checkpoint
    if weights not in FORMATS:
        raise EngineError(f"weights must be auto, {' or '.join(FORMATS)}, not {weights!r}")
    return replace(checkpoint, tensors=quantized(checkpoint.path.stem, checkpoint.tensors, weights, checkpoint.plugin.exact, backend, progress))


def plan(checkpoint: Checkpoint, backend: Backend, activations: str, cache: str, experts: str, memory: int | None, context: int | None,
         checkpoints: int | None, host_checkpoints: int | None = None) -> Plan:
    """Fits weights and pages into the budget, or OutOfMemory with what would help."""
    cpu, formats = backend.kind == "cpu", {t.dtype for t in checkpoint.tensors.values() if t.dtype is not None}
    if activations == "auto":
        quantised = formats - {DType.F32, DType.F16, DType.BF16}
        activations = "bf16" if not cpu else "q8" if quantised else "bf16" if DType.BF16 in formats else "f32"
    if activations not in _ACTIVATIONS:
        raise ValueError(f"activations must be auto, f32, bf16 or q8, not {activations!r}")
    rounding = _ACTIVATIONS[activations]
    storage = DType.F32 if cpu or rounding == DType.F32 else DType.BF16   # a CPU computes in f32 and rounds the inputs of products
    cache_dtype = _cache_dtype(cache, rounding, backend)
    page_bytes = Runner.page_bytes(checkpoint.plugin, checkpoint.config, cache_dtype)
    context = min(context or min(checkpoint.context, CONTEXT), checkpoint.context)
    weights = sum(t.nbytes for t in checkpoint.tensors.values())
    workspace_bytes = _workspace_bytes(checkpoint, backend, storage)
    budget = memory if memory is not None else backend.memory_info()[0] - _MARGIN - workspace_bytes
    least = -(-context // PAGE_SIZE) + 2
    layout = checkpoint.plugin.cache_layout(checkpoint.config).states
    state_bytes = layout.nbytes if layout else 0
    left = budget - weights - least * page_bytes - state_bytes
    mapped_bytes = _mapped_bytes(checkpoint, backend, experts, fits=left >= 0)
    left, weights = left + mapped_bytes, weights - mapped_bytes
    if left < 0:
        states = f", {_mb(state_bytes)} for a recurrent state" if state_bytes else ""
        raise OutOfMemory(
            f"{checkpoint.path.name} needs {_mb(weights)} for weights{states} and {_mb(least * page_bytes)} for {context} tokens of "
            f"context on {backend.device}; the budget is {_mb(max(budget, 0))}. A smaller --context, a larger --memory"
            f"{', --experts file' if experts == 'memory' and checkpoint.plugin.experts else ''} or a smaller model would fit")
    states = 0
    if state_bytes:
        wanted = _CHECKPOINTS if checkpoints is None else checkpoints // state_bytes
        states = 1 + min(_RUNNING - 1 + wanted, left // 2 // state_bytes)
        left -= (states - 1) * state_bytes
    pages = least + min(left // max(page_bytes, 1), (_CONTEXTS - 1) * least)   # recurrent layers alone have no pages
    host_states = _host_budget(backend, host_checkpoints) // state_bytes if state_bytes else 0
    return Plan(storage, rounding, cache_dtype, context, pages, page_bytes, states, state_bytes, host_states, workspace_bytes, mapped_bytes)


def _mapped_bytes(checkpoint: Checkpoint, backend: Backend, experts: str, fits: bool) -> int:
    """Bytes of experts that stay in the file; `fits`: there is memory for all of them."""
    if experts not in ("auto", "memory", "file"):
        raise EngineError(f"experts must be auto, memory or file, not {experts!r}")
    if experts == "memory" or (experts == "auto" and (fits or backend.kind != "cpu")):
        return 0
    if backend.kind != "cpu":
        raise EngineError(f"experts 'file' cannot be used on {backend.device}, which cannot read a file: use experts 'auto' or --device cpu")
    return sum(t.nbytes for t in checkpoint.tensors.values()
               if t.dtype is not None and t.shape and backend.reads_in_place(t.dtype, t.shape[-1])
               and t.named(checkpoint.plugin.experts))


def _cache_dtype(cache: str, rounding: DType, backend: Backend) -> DType:
    """How keys and values are kept."""
    if cache not in ("auto", "q8"):
        raise EngineError(f"cache must be auto or q8, not {cache!r}")
    if cache == "auto":
        return DType.F32 if rounding == DType.F32 else DType.F16 if backend.kind == "cpu" else DType.BF16
    if backend.kind != "cpu":
        raise EngineError(f"cache 'q8' cannot be used on {backend.device}, which keeps keys and values in 16 bits: use cache 'auto' or --device cpu")
    return DType.Q8_0


def summary(checkpoint: Checkpoint, backend: Backend, plan: Plan) -> str:
    """What will be loaded where, in bytes: said before it happens."""
    weights = sum(tensor.nbytes for tensor in checkpoint.tensors.values()) - plan.mapped_bytes
    mapped = f", experts read in the file {_mb(plan.mapped_bytes)}" if plan.mapped_bytes else ""
    line = f"{checkpoint.plugin.name} on {backend.device}: weights {_mb(weights)}{mapped}, {_mb(plan.workspace_bytes)} to compute in, " \
           f"cache up to {_mb(plan.pages * plan.page_bytes)} ({plan.pages * PAGE_SIZE} tokens)"
    return line + (f", {plan.states} + {plan.host_states} recurrent states of {_mb(plan.state_bytes)}" if plan.states else "")


class _Measure:
    """Stands in for a backend that a workspace is made on: counts the bytes."""

    def __init__(self, backend: Backend):
        self._backend, self.nbytes = backend, 0

    def tensor(self, shape: Sequence[int], dtype: DType) -> None:
        self.nbytes += prod(shape) * BLOCKS[dtype][1]

    def reserve(self, n: int, widest: int, h: int, p: int) -> None:
        self.nbytes += self._backend.lib.tops_scratch_bytes(n, widest, h, p)


def _workspace_bytes(checkpoint: Checkpoint, backend: Backend, storage: DType) -> int:
    measure = _Measure(backend)
    checkpoint.plugin.workspace(checkpoint.config, measure, Runner.most_tokens(backend), SCORED_ROWS, storage)
    return measure.nbytes


def _host_budget(backend: Backend, wanted: int | None) -> int:
    """Bytes for checkpoints in the host's memory. On a CPU the device's memory is the host's, and nobody gains by copying."""
    if wanted is not None:
        return wanted
    if backend.kind == "cpu":
        return 0
    return min(_HOST_CHECKPOINTS, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


def load(checkpoint: Checkpoint, backend: Backend, plan: Plan, progress: Callable[[int, int], None]) -> tuple[Runner, int]:
    """(runner, bytes of weights). The checkpoint's files are unmapped when it returns, but for those whose experts are read in place."""
    store = WeightStore(checkpoint.path.name, checkpoint.format, checkpoint.tensors, backend, plan.activations, progress,
                        checkpoint.plugin.experts if plan.mapped_bytes else ())
    try:
        weights = checkpoint.plugin.load(checkpoint.config, store, backend)
        store.finish()
        backend.end_packing()
        runner = Runner(backend, checkpoint.plugin, checkpoint.config, weights, storage=plan.storage, cache_dtype=plan.cache_dtype,
                        pages=plan.pages, slots=plan.states, context=plan.context, files=tuple(store.left),
                        vocabulary=checkpoint.tokenizer.vocabulary if checkpoint.tokenizer else 0)
    except native.OutOfMemory as error:
        raise OutOfMemory(f"{checkpoint.path.name} does not fit on {backend.device}: {error}. "
                          "Use a smaller --context, a smaller model or --device cpu") from None
    except native.DeviceFailed as error:
        raise DeviceError(f"{backend.device} failed while {checkpoint.path.name} was loaded: {error}") from None
    for file in {tensor.file for tensor in checkpoint.tensors.values()} - store.left:
        file.close()
    return runner, store.nbytes


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
