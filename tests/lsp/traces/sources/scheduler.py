"""A job scheduler for one process: priorities, delays, retries and deadlines, without threads of its own."""

from __future__ import annotations

import heapq
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from store import JobStore, StoreError

log = logging.getLogger(__name__)


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(order=True)
class Entry:
    """What the heap sorts: earliest first, then the most important, then the oldest."""

    due: float
    priority: int
    number: int
    job: "Job" = field(compare=False)


@dataclass
class Job:
    name: str
    action: Callable[[], object]
    priority: int = 10
    retries: int = 3
    backoff: float = 0.5
    deadline: float | None = None
    attempts: int = 0
    state: State = State.WAITING
    result: object = None
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        return self.state in (State.DONE, State.FAILED, State.CANCELLED)

    def delay(self) -> float:
        """Seconds until the next attempt: doubles each time, with jitter so that jobs do not return together."""
        base = self.backoff * 2 ** (self.attempts - 1)
        return base * random.uniform(0.75, 1.25)


class Scheduler:
    """Runs jobs when they are due. Call `run_pending` from your loop, or `run_until_idle` in a script."""

    def __init__(self, store: JobStore | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._heap: list[Entry] = []
        self._numbers = itertools.count()
        self._clock = clock
        self._store = store
        self._jobs: dict[str, Job] = {}

    def submit(self, job: Job, after: float = 0.0) -> Job:
        """Queues `job` to run `after` seconds from now. A name that is waiting already is an error."""
        known = self._jobs.get(job.name)
        if known is not None and not known.finished:
            raise ValueError(f"a job named {job.name!r} is {known.state.value}")
        self._jobs[job.name] = job
        self._push(job, self._clock() + after)
        if self._store is not None:
            self._store.save(job.name, job.state.value)
        return job

    def cancel(self, name: str) -> bool:
        """Marks a waiting job as cancelled; the heap drops it when it comes up. False if there is nothing to cancel."""
        job = self._jobs.get(name)
        if job is None or job.state is not State.WAITING:
            return False
        job.state = State.CANCELLED
        return True

    def due(self) -> Iterator[Job]:
        """Jobs whose time has come, most urgent first."""
        now = self._clock()
        while self._heap and self._heap[0].due <= now:
            entry = heapq.heappop(self._heap)
            if entry.job.state is State.WAITING:
                yield entry.job

    def run_pending(self) -> int:
        """Runs everything that is due and returns how many jobs were run."""
        count = 0
        for job in self.due():
            self._run(job)
            count += 1
        return count

    def run_until_idle(self, poll: float = 0.05) -> None:
        while self._heap:
            if not self.run_pending():
                pause = self._heap[0].due - self._clock()
                time.sleep(max(0.0, min(poll, pause)))

    def _run(self, job: Job) -> None:
        job.state = State.RUNNING
        job.attempts += 1
        started = self._clock()
        try:
            job.result = job.action()
        except Exception as error:
            self._failed(job, error)
        else:
            job.state = State.DONE
            log.info("%s finished in %.3f s", job.name, self._clock() - started)

    def _failed(self, job: Job, error: Exception) -> None:
        job.error = error
        if job.attempts > job.retries:
            job.state = State.FAILED
            log.error("%s failed after %d attempts: %s", job.name, job.attempts, error)
            return
        job.state = State.WAITING
        self._push(job, self._clock() + job.delay())

    def _push(self, job: Job, due: float) -> None:
        heapq.heappush(self._heap, Entry(due, job.priority, next(self._numbers), job))

    # -- reading ------------------------------------------------------------------------------------

    def waiting(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.state is State.WAITING]

