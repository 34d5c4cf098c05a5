"""Where jobs are remembered between runs: one JSON line for each change, replayed when the file is opened."""

from __future__ import annotations

import json
import os
from pathlib import Path


class StoreError(Exception):
    """The file could not be read or written; the message names it."""


class JobStore:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._states: dict[str, str] = {}
        self._replay()

    def _replay(self) -> None:
        try:
            with open(self.path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        record = json.loads(line)
                        self._states[record["name"]] = record["state"]
                    except (ValueError, KeyError, TypeError) as error:
                        raise StoreError(f"{self.path}, line {number}: {error}") from error
        except FileNotFoundError:
            pass

    def save(self, name: str, state: str) -> None:
        """Appends one record and waits until it is on disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "state": state}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._states[name] = state

    def state(self, name: str) -> str | None:
        return self._states.get(name)

    def names(self, state: str) -> list[str]:
        return [name for name, known in self._states.items() if known == state]

    def compact(self) -> None:
        """Rewrites the file with one line for each job."""
        temporary = self.path.with_suffix(".new")
        with open(temporary, "w", encoding="utf-8") as file:
            for name, state in sorted(self._states.items()):
                file.write(json.dumps({"name": name, "state": state}) + "\n")
        os.replace(temporary, self.path)
