"""What lives as long as the connection: settings, documents, the engine and how it is loaded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from inference_pio.engine import EngineError, FimPrompt
from inference_pio.lsp_server.context import Context
from inference_pio.lsp_server.documents import Document, Documents
from inference_pio.lsp_server.generation import Cursor, Generation
from inference_pio.lsp_server.privacy import Privacy
from inference_pio.lsp_server.prompt import PromptBuilder
from inference_pio.lsp_server.settings import Settings
from inference_pio.lsp_server.suggestions import Suggestions

if TYPE_CHECKING:
    from inference_pio.engine import Engine, LoadProgress

_log = logging.getLogger(__name__)
OpenEngine = Callable[..., "Engine"]


def open_engine(*args: Any, **options: Any) -> Engine:
    """Imported late: the engine's libraries would double the time to the first answer."""
    from inference_pio.engine import Engine

    return Engine.open(*args, **options)


@dataclass
class LastRequest:
    """What became of the last completion request of a document: the answer to "why was nothing shown?"."""

    uri: str
    version: int
    reason: str                      # shown, or why not
    source: str = "none"             # model, type-through, adopted
    rule: str | None = None          # the trimming rule that left nothing
    prompt: FimPrompt | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    first_token_ms: float | None = None     # both since the request came in; None: no token was generated
    total_ms: float | None = None
    began: float = field(default_factory=perf_counter, repr=False)

    def elapsed_ms(self) -> float:
        return 1e3 * (perf_counter() - self.began)


class Session:
    """Used on the event loop only; the engine's own methods do their work elsewhere."""

    def __init__(self, settings: Settings, open_engine: OpenEngine = open_engine, reuse: bool = True):
        self.settings = settings
        self.documents = Documents()
        self.suggestions = Suggestions()
        self.prompts = PromptBuilder()
        self.privacy = Privacy()
        self.context = Context(self.privacy)
        self.engine: Engine | None = None
        self.error: str | None = None
        self.progress: LoadProgress | None = None
        self.last: LastRequest | None = None
        self.latest: dict[str, int] = {}                 # uri -> number of its newest request
        self.asked: dict[str, Document] = {}             # uri -> the document as it was when the newest request came
        self.generations: dict[str, Generation] = {}     # uri -> what is being written for it
        self.prefetched: dict[str, Generation] = {}      # uri -> what follows the suggestion on the screen, should it be accepted
        self.prefetches = self.prefetch_hits = 0         # begun, and of those, wanted in the end
        self.workers = ThreadPoolExecutor(4, thread_name_prefix="pio-worker")
        self._open, self._reuse = open_engine, reuse
        self._loading: asyncio.Task | None = None
        self.loaded = asyncio.Event()

    async def in_worker(self, function: Callable, *arguments: Any) -> Any:
        """Run what may take milliseconds off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, function, *arguments)

    # ---- the model -------------------------------------------------------------------------------------------------------

    def load(self, on_progress: Callable[[LoadProgress], None]) -> asyncio.Task:
        """Load the model of the settings in the background, after one that is being loaded. on_progress runs on the event loop."""
        previous = self._loading
        self._loading = asyncio.get_running_loop().create_task(self._load(previous, on_progress))
        return self._loading

    async def _load(self, previous: asyncio.Task | None, on_progress: Callable[[LoadProgress], None]) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        loop, s = asyncio.get_running_loop(), self.settings
        self.loaded.clear()
        self.error = None
        self._stop_all()
        engine, self.engine = self.engine, None
        if engine is not None:
            await self.in_worker(engine.close)

        def report(progress: LoadProgress) -> None:
            loop.call_soon_threadsafe(self._report, progress, on_progress)

        try:
            self.engine = await self.in_worker(lambda: self._open(
                s.model, device=s.device, weights=s.weights, cache=s.cache, experts=s.experts, memory=s.memory or None,
                context=s.context or None, checkpoints=s.checkpoint_memory or None, host_checkpoints=s.host_checkpoint_memory or None,
                threads=s.threads, reuse=self._reuse, progress=report))
        except EngineError as error:
            self.error = str(error)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            _log.exception("loading %s failed", s.model)
        self.loaded.set()

    def _report(self, progress: LoadProgress, on_progress: Callable[[LoadProgress], None]) -> None:
        self.progress = progress
        on_progress(progress)

    def close(self) -> None:
        self._stop_all()
        if self.engine is not None:
            self.engine.close()
        self.workers.shutdown(wait=False, cancel_futures=True)

    # ---- what runs for a document ----------------------------------------------------------------------------------------

    def supersede(self, cursor: Cursor) -> int:
        """A newer request: the document's older one is answered with nothing. Gives the new request's number. What would follow a
        suggestion in another document is wanted no more: whoever asks here does not look there."""
        uri = cursor.document.uri
        for other in [u for u in self.prefetched if u != uri]:
            self.stop_prefetch(other)
        self.asked[uri] = cursor.document
        self.latest[uri] = self.latest.get(uri, 0) + 1
        return self.latest[uri]

    def keep(self, now: Cursor) -> Generation | None:
        """What is being written for the document, if it agrees with the document as it is now; anything else stops within a step."""
        uri = now.document.uri
        generation, ahead = self.generations.get(uri), self.prefetched.get(uri)
        if generation is not None and generation.agrees(now):
            return generation
        self.stop(uri)
        if ahead is not None and ahead.agrees(now):   # the suggestion was accepted
            self.generations[uri] = self.prefetched.pop(uri)
            return ahead
        if ahead is not None and now.typed_since(ahead.cursor) is None:
            self.stop_prefetch(uri)
        return None

    def stop(self, uri: str) -> None:
        _stop(self.generations, uri)

    def stop_prefetch(self, uri: str) -> None:
        _stop(self.prefetched, uri)

    def is_latest(self, uri: str, number: int) -> bool:
        return self.latest.get(uri) == number

    def forget(self, uri: str) -> None:
        """The document was closed."""
        self.latest[uri] = self.latest.get(uri, 0) + 1
        self.asked.pop(uri, None)
        self.stop(uri)
        self.stop_prefetch(uri)
        self.suggestions.forget(uri)
        self.prompts.forget(uri)
        self.context.forget(uri)
        self.documents.close(uri)

    def _stop_all(self) -> None:
        for running in (self.generations, self.prefetched):
            for uri in list(running):
                _stop(running, uri)


def _stop(running: dict[str, Generation], uri: str) -> None:
    generation = running.pop(uri, None)
    if generation is not None:
        generation.stop()
