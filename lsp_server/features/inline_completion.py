"""Ghost text: from a cursor to a suggestion."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from inference_pio.engine import EngineError, FimPrompt, Priority, SamplingParams, TokenStream
from inference_pio.lsp_server.context import SIZE
from inference_pio.lsp_server.generation import Cursor, Generation
from inference_pio.lsp_server.session import LastRequest, Session
from inference_pio.lsp_server.suggestions import Suggestion

_FRAME = 256               # tokens of a prompt that are not its text: special ones, names of files
_LOADING_PATIENCE = 20.0   # seconds a request waits for a model that is being loaded, so that the first text is completed too


async def complete(session: Session, cursor: Cursor, explicit: bool = False) -> str:
    """The suggestion at the cursor, or "" with the reason in session.last. Superseded by any later call for the same document."""
    last = session.last = LastRequest(cursor.document.uri, cursor.document.version, "superseded")
    try:
        return await _complete(session, cursor, explicit, last)
    finally:
        last.total_ms = last.elapsed_ms()


async def _complete(session: Session, cursor: Cursor, explicit: bool, last: LastRequest) -> str:
    document, uri = cursor.document, cursor.document.uri
    number = session.supersede(cursor)
    session.keep(cursor)
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
        return await _generate(session, cursor, number, last)
    except EngineError as error:
        last.reason = f"error: {error}"
        return ""


def build_prompt(session: Session, cursor: Cursor, remember: bool = True) -> FimPrompt:
    """As much as the settings allow and the model's context holds. May read other documents and ask git: not for the event loop.
    remember: see PromptBuilder."""
    engine, s = session.engine, session.settings
    if engine is None:
        raise EngineError("the model is being loaded")
    info = engine.info
    room = info.context - s.max_tokens
    for share in (1, 2, 4, 8, 16):
        context = session.context.chunks(cursor.document, cursor.offset, session.documents.recent(), s.secrets, SIZE // share) \
            if info.fim and s.context_files else ()
        prompt = session.prompts.build(cursor.document, cursor.offset, min(s.prompt_tokens, room) // share, info.fim, context, remember)
        if _bytes(prompt) + _FRAME <= room or engine.prompt_length(prompt) <= room:   # no token is less than a byte
            break
    return prompt


def _bytes(prompt: FimPrompt) -> int:
    texts = (prompt.prefix, prompt.middle, prompt.suffix, *(chunk.text for chunk in prompt.context))
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


async def _generate(session: Session, cursor: Cursor, number: int, last: LastRequest) -> str:
    """Take over what is being written, if it agrees with what was typed; else begin anew."""
    generation = session.keep(cursor)
    if generation is not None and not _waits_behind_others(session, generation):
        last.source, generation.owner = _source(session, generation), number
        if (text := await _await(session, generation, cursor, number, last)) is not None:
            return text
    prompt = await session.in_worker(build_prompt, session, cursor)
    if not session.is_latest(cursor.document.uri, number):
        return ""
    generation = await _begin(session, cursor, prompt, number, Priority.COMPLETION)
    if generation is None:
        last.reason = "superseded" if not session.is_latest(cursor.document.uri, number) else "an empty document"
        return ""
    last.source = "model"
    return await _await(session, generation, cursor, number, last) or ""


def _source(session: Session, generation: Generation) -> str:
    if not generation.prefetched:
        return "adopted"
    generation.prefetched = False   # a hit counts once
    session.prefetch_hits += 1
    return "prefetch"


def _waits_behind_others(session: Session, generation: Generation) -> bool:
    """Begun ahead it gives way to everything; now that somebody waits, what has no text yet had better begin again, urgently."""
    if generation.owner is not None or generation.text or session.engine is None:
        return False
    status = session.engine.status()
    return status.running + status.waiting > 1


async def _begin(session: Session, cursor: Cursor, prompt: FimPrompt, owner: int | None, priority: Priority) -> Generation | None:
    """Start to write. None if there is nothing to continue, or something newer came meanwhile."""
    if not _says_anything(prompt):
        return None
    uri = cursor.document.uri
    number = session.latest.get(uri, 0)
    stream = await _submit(session, prompt, _params(session, cursor), priority)
    if session.latest.get(uri, 0) != number:
        stream.close()
        return None
    session.stop(uri)
    generation = session.generations[uri] = Generation(cursor, stream, owner, prompt)
    return generation


def _says_anything(prompt: FimPrompt) -> bool:
    return bool((prompt.prefix + prompt.middle + prompt.suffix + "".join(c.text for c in prompt.context)).strip())


def _params(session: Session, cursor: Cursor) -> SamplingParams:
    s = session.settings
    stop = () if s.multiline and not cursor.place.inside_a_line else ("\n",)
    return SamplingParams(max_tokens=s.max_tokens, temperature=s.temperature, deadline_ms=float(s.deadline_ms), stop=stop)


async def _submit(session: Session, prompt: FimPrompt, params: SamplingParams, priority: Priority) -> TokenStream:
    """Tokenizing takes a while, so a worker does it; a stream that comes after nobody wants it any more is closed."""
    if session.engine is None:
        raise EngineError("the model was closed meanwhile; another one is being loaded")
    submitted = asyncio.ensure_future(session.in_worker(session.engine.submit, prompt, params, priority))
    try:
        return await asyncio.shield(submitted)
    except asyncio.CancelledError:
        submitted.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().close())
        raise


async def _await(session: Session, generation: Generation, cursor: Cursor, number: int, last: LastRequest) -> str | None:
    """The generation's text, as far as it is not typed yet; None if it turns out to disagree with what was typed."""
    uri = cursor.document.uri
    last.prompt = generation.prompt
    try:
        while not generation.ended and generation.agrees(cursor):
            _see_first_text(generation, cursor, last)
            await generation.change()
            if not session.is_latest(uri, number):
                return ""
    except asyncio.CancelledError:
        if generation.owner == number and session.generations.get(uri) is generation:
            session.stop(uri)
        raise
    _see_first_text(generation, cursor, last)
    last.stats = asdict(generation.stream.stats) | {"tokens_per_second": generation.tokens_per_second}
    if not generation.agrees(cursor) and generation.error is None:
        return None
    if session.generations.get(uri) is generation:
        del session.generations[uri]
    if generation.error is not None:
        raise generation.error
    return _show(session, generation, cursor, last)


