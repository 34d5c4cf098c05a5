"""Requests in, tokens out. These names are all that lsp_server may touch; they load on first use, so that a server answers at once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from inference_pio.engine.errors import BadCheckpoint, DeviceError, DownloadFailed, EngineError, ModelNotFound, OutOfMemory
from inference_pio.engine.request import (ChatPrompt, ContextChunk, FimPrompt, Message, Priority, Prompt, SamplingParams, TokenPrompt)
from inference_pio.engine.stream import StreamStats, TokenStream

if TYPE_CHECKING:
    from inference_pio.engine.engine import Completion, Engine, Logits
    from inference_pio.engine.info import EngineInfo, EngineStatus, LoadProgress
    from inference_pio.engine.models import ModelListing, list_models

_LATER = {name: "engine" for name in ("Completion", "Engine", "Logits")} | {name: "info" for name in ("EngineInfo", "EngineStatus", "LoadProgress")}
_LATER |= {"ModelListing": "models", "list_models": "models"}

__all__ = ["BadCheckpoint", "ChatPrompt", "Completion", "ContextChunk", "DeviceError", "DownloadFailed", "Engine", "EngineError", "EngineInfo",
           "EngineStatus", "FimPrompt", "LoadProgress", "Logits", "Message", "ModelListing", "ModelNotFound", "OutOfMemory", "Priority", "Prompt",
           "SamplingParams", "StreamStats", "TokenPrompt", "TokenStream", "list_models"]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(f"inference_pio.engine.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
