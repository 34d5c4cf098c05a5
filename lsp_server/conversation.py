"""From what was said, and the code it is about, to a prompt that fits the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference_pio.engine import ChatPrompt, EngineError, Message
from inference_pio.lsp_server.documents import Document

if TYPE_CHECKING:
    from inference_pio.engine import Engine

_SYSTEM = "You are a programming assistant inside a code editor. Answer briefly. Put code into fenced blocks that name their language."
_TASKS = {
    "explain": "Explain what this code does, and how.",
    "fix": "Find what is wrong in this code and give the corrected code.",
    "refactor": "Rewrite this code so that it is easier to read and does the same.",
    "tests": "Write unit tests for this code.",
    "docs": "Write documentation comments for this code.",
}
_TEMPLATE_TOKENS = 64      # what a chat template writes around the messages, at the most
_CODE_SHARE = 0.5          # of the prompt may be code shown beside the conversation
_LOOP = 160                # characters that repeat four times or more are no answer
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """What of the editor the model sees."""

    name: str
    tokens: int
    cut: bool


@dataclass(frozen=True)
class Conversation:
    prompt: ChatPrompt
    shown: tuple[Shown, ...]
    dropped: int             # earlier messages that did not fit
    tokens: int              # of all contents


def compose(engine: Engine, messages: Sequence[Message], answer_tokens: int, document: Document | None = None,
            span: tuple[int, int] | None = None, thinking: bool = False) -> Conversation:
    """The newest messages that fit beside an answer, and the code: the span of the document, or its beginning. Counts tokens: slow."""
    budget = engine.info.context - answer_tokens - _TEMPLATE_TOKENS
    *earlier, question = messages
    question = Message("user", expanded(question.content))
    needed = engine.count_tokens(_SYSTEM) + engine.count_tokens(question.content)
    if needed > budget:
        raise EngineError(f"the question has {needed} tokens and the model can see {budget} beside an answer of {answer_tokens}: "
                          "ask less, or set chatTokens lower or context higher")
    code, shown = "", ()
    if document is not None:
        code, shown = _code(engine, document, span, int(min(budget * _CODE_SHARE, budget - needed)))
        needed += sum(item.tokens for item in shown)
    kept: list[Message] = []
    for message in reversed(earlier):
        needed += (tokens := engine.count_tokens(message.content))
        if needed > budget:
            needed -= tokens
            break
        kept.insert(0, message)
    while kept and kept[0].role != "user":   # an answer without its question tells nothing, and templates refuse it
        needed -= engine.count_tokens(kept.pop(0).content)
    system = Message("system", f"{_SYSTEM}\n\n{code}" if code else _SYSTEM)
    return Conversation(ChatPrompt((system, *kept, question), {"enable_thinking": thinking}), shown, len(earlier) - len(kept), needed)


def _code(engine: Engine, document: Document, span: tuple[int, int] | None, budget: int) -> tuple[str, tuple[Shown, ...]]:
    text = document.text[slice(*span)] if span and span[0] < span[1] else document.text
    if not text.strip():
        return "", ()
    name = document.uri.rsplit("/", 1)[-1]
    tokens, whole = engine.count_tokens(text), len(text)
    while tokens > budget and text:
        text = text[:max(len(text) * budget // tokens - 16, 0)]
        text = text[:text.rfind("\n") + 1]
        tokens = engine.count_tokens(text)
    if not text:
        return "", (Shown(name, 0, True),)
    return f"{name}:\n{fenced(text, document.language)}", (Shown(name, tokens, len(text) < whole),)


def expanded(text: str) -> str:
    """/explain and its kin as the sentences they stand for; other texts as they are."""
    command, _, rest = text.strip().partition(" ")
    task = _TASKS.get(command[1:]) if command.startswith("/") else None
    return text if task is None else f"{task} {rest}".strip()


def fenced(text: str, language: str) -> str:
    """A code block; its fence is longer than any inside."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text if text.endswith(chr(10)) else text + chr(10)}{fence}"


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block; one that was not closed goes to the end."""
    return [(match[2], match[3]) for match in _FENCE.finditer(text)]


def repeats(text: str) -> bool:
    """Whether a text has come to say the same over and over: small models do not stop by themselves."""
    tail = text[-_LOOP:]
    return len(tail) == _LOOP and bool(tail.strip("-=*_# \n")) and any(tail[period:] == tail[:-period] for period in range(1, _LOOP // 4))
