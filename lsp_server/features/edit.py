"""`pio/edit`: rewrite a selection as somebody says. Only the lines that change, and none outside the selection."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from functools import partial
from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcInvalidParams

from inference_pio.engine import ChatPrompt, EngineError, Message
from inference_pio.lsp_server.conversation import code_blocks, fenced
from inference_pio.lsp_server.documents import Document, Encoding
from inference_pio.lsp_server.features.chat import Report, answer, ready, snapshot, span_of
from inference_pio.lsp_server.reasoning import answer_of
from inference_pio.lsp_server.session import Session

_SYSTEM = "You rewrite code. Answer with the whole rewritten code in one fenced block and nothing else. Change only what is asked for."
_MARGIN = 128      # tokens of the template and of a longer answer
_AROUND = 1500     # characters before the selection that are shown, too


async def edit(session: Session, params: Mapping[str, Any], report: Report) -> types.WorkspaceEdit:
    """`params`: textDocument, range, instruction. Nothing is applied here. `report` gets each piece of what the model writes."""
    document, instruction = snapshot(session, params), params.get("instruction")
    if document is None or not isinstance(instruction, str) or not instruction.strip():
        raise JsonRpcInvalidParams("an edit needs textDocument, range and an instruction")
    start, end = span_of(session, document, params.get("range"))
    selected = document.text[start:end]
    if not selected.strip():
        raise JsonRpcInvalidParams("nothing is selected: select the code to be rewritten")
    engine = await ready(session)
    if not session.settings.secrets and (reason := await session.in_worker(session.privacy.reason, document.uri)):
        raise EngineError(f"the file is not shown to the model ({reason}); the setting secrets allows it")
    tokens = await session.in_worker(engine.count_tokens, selected + instruction)
    if 2 * tokens + _MARGIN > engine.info.context:
        raise EngineError(f"the selection has {tokens} tokens; to be rewritten they must fit twice into the model's {engine.info.context}: select less")
    prompt = await session.in_worker(partial(_prompt, engine, document, start, selected, instruction, engine.info.context - 2 * tokens - _MARGIN))
    async with answer(session, prompt, tokens + max(tokens, _MARGIN) // 2) as stream:
        async for piece in stream:
            report({"delta": piece})
    if stream.stats.finish_reason == "length":
        raise EngineError("the model did not come to an end; nothing was changed. Select less, or say more precisely what to do")
    if session.documents.get(document.uri) is not document:
        raise EngineError("the document was changed while the model wrote; nothing was changed. Ask again")
    blocks = code_blocks(answer_of(stream.text))
    if not blocks:
        raise EngineError("the model answered without code; nothing was changed")
    edits = changed_lines(document, start, end, fitted(blocks[0][1], selected), session.documents.encoding)
    versioned = types.OptionalVersionedTextDocumentIdentifier(uri=document.uri, version=document.version)
    return types.WorkspaceEdit(document_changes=[types.TextDocumentEdit(text_document=versioned, edits=edits)])


def _prompt(engine: Any, document: Document, start: int, selected: str, instruction: str, room: int) -> ChatPrompt:
    before = document.text[max(start - _AROUND, 0):start]
    before = before[before.find("\n") + 1:] if start > _AROUND else before
    shown = f"What stands before it:\n{fenced(before, document.language)}\n\n" if before.strip() else ""
    if shown and engine.count_tokens(shown) > room:
        shown = ""
    request = f"{shown}Rewrite this code:\n{fenced(selected, document.language)}\n\n{instruction}"
    return ChatPrompt((Message("system", _SYSTEM), Message("user", request)), {"enable_thinking": False})


def fitted(code: str, selected: str) -> str:
    """The model's code with the selection's line ends, and its indentation where the model left it away."""
    lines = code.split("\n")
    if lines[-1] == "":
        lines.pop()
    first = next((line for line in selected.split("\n") if line.strip()), "")
    wanted, has = (line[:len(line) - len(line.lstrip())] for line in (first, next((line for line in lines if line.strip()), "")))
    if len(has) < len(wanted):
        missing = wanted[len(has):] if wanted.startswith(has) else wanted
        lines = [missing + line if line.strip() else line for line in lines]
    end = "\r\n" if "\r\n" in selected else "\n"
    return end.join(lines) + (end if selected.endswith("\n") else "")


def changed_lines(document: Document, start: int, end: int, text: str, encoding: Encoding) -> list[types.TextEdit]:
    """The smallest set of whole lines to replace, so that document.text[start:end] becomes text."""
    old, new = document.text[start:end].splitlines(keepends=True), text.splitlines(keepends=True)
    offsets = [start]
    for line in old:
        offsets.append(offsets[-1] + len(line))
    edits = []
    for tag, i, j, k, l in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():   # noqa: E741
        if tag != "equal":
            first, last = (types.Position(*document.position(offset, encoding)) for offset in (offsets[i], offsets[j]))
            edits.append(types.TextEdit(range=types.Range(start=first, end=last), new_text="".join(new[k:l])))
    return edits
