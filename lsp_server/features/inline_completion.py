"""Ghost text: from a cursor to a suggestion."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from functools import partial

from inference_pio.engine import EngineError, FimPrompt, Priority, SamplingParams, TokenStream
from inference_pio.lsp_server.context import chunks
from inference_pio.lsp_server.documents import Document
from inference_pio.lsp_server.session import LastRequest, Session
from inference_pio.lsp_server.suggestions import Suggestion
from inference_pio.lsp_server.trim import Place, block_ended, trim

_LOADING_PATIENCE = 20.0   # seconds a request waits for a model that is being loaded, so that the first text is completed too


@dataclass(frozen=True)
class Cursor:
    """A document as it was when the request came, and where."""

    document: Document
    offset: int

    @property
    def place(self) -> Place:
        text, starts = self.document.text, self.document.starts
        line = self.document.position(self.offset, "utf-32")[0]
        end = starts[line] + len(self.document.line(line))
        return Place(before=text[starts[line]:self.offset], after=text[self.offset:max(end, self.offset)], below=text[end:end + 4000])


async def complete(session: Session, cursor: Cursor, explicit: bool = False) -> str:
    """The suggestion at the cursor, or "" with the reason in session.last. Superseded by any later call for the same document."""
    last = session.last = LastRequest(cursor.document.uri, cursor.document.version, "superseded")
    try:
        return await _complete(session, cursor, explicit, last)
    finally:
        last.total_ms = last.elapsed_ms()


async def _complete(session: Session, cursor: Cursor, explicit: bool, last: LastRequest) -> str:
    document, uri = cursor.document, cursor.document.uri
    number = session.supersede(uri)
    along = session.suggestions.typed_along(uri, document.text, cursor.offset)
    if along is not None:
        last.reason, last.source = "shown", "type-through"
        return along
    settings = session.settings
    if not settings.enable and not explicit:
        last.reason = "switched off by the setting enable"
        return ""
    if not settings.secrets and (reason := await session.in_worker(session.privacy.reason, uri)):
        last.reason = reason
        return ""
    if not session.loaded.is_set():
        last.reason = "the model is being loaded"
        try:
            await asyncio.wait_for(session.loaded.wait(), _LOADING_PATIENCE)
        except TimeoutError:
            return ""
    if session.engine is None:
        last.reason = f"no model: {session.error}"
        return ""
    if not session.is_latest(uri, number):
        last.reason = "superseded"
        return ""
    try:
        prompt = await session.in_worker(partial(build_prompt, session, document, cursor.offset))
        return await _generate(session, cursor, number, prompt, last)
    except EngineError as error:
        last.reason = f"error: {error}"
        return ""


def build_prompt(session: Session, document: Document, offset: int) -> FimPrompt:
    """May read other documents and ask git: not for the event loop."""
    fim, s = session.engine is not None and session.engine.info.fim, session.settings
    context = chunks(document, session.documents.recent(), session.privacy, s.secrets) if fim and s.context_files else ()
    return session.prompts.build(document, offset, s.prompt_tokens, fim, context)


async def _generate(session: Session, cursor: Cursor, number: int, prompt: FimPrompt, last: LastRequest) -> str:
    uri, place, s = cursor.document.uri, cursor.place, session.settings
    last.prompt = prompt.prefix + prompt.middle
    if not (prompt.prefix + prompt.middle + prompt.suffix + "".join(c.text for c in prompt.context)).strip():
        last.reason = "an empty document"
        return ""
    stop = () if s.multiline and not place.after.strip(")]}>,; \t\"'`") else ("\n",)
    params = SamplingParams(max_tokens=s.max_tokens, temperature=s.temperature, deadline_ms=float(s.deadline_ms), stop=stop)
    stream: TokenStream = await session.in_worker(session.engine.submit, prompt, params, Priority.COMPLETION)
    submitted_ms = last.elapsed_ms()
    if not session.is_latest(uri, number):
        stream.close()
        return ""
    session.streams[uri] = stream
    ended_early = False
    try:
        text = ""
        async for piece in stream:
            text += piece
            if not session.is_latest(uri, number):
                return ""
            if "\n" in piece and block_ended(text, place):
                ended_early = True
                break
    finally:
        stream.close()
        if session.streams.get(uri) is stream:
            del session.streams[uri]
        last.source, last.stats = "model", asdict(stream.stats)
        if stream.stats.first_token_ms is not None:
            last.first_token_ms = submitted_ms + stream.stats.first_token_ms
    if not session.is_latest(uri, number):
        return ""
    cut = not ended_early and stream.stats.finish_reason in ("length", "deadline")
    trimmed = trim(text, Place(place.before, place.after, place.below, cut))
    last.rule = trimmed.dropped_by
    last.reason = "shown" if trimmed.text else f"nothing was left after the rule {trimmed.dropped_by}"
    if trimmed.text:
        before, after = cursor.document.text[:cursor.offset], cursor.document.text[cursor.offset:]
        session.suggestions.show(Suggestion(uri, cursor.offset, before, after, trimmed.text))
    return trimmed.text


async def prefill(session: Session, cursor: Cursor) -> None:
    """Compute the prompt while somebody still types. Gives way to everything else."""
    uri, s = cursor.document.uri, session.settings
    if session.engine is None or not s.prefill or not s.enable:
        return
    number = session.latest.get(uri, 0)
    try:
        if not s.secrets and await session.in_worker(session.privacy.reason, uri):
            return
        prompt = await session.in_worker(partial(build_prompt, session, cursor.document, cursor.offset))
        if session.latest.get(uri, 0) != number or session.documents.get(uri) is not cursor.document:
            return
        session.stop(uri)
        session.streams[uri] = await session.in_worker(session.engine.submit, prompt, SamplingParams(max_tokens=0), Priority.PREFETCH)
    except EngineError:
        pass   # the request itself will meet the same error and report it
