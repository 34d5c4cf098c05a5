"""The checkpoint's own chat template (Jinja), run in a sandbox with the conventions of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from inference_pio.engine.errors import BadCheckpoint, EngineError
from inference_pio.engine.request import Message
from inference_pio.engine.tokenizer import Tokenizer


class ChatTemplate:
    """Compiled once. `where` names the file for errors."""

    def __init__(self, source: str, where: str):
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        self._where = where
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise BadCheckpoint(f"{where}: its chat template is not valid: {error}") from None

    def render(self, tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
        """Token ids of the conversation and the opening of the answer. Special tokens' strings in contents stay text."""
        escape = next(chr(c) for c in range(0xE000, 0xF8FF) if not any(chr(c) in m.content for m in messages))
        escaped = [{"role": m.role, "content": tokenizer.escaped(m.content, escape)} for m in messages]
        try:
            text = self._template.render(messages=escaped, add_generation_prompt=True, **variables)
        except Exception as error:   # a template may fail in any way that Python can
            raise EngineError(f"{self._where}: its chat template failed: {error}") from None
        return tokenizer.encode_with_special(text, escape)


def _raise(message: str) -> None:
    raise ValueError(message)
