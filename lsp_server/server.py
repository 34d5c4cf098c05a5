"""The table of what the server answers, and its life from initialize to exit."""

from __future__ import annotations

import asyncio
import os
from functools import wraps
from inspect import isgeneratorfunction
from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.lsp.server import LanguageServer

from inference_pio.engine import EngineError
from inference_pio.lsp_server.features.chat import chat
from inference_pio.lsp_server.features.code_action import ASK, REWRITE, actions
from inference_pio.lsp_server.features.edit import edit
from inference_pio.lsp_server.features.inline_completion import begin_ahead, complete, prefetch
from inference_pio.lsp_server.features.status import explain, loading, models, status
from inference_pio.lsp_server.generation import Cursor
from inference_pio.lsp_server.protocol import Protocol, claim_stdout
from inference_pio.lsp_server.session import OpenEngine, Session, open_engine
from inference_pio.lsp_server.settings import Settings

_AHEAD_PAUSE = 0.005   # seconds after a change: a request that comes with it comes first


class Server(LanguageServer):
    """pio-lsp. `session` holds everything that is not protocol. alone: the process is this server's, and ends with it."""

    def __init__(self, settings: Settings, version: str, open_engine: OpenEngine = open_engine, reuse: bool = True, alone: bool = True):
        super().__init__("pio-lsp", version, protocol_cls=Protocol, text_document_sync_kind=types.TextDocumentSyncKind.Incremental)
        self.session = Session(settings, open_engine, reuse)
        self.protocol.alone = alone
        self._tasks: set[asyncio.Task] = set()
        self._ahead: asyncio.TimerHandle | None = None
        self._progress_token: str | None = None
        for method, handler, options in (
            (types.INITIALIZE, self.on_initialize, None),
            (types.INITIALIZED, self.on_initialized, None),
            (types.SHUTDOWN, self.on_shutdown, None),
            (types.TEXT_DOCUMENT_DID_OPEN, self.on_open, None),
            (types.TEXT_DOCUMENT_DID_CHANGE, self.on_change, None),
            (types.TEXT_DOCUMENT_DID_CLOSE, self.on_close, None),
            (types.WORKSPACE_DID_CHANGE_CONFIGURATION, self.on_configuration, None),
            # Without options pygls would not advertise it, and no editor would ask.
            (types.TEXT_DOCUMENT_INLINE_COMPLETION, self.on_inline_completion, types.InlineCompletionOptions()),
            ("pio/status", lambda params: status(self.session), None),
            ("pio/models", self.on_models, None),
            ("pio/chat", self.on_chat, None),
            ("pio/edit", self.on_edit, None),
            (types.TEXT_DOCUMENT_CODE_ACTION, actions, types.CodeActionOptions(code_action_kinds=[
                types.CodeActionKind.Empty, types.CodeActionKind.QuickFix, types.CodeActionKind.RefactorRewrite])),
            ("pio/measure", self.on_measure, None),
            ("pio/explain", lambda params: explain(self.session), None),
            # What Copilot's clients send; accepting is seen as a change, and nothing is logged.
            ("textDocument/didShowCompletion", lambda params: None, None),
            ("textDocument/didPartiallyAcceptCompletion", lambda params: None, None),
            ("textDocument/didFocus", lambda params: None, None),
            ("$/unreadable", lambda params: None, None),
        ):
            self.feature(method, options)(_plain(handler)) if options else self.feature(method)(_plain(handler))
        self.command("pio.explain")(_plain(lambda *_: explain(self.session)))
        self.command("pio.restart")(_plain(lambda *_: self.load()))
        self.command(ASK)(_plain(self.on_ask))
        self.command(REWRITE)(_plain(self.on_rewrite))

    # ---- life ------------------------------------------------------------------------------------------------------------

    def on_initialize(self, params: types.InitializeParams) -> None:
        self._configure(params.initialization_options)
        if not (params.capabilities.text_document and params.capabilities.text_document.inline_completion):
            options = types.CompletionOptions([".", "(", " "])   # a menu would hide ghost text
            self.feature(types.TEXT_DOCUMENT_COMPLETION, options)(_plain(self.on_completion))
        if params.process_id and self.protocol.alone:
            self._start(self._watch(params.process_id))

    def on_initialized(self, params: types.InitializedParams) -> None:
        encoding = self.server_capabilities.position_encoding
        self.session.documents.encoding = getattr(encoding, "value", encoding) or "utf-16"
        self.load()

    def on_shutdown(self, params: Any) -> None:
        self._end()

    def hang_up(self) -> None:
        """The client has gone, and others may be there."""
        self._end()
        self.shutdown()

    def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.session.close()

    async def _watch(self, process: int) -> None:
        """Leave with the editor, even if it dies without a word."""
        while True:
            await asyncio.sleep(5)
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                os._exit(1)
            except PermissionError:
                pass   # it lives, under another user

    def _start(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- the model and the settings --------------------------------------------------------------------------------------

    def load(self) -> None:
        self._start(self._load())

    async def _load(self) -> None:
        capabilities = self.client_capabilities.window
        token = None
        if capabilities is not None and capabilities.work_done_progress:
            token = f"pio-load-{os.urandom(4).hex()}"
            await self.work_done_progress.create_async(token)
            self.work_done_progress.begin(token, types.WorkDoneProgressBegin(title=f"Loading {self.session.settings.model}", percentage=0))
        shown = ("", -1)

        def on_progress(progress: Any) -> None:
            nonlocal shown
            percent = int(20 * progress.done / progress.total) * 5 if progress.total else 0
            if token and (progress.stage, percent) != shown:
                shown = progress.stage, percent
                self.work_done_progress.report(token, types.WorkDoneProgressReport(message=loading(progress.stage, progress.detail), percentage=percent))

        await self.session.load(on_progress)
        error = self.session.error
        if token:
            self.work_done_progress.end(token, types.WorkDoneProgressEnd(message=error or f"{self.session.settings.model} is ready"))
        if error:
            self.window_show_message(types.ShowMessageParams(type=types.MessageType.Error, message=f"pio: {error}"))
        self.protocol.notify("pio/didChangeStatus", status(self.session))

    def on_configuration(self, params: types.DidChangeConfigurationParams) -> None:
        value = params.settings
        before = self.session.settings
        self._configure(value.get("pio", value) if isinstance(value, dict) else getattr(value, "pio", value))
        if not self.session.settings.loads_alike(before):
            self.load()

    def _configure(self, value: Any) -> None:
        settings, messages = Settings.from_client(_plain_value(value), self.session.settings)
        self.session.settings = settings
        for message in messages:
            self.window_show_message(types.ShowMessageParams(type=types.MessageType.Warning, message=f"pio: {message}; it is ignored"))

    # ---- documents -------------------------------------------------------------------------------------------------------

    def on_open(self, params: types.DidOpenTextDocumentParams) -> None:
        document = params.text_document
        self.session.documents.open(document.uri, document.language_id, document.version, document.text)

    def on_change(self, params: types.DidChangeTextDocumentParams) -> None:
        changes = [(None if (r := getattr(change, "range", None)) is None else (r.start.line, r.start.character, r.end.line, r.end.character),
                    change.text) for change in params.content_changes]
        changed = self.session.documents.change(params.text_document.uri, params.text_document.version, changes)
        if changed is None:
            return
        cursor = Cursor(*changed)
        if self._ahead is not None:
            self._ahead.cancel()
        if (generation := self.session.keep(cursor)) is not None:
            generation.owner = None   # its request is about to be cancelled, and the next one will want it
        self._ahead = asyncio.get_running_loop().call_later(_AHEAD_PAUSE, self._begin_ahead, cursor)

    def _begin_ahead(self, cursor: Cursor) -> None:
        document = cursor.document
        # A request that is being answered computes the same prompt.
        if self.session.documents.get(document.uri) is document and document.uri not in self.session.generations:
            self._start(begin_ahead(self.session, cursor))

    def on_close(self, params: types.DidCloseTextDocumentParams) -> None:
        self.session.forget(params.text_document.uri)

    # ---- completions -----------------------------------------------------------------------------------------------------

    def _cursor(self, params: Any) -> Cursor | None:
        document = self.session.documents.get(params.text_document.uri)
        if document is None:
            return None
        return Cursor(document, document.offset(params.position.line, params.position.character, self.session.documents.encoding))

    def on_inline_completion(self, params: types.InlineCompletionParams):
        # A generator begins at once, so that it sees the document as it is now and not after changes that are in the same packet.
        cursor = self._cursor(params)
        explicit = params.context.trigger_kind == types.InlineCompletionTriggerKind.Invoked
        return (yield self._inline_completion, (cursor, params.position, explicit), None)

    async def _inline_completion(self, cursor: Cursor | None, position: types.Position, explicit: bool) -> types.InlineCompletionList:
        text = await complete(self.session, cursor, explicit) if cursor else ""
        if text:
            self._start(prefetch(self.session, cursor, text))
        here = types.Range(start=position, end=position)   # without one, editors disagree about what is replaced
        return types.InlineCompletionList(items=[types.InlineCompletionItem(insert_text=text, range=here)] if text else [])

    def on_completion(self, params: types.CompletionParams):
        return (yield self._completion, (self._cursor(params), params.position), None)

    async def _completion(self, cursor: Cursor | None, position: types.Position) -> types.CompletionList:
        """The same suggestion as an item of the completion menu, for editors without ghost text."""
        text = await complete(self.session, cursor) if cursor else ""
        if not text:
            return types.CompletionList(is_incomplete=True, items=[])
        word = cursor.place.before[len(cursor.place.before.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")):]
        edit = types.TextEdit(range=types.Range(start=position, end=position), new_text=text)
        first = (word + text).split("\n", 1)[0]
        return types.CompletionList(is_incomplete=True, items=[types.CompletionItem(
            label=first + (" …" if "\n" in text else ""), kind=types.CompletionItemKind.Snippet, detail="pio", filter_text=word + text,
            sort_text="0", text_edit=edit, documentation=text)])

    def on_models(self, params: Any):
        return (yield self.session.in_worker, (models,), None)

    def on_measure(self, params: Any):
        return (yield self._measure, (), None)

    async def _measure(self) -> dict[str, float]:
        """`pio/measure`: bytes per second that the device reads, now. For --bench."""
        engine = self.session.engine
        return {"readBandwidth": await self.session.in_worker(engine.read_bandwidth) if engine else 0.0}

    # ---- chat and edits --------------------------------------------------------------------------------------------------

    def on_chat(self, params: Any):
        return (yield self._talk, (chat, params), None)

    def on_edit(self, params: Any):
        return (yield self._talk, (edit, params), None)

    async def _talk(self, feature: Any, params: Any) -> Any:
        """A feature that reports what it writes through the request's progress token, if it has one."""
        params = _plain_value(params)
        params = params if isinstance(params, dict) else {}
        token = params.get("partialResultToken")

        def report(value: dict[str, Any]) -> None:
            if token is not None:
                self.protocol.notify(types.PROGRESS, types.ProgressParams(token=token, value=value))

        try:
            return await feature(self.session, params, report)
        except EngineError as error:
            raise JsonRpcException(str(error), code=types.LSPErrorCodes.RequestFailed) from None

    def on_ask(self, *arguments: Any) -> None:
        self._start(self._carry_out(chat, arguments))

    def on_rewrite(self, *arguments: Any) -> None:
        self._start(self._carry_out(edit, arguments))

    async def _carry_out(self, feature: Any, arguments: tuple) -> None:
        """A code action's command, for editors that do not carry it out themselves."""
        try:
            result = await self._talk(feature, arguments[0] if arguments else {})
        except JsonRpcException as error:
            self.window_show_message(types.ShowMessageParams(type=types.MessageType.Error, message=f"pio: {error}"))
            return
        if isinstance(result, types.WorkspaceEdit):
            await self.workspace_apply_edit_async(types.ApplyWorkspaceEditParams(edit=result, label="pio"))
        else:
            self.window_show_message(types.ShowMessageParams(type=types.MessageType.Info, message=result["text"]))

    def serve_stdio(self) -> None:
        self.start_io(stdout=claim_stdout())
        os._exit(0)   # nobody is there any more, and a model that is still being loaded or fetched would hold the process


def _plain(function: Any) -> Any:
    """pygls names handlers by attributes that bound methods cannot carry."""
    if isgeneratorfunction(function):
        @wraps(function)
        def generator(*arguments: Any):
            return (yield from function(*arguments))
        return generator

    @wraps(function)
    def plain(*arguments: Any) -> Any:
        return function(*arguments)
    return plain


def _plain_value(value: Any) -> Any:
    """pygls gives unknown JSON objects as attribute objects; back to dicts."""
    if isinstance(value, dict):
        return {key: _plain_value(entry) for key, entry in value.items()}
    if hasattr(value, "_asdict"):
        return {key: _plain_value(entry) for key, entry in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [_plain_value(entry) for entry in value]
    return value
