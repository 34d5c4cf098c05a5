"""The checkpoint's own chat template (Jinja), run in a sandbox with the conventions of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inference_pio.engine.errors import BadCheckpoint, EngineError
from inference_pio.engine.request import Message
from inference_pio.engine.safetensors import read_json
from inference_pio.engine.tokenizer import Tokenizer


class ChatTemplate:
    """Compiled once. `where` names the file for errors; `tokens` are the special tokens' names that templates use: bos_token and the like."""

    def __init__(self, source: str, where: str, tokens: Mapping[str, str] = MappingProxyType({})):
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        self._where, self._tokens = where, tokens
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise BadCheckpoint(f"{where}: its chat template is not valid: {error}") from None

    def render(self, tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
        """Token ids of the conversation and the opening of the answer. Special tokens' strings in contents stay text."""
        escape = next(chr(c) for c in range(0xE000, 0xF8FF) if not any(chr(c) in m.content for m in messages))
        escaped = [{"role": m.role, "content": tokenizer.escaped(m.content, escape)} for m in messages]
        try:
            text = self._template.render({**self._tokens, **variables, "messages": escaped, "add_generation_prompt": True})
        except Exception as error:   # a template may fail in any way that Python can
            raise EngineError(f"{self._where}: its chat template failed: {str(error) or type(error).__name__}") from None
        return tokenizer.encode_with_special(text, escape)


_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def chat_template_of(folder: Path) -> tuple[str | None, dict[str, str]]:
    """(template, names of special tokens) from chat_template.jinja and tokenizer_config.json, as far as they are there."""
    config, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    fields = read_json(config) if config.exists() else {}
    named = {name: fields[name]["content"] if isinstance(fields[name], dict) and "content" in fields[name] else fields[name]
             for name in _TOKENS if name in fields}
    template = fields.get("chat_template")
    if isinstance(template, list):   # several, by name
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
    if own.exists():
        try:
            template = own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadCheckpoint(f"{own} cannot be read: {error}") from None
    return template if isinstance(template, str) else None, {name: token for name, token in named.items() if isinstance(token, str)}


def chat_tokens_of_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Names of special tokens, as far as the vocabulary has them."""
    tokens, found = metadata.get("tokenizer.ggml.tokens"), {}
    for name in _TOKENS:
        index = metadata.get(f"tokenizer.ggml.{name.replace('pad', 'padding').replace('unk', 'unknown')}_id")
        if isinstance(tokens, list) and isinstance(index, int) and 0 <= index < len(tokens):
            found[name] = tokens[index]
    return found


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise ValueError(message)
