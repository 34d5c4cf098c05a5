"""The step thread: it owns every tensor. Other threads hand it sequences and functions; it answers through streams and futures."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from inference_pio.engine.errors import DeviceError, EngineError
from inference_pio.engine.sequence import Sequence
from inference_pio.engine.stepper import Stepper
from inference_pio.native.backend import Backend, DeviceFailed

Result = TypeVar("Result")


class StepThread:
    """Runs a stepper's steps while there are any, and sleeps else. Its methods may be called from any thread."""

    def __init__(self, stepper: Stepper, backend: Backend):
        self._stepper, self._backend, self._sequences = stepper, backend, stepper.sequences
        self._arrivals: deque[Sequence | tuple[Callable[[], Any], Future]] = deque()
        self._condition = threading.Condition()
        self._closing = False
        self._failed: DeviceError | None = None
        self._thread = threading.Thread(target=self._run, name="pio-engine", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        self._arrive(sequence)

    def call(self, function: Callable[[], Result]) -> Result:
        """Run function between two steps and give its result."""
        future: Future = Future()
        self._arrive((function, future))
        return future.result()

    def wake(self) -> None:
        """A stream was closed."""
        with self._condition:
            self._condition.notify()

    def close(self) -> None:
        """End all requests, stop the thread and close the backend. May be called more than once."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    def _arrive(self, item: Sequence | tuple[Callable[[], Any], Future]) -> None:
        with self._condition:
            if self._failed:
                raise DeviceError(str(self._failed))
            if self._closing:
                raise EngineError("the engine is closed")
            self._arrivals.append(item)
            self._condition.notify()

    # ---- on the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            # Between two tokens nothing is locked: whoever arrives now is seen one step later.
            while (self._sequences and not self._arrivals and not self._closing) or self._receive():
                try:
                    self._stepper.step()
                except DeviceFailed as error:
                    self._fail(DeviceError(f"{self._backend.device} failed: {error}. Load the model again, or use --device cpu"))
        finally:
            self._stepper.end_all()
            self._stepper.clear_cache()
            self._backend.close()

    def _receive(self) -> bool:
        """Take in what has arrived; sleep while there is nothing to do. False when the engine closes."""
        while True:
            with self._condition:
                while not self._arrivals and not self._sequences and not self._closing:
                    self._condition.wait()
                arrivals = list(self._arrivals)
                self._arrivals.clear()
                closing = self._closing
            if closing:
                _refuse(arrivals, "closed", EngineError("the engine is closed"))
                return False
            for item in arrivals:
                if isinstance(item, Sequence):
                    self._stepper.add(item)
                else:
                    _answer(*item)
            if self._sequences:
                return True

    def _fail(self, error: DeviceError) -> None:
        """The device is lost: every request ends with the error, and so does every later one."""
        with self._condition:
            self._failed = error
            arrivals = list(self._arrivals)
            self._arrivals.clear()
        self._stepper.end_all(error)
        _refuse(arrivals, "error", error)


def _answer(function: Callable[[], Any], future: Future) -> None:
    try:
        future.set_result(function())
    except BaseException as error:   # belongs to the caller, whatever it is
        future.set_exception(error)


def _refuse(arrivals: list[Sequence | tuple[Callable[[], Any], Future]], reason: str, error: EngineError) -> None:
    for item in arrivals:
        if isinstance(item, Sequence):
            item.stream.end(reason, error=error if reason == "error" else None)
        else:
            item[1].set_exception(error)
