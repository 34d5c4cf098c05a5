"""`pio/chat`: an answer to a conversation, streamed. The editor keeps the conversation, so that nothing is lost if the server dies; the
engine's cache makes it cheap to send all of it again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from pygls.exceptions import JsonRpcInvalidParams

from inference_pio.engine import ChatPrompt, EngineError, Message, Priority, SamplingParams, TokenStream
from inference_pio.lsp_server.conversation import code_blocks, compose, repeats
from inference_pio.lsp_server.documents import Document
from inference_pio.lsp_server.reasoning import Reasoning
from inference_pio.lsp_server.session import Session

_PENALTY = 1.05   # of repetition
Report = Callable[[dict[str, Any]], None]


async def chat(session: Session, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """`params`: messages of role and content, the last one the user's; perhaps textDocument and range, what it is about. `report` gets
    what the model is shown, and then each piece of its reasoning and of the answer."""
    messages = _messages(params.get("messages"))
    document = snapshot(session, params)
    span = span_of(session, document, params.get("range")) if document is not None and params.get("range") else None
    engine, limit = await ready(session), session.settings.chat_tokens
    if document is not None and not session.settings.secrets and (reason := await session.in_worker(session.privacy.reason, document.uri)):
        document = None
        report({"hidden": reason})
    conversation = await session.in_worker(partial(
        compose, engine, messages, min(limit, engine.info.context // 2), document, span, session.settings.thinking))
    context = {"shown": [asdict(item) for item in conversation.shown], "dropped": conversation.dropped, "tokens": conversation.tokens}
    report({"context": context})
    reasoning = Reasoning()
    async with answer(session, conversation.prompt, limit, _PENALTY) as stream:
        async for piece in stream:
            _report_texts(report, reasoning.feed(piece))
            if repeats(stream.text):
                report({"repeats": True})
                break
    _report_texts(report, reasoning.end())
    blocks = [{"language": language, "text": text} for language, text in code_blocks(reasoning.answer)]
    return {"text": reasoning.answer, "reasoning": reasoning.thoughts, "codeBlocks": blocks, "context": context, "stats": asdict(stream.stats)}


def _report_texts(report: Report, texts: tuple[str, str]) -> None:
    for key, text in zip(("reasoning", "delta"), texts, strict=True):
        if text:
            report({key: text})


@asynccontextmanager
async def answer(session: Session, prompt: ChatPrompt, limit: int, penalty: float = 1.0) -> AsyncIterator[TokenStream]:
    """What the model says, closed when nobody listens any more."""
    params = SamplingParams(max_tokens=limit, temperature=session.settings.temperature, repetition_penalty=penalty)
    stream = await session.in_worker(session.engine.submit, prompt, params, Priority.CHAT)
    try:
        yield stream
    finally:
        stream.close()


async def ready(session: Session) -> Any:
    """The engine, once it is loaded."""
    await session.loaded.wait()
    if session.engine is None:
        raise EngineError(f"there is no model: {session.error}")
    return session.engine


def snapshot(session: Session, params: Mapping[str, Any]) -> Document | None:
    """The document of the request as it is now; None if none is named."""
    named = params.get("textDocument")
    if named is None:
        return None
    uri = named.get("uri") if isinstance(named, Mapping) else None
    document = session.documents.get(uri) if isinstance(uri, str) else None
    if document is None:
        raise JsonRpcInvalidParams(f"textDocument names {uri!r}, which is not open")
    if named.get("version") not in (None, document.version):
        raise EngineError(f"the document was changed since: it is at version {document.version}, the request at {named['version']}. Ask again")
    return document


def span_of(session: Session, document: Document, value: Any) -> tuple[int, int]:
    """An LSP range as offsets."""
    try:
        start, end = (document.offset(int(value[side]["line"]), int(value[side]["character"]), session.documents.encoding)
                      for side in ("start", "end"))
    except (KeyError, TypeError, ValueError):
        raise JsonRpcInvalidParams(f"range must hold start and end, each with line and character, not {value!r}") from None
    return min(start, end), max(start, end)


def _messages(value: Any) -> list[Message]:
    try:
        messages = [Message(entry["role"], entry["content"]) for entry in value]
    except (KeyError, TypeError):
        raise JsonRpcInvalidParams("messages must be a list of objects with role and content") from None
    if not messages or messages[-1].role != "user" or any(m.role not in ("user", "assistant") or not isinstance(m.content, str) for m in messages):
        raise JsonRpcInvalidParams("messages must have the roles user and assistant and texts, and end with the user's")
    return messages
