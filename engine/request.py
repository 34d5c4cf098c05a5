"""What a caller asks of the engine. Everything here is frozen: the engine's own state for a request is a `Sequence`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Priority(IntEnum):
    """Lower runs first. A step never mixes in work of a lower priority while work of a higher one waits."""

    COMPLETION = 0   # somebody is typing
    CHAT = 1         # somebody is reading
    PREFETCH = 2     # nobody waits yet


@dataclass(frozen=True)
class ContextChunk:
    """A piece of another file that may help: shown to the model before the text around the cursor."""

    path: str
    text: str


@dataclass(frozen=True)
class FimPrompt:
    """Continue the text at the cursor.

    The text before the cursor is `prefix + middle`; `prefix` ends at a line boundary that moves rarely (the anchor), so that
    typing only appends to `middle`, the end of the prompt. `suffix` is the text after the cursor.
    """

    prefix: str
    suffix: str = ""
    middle: str = ""
    context: tuple[ContextChunk, ...] = ()
    path: str = ""
    repository: str = ""


@dataclass(frozen=True)
class Message:
    role: str        # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation; the model's chat template turns it into tokens. Special tokens in `content` stay plain text."""

    messages: tuple[Message, ...]
    template_variables: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids as they are, for tests and measurements."""

    token_ids: tuple[int, ...]


Prompt = FimPrompt | ChatPrompt | TokenPrompt | str   # a str is raw text, continued


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens and when to stop. The default is greedy.

    `stop` are texts that end the answer and are not part of it. `deadline_ms` counts from submission; when it passes, the answer
    ends with what there is. `max_tokens` 0 computes the prompt into the cache and answers nothing. `keep_logits` leaves the logits that
    the first token was drawn from in the stream.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    deadline_ms: float | None = None
    keep_logits: bool = False

    def __post_init__(self) -> None:
        for name, valid, requirement in (
            ("max_tokens", self.max_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0 and finite"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 and finite (1 is off)"),
            ("presence_penalty", abs(self.presence_penalty) < float("inf"), "finite (0 is off)"),
            ("seed", 0 <= self.seed < 2**64, "an unsigned 64-bit integer"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("deadline_ms", self.deadline_ms is None or self.deadline_ms > 0, "above 0 or None"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {requirement}, not {getattr(self, name)!r}")