def _see_first_text(generation: Generation, cursor: Cursor, last: LastRequest) -> None:
    if last.first_token_ms is None and len(generation.text) > cursor.offset - generation.cursor.offset:
        last.first_token_ms = last.elapsed_ms()


def _show(session: Session, generation: Generation, cursor: Cursor, last: LastRequest) -> str | None:
    """Remember the suggestion where it was begun, and give what is left of it here; None if all of it is typed."""
    at, trimmed = generation.cursor, generation.result
    if trimmed.text:
        session.suggestions.show(Suggestion(at.document.uri, at.offset, at.document.text[:at.offset], at.document.text[at.offset:], trimmed.text))
    typed = at.typed_since(cursor)
    if typed and not (trimmed.text.startswith(typed) and len(trimmed.text) > len(typed)):
        return None
    last.rule = trimmed.dropped_by
    last.reason = "shown" if trimmed.text else f"nothing was left after the rule {trimmed.dropped_by}"
    return trimmed.text[len(typed or ""):]


async def begin_ahead(session: Session, cursor: Cursor) -> None:
    """Begin to write while nobody has asked yet: editors ask some time after the key. Gives way to everything else."""
    uri, s = cursor.document.uri, session.settings
    if session.engine is None or not s.prefill or not s.enable or session.asked.get(uri) is cursor.document:
        return
    if session.suggestions.typed_along(uri, cursor.document.text, cursor.offset) is not None:
        return   # the answer is there already
    number = session.latest.get(uri, 0)
    try:
        if not s.secrets and await session.in_worker(session.privacy.reason, uri):
            return
        prompt = await session.in_worker(build_prompt, session, cursor)
        if session.latest.get(uri, 0) == number and session.documents.get(uri) is cursor.document:
            await _begin(session, cursor, prompt, None, Priority.PREFETCH)
    except EngineError:
        pass   # the request itself will meet the same error and report it


async def prefetch(session: Session, cursor: Cursor, shown: str) -> None:
    """While a suggestion stands on the screen, write what would follow it. Gives way to everything else, and stops when anything but
    the suggestion is typed."""
    uri, document = cursor.document.uri, cursor.document
    accepted = Cursor(document.edited(cursor.offset, cursor.offset, shown, document.version), cursor.offset + len(shown))
    known = session.prefetched.get(uri)
    if not session.settings.prefetch or session.engine is None or known is not None and known.agrees(accepted):
        return
    session.stop_prefetch(uri)
    try:
        prompt = await session.in_worker(build_prompt, session, accepted, False)
        if session.documents.get(uri) is not document or not _says_anything(prompt):
            return
        stream = await _submit(session, prompt, _params(session, accepted), Priority.PREFETCH)
    except EngineError:
        return   # a request will meet the same error and report it
    if session.documents.get(uri) is not document or uri in session.prefetched:
        stream.close()
        return
    session.prefetches += 1
    session.prefetched[uri] = Generation(accepted, stream, None, prompt, prefetched=True)
